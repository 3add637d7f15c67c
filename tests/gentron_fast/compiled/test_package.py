"""The file of a compiled sampler: what it holds, and every refusal of one."""

import hashlib
import io
import json
import re
import shutil
import zipfile

import pytest
import torch
from compiled_files import (
    PREFIX,
    PROMPT,
    read_package,
    run_program,
    write_changed,
    write_package,
)
from faults import FAULTS
from hostile_files import mutations

from gentron_fast.compiled import CompiledSampler
from gentron_fast.compiled import package as package_module
from gentron_fast.compiled.package import MAGIC, part_digests


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_a_part_is_known_by_its_configuration_and_weights(tiny_t2i_folder, tmp_path, part):
    shutil.copytree(tiny_t2i_folder, folder := tmp_path / "pipeline")
    before = part_digests(tiny_t2i_folder, [part])
    assert part_digests(folder, [part]) == before
    for path in (folder / part / "config.json", *(folder / part).glob("*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert part_digests(folder, [part]) != before
        path.write_bytes(content)
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"no {part} in {folder}"):
        part_digests(folder, [part])


def test_the_weights_are_there_once(package, pipeline):
    header, body = read_package(package)
    sections = header["sections"]
    parts = pipeline.transformer, pipeline.text_encoder, pipeline.vae.autoencoder.decoder
    least = sum(4 * p.numel() for part in parts for p in part.parameters())
    assert least <= sections["weights.safetensors"]["size"] <= 1.15 * least
    for name, entry in sections.items():
        if name.startswith("graphs/"):  # code and its sources, with no weights of a block in them
            content = body[entry["offset"] :][: entry["size"]]
            for member in zipfile.ZipFile(io.BytesIO(content)).infolist():
                assert member.file_size < 4 << 20, (name, member.filename)
                assert "weight" not in member.filename or member.file_size < 4096


def corrupted(data, where):
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: b"", "too short"),
        (lambda data: b"no sampler" * 20, "no compiled sampler"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:100], "truncated"),
        (lambda data: data + b"\0", "longer"),
        (lambda data: corrupted(data, 7), "has format"),
        (lambda data: corrupted(data, 20), "checksum"),
        (lambda data: corrupted(data, PREFIX + 30), "checksum"),
        (lambda data: corrupted(data, len(data) // 2), "checksum"),
        (lambda data: corrupted(data, len(data) - 1), "weights.safetensors"),
    ],
    ids=[
        "empty",
        "other",
        "truncated",
        "header_alone",
        "longer",
        "format",
        "digest",
        "header",
        "code",
        "weights",
    ],
)
def test_a_damaged_file_is_refused(package, tmp_path, damage, words):
    path = tmp_path / "damaged.gentron"
    path.write_bytes(damage(package.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        CompiledSampler.load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    done = run_program(path, "--tokens", "clip=1", "--out", tmp_path / "out.npy")
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "out.npy").exists()
    assert done.stderr == f"gentron-sample: error: {refusal.value}\n"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"torch": "1.0"}, "made with torch 1.0"),
        ({"machine": "pdp11"}, "made for pdp11"),
        ({"cpu_flags": ["avx4096"]}, "a CPU with avx4096"),
        ({"device": "cuda"}, "made for cuda"),
    ],
    ids=["torch", "machine", "instructions", "device"],
)
def test_another_machine_is_refused(package, tmp_path, change, words):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    header, body = read_package(package)
    header["metadata"] |= change
    path = write_package(tmp_path / "other.gentron", header, body)
    with pytest.raises(ValueError, match=words):
        CompiledSampler.load(path)


def test_a_graphs_name_stays_in_its_folder(package, tmp_path):
    header, body = read_package(package)
    metadata, sections = header["metadata"], header["sections"]
    metadata["graphs"]["../outside"] = metadata["graphs"].pop("embed")
    sections["graphs/../outside"] = sections.pop("graphs/embed")
    path = write_package(tmp_path / "outside.gentron", header, body)
    with pytest.raises(ValueError, match=re.escape("no name for a graph: ../outside")):
        CompiledSampler.load(path)


@pytest.mark.parametrize("name", ["/outside", "../outside", "tokenizer/..", "other/outside"])
def test_a_name_of_a_tokenizers_file_stays_in_its_folder(sampler, name):
    other = CompiledSampler(sampler._runtime)
    other.metadata = sampler.metadata | {"tokenizers": [name]}
    with pytest.raises(ValueError, match=f"no tokenizer's file: '{name}'"):
        other(PROMPT)


def test_a_digest_pins_the_file(package, tmp_path):
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    CompiledSampler.load(package, sha256=digest.upper())
    header, body = read_package(package)
    header["metadata"]["lambda_t"] = 1.0
    forged = write_package(tmp_path / "forged.gentron", header, body)
    CompiledSampler.load(forged)  # its own checksums tell damage only
    with pytest.raises(ValueError, match=f"wanted {digest}"):
        CompiledSampler.load(forged, sha256=digest)
    arguments = [forged, "--tokens", "clip=1", "--out", tmp_path / "out.npy", "--sha256", digest]
    assert digest in run_program(*arguments).stderr


