"""Shards: found, fetched, indexed, and read where they break off."""

import gzip

import pytest
from samples import write_tar

from gentron_train.data import shards as shards_module
from gentron_train.data.broken import BrokenSample
from gentron_train.data.shards import count, find_shards, read


@pytest.mark.parametrize(
    "cut, samples", [(0, 3), (1, 3), (512, 3), (1024, 2), (1600, 2), (4000, 1)]
)
def test_shard_that_breaks_off(tmp_path, cut, samples):
    """3 samples of two files; each file takes 1024 bytes, the archive's end 512 or more."""
    path = write_tar(tmp_path / "a.tar", [{"jpg": b"x" * 300, "txt": b"y"}] * 3)
    content = path.read_bytes()[: 6 * 1024 + 512]
    path.write_bytes(content[: len(content) - cut])
    found, where = count(find_shards(str(path))[0])
    assert found == samples and bool(where) == (cut > 0)
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    assert count(find_shards(str(tmp_path / "b.tar"))[0])[0] == 0


def test_shards_by_any_url(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0))
    pattern = f"pipe:cat {shards}/{{images-0,clips-0}}.tar"
    remote = find_shards(pattern, tmp_path / "cache")
    local = find_shards(f"file:{shards}/{{images-0,clips-0}}.tar")
    assert [shard.name for shard in remote] == [shard.name for shard in local]
    for one, other in zip(remote, local, strict=True):
        assert count(one) == count(other)
        assert read(one, 3) == read(other, 3)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert [shard.name for shard in find_shards(f"{shards}/*-0.tar")] == ["clips-0", "images-0"]
    with pytest.raises(ValueError, match="cannot read the shard pipe:false"):
        count(find_shards("pipe:false", tmp_path / "cache")[0])
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"a"))
    with pytest.raises(ValueError, match="is compressed"):
        count(find_shards(str(tmp_path / "a.tar"))[0])


def test_a_shard_is_fetched_three_times_before_its_samples_are_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0))
    tried, path = tmp_path / "tried", write_tar(tmp_path / "a.tar", [{"txt": b"one"}])
    command = f"pipe:echo >> {tried}; test $(wc -l < {tried}) -ge 3 && cat {path}"
    shard = find_shards(command, tmp_path / "cache")[0]
    assert count(shard) == (1, None) and tried.read_text().count("\n") == 3
    tried.unlink()
    path.unlink()
    shard.path.unlink()  # as it goes to make room
    with pytest.raises(BrokenSample) as broken:
        read(shard, 0)
    assert broken.value.cause == "unreadable shard" and "cannot read" in broken.value.detail
    assert tried.read_text().count("\n") == 3


@pytest.mark.parametrize("name", ["_read_headers", "_keep"])
def test_a_copy_that_goes_while_it_is_counted_is_made_again(tmp_path, monkeypatch, name):
    path = write_tar(tmp_path / "a.tar", [{"txt": b"one"}, {"txt": b"two"}])
    shard = find_shards(f"pipe:cat {path}", tmp_path / "cache")[0]
    function, gone = getattr(shards_module, name), []

    def removed_once(*arguments):
        if not gone:
            gone.append(shard.path.unlink())
        return function(*arguments)

    monkeypatch.setattr(shards_module, name, removed_once)
    assert count(shard) == (2, None) and gone == [None]
    assert read(shard, 1)[1] == {"txt": b"two"}


def test_copies_of_shards_make_room_for_others(tmp_path):
    """Two of three copies fit; what was removed is counted without it, and copied again to read."""
    names, fetched = "abc", tmp_path / "fetched"
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [{"txt": name.encode()}])
    room = 2 * (tmp_path / "a.tar").stat().st_size
    command = f"pipe:echo >> {fetched}; cat {tmp_path}/"
    shards = [find_shards(f"{command}{n}.tar", tmp_path / "cache", room)[0] for n in names]

    def fetches(contents):
        for shard, content in contents:
            assert read(shard, 0)[1] == {"txt": content.encode()}
            assert shard.path.exists()
            shards_module._open_files.pop(shard.path, None)  # as in a process that opens it anew
        return fetched.read_text().count("\n")

    a, b, c = zip(shards, names, strict=True)
    (tmp_path / "cache").mkdir()
    own = write_tar(tmp_path / "cache" / "images-0.tar", [{"txt": b"the user's own"}])
    assert fetches([a, b, a]) == 2
    assert fetches([c]) == 3  # b was longest not opened
    assert [shard.path.exists() for shard in shards] == [True, False, True]
    assert [count(shard) for shard in shards] == [(1, None)] * 3
    assert fetches([a]) == 3 and fetches([b]) == 4
    assert own.exists()


def test_index_follows_the_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"txt": b"one"}])
    shard = find_shards(str(path))[0]
    assert count(shard) == (1, None)
    write_tar(path, [{"txt": b"one"}, {"txt": b"two"}])
    assert count(shard) == (2, None)
