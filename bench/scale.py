"""Clips a day, queue, traffic and the precompute of ten million clips on 1 to 512 GPUs, on paper.

python bench/scale.py writes the table of docs/scaling.md from what bench/results holds.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from contest import OURS
from diffusers import AutoencoderKL
from records import ROOT
from report import RESULTS, newest_rows
from torch.utils.flop_counter import FlopCounterMode

from gentron_fast.files import replace_section
from gentron_train.flops import BF16_PEAKS

PAGE = ROOT / "docs/scaling.md"
BEGIN = "<!-- table begins: `python bench/scale.py` writes what stands between -->"
END = "<!-- table ends -->"
GPUS = 1, 8, 64, 512
DAY = 86_400

MODEL, SHAPE, STEPS = "G/2-T2V", (1, 4, 8, 64, 64), 50  # 8 frames at 512 × 512
FEW_STEPS = 8  # of a distilled model
GPU, SHARE = "H200", 0.5  # of the data sheet's rate: assumed until a step is measured there
LOAD = 0.9  # of what the GPUs can do, for the queue
CLIP_BYTES = 300_000  # of an mp4: the small model's 4.7 kB at 64 × 64, by pixels
CLIPS, WINDOWS = 10_000_000, 2  # to be precomputed
# Clips of 10 s, 1280 × 720: 4 Mbit/s assumed; process_time of read_pixels, AMD EPYC, one core.
RAW_BYTES, DECODE_SECONDS = 5_000_000, 0.7
# T5-XL's 120 tokens in bf16; latents' mean and deviation in fp16.
SAMPLE_BYTES = 120 * 2048 * 2 + WINDOWS * 2 * math.prod(SHAPE[1:]) * 2


class Step(NamedTuple):
    """Seconds of a guided step of MODEL on one GPU, and where they are from; and of a distilled
    model's, which is one of three plain forwards, at the same rate."""

    seconds: float
    origin: str
    distilled: float


def step_seconds() -> Step:
    """By the newest row of a GPU, without one by what a step computes."""
    for row in newest_rows(RESULTS):
        named = row["operator"].startswith(f"guided step, {MODEL}") and GPU in row["device"]
        if named and tuple(row["shape"]) == SHAPE and row["dtype"] == "bfloat16":
            seconds = row["contenders"][OURS]["ms"] / 1e3
            return Step(seconds, "measured", seconds * row["plain_flops"] / 3 / row["flops"])
    (row,) = (
        row
        for row in newest_rows(RESULTS, "saved")
        if row["preset"] == MODEL and row["direction"] == "λ_M 1.2"
    )
    flops = row["flops"] * (1 - row["saved"]["altogether"])
    told = f"predicted: {flops / 1e12:.0f} TFLOP at {SHARE:.0%} of the data sheet's rate"
    return Step(_seconds(flops), told, _seconds(row["flops"] / 3))


def _seconds(flops: float) -> float:
    return flops / (SHARE * BF16_PEAKS[GPU] * 1e12)


def vae_flops() -> tuple[int, int]:
    """Of encoding and of decoding a clip's frames by Stable Diffusion's autoencoder."""
    frames, height, width = SHAPE[2:]
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        pixels = torch.empty(frames, 3, 8 * height, 8 * width)
        latents = torch.empty(frames, 4, height, width)
    counts = []
    for work in (lambda: vae.encoder(pixels), lambda: vae.decoder(latents)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        counts.append(counter.get_total_flops())
    return tuple(counts)


def mean_wait(servers: int, seconds: float, load: float) -> float:
    """Seconds that a request waits: Poisson arrivals, all of one length, by Erlang's C over two
    (M/D/c, Cosmetatos' first term)."""
    offered, blocked = servers * load, 1.0
    for number in range(1, servers + 1):  # Erlang's B, by its recursion
        blocked = offered * blocked / (number + offered * blocked)
    waits = blocked / (1 - load * (1 - blocked))
    return waits * seconds / (servers * (1 - load)) / 2


def table() -> str:
    """The table in Markdown, and the figures it is made from."""
    step, origin, distilled = step_seconds()
    encode, decode = vae_flops()
    clip = STEPS * step + _seconds(decode)
    few = FEW_STEPS * distilled + _seconds(decode)
    sample = WINDOWS * _seconds(encode) * 2  # in fp32, by cuDNN's TF32: half the rate of bf16
    columns = [_column(gpus, clip, sample) for gpus in GPUS]
    lines = [["", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)], ["---"] * (1 + len(GPUS))]
    lines += [[name, *(column[name] for column in columns)] for name in columns[0]]
    told = [
        f"{MODEL}, 8 frames at 512 × 512, {STEPS} steps, λ_M 1.2, clip by clip on {GPU}s in bf16.",
        f"A step takes {step:.3f} s ({origin}),",
        f"{STEPS} of them and the autoencoder's decoder ({decode / 1e12:.1f} TFLOP) {clip:.1f} s.",
        f"A distilled model's, one of three branches at the same rate, takes {distilled:.3f} s on",
        f"paper, {FEW_STEPS} of them and the decoder {few:.2f} s: {clip / few:.1f} times as fast.",
        f"Precompute: {WINDOWS} windows of a clip through the encoder, {encode / 1e12:.1f} TFLOP",
        f"each, fp32 as TF32: {1 / sample:.0f} clips/s and GPU.",
    ]
    head = "\n".join(told)
    return f"{head}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _column(gpus: int, clip: float, sample: float) -> dict[str, str]:
    wait, rate = mean_wait(gpus, clip, LOAD), gpus / clip
    precomputed = gpus / sample
    return {
        "clips a day": f"{rate * DAY:,.0f}",
        f"wait at {LOAD:.0%} load, mean": f"{wait:.1f} s" if wait < 100 else f"{wait / 60:.0f} min",
        "requests waiting then": f"{wait * rate * LOAD:.1f}",
        "a queue of 10 a GPU lasts": f"{10 * clip:.0f} s",
        "egress of mp4": f"{rate * CLIP_BYTES * DAY / 1e9:,.0f} GB/day, "
        f"{rate * CLIP_BYTES * 8 / 1e6:,.1f} Mbit/s",
        "files written": f"{2 * rate:,.1f}/s",
        f"precompute of {CLIPS / 1e6:.0f} M clips": _days(CLIPS / precomputed),
        "its clips read": f"{precomputed * RAW_BYTES / 1e9:.2g} GB/s",
        "its cores that decode": f"{precomputed * DECODE_SECONDS:,.0f}",
        "its shards written": f"{precomputed * SAMPLE_BYTES / 1e6:,.0f} MB/s, "
        f"{CLIPS * SAMPLE_BYTES / 1e12:.0f} TB",
    }


def _days(seconds: float) -> str:
    return f"{seconds / DAY:.1f} days" if seconds > DAY else f"{seconds / 3600:.1f} hours"


def main(page: Path = PAGE) -> None:
    replace_section(page, BEGIN, END, table())


if __name__ == "__main__":
    main()