def test_a_file_of_another_format_is_refused(package, tmp_path):
    header, body = read_package(package)
    path = write_package(tmp_path / "older.gentron", header, body)
    path.write_bytes(MAGIC[:-1] + b"\x01" + path.read_bytes()[len(MAGIC) :])
    words = f"has format 1, this version reads {MAGIC[-1]}: export it again, python -m"
    with pytest.raises(ValueError, match=words):
        CompiledSampler.load(path)


HOSTILE = [
    *(
        ("branches", value, "branches must")
        for value in ([], ["1"], ["110", "011"], ["001"], "111")
    ),
    *(("latent_shape", v, "latent_shape must be") for v in ([0], [4, 8, 0, 8], [4, 8, 8], 4)),
    ("latent_shape", [4, 8, 2**14, 2**14], "latent_shape is too large"),
    ("latent_shape", [4, 8, 8, 16], r"graphs embed must take Float \[1-3, 4, 8, 8, 16\]"),
    *(("model.width", value, "width must be whole") for value in (2**60, 0, "192", 192.0, None)),
    ("model.width", 196, r"graphs modulation must take Float \[2-80, 196\]"),
    ("model.heads", 0, "heads must be whole numbers from 1 to 192"),
    ("model.depth", 2**40, "depth must be whole numbers from 1 to 4096"),
    ("model.depth", 7, "lacks the tensor blocks.6."),
    *(("model.encoders", value, "encoders must") for value in ([], ["clip", "clip"], ["bert"], 1)),
    ("model", [], "model must be an object"),
    ("max_tokens", {"clip": 77}, "max_tokens lacks t5"),
    ("max_tokens", {"clip": 78, "t5": 256}, r"graphs encode must take Long \[1-3, 2-78\]"),
    ("max_batch", 4, "modulation_chunks must be 4 numbers, it has 3"),
    ("modulation_chunks", [1, 1, 0], "modulation_chunks must be whole numbers from 1"),
    *(("timesteps", value, "timesteps must") for value in ([], [1.5], [-1])),
    ("rows", [[0.0] * 6], "rows must be 20 rows of 6 numbers"),
    ("rows", [[0.0] * 5 + ["0"]] * 20, "rows must be 20 rows of 6 numbers"),
    ("guidance_coefficients", [[1, 0, 0]], "guidance_coefficients must be 3 rows of 3 numbers"),
    ("lambda_t", None, "lambda_t must be a number"),
    ("rescale", 1.5, "rescale must be 0 to 1"),
    ("log_variance", 5, "log_variance must be an array"),
    ("dtype", "int64", "dtype must be one of floating point"),
    ("device", "meta", "device must be cpu or cuda, it is meta"),
    ("whole", 1, "whole must be true or false"),
    ("tokenizers", {}, "tokenizers must be an array"),
    ("parts", {"vae": 1}, "parts must be digests"),
    ("parts", {"../vae": "0"}, "parts must be digests"),
    ("graphs", {}, "graphs lacks condition"),
    ("graphs.embed.inputs", [], r"graphs embed must take Float"),
    ("graphs.embed.weights", [{"name": "x", "dtype": "float32", "shape": [-1]}], "sides of 1 or"),
    ("torch", "2\n13", r"made with torch 2\?13"),
]


