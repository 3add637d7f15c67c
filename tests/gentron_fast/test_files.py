"""Files and folders that are there whole or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest
from faults import FAULTS, holder_of

from gentron_fast import files
from gentron_fast.files import (
    check_output_folder,
    claim,
    lock_folder,
    read_json,
    whole_file,
    whole_folder,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as partial:
        assert partial.suffix == ".txt" and not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole" and names(path.parent) == ["a.txt"]
    with pytest.raises(KeyError), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "whole" and names(path.parent) == ["a.txt"]


def test_two_writers_have_two_names_and_the_dead_ones_are_removed(tmp_path):
    path = tmp_path / "a[1].txt"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = files.partial_path(path)
    left = own.with_name(own.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    left.write_text("of a process that was killed")
    of_others = tmp_path / ".a[1].elsewhere.1.0.part.txt"
    of_others.write_text("of another host")
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert path.read_text() == "1" and names(tmp_path) == [of_others.name, path.name]


def test_a_folder_is_exchanged_whole(tmp_path):
    folder = tmp_path / "out"
    link = tmp_path / "link"
    for content in ("old", "new"):
        link.symlink_to(folder)
        with whole_folder(link, ("a",)) as partial:
            assert folder.exists() == (content == "new")
            (partial / "a").write_text(content)
        link.unlink()  # it was followed, not replaced
    assert (folder / "a").read_text() == "new" and names(tmp_path) == ["out"]
    with pytest.raises(OSError), whole_folder(folder, ("a",)) as partial:
        (partial / "a").write_text("half")
        raise OSError
    assert (folder / "a").read_text() == "new" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_exchange_in_steps_that_is_killed_is_recovered(tmp_path, renames):
    """Where there is no renameat2: after each rename the old folder or the new one comes back."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from gentron_fast import files\n"
        "files.ctypes.CDLL = lambda *args, **kwargs: object()\n"
        "def write(content):\n"
        "    with files.whole_folder(Path(sys.argv[1]), ('a',)) as partial:\n"
        "        (partial / 'a').write_text(content)\n"
        "write('old')\n"
        "replace, done = os.replace, []\n"
        "def replace_or_die(old, new):\n"
        "    if Path(old).is_dir():\n"
        "        if len(done) == int(sys.argv[2]): os._exit(9)\n"
        "        done.append(new)\n"
        "    replace(old, new)\n"
        "os.replace = replace_or_die\n"
        "write('new')\n"
    )
    folder = tmp_path / "out"
    command = [sys.executable, "-c", code, str(folder), str(renames)]
    assert subprocess.run(command).returncode == 9
    with pytest.raises(KeyError), whole_folder(folder, ("a",)):
        assert (folder / "a").read_text() == ("new" if renames == 2 else "old")
        raise KeyError
    assert names(tmp_path) == ["out"] and names(folder) == [files.MARK, "a"]


@pytest.mark.parametrize("exchange", ["renameat2", "none"])
def test_without_the_systems_exchange_too(tmp_path, monkeypatch, exchange):
    if exchange == "none":
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files._exchange(tmp_path / "one", tmp_path / "other")
    assert names(tmp_path) == ["one", "other"]
    assert (tmp_path / "one/other").exists() and (tmp_path / "other/one").exists()


def test_what_is_not_ours_is_refused_and_stays(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    check_output_folder(folder)  # empty
    (folder / "thesis.tex").write_text("years of work")
    (folder / "config.json").write_text("{}")
    entered = False
    refused = pytest.raises(ValueError, match=r"wanted a new folder, it holds thesis\.tex")
    with refused, whole_folder(folder, ("config.json",)):
        entered = True
    assert not entered and names(folder) == ["config.json", "thesis.tex"]
    downloaded = tmp_path / "vae"
    downloaded.mkdir()
    (downloaded / "config.json").touch()
    with pytest.raises(ValueError, match=r"config\.json: choose another, or move it"):
        check_output_folder(downloaded, ("config.json",))
    for mark in ("", "[]", '{"files": 5}', '{"files": [[]]}'):
        (downloaded / files.MARK).write_text(mark)
        with pytest.raises(ValueError, match="choose another"):
            check_output_folder(downloaded, ("config.json",))
    with whole_folder(tmp_path / "out", ("vae",)) as partial:
        (partial / "vae").mkdir()
        (partial / "vae/config.json").touch()
    check_output_folder(tmp_path / "out", ("vae",))
    with pytest.raises(ValueError, match="holds vae: choose"):  # ours, of another command
        check_output_folder(tmp_path / "out", ("clip",))
    (tmp_path / "out/vae/notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds vae/notes\.txt"):
        check_output_folder(tmp_path / "out", ("vae",))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="wanted a new folder"):
        check_output_folder(tmp_path / "file")
    with pytest.raises(ValueError), whole_folder(tmp_path / "new/deep/out"):
        raise ValueError
    assert not (tmp_path / "new").exists()


