"""make predictions: docs/predictions.md, what paper says of the Triton kernels on an H200.

python tests/kernels/predictions.py [--add | --check]    the page, of the installed Triton alone;
--add: beside what other Tritons compile; --check: exits 1 where its part is not the code's

Each kernel is compiled for sm_90 and its machine code read; the model below turns that into a share
of the time of a copy. Aims and predictions stood there before a GPU had run them.
"""

import argparse
import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import aot
import triton

from gentron_kernels import guided_step, layernorm_modulate, temporal_attention

PAGE = Path(__file__).parents[2] / "docs/predictions.md"
RESULTS = Path(__file__).parents[2] / "bench/results"
PRESETS = {"XL/2": 1152, "G/2": 1664}  # widths
BATCH, FRAMES, TOKENS, HEADS = 3, 8, 1024, 16  # a guided batch at 512², as bench/conftest.py has it

# An H200: datasheet and the CUDA C++ programming guide, but for the copy, which was measured on one
# (8.6 GB from device to device in 2.0 ms, read and written), and the three latencies, which are
# rounded from what others measured on Hopper under load.
MULTIPROCESSORS, CLOCK, COPY = 132, 1.98e9, 4.3e12
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 << 10, 64, 32  # of a multiprocessor
ISSUED = 4  # instructions of a cycle
BYTES = COPY / MULTIPROCESSORS / CLOCK  # of a multiprocessor's cycle
MEMORY, NEAR, STALL = 800, 270, 2.0  # cycles: DRAM, second-level cache, an instruction by itself
BARRIER, SHUFFLE, PRODUCTS, SMALL_PRODUCT = 40, 24, 60, 8  # cycles that a warp waits at each
LAUNCH = 3e-6  # seconds of a second launch that follows the first


class Kernel(NamedTuple):
    """A kernel at one size, and what a program of it does.

    case: as a compile_cases() yields it; nbytes: what all programs move; near: bytes a lane of the
    loads that the second-level cache answers, a flag's or an index's; tokens: of a program that
    loops over them, 1 without a loop; ahead: tokens fetched while one is computed; first_exit: only
    the instructions before the first EXIT run; launches: further ones.
    """

    title: str
    case: tuple
    programs: int
    nbytes: float
    aim: int | None = None
    near: int | None = None
    tokens: int = 1
    ahead: int = 0
    first_exit: bool = False
    launches: int = 0


class Code(NamedTuple):
    """What is read off the machine code; counts are of one warp and one pass."""

    registers: int
    shared: int
    warps: int
    once: Counter  # instructions outside the loop
    looped: Counter  # and within
    in_flight: int  # loads issued before the first instruction that reads one of them
    waits: float  # cycles that a warp stands still for its loads, where no loop fetches them ahead