@pytest.mark.parametrize("field, value, words", HOSTILE, ids=lambda v: str(v)[:24])
def test_hostile_metadata_is_refused(package, tmp_path, field, value, words):
    """Though every checksum is right; before any graph is loaded."""
    header, body = read_package(package)
    place, *names = header["metadata"], *field.split(".")
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    if "tensor" not in words:
        header["sections"], body = {}, b""
    path = write_package(tmp_path / "hostile.gentron", header, body)
    with pytest.raises(ValueError, match=words) as refusal:
        CompiledSampler.load(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1100


def test_every_field_of_the_metadata_is_asked_for(package, tmp_path):
    """Nothing that a file lacks is a KeyError, from C++ or from Python."""
    header, _ = read_package(package)
    for name in header["metadata"]:
        lacking = {key: value for key, value in header["metadata"].items() if key != name}
        header_of_one = {"metadata": lacking, "sections": {}}
        path = write_package(tmp_path / "lacking.gentron", header_of_one, b"")
        with pytest.raises(ValueError, match=f"the compiled sampler's metadata lacks {name}"):
            CompiledSampler.load(path)


@pytest.mark.parametrize(
    "change",
    [lambda t: t.reshape(96, 384), lambda t: t[:-1], lambda t: t.double(), lambda t: t[None]],
    ids=["shape", "size", "dtype", "rank"],
)
def test_weights_of_another_shape_than_the_graphs_are_refused(package, tmp_path, change):
    name = "blocks.1.cross_attention.q.weight"
    path = write_changed(tmp_path / "other.gentron", package, name, change)
    with pytest.raises(
        ValueError, match=rf"graph \S+ takes Float \[.*\] of {re.escape(name)}, not "
    ):
        CompiledSampler.load(path)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"1]}", "too many values"),
        (b'{"a": 1, "a": 2}', "names a twice"),
        (b'{"a": "\xff"}', "ASCII"),
        (b'{"a": "\\ud800"}', "no JSON at byte"),
        (b'{"a": 01}', "no JSON at byte"),
        (b'{"a": 1e999}', "no JSON at byte"),
        (b'{"a": NaN}', "no JSON at byte"),
        (b'{"a": "\n"}', "no JSON at byte"),
        (b'{"a": "\\x"}', "no JSON at byte"),
        (b"[]", "no object"),
        (b"{}", "lacks sections"),
        (b'{"sections": {"a": []}, "metadata": {}}', "no object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_is_one_json_object_of_bounded_depth_and_size(tmp_path, text, words):
    path = tmp_path / "hostile.gentron"
    digest = hashlib.sha256(text).digest()
    path.write_bytes(MAGIC + len(text).to_bytes(8, "little") + digest + text)
    with pytest.raises(ValueError, match=words) as refusal:
        CompiledSampler.load(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text, words",
    [
        (b'{"a": ' + b"[" * 1_000_000, "nested too deeply"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"1]}", "too many values"),
        (b" " * (1 << 24) + b"{}", "header is too large"),
    ],
    ids=["depth", "values", "size"],
)
def test_a_safetensors_header_is_bounded(tmp_path, text, words):
    path = tmp_path / "text.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    done = run_program("nowhere", "--embeddings", path, "--out", tmp_path / "out.npy")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"data_offsets": [2**63 - 512, -(2**63)]}, "does not lie in its file"),
        ({"data_offsets": [2, 514]}, "is not aligned"),
        ({"shape": [1, 0, 128], "data_offsets": [0, 0]}, "has a side of 0"),
        ({"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, "has a side of 0"),
        ({"shape": [2**32, 2**32, 128]}, "is too large"),
        ({"shape": [2**64, 1, 128]}, "no whole number"),
        ({"dtype": "BOOL", "shape": [1, 512]}, "holds bytes that are no bool"),
        ({"dtype": "F8"}, "unknown dtype F8"),
    ],
    ids=["wrapped", "misaligned", "empty", "no_elements", "large", "huge", "bool", "dtype"],
)
def test_a_safetensors_file_is_not_trusted(tmp_path, entry, words):
    entry = {"dtype": "F32", "shape": [1, 1, 128], "data_offsets": [0, 512]} | entry
    header = json.dumps({"clip.tokens": entry}).encode()
    path = tmp_path / "text.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(256)) * 4)
    done = run_program("nowhere", "--embeddings", path, "--out", tmp_path / "out.npy")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{path} is no safetensors file: " in done.stderr and words in done.stderr


def test_an_empty_section_may_share_a_place(package, tmp_path):
    header, body = read_package(package)
    empty = {"offset": 0, "size": 0, "sha256": hashlib.sha256().hexdigest()}
    header["sections"] |= {"an empty one": empty, "zero": empty}
    header["metadata"]["torch"] = "1.0"  # refused behind the sections
    path = write_package(tmp_path / "empty.gentron", header, body)
    with pytest.raises(ValueError, match=r"made with torch 1\.0"):
        CompiledSampler.load(path)


@pytest.mark.parametrize(
    "line, flags",
    [
        ("flags\t\t: fpu sse2 smep avx512f", ["avx512f", "sse2"]),
        ("Features\t: fp asimd sve bf16 crc32", ["asimd", "bf16", "sve"]),
        ("", []),
    ],
    ids=["x86", "Arm", "none"],
)
def test_instruction_sets_are_read(line, flags):
    assert package_module._cpu_flags(f"processor\t: 0\n{line}\nbugs\t: none\n") == flags


def test_what_is_loaded_is_there_once(sampler):
    """The bytes of graphs and weights are let go of, those of the tokenizers are not."""
    assert sampler._runtime.section("tokenizer/tokenizer.json")
    for name in ("weights.safetensors", "graphs/embed"):
        with pytest.raises(ValueError, match=f"no section {name}"):
            sampler._runtime.section(name)


@pytest.mark.faults
def test_hostile_files_are_refused_in_one_line(tmp_path, tally):
    """A few of those that `make fuzz` gives to the runtime under sanitizers."""
    path, refused = tmp_path / "hostile.gentron", 0
    for kind, data in mutations(300 * FAULTS, seed=1):
        if kind == "p":
            path.write_bytes(data)
            with pytest.raises(ValueError) as refusal:
                CompiledSampler.load(path)
            assert "\n" not in str(refusal.value)
            tally("refused")
            refused += 1
    assert refused > 200 * FAULTS