def test_what_comes_while_a_folder_is_written_stays(tmp_path):
    with whole_folder(tmp_path / "out", ["a"]) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(ValueError, match="mine"), whole_folder(tmp_path / "out", ["a"]) as partial:
        (partial / "a").write_text("new")
        (tmp_path / "out" / "mine").write_text("mine")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_names_that_only_look_like_ours_are_left(tmp_path):
    path = tmp_path / "clip.mp4"
    host = files.partial_path(path).name.split(".")[2]
    alike = tmp_path / f".clip.{host}.999999.notes.partly"
    alike.write_text("mine")
    files.partial_path(path)
    assert alike.exists()


@pytest.mark.faults
def test_killed_at_any_moment_a_whole_folder_is_there(tmp_path, tally):
    folder = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path\n"
        "from gentron_fast.files import whole_folder\n"
        "while True:\n"
        "    with whole_folder(Path(sys.argv[1]), ('a', 'b')) as partial:\n"
        "        for name in 'ab': (partial / name).write_text('x' * 1000)\n"
    )
    for trial in range(6 * FAULTS):
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
        while not folder.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05 + 0.013 * (trial % 20))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert names(folder) == [files.MARK, "a", "b"]
        assert {len((folder / name).read_text()) for name in "ab"} == {1000}
        tally("recovered")
    with whole_folder(folder, ("a", "b")) as partial:
        (partial / "a").touch()
    assert names(tmp_path) == ["out"]  # what the killed ones left is gone


def test_a_folder_has_one_process_until_that_ends(tmp_path):
    """Even where a fork of it, as a loader's worker, lives on."""
    folder = tmp_path / "run"
    with holder_of(folder) as holder:
        with pytest.raises(ValueError, match=f"{folder} is in use by process {holder.pid} on "):
            lock_folder(folder)
        holder.kill()
        holder.wait()
        lock_folder(folder)
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} ")


@pytest.mark.parametrize(
    "content, words",
    [("[" * 100_000, "is not JSON"), ("[1]", "must hold a JSON object, it holds a list")],
    ids=["deep", "list"],
)
def test_json_that_is_no_object(tmp_path, content, words):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_json(path)
    path.write_text("\ufeff{}", encoding="utf-8")
    assert read_json(path) == {}
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1} and names(tmp_path) == ["a.json"]


def test_a_claim_is_one_process_s_until_it_gives_it_back_or_dies(tmp_path):
    path = tmp_path / "new" / "a.tar"
    give_back = claim(path)
    assert claim(path) is None
    give_back()
    assert names(path.parent) == []
    code = f"""
import sys, time
from pathlib import Path
from gentron_fast.files import claim
claim(Path({str(path)!r}))
print("claimed", flush=True)
time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    other.stdout.readline()
    assert claim(path) is None
    other.kill()
    claim(path, wait=True)()
    other.communicate()
    assert names(path.parent) == []


def test_a_name_as_long_as_any_is_written(tmp_path):
    path = tmp_path / ("a" * 251 + ".txt")
    write_json(path, {})
    with pytest.raises(KeyError), whole_file(path):
        raise KeyError
    assert names(tmp_path) == [path.name]


def test_a_section_is_replaced_and_the_rest_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<b>\nold\n<e>\nafter\n")
    for _ in range(2):
        files.replace_section(page, "<b>", "<e>", "new")
        assert page.read_text() == "before\n<b>\n\nnew\n<e>\nafter\n"
    for text in ("no markers", "<e> before <b>"):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"page.md must hold the lines '<b>' and '<e>'"):
            files.replace_section(page, "<b>", "<e>", "new")
        assert page.read_text() == text