def kernels(preset: str) -> Iterator[Kernel]:
    width = PRESETS[preset]
    tokens, item = BATCH * FRAMES * TOKENS, 2
    row = tokens * width * item
    for case in layernorm_modulate.compile_cases():
        name, kernel, _, constants, warps = case
        if name.split(" without")[0] != f"{preset} bf16":
            continue
        is_chain = "has_y" not in name and "d_residual" not in name
        title = "residual, LayerNorm, modulation" if is_chain else "LayerNorm, modulation"
        if kernel is layernorm_modulate._forward_kernel:
            programs, nbytes = tokens // constants["TOKENS"], (4 if is_chain else 2) * row
            yield Kernel(f"{title}: forward", case, programs, nbytes, aim=88, near=8)
        elif kernel is layernorm_modulate._backward_kernel:
            shape = {"CHUNK": constants["CHUNK"], "num_warps": warps}
            programs = layernorm_modulate._backward_programs(shape, width) * MULTIPROCESSORS
            yield Kernel(
                f"{title}: backward",
                case,
                programs,
                (6 if is_chain else 3) * row,
                aim=80,
                tokens=-(-tokens // programs),
                ahead=constants["STAGES"] - 1,
                launches=1,
            )
    for case in temporal_attention.compile_cases():
        name, kernel, _, constants, _ = case
        if not name.startswith(f"{preset} t = {FRAMES} bf16"):
            continue
        is_forward = kernel is temporal_attention._temporal_attention_fwd_kernel
        programs = BATCH * -(-TOKENS * HEADS // (constants["ROWS"] // FRAMES))
        flags = "" if "no flags" in name else ", with flags"
        title = f"temporal attention{flags}: {'forward' if is_forward else 'backward'}"
        tensors, aim = (4, 86) if is_forward else (7, 80)
        yield Kernel(title, case, programs, tensors * row, aim, near=1)
        if flags and is_forward:
            title = "temporal attention, every sample motion-free: forward"
            yield Kernel(title, case, programs, 2 * row, 90, near=1, first_exit=True)
    if preset == "G/2":  # latents alone set its shape
        elements = BATCH * 4 * FRAMES * TOKENS * 4
        case = next(guided_step.compile_cases())
        programs = elements // guided_step.BLOCK
        yield Kernel("guided step", case, programs, elements * (5 * 4 + 3 * 2), near=8)


def one_token_a_program(preset: str) -> Kernel:
    """The chain's forward otherwise: a token to eight warps."""
    name, kernel, signature, constants, _ = next(
        case for case in layernorm_modulate.compile_cases() if case[0] == f"{preset} bf16"
    )
    constants = constants | {"TOKENS": 1, "CHUNK": 2048}
    tokens = BATCH * FRAMES * TOKENS
    nbytes = 4 * tokens * PRESETS[preset] * 2
    case = name, kernel, signature, constants, 8
    return Kernel("a token to eight warps", case, tokens, nbytes, near=8)


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def read(kernel: Kernel) -> Code:
    _, function, signature, constants, warps = kernel.case
    compiled = aot.compiled(function, signature, constants, warps)
    used = aot.usage(compiled)
    found = INSTRUCTION.findall(aot.dump(compiled, "-sass"))
    code = [(int(address, 16), name, operands) for address, name, operands in found]
    names = [name for _, name, _ in code]
    if kernel.first_exit:
        code = code[: names.index("EXIT") + 1]
    places = {address: place for place, (address, *_) in enumerate(code)}
    first, last = 0, -1
    for place, (address, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name == "BRA" and target and int(target[1], 16) < address:
            first, last = places[int(target[1], 16)], place
    end = max(place for place, name in enumerate(names[: len(code)]) if name == "EXIT")
    looped = Counter(name for _, name, _ in code[first : last + 1])
    once = Counter(name for _, name, _ in [*code[:first], *code[last + 1 : end + 1]])
    waits = _waits(code, kernel.near)
    return Code(used["registers"], used["shared"], warps, once, looped, _in_flight(code), waits)


def _in_flight(code: list[tuple[int, str, str]]) -> int:
    """Loads of 8 or 16 bytes a lane before the first that is read."""
    written: set[int] = set()
    count = 0
    for _, name, operands in code:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        is_load = name.startswith("LDG") and name.endswith((".64", ".128"))
        if written & set(registers[1:] if is_load else registers):
            return count
        if is_load:
            written |= set(range(registers[0], registers[0] + (4 if name.endswith("128") else 2)))
            count += 1
    return count


def _waits(code: list[tuple[int, str, str]], near: int | None) -> float:
    """Cycles that a warp stands still for loads, its instructions run in their order: each waits
    for the registers that it names, until the load that writes them has come."""
    ready: dict[int, float] = {}
    now = waited = 0.0
    for _, name, operands in code:
        named = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        come = max((ready.get(register, 0.0) for register in named), default=0.0)
        waited += max(0.0, come - now)
        now = max(now, come) + STALL
        if name.startswith("LDG."):
            size = _bytes_a_lane(name)
            latency = NEAR if size == near else MEMORY
            for register in range(named[0], named[0] + -(-size // 4)):
                ready[register] = now + latency
    return waited


def resident(code: Code) -> int:
    """Programs that a multiprocessor holds at once."""
    registers = -(-code.registers // 8) * 8 * 32 * code.warps
    shared = SHARED // (code.shared + 1024)
    return min(REGISTERS // registers, shared, WARPS // code.warps, BLOCKS)


def predict(kernel: Kernel, code: Code) -> float:
    """The share of a copy's speed: a closed queue of the programs that a multiprocessor holds.

    A program is served by the memory, by the scheduler, and waits for what nobody else keeps busy.
    """
    counts = code.looped if kernel.tokens > 1 else code.once + code.looped
    meet = any(name.startswith("BAR") for name in counts)
    held = resident(code) * (1 if meet else code.warps)  # warps that never meet go by themselves
    passes = kernel.programs * kernel.tokens * (1 if meet else code.warps)
    memory = kernel.nbytes / passes / BYTES
    issue = sum(counts.values()) * (code.warps if meet else 1) / ISSUED

    def number(prefix: str) -> int:
        return sum(n for name, n in counts.items() if name.startswith(prefix))

    alone = sum(counts.values()) * STALL + number("BAR") * BARRIER
    alone += number("SHFL") * SHUFFLE + number("WARPGROUP.DEPBAR") * PRODUCTS
    alone += number("HMMA") * SMALL_PRODUCT
    alone += sum(n * int(name.split("x")[1]) / 2 for name, n in counts.items() if "HGMMA" in name)
    if kernel.ahead:  # fetched while others are computed: the wait for memory is beside the work
        rate = min(_queue(held * kernel.ahead, MEMORY, memory, issue), held / alone)
    else:
        rate = _queue(held, code.waits + alone, memory, issue)
    seconds = passes / MULTIPROCESSORS / rate / CLOCK + kernel.launches * LAUNCH
    if kernel.tokens == 1:  # the first and the last programs of a multiprocessor run by themselves
        seconds *= 1 + 0.5 * held * MULTIPROCESSORS / passes
    return kernel.nbytes / COPY / seconds


def _queue(customers: int, wait: float, *services: float) -> float:
    """Throughput by mean value analysis: customers who wait and then queue at each station."""
    lengths = [0.0] * len(services)
    rate = 0.0
    for count in range(1, customers + 1):
        times = [s * (1 + length) for s, length in zip(services, lengths, strict=True)]
        rate = count / (wait + sum(times))
        lengths = [rate * time for time in times]
    return rate


def widths(counts: Counter, prefix: str) -> str:
    """5 × 16 B + 2 × 8 B: the accesses whose name starts so, by bytes a lane."""
    found: Counter = Counter()
    for name, number in counts.items():
        if name.split(".")[0] == prefix:
            found[_bytes_a_lane(name)] += number
    return " + ".join(f"{n} × {size} B" for size, n in sorted(found.items(), reverse=True)) or "–"


def _bytes_a_lane(name: str) -> int:
    """Of an access, LDG.E.128 or STG.E.U8."""
    sizes = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((sizes[part] for part in name.split(".") if part in sizes), 4)


def row(preset: str, index: int) -> list[str]:
    kernel = list(kernels(preset))[index]
    code = read(kernel)
    counts = code.once + code.looped
    loads = widths(counts, "LDG")
    flight, waits = str(code.in_flight), f"{code.waits:.0f}"
    if kernel.ahead:
        loads = f"{widths(code.looped, 'LDGSTS')} a token, ahead"
        flight = f"{sum(n for k, n in code.looped.items() if 'LDGSTS' in k) * kernel.ahead}"
        waits = "–"
    held = resident(code)
    share = 100 * predict(kernel, code)
    aim = "–" if kernel.aim is None else f"{kernel.aim} {'✓' if share >= kernel.aim else '✗'}"
    stores = widths(code.looped if kernel.tokens > 1 else counts, "STG")
    length = sum((code.looped if kernel.tokens > 1 else counts).values())
    return [
        kernel.title,
        f"{kernel.nbytes / 1e6:.0f}",
        loads,
        flight,
        waits,
        stores,
        str(code.registers),
        f"{code.shared / 1024:.0f}",
        f"{held} × {code.warps}",
        str(length),
        f"{kernel.nbytes / COPY * 1e6:.0f}",
        f"**{share:.0f}**",
        aim,
    ]


def otherwise(preset: str) -> list[str]:
    kernel = one_token_a_program(preset)
    code = read(kernel)
    ours = next(kernels(preset))
    mine = read(ours)
    lines = []
    for title, k, c in (("a warp (ours)", ours, mine), ("eight warps", kernel, code)):
        tokens = BATCH * FRAMES * TOKENS / k.programs
        issued = sum((c.once + c.looped).values()) * c.warps / ISSUED / tokens
        memory = k.nbytes / (k.programs * tokens) / BYTES
        share = f"{100 * predict(k, c):.0f}"
        lines.append(
            f"| {preset} | {title} | {c.registers} | {resident(c) * c.warps} | {issued:.0f} "
            f"| {memory:.0f} | {share} |"
        )
    return lines


def section() -> str:
    """What the installed Triton compiles."""
    jobs = [(preset, index) for preset in PRESETS for index in range(len(list(kernels(preset))))]
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(row, *zip(*jobs, strict=True)))
        alternatives = list(pool.map(otherwise, PRESETS))
    lines = [f"## Triton {triton.__version__}", ""]
    for preset, width in PRESETS.items():
        lines += [f"### {preset}, width {width}", "", HEADER, "|" + " --- |" * 13]
        lines += [
            f"| {' | '.join(cells)} |"
            for (of, _), cells in zip(jobs, rows, strict=True)
            if of == preset
        ]
        lines += [""]
    lines += ["### The chain's forward, a token to a warp or to eight", "", ALTERNATIVES]
    lines += ["|" + " --- |" * 7, *(line for lines in alternatives for line in lines)]
    return "\n".join(lines) + "\n\n"


def page(others: list[str]) -> str:
    """others: the sections of other Tritons."""
    waits = f"{MEMORY} cycles, {MEMORY / CLOCK * 1e9:.0f} ns"
    sections = "".join(sorted([section(), *others], reverse=True))
    return INTRODUCTION.format(waits=waits, near=NEAR) + "\n" + sections + measured() + OTHERS


def measured() -> str:
    """What the newest rows of bench/bench_predictions.py on an H200 say, beside the predictions."""
    newest = max(RESULTS.glob("ops-nvidia-h200-*.json"), key=lambda path: path.stem)
    rows = [r for r in json.loads(newest.read_text())["rows"] if "predicted_percent" in r]
    lines = ["## Measured on an H200", ""]
    lines += [f"Commit {rows[0]['commit']}, Triton {rows[0]['triton']}, torch {rows[0]['torch']}"]
    lines[-1] += f" (`{rows[0]['command']}`)."
    lines += ["", MEASURED, "|" + " --- |" * 6]
    for r in rows:
        name = f"{r['operator'].removeprefix('predicted: ')}: {r['direction']}"
        ours, copy = r["contenders"]["ours"], r["copy"]
        cells = [name, r["preset"].removesuffix("-T2V"), f"{1e3 * copy['ms']:.0f}"]
        cells += [f"{1e3 * ours['ms']:.0f}", f"{r['predicted_percent']}"]
        lines += [f"| {' | '.join(cells)} | **{ours['percent_of_copy']:.0f}** |"]
    return "\n".join(lines) + "\n\n" + REFUTED


def other_sections(text: str) -> list[str]:
    """The sections of a page that another Triton than the installed one compiled."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    own = f"## Triton {triton.__version__}\n"
    return [part for part in parts if part.startswith("## Triton ") and not part.startswith(own)]


HEADER = (
    "| kernel | MB | loads a lane | in flight before the first use | cycles that a warp waits for "
    "them | stores a lane | registers | shared, KiB | programs × warps at once | instructions | "
    "copy, µs | predicted % of a copy | aim |"
)
ALTERNATIVES = (
    "| preset | a token to | registers | warps at once | cycles of issue | cycles of the bus | % |"
)
MEASURED = "| kernel | preset | copy, µs | ours, µs | predicted % of a copy | measured |"
REFUTED = """\
Confirmed within 3 points: the chain's forward, and the temporal forward with flags. Not confirmed,
with what the figures say of the reason and what they leave open:

- Backward of the LayerNorms: 18 and 18 µs over a copy in the chain's, 24 and 25 in the other's,
  whatever the width. So it is a cost of each call and not of its bytes. The 3 µs for the second
  launch are too few: it reads a partial of three or two rows from each program, 10 MB at G/2, which
  the copy does not move, and the first launch has a start and an end of its own. How it divides was
  not measured.
- Temporal attention backward at G/2: 50 to 56 µs over a copy, in proportion to the bytes. Its tiles
  of 32 rows leave 4 to 11 loads in flight before the first use; XL/2's, of 64 rows, leave 20, and
  reach 83 to 85 %. That six programs a multiprocessor make up for it is what the model got wrong.
  Tiles of 64 rows at G/2 are the first thing to try.
- Temporal attention forward at XL/2: 7 to 10 µs over a copy where G/2 has 2 to 5. Its heads of 72
  lie in tiles of 128 columns. Unconfirmed.
- LayerNorm forward: 4 to 5 µs over a copy of 29 and 41, at either width: a call's own cost again.
- The guided step's copy of 10 MB is no faster than 1.9 TB/s, so that its share is larger.

"""
INTRODUCTION = """\
# Predictions

Written by `make predictions`, from the Triton kernels compiled for sm_90 (no GPU) in bf16, at
3 samples × 8 frames × 1024 tokens, by the Triton that is installed here and the oldest that is
taken. [Measured](#measured-on-an-h200) says what an H200 made of it.

The model. A multiprocessor holds as many programs as its registers, shared memory and warps
allow. A program sends its loads, waits for them, works, and stores. The machine code tells the
waits: its instructions in their order, each once what it reads has come, {waits}
after its load, {near} cycles where that was a flag or the index of a row. The bus serves each
program's bytes at a copy's speed (4.3 TB/s, measured on an H200), the schedulers issue four
instructions a cycle for all, and what a warp does by itself keeps nobody else from working: 2
cycles an instruction, 40 a barrier, 24 a shuffle, half of N for a product of 64 × N tiles, 8 for
one of 16 × 8, 60 for the end of a group of products. Programs, or warps where no barrier joins
them, are customers of a queue with these two servers; its throughput by mean value analysis, over
that of the bus alone, is the share of a copy. Every instruction counts as run, and half a wave of
programs is added for the start and the end. The backward of the LayerNorms loops over tokens: its
figures are of one token, which is fetched while two before it are computed, and 3 µs are added for
the launch that adds the row gradients. What could refute it first: rows of modulation that the
first-level cache does not keep, stores that reach DRAM in another order than a copy's, and
latencies under load.
"""
OTHERS = """\
## Why these layouts

The chain's forward gives a token to a warp and four tokens to a program. A token to eight warps
needs 32 registers and fills all 64 warps, but joins eight partial sums twice a token and has idle
lanes beyond the width (1152 of 2048): it issues two to three times the instructions (the last
table of each Triton).

Temporal attention has tiles of 64 rows, which fill the tensor cores' tiles. The backward at head
sizes above 64 has 32: a multiprocessor holds two programs of 64 rows and six of 32, and with two
the bus waits for a quarter of the time.

What others do, read in their code:

- quack: in the forward one warp a row up to a width of 3072, four rows a program; in the backward
  128 threads a row, four programs a multiprocessor at these widths, two stages of shared memory.
  The same layouts, for one row of weights. Here gate, shift and scale are rows by sample, frame
  or index, the residual is added in the same pass, three stages hide more of the wait, and one
  launch adds the row gradients.
- Liger (Triton): a row a program, padded to a power of two (2048 for 1152). Its backward has one
  program a multiprocessor, fetches nothing ahead, keeps partial sums in the weights' dtype, and
  leaves two sums and two casts to PyTorch. Here three or four programs a multiprocessor fetch two
  tokens ahead, 1152 is padded to 1536, sums stay fp32, and one launch adds and casts them all.
- Apex's FastLayerNorm, as flash-attention keeps it: a kernel compiled for each width that it
  knows, mean and rstd written for a backward with one finishing kernel. It takes one row of
  weights, not one a sample. Here statistics are computed again, from a row that is in registers
  anyway.
- sglang's fused kernel for diffusion: a row to a block of threads, four elements (8 bytes of
  bf16) a lane, warps joined through shared memory at each sum. Here a lane moves 16 bytes, no
  warp waits for another, and there is a backward.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/predictions.md.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--add", action="store_true", help="keep what other Tritons compile")
    choice.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    before = PAGE.read_text() if args.add or args.check else ""
    text = page(other_sections(before))
    if not args.check:
        PAGE.write_text(text)
        print(text)
        return 0
    difference = list(
        difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
    )
    print("\n".join(difference))
    return int(bool(difference))


if __name__ == "__main__":
    sys.exit(main())
