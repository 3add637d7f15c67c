"""The page of a study in a real Chromium, driven by selenium. Skipped where there is none."""

import pytest
from studies import clips, served, small_study

pytest.importorskip("bottle")
pytest.importorskip("selenium")

from browser import NEEDED, PHONE, Browser
from selenium.webdriver.common.keys import Keys

pytestmark = NEEDED
SIDES = {"left": Keys.ARROW_LEFT, "equal": Keys.ARROW_DOWN, "right": Keys.ARROW_RIGHT}


class Rater(Browser):
    """One person at one browser."""

    def begin(self, address, name):
        self.driver.get(address)
        self.wait(lambda: self.one("#rater").is_displayed())
        self.one("#rater").send_keys(name, Keys.ENTER)
        self.ready(0)

    def ready(self, done, of=4):
        """Wait until the page shows so many judged pairs, and takes the next answer."""
        self.wait(lambda: self.one("#count").text == f"{done} of {of}")
        if done < of:
            self.wait(
                lambda: self.button("quality", "left").get_attribute("aria-disabled") == "false"
            )

    def button(self, question, answer):
        return self.one(f"[data-question={question}] [data-answer={answer}]")

    def press(self, *keys):
        for key in keys:
            self.one("body").send_keys(SIDES.get(key, key))

    def answers(self):
        pressed = self.all("button[aria-pressed=true]")
        return [button.get_attribute("data-answer") for button in pressed]

    def prompt(self):
        return self.one("#prompt").text


@pytest.fixture(scope="module")
def make_rater(tmp_path_factory):
    raters = []

    def make():
        raters.append(Rater(tmp_path_factory.mktemp("profile")))
        return raters[-1]

    yield make
    for rater in raters:
        rater.driver.quit()


@pytest.fixture(scope="module")
def ada(make_rater):
    return make_rater()


@pytest.fixture
def study(tmp_path):
    return small_study(tmp_path)


@pytest.fixture
def address(study):
    with served(study.folder) as (_, address):
        yield address


def said(study, rater):
    """What a rater's votes say, by prompt, in the order of the votes."""
    prompts = {pair.id: pair.prompt for pair in study.pairs}
    return [(prompts[v.pair], v.quality, v.text) for v in study.votes().standing(rater)]


def test_votes_by_mouse_and_by_key(ada, address, study):
    ada.begin(address, "Ada")
    first = ada.prompt()
    ada.button("quality", "right").click()
    assert ada.answers() == ["right"]
    ada.button("quality", "left").click()  # changed, before the second answer
    ada.button("text", "equal").click()
    ada.ready(1)
    second = ada.prompt()
    ada.press("equal", "right")
    ada.ready(2)
    ada.press("1", "3")
    ada.ready(3)
    ada.button("quality", "left").send_keys(Keys.ENTER)  # reached by Tab
    ada.button("text", "right").send_keys(Keys.SPACE)
    ada.wait(lambda: ada.one("#end").is_displayed())
    votes = said(study, "Ada")
    assert votes[:2] == [(first, "left", "equal"), (second, "equal", "right")]
    assert [vote[1:] for vote in votes[2:]] == [("left", "right")] * 2
    assert len({prompt for prompt, *_ in votes}) == 4


def test_undo(ada, address, study):
    ada.begin(address, "Ada")
    assert ada.one("#undo").get_attribute("disabled")
    first = ada.prompt()
    ada.press("left", "u")
    assert ada.answers() == []
    ada.press("left", "left")
    ada.ready(1)
    assert ada.prompt() != first
    ada.one("#undo").click()
    ada.ready(0)
    assert ada.prompt() == first and said(study, "Ada") == []
    for done in range(4):
        ada.press("right", "equal")
        ada.ready(done + 1)
    last = said(study, "Ada")[-1][0]
    ada.press(Keys.BACKSPACE)  # from the end too
    ada.ready(3)
    assert ada.prompt() == last and len(said(study, "Ada")) == 3


def test_reload_in_the_middle(ada, address, study):
    ada.begin(address, "Ada")
    ada.press("left", "left")
    ada.ready(1)
    second = ada.prompt()
    ada.press("right")
    ada.driver.refresh()
    ada.ready(1)
    assert ada.prompt() == second and ada.answers() == []
    ada.press("u")  # what was voted before the reload
    ada.ready(0)
    assert said(study, "Ada") == []


