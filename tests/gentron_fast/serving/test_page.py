"""The server's page in a real Chromium, above a stand-in of the scheduler."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("selenium")

from browser import NEEDED, PHONE, Browser
from serving import MODEL, StandIn, make_service, served

pytestmark = NEEDED
KEY = "a-key-for-tests"
SEED = 2**64 - 1  # more than a number of JavaScript holds


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def scheduler():
    return StandIn(is_quick=False)


@pytest.fixture
def address(scheduler, tmp_path):
    with served(make_service(tmp_path, scheduler)) as address:
        yield address


def opened(browser, address):
    browser.driver.get(address)
    browser.wait(lambda: browser.one("#model").text == "tiny")


def write(browser, **fields):
    for name, text in fields.items():
        browser.one(f"#{name}").clear()
        browser.one(f"#{name}").send_keys(text)


def press_make(browser):
    browser.wait(browser.one("#make").is_enabled)  # what was asked for before is taken
    browser.one("#make").click()


def ask(browser, scheduler, **fields):
    """Ask for a clip; its job."""
    before = len(scheduler.jobs)
    write(browser, **fields)
    press_make(browser)
    browser.wait(lambda: len(scheduler.jobs) > before)
    return scheduler.jobs[-1]


def settings(browser):
    return browser.one("#settings").text.split("\n")


def test_a_clip_from_prompt_to_copied_settings(browser, scheduler, address):
    opened(browser, address)
    numbers = {"lambda_t-number": "4.25", "steps-number": "8", "frames-number": "6"}
    words = 'an <b>orange</b> "seed": 3 circle'
    job = ask(browser, scheduler, prompt=words, seed=str(SEED), size="48x64", **numbers)
    request = job.request
    assert (request.prompt, request.seed, request.lambda_t) == (words, SEED, 4.25)
    assert (request.steps, request.frames, request.width, request.height) == (8, 6, 48, 64)
    browser.wait(lambda: browser.one("#state").text == "Waiting for its turn")
    for step in (2, 6):
        scheduler.advance(job, step)
        browser.wait(lambda: browser.one("#state").text == f"Step {step} of 8")  # noqa: B023
        assert float(browser.one("progress").get_property("value")) == 100 * step // 8
    scheduler.end(job)
    video = browser.wait(lambda: browser.all("#stage video"))[0]
    browser.wait(lambda: video.get_property("videoWidth") == 48)
    browser.wait(lambda: video.get_property("currentTime") > 0.2)  # it plays
    assert video.get_property("loop") and video.get_property("duration") == pytest.approx(1.5)
    assert browser.one("#words").text == words
    assert browser.one("#remarks").text == "the model has never seen: orange"
    told = settings(browser)
    assert told[told.index("Seed") + 1] == str(SEED) and told[told.index("Steps") + 1] == "8"
    browser.driver.execute_script(
        "navigator.clipboard.writeText = async text => { window.copied = text; }"
    )
    browser.one("#copy").click()
    browser.wait(lambda: browser.one("#copy").text == "Copied")
    copied = json.loads(browser.driver.execute_script("return window.copied"))
    assert copied == {
        **{"prompt": words, "seed": SEED, "steps": 8, "solver": "dpm++"},
        **{"lambda_t": 4.25, "lambda_m": 1.2, "rescale": 0, "frames": 6, "size": "48x64"},
        "negative_prompt": None,
    }
    # Used again after other values were typed, it asks for the same.
    write(browser, prompt="other", seed="1", **{"lambda_t-number": "9"})
    browser.one("#again").click()
    press_make(browser)
    browser.wait(lambda: len(scheduler.jobs) == 2)
    assert scheduler.jobs[1].request == replace(request, negative_prompt=None)
    asked = browser.asked()
    assert asked and all(name.startswith((address, "blob:")) for name in asked)
    assert not browser.faults()


def test_the_last_ones_cancelling_and_deleting(browser, scheduler, address):
    opened(browser, address)
    for number in range(2):
        scheduler.end(ask(browser, scheduler, prompt=f"number {number}", seed=str(number)))
    browser.wait(lambda: len(browser.all("#stage video")) == 1)
    browser.driver.refresh()
    browser.wait(lambda: len(browser.all("#clips button")) == 2)
    first, second = browser.all("#clips button")
    assert [button.text for button in (first, second)] == ["number 1", "number 0"]
    for button in (first, second):
        picture = button.find_element("css selector", ".picture")
        browser.wait(lambda: "blob:" in picture.value_of_css_property("background-image"))  # noqa: B023
    second.click()
    browser.wait(lambda: browser.one("#words").text == "number 0")
    browser.one("#remove").click()
    browser.wait(lambda: len(browser.all("#clips button")) == 1)
    job = ask(browser, scheduler, prompt="cancelled")
    scheduler.advance(job, 1)
    browser.wait(lambda: browser.one("#remove").text == "Cancel")
    browser.one("#remove").click()
    browser.wait(lambda: job.state == "cancelled" and len(browser.all("#clips button")) == 1)
    job = ask(browser, scheduler, prompt="broken")
    scheduler.end(job, ValueError("the latents are not finite"))
    browser.wait(lambda: browser.one("#state").text == "Failed: the latents are not finite")


def test_what_is_refused_is_told(browser, scheduler, address):
    opened(browser, address)
    write(browser, prompt="a circle", **{"steps-number": "21"})
    press_make(browser)
    browser.wait(lambda: "steps is 21, wanted a whole" in browser.one("#trouble").text)
    write(browser, **{"steps-number": "20"})
    for _ in range(4):
        ask(browser, scheduler)
    assert not browser.one("#trouble").is_displayed()
    press_make(browser)
    browser.wait(lambda: "the queue is full" in browser.one("#trouble").text)


def test_a_model_of_images_the_key_and_a_phone(browser, tmp_path):
    scheduler = StandIn()
    service = make_service(tmp_path, scheduler, model=replace(MODEL, makes_video=False, frames=1))
    with served(service, KEY) as address:
        browser.driver.get(address)
        browser.wait(lambda: "with the key" in browser.one("#trouble").text)
        browser.driver.get("about:blank")
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
        try:
            opened(browser, f"{address}#{KEY}")
            assert not browser.one("#frames").is_displayed()
            ask(browser, scheduler, prompt="a circle", seed=str(SEED))
            picture = browser.wait(lambda: browser.all("#stage img"))[0]
            browser.wait(lambda: picture.get_property("naturalWidth") == 48)
            assert settings(browser)[1] == str(SEED)
            assert not browser.one("#remarks").is_displayed()
            assert int(browser.one("html").get_property("scrollWidth")) == 375
        finally:
            browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
