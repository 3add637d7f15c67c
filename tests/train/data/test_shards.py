"""Shards: found, fetched, indexed, and read where they break off."""

import gzip
import io
import tarfile

import pytest
from samples import write_tar

from gentron_train.data import shards as shards_module
from gentron_train.data.broken import BrokenSample
from gentron_train.data.shards import check_any_sample, count, digest, find_shards, index, read


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
    remote = find_shards(pattern, tmp_path / "cache", allow_pipes=True)
    local = find_shards(f"file:{shards}/{{images-0,clips-0}}.tar")
    assert [shard.name for shard in remote] == [shard.name for shard in local]
    for one, other in zip(remote, local, strict=True):
        assert count(one) == count(other)
        assert read(one, 3) == read(other, 3)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert [shard.name for shard in find_shards(f"{shards}/*-0.tar")] == ["clips-0", "images-0"]
    with pytest.raises(ValueError, match="cannot read the shard pipe:false"):
        count(find_shards("pipe:false", tmp_path / "cache", allow_pipes=True)[0])
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"a"))
    with pytest.raises(ValueError, match="is compressed"):
        count(find_shards(str(tmp_path / "a.tar"))[0])


def test_a_shard_is_fetched_three_times_before_its_samples_are_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0))
    tried, path = tmp_path / "tried", write_tar(tmp_path / "a.tar", [{"txt": b"one"}])
    command = f"pipe:echo >> {tried}; test $(wc -l < {tried}) -ge 3 && cat {path}"
    shard = find_shards(command, tmp_path / "cache", allow_pipes=True)[0]
    assert count(shard) == (1, None) and tried.read_text().count("\n") == 3
    tried.unlink()
    path.unlink()
    shard.path.unlink()  # as it goes to make room
    with pytest.raises(BrokenSample) as broken:
        read(shard, 0)
    assert broken.value.cause == "unreadable shard" and "cannot read" in broken.value.detail
    local = find_shards(str(write_tar(tmp_path / "b.tar", [{"txt": b"one"}])))[0]
    count(local)
    local.path.unlink()
    with pytest.raises(BrokenSample, match="unreadable shard"):
        read(local, 0)
    assert tried.read_text().count("\n") == 3


@pytest.mark.parametrize("name", ["_read_headers", "_keep"])
def test_a_copy_that_goes_while_it_is_counted_is_made_again(tmp_path, monkeypatch, name):
    path = write_tar(tmp_path / "a.tar", [{"txt": b"one"}, {"txt": b"two"}])
    shard = find_shards(f"pipe:cat {path}", tmp_path / "cache", allow_pipes=True)[0]
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
    cache = tmp_path / "cache", room, True
    shards = [find_shards(f"{command}{n}.tar", *cache)[0] for n in names]

    def fetches(contents):
        for shard, content in contents:
            assert read(shard, 0)[1] == {"txt": content.encode()}
            assert shard.path.exists()
            shards_module._open_files.pop(shard.path, None)  # as in a process that opens it anew
        return fetched.read_text().count("\n")

    a, b, c = zip(shards, names, strict=True)
    (tmp_path / "cache").mkdir()
    own = write_tar(tmp_path / "cache" / f"{'0' * 16}.tar", [{"txt": b"the user's own"}])
    count(find_shards(str(own))[0])
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
    old = digest(shard)
    assert digest(shard) == old
    write_tar(path, [{"txt": b"one"}, {"txt": b"TWO"}])
    assert digest(shard) != old


def tar_of(path, names: list[str]):
    with tarfile.open(path, "w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    return find_shards(str(path))[0]


def test_files_that_are_apart_in_a_tar_are_told(tmp_path):
    shard = tar_of(tmp_path / "a.tar", ["0.jpg", "1.jpg", "0.txt", "1.txt", "2.jpg", "2.txt"])
    assert count(shard) == (3, None)
    for number in range(2):
        with pytest.raises(BrokenSample) as error:
            read(shard, number)
        assert "tar --sort=name" in error.value.cause
        assert error.value.detail == f"jpg, txt of {number}"
    assert read(shard, 2)[1] == {"jpg": b"2.jpg", "txt": b"2.txt"}
    # A tar that holds a sample twice holds two.
    assert count(tar_of(tmp_path / "b.tar", ["0.jpg", "0.txt", "1.jpg", "0.jpg", "0.txt"])) == (
        3,
        None,
    )


@pytest.mark.parametrize("content", [b"", bytes(10240)], ids=["nothing", "empty"])
def test_shards_without_a_sample_are_told(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"no samples in .*a\.tar"):
        check_any_sample(find_shards(str(tmp_path / "a.tar")))


@pytest.mark.parametrize("name", ["[ab]", "{c,d}", "12:30", "e::f", "?*"])
def test_a_folder_that_is_there_is_no_pattern_and_no_protocol(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    paths = [write_tar(folder / f"x[{n}]:{n}.tar", [{"txt": b"one"}]) for n in "12"]
    if "::" not in name:
        assert [shard.path for shard in find_shards(f"{folder}/x*.tar")] == paths
        assert [shard.path for shard in find_shards(f"{folder}/x[[]{{1,2}}*.tar")] == paths
        assert [shard.path for shard in find_shards("::".join(map(str, paths)))] == paths
    monkeypatch.chdir(tmp_path)
    (shard,) = find_shards(f"{name}/{paths[0].name}")
    assert (shard.name, count(shard)) == ("x[1]:1", (1, None))


def test_a_header_with_a_number_too_large_is_where_a_shard_breaks_off(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"txt": b"one"}, {"txt": b"two"}])
    content = bytearray(path.read_bytes())
    header = bytearray(content[1024:1536])
    header[124:136] = b"\x80" + b"\x7f" * 11  # its size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    path.write_bytes(content)
    assert count(find_shards(str(path))[0])[0] == 1


def test_a_command_runs_only_where_it_is_asked_for(tmp_path):
    for url in (f"pipe:touch {tmp_path}/ran", f"PIPE:touch {tmp_path}/ran"):
        with pytest.raises(ValueError, match="runs a command in a shell: --allow-pipes"):
            find_shards(url, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"count": 1e999}', b"[" * 10**5])
def test_a_damaged_index_or_digest_is_made_anew(tmp_path, content):
    (shard,) = find_shards(str(write_tar(tmp_path / "a.tar", [{"txt": b"one"}])))
    wanted = count(shard), index(shard), digest(shard)
    kept = tmp_path / ".a.tar.index"
    head = kept.read_bytes().partition(b"\n")[0]
    for damaged in (content, head + b"\n" + content):
        kept.write_bytes(damaged)
        (tmp_path / ".a.tar.digest").write_bytes(content)
        index.cache_clear()
        assert (count(shard), index(shard), digest(shard)) == wanted


def test_an_index_of_an_earlier_version_is_made_anew(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"txt": b"one"}])
    (shard,) = find_shards(str(path))
    count(shard)
    kept = tmp_path / ".a.tar.index"
    kept.write_text(kept.read_text().replace('"format": 2', '"format": 1').replace("0000", "0009"))
    index.cache_clear()
    assert index(shard).samples[0][0] == "a-0000"