def test_two_raters_at_once(ada, make_rater, address, study):
    bo = make_rater()
    ada.begin(address, "Ada")
    bo.begin(address, "Bo")
    for done in range(4):
        ada.press("left")
        bo.press("right", "equal")
        bo.ready(done + 1)
        ada.press("left")
        ada.ready(done + 1)
    assert [vote[1:] for vote in said(study, "Ada")] == [("left", "left")] * 4
    assert [vote[1:] for vote in said(study, "Bo")] == [("right", "equal")] * 4


def test_a_phone(ada, address, study):
    ada.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        ada.begin(address, "Ada")
        page = ada.one("html")
        assert int(page.get_property("scrollWidth")) == 375
        assert int(page.get_property("scrollHeight")) <= 667  # nothing to scroll
        boxes = [ada.one(f"#{side} img").rect for side in ("left", "right")]
        assert boxes[0]["y"] == boxes[1]["y"] and min(box["width"] for box in boxes) > 170
        for button in ada.all("[data-answer]"):
            assert button.rect["height"] >= 44 and button.rect["width"] >= 44
        ada.button("quality", "left").click()
        ada.button("text", "left").click()
        ada.ready(1)
    finally:
        ada.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_what_is_whose_is_hidden_and_nothing_comes_from_elsewhere(ada, address, study):
    ada.begin(address, "Ada")
    source = ada.driver.page_source
    assert not any(word in source for word in ("ours $_$", "theirs", "_000000"))
    asked = ada.asked()
    assert asked and all(name.startswith((address, "blob:")) for name in asked)
    shades = [
        ada.driver.execute_script(
            "const canvas = new OffscreenCanvas(1, 1).getContext('2d');"
            "canvas.drawImage(arguments[0], 0, 0); return canvas.getImageData(0, 0, 1, 1).data[0]",
            ada.one(f"#{side} img"),
        )
        for side in ("left", "right")
    ]
    pair = next(pair for pair in study.pairs if pair.prompt == ada.prompt())
    assert shades == [[60, 200], [200, 60]][pair.left]  # A is the darker one
    assert not ada.faults()


def test_clips_loop_together(ada, tmp_path):
    study = small_study(tmp_path, clips, sizes=(6, 8))  # 0.75 and 1 second
    with served(study.folder) as (_, address):
        ada.begin(address, "Ada")
        seen = ada.driver.execute_async_script(
            """
            const done = arguments[0], seen = [], start = performance.now();
            const watch = () => {
              seen.push(clips.map(clip => [clip.currentTime, clip.ended]));
              if (performance.now() - start < 3500) requestAnimationFrame(watch);
              else done(seen);
            };
            watch();
            """
        )
        assert len(seen) > 30
        apart = [abs(one - other) for (one, ended), (other, also) in seen if not (ended or also)]
        assert max(apart) < 0.25 and sorted(apart)[len(apart) // 2] < 0.06
        assert (
            max(clip[k][0] for clip in seen for k in (0, 1)) > 0.9
        )  # the longer one is seen whole
        starts = [
            [index for index in range(1, len(seen)) if seen[index][k][0] < seen[index - 1][k][0]]
            for k in (0, 1)
        ]
        # Both start anew at once, the shorter one after it has waited.
        assert len(starts[0]) >= 2 and all(
            abs(one - other) <= 3 for one, other in zip(*starts, strict=False)
        )
        ada.press("left", "right")
        ada.ready(1)


def test_a_server_that_goes_away_and_comes_back(ada, study):
    with served(study.folder) as (_, address):
        ada.begin(address, "Ada")
    ada.press("left", "right")
    ada.wait(lambda: "not saved yet" in ada.one("#trouble").text)
    port = address.rstrip("/").rpartition(":")[2]
    with served(study.folder, "--port", port):
        ada.ready(1)
        assert not ada.one("#trouble").is_displayed()
    assert [vote[1:] for vote in said(study, "Ada")] == [("left", "right")]


def test_the_token_comes_with_the_address(ada, study):
    with served(study.folder, "--host", "0.0.0.0") as (_, address):
        address = address.replace("0.0.0.0", "127.0.0.1")
        ada.driver.get(address.partition("#")[0])
        ada.one("#rater").send_keys("Ada", Keys.ENTER)
        ada.wait(lambda: "with the token" in ada.one("#trouble").text)
        ada.driver.get("about:blank")
        ada.begin(address, "Ada")
        ada.press("left", "right")
        ada.ready(1)
