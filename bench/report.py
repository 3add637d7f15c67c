"""make report: docs/performance.md, README's headline table and the roofline plot, from the rows in
bench/results.

Every figure comes from a file; a benchmark without one is not shown.
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from contest import OURS
from records import ROOT, identity, read_rows

from gentron_fast.files import replace_section, whole_file

RESULTS = ROOT / "bench/results"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs/performance.md"
PLOT = ROOT / "docs/roofline.png"
BEGIN = "<!-- headline begins: `make report` writes what stands between -->"
END = "<!-- headline ends -->"
INTRODUCTION = """\
# Performance

Written by `make report` from the rows in bench/results. Nothing else ran beside the rows of the AMD
machine. There an operator's result stays in the cache for the product that reads it next, and the
copy it is compared with does not read the lines it writes: its share of a copy is lower than on a
machine whose cache is small.
"""
LEGEND = (
    "ms: ours, median and quartiles. % of copy: the time of copying as many bytes in the same run,"
    " over ours. × NAME: that contender's time over ours, in the same run; – where it was absent."
)
# Lines of README's table: what ours is, beside what; then a row's operator, preset and direction,
# and the contender in it.
HEADLINES = (
    (
        *("guided step, 4 blocks of XL/2", "one batched forward, torch.compile"),
        *("guided step, 4 blocks of XL/2-T2V", None, "forward", "batched, torch.compile"),
    ),
    (
        *("guided step, G/2 at 512², 8 frames", "one batched forward, torch.compile"),
        *("guided step, G/2-T2V beside compiled", None, "forward", "batched, torch.compile"),
    ),
    (
        *("guided step, small model", "one batched forward"),
        *("guided step, small", None, "forward", "one batched forward"),
    ),
    (
        *("guided step, small model", "OpenVINO"),
        *("guided step, small", None, "forward", "OpenVINO"),
    ),
    (
        *("guided step, small model", "zentorch"),
        *("guided step, small", None, "forward", "zentorch"),
    ),
    (
        *("guided step, 4 blocks of XL/2", "OpenVINO"),
        *("guided step, 4 blocks of XL/2-T2V", None, "forward", "OpenVINO"),
    ),
    (
        *("clip of a prompt, small model", "OpenVINO"),
        *("clip of a prompt, 20 guided steps, small", None, "forward", "OpenVINO"),
    ),
    (
        *("guided step, PixArt-α XL/2", "diffusers"),
        *("guided step of PixArt-α XL/2, eager, 28 blocks", None, "forward", "diffusers"),
    ),
    (
        *("clip by a compiled sampler, small model", "the pipeline"),
        *("clip of 20 steps, small", None, "forward", "eager pipeline"),
    ),
    (
        *("training step, small T2V", "a plain AdamW loop"),
        *("training step, small-T2V", None, "training step", "plain AdamW loop"),
    ),
    (
        *("training step, G/2, checkpointed", "a plain AdamW loop"),
        *(
            "training step, G/2-T2V, blocks computed again",
            None,
            "training step",
            "plain AdamW loop",
        ),
    ),
    (
        *("LayerNorm and modulation, G/2", "torch.compile"),
        *("layernorm_modulate", "G/2-T2V", "forward", "torch.compile"),
    ),
    (
        *("residual, LayerNorm and modulation, G/2", "torch.compile"),
        *("residual_layernorm_modulate", "G/2-T2V", "forward", "torch.compile"),
    ),
    (
        *("the same, backward", "torch.compile"),
        *("residual_layernorm_modulate", "G/2-T2V", "backward", "torch.compile"),
    ),
    (
        *("temporal attention, G/2", "SDPA"),
        *("temporal_attention", "G/2-T2V", "forward", "SDPA"),
    ),
    (
        *("the same, backward", "SDPA"),
        *("temporal_attention", "G/2-T2V", "backward", "SDPA"),
    ),
)
HEADLINE_KEY = ("operator", "preset", "direction")
HEADLINE_DTYPES = ("float32", "bfloat16")
THREAD, THREADS = "thread)", "threads)"  # end of a processor's name in a row


def main() -> None:
    rows = newest_rows(RESULTS)
    text = section(rows) + work_section(newest_rows(RESULTS, "saved"))
    text += serve_section(newest_rows(RESULTS, "served"))
    text += busy_section(newest_rows(RESULTS, "busy"))
    readme = headline(rows)
    if plot_roofline(rows, PLOT):
        text += f"\n![Roofline]({PLOT.name})\n"
        readme += f"\n![Roofline]({PLOT.relative_to(ROOT)})\n"
    PERFORMANCE.write_text(f"{INTRODUCTION}\n{text}")
    replace_section(README, BEGIN, END, readme)
    devices = len({row["device"] for row in rows})
    print(f"{len(rows)} rows of {devices} devices in {PERFORMANCE.relative_to(ROOT)}")


def newest_rows(folder: Path, kind: str = "contenders") -> list[dict]:
    """The newest row of each benchmark, shape, dtype and device in the folder's files, among the
    rows that hold `kind`."""
    found = [row for path in sorted(folder.glob("*.json")) for row in read_rows(path)]
    found = [row for row in found if kind in row]
    newest = {identity(row): row for row in sorted(found, key=lambda row: row["time"])}
    return sorted(newest.values(), key=_order)


def headline(rows: list[dict]) -> str:
    """README's table: how many times as fast as others, on every processor, several threads of it,
    and on the GPU that was measured last."""
    if not rows:
        return "Nothing has been measured yet.\n"
    devices = sorted({row["device"] for row in rows if row["device"].endswith(THREADS)})
    times = {row["time"]: row["device"] for row in rows if not _is_processor(row)}
    devices += [times[max(times)]] if times else []
    ratios = [
        {
            (row["device"], row["dtype"]): row["contenders"].get(contender, {}).get("speedup")
            for row in rows
            if row["device"] in devices and [row[name] for name in HEADLINE_KEY] == key
        }
        for _, _, *key, contender in HEADLINES
    ]
    columns = [
        (device, dtype)
        for device in devices
        for dtype in HEADLINE_DTYPES
        if any(found.get((device, dtype)) for found in ratios)
    ]
    lines = [["ours", "beside", *(f"{device}, {dtype}" for device, dtype in columns)]]
    lines.append(["---"] * len(lines[0]))
    for (title, beside, *_), found in zip(HEADLINES, ratios, strict=True):
        if any(found.values()):
            lines.append([title, beside, *(_times(found.get(column)) for column in columns)])
    return f"{_markdown(lines)}\n"


def _is_processor(row: dict) -> bool:
    return row["device"].endswith((THREAD, THREADS))


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} ×"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def section(rows: list[dict]) -> str:
    """The tables in Markdown, one a device and operator."""
    parts = [LEGEND] if rows else ["Nothing has been measured yet."]
    for device in _names(rows, "device"):
        mine = [row for row in rows if row["device"] == device]
        parts += [f"### {device}", _provenance(mine)]
        for operator in _names(mine, "operator"):
            parts.append(_table(operator, [row for row in mine if row["operator"] == operator]))
    return "\n\n".join(parts) + "\n"


def work_section(rows: list[dict]) -> str:
    """The table of bench/work.py: FLOPs of a guided step saved, by source; nothing without rows."""
    if not rows:
        return ""
    sources = list(rows[0]["saved"])
    head = ["model", "guidance", "three forwards", *sources]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        shares = (f"{row['saved'][source]:.1%}" for source in sources)
        lines.append([row["preset"], row["direction"], f"{row['flops'] / 1e12:.1f} TFLOP", *shares])
    shape = " × ".join(map(str, rows[0]["shape"]))
    title = f"### Work saved in a guided step, latents {shape} (`python bench/work.py`)"
    return f"\n{title}\n\n{_markdown(lines)}\n"


def serve_section(rows: list[dict]) -> str:
    """The table of bench/bench_serve.py, one a device; nothing without rows."""
    parts = []
    for row in rows:
        head = ["requests of clips and images", "a minute, all at once", "p50, s", "p95, s"]
        lines = [head, ["---"] * len(head)]
        for way, figures in row["served"].items():
            lines.append([way, *(_figure(figures[key]) for key in ("a_minute", "p50", "p95"))])
        title = f"### Serving, {row['device']} (`{row['command']}`, commit {row['commit']})"
        rate = f"p50 and p95 at {_figure(row['arrivals_a_minute'])} requests a minute"
        parts.append(f"\n{title}\n\n{rate}, at most {row['max_batch']} at a time.\n\n")
        parts.append(f"{_markdown(lines)}\n")
    return "".join(parts)


def busy_section(rows: list[dict]) -> str:
    """The table of bench/bench_busy.py, one a device; nothing without rows."""
    parts = []
    for row in rows:
        head = [
            "guided step, small",
            "quiet, ms",
            "× defaults",
            "busy, ms",
            "p90",
            "× quiet",
            "p90",
        ]
        lines = [head, ["---"] * len(head)]
        names = ("quiet", "quiet_of_defaults", "busy", "busy_p90", "times_quiet", "times_quiet_p90")
        for way, figures in row["busy"].items():
            lines.append([way, *(_figure(figures[name]) for name in names)])
        where = f"{row['device']} (`{row['command']}`, commit {row['commit']})"
        parts.append(f"\n### Beside a process that never rests, {where}\n\n{_markdown(lines)}\n")
    return "".join(parts)


def plot_roofline(rows: list[dict], path: Path) -> bool:
    """Ours and the best other contender under each device's measured roofs; False without rows."""
    rows = [row for row in rows if row["flops"] and row["copy"]]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    devices = _names(rows, "device")
    figure, axes = plt.subplots(
        1, len(devices), figsize=(6 * len(devices), 4.5), squeeze=False, layout="constrained"
    )
    operators = _names(rows, "operator")
    colours = {operator: f"C{index}" for index, operator in enumerate(operators)}
    for axis, device in zip(axes[0], devices, strict=True):
        _draw_device(axis, [row for row in rows if row["device"] == device], colours)
        axis.set_title(device, fontsize=10)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def _draw_device(axis, rows: list[dict], colours: dict) -> None:
    intensities = [row["flops"] / row["bytes"] for row in rows]
    span = min(intensities) / 2, max(intensities) * 4
    bandwidth = median(row["copy"]["gbs"] for row in rows)
    for dtype, style in zip(_names(rows, "dtype"), ("-", "--", ":"), strict=False):
        peak = 1e3 * median(row["product_tflops"] for row in rows if row["dtype"] == dtype)
        ridge = min(max(peak / bandwidth, span[0]), span[1])
        knees = [span[0], ridge, span[1]]
        roof = [min(peak, bandwidth * x) for x in knees]
        axis.plot(knees, roof, f"k{style}", linewidth=1, label=f"copy and product, {dtype}")
    for row, intensity in zip(rows, intensities, strict=True):
        colour = colours[row["operator"]]
        others = [row["contenders"][name] for name in row["contenders"] if name != OURS]
        others = [entry for entry in others if "ms" in entry]
        best = min(others, key=lambda entry: entry["ms"], default=None)
        if best is not None:
            axis.plot(intensity, 1e3 * best["tflops"], "o", color=colour, fillstyle="none")
        axis.plot(intensity, 1e3 * row["contenders"][OURS]["tflops"], "o", color=colour)
    for operator in _names(rows, "operator"):
        axis.plot([], [], "o", color=colours[operator], label=operator)
    axis.plot([], [], "o", color="grey", fillstyle="none", label="best other contender")
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s")
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.legend(fontsize=7)


def _provenance(rows: list[dict]) -> str:
    """What was measured where, when and by which command, and the roofs."""
    facts = [f"torch {', '.join(_names(rows, 'torch'))}"]
    facts += [f"triton {version}" for version in _names(rows, "triton") if version]
    days = sorted({row["time"][:10] for row in rows})
    facts.append(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
    facts.append(f"commit {', '.join(_names(rows, 'commit'))}")
    copies = [row["copy"]["gbs"] for row in rows if row["copy"]]
    if copies:
        facts.append(f"copy {_figure(median(copies))} GB/s")
    for dtype in _names(rows, "dtype"):
        rates = [r["product_tflops"] for r in rows if r["dtype"] == dtype and r["product_tflops"]]
        if rates:
            facts.append(f"{dtype} product {_figure(median(rates))} TFLOP/s")
    commands = "".join(f"\n    {command}" for command in _names(rows, "command"))
    return f"{'; '.join(facts)}.\n{commands}"


def _table(operator: str, rows: list[dict]) -> str:
    names = [name for row in rows for name in row["contenders"] if name != OURS]
    names = [name for name in dict.fromkeys(names) if any(_has(row, name) for row in rows)]
    has_bytes = any(row["bytes"] for row in rows)
    has_preset = any(row["preset"] for row in rows)
    head = [operator] * has_preset + ["direction", "shape", "dtype", "ms"]
    head += ["GB/s", "% of copy"] * has_bytes + [f"× {name}" for name in names]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        ours = row["contenders"][OURS]
        low, high = ours["iqr"]
        shape = " × ".join(map(str, row["shape"]))
        cells = [row["preset"] or ""] * has_preset + [row["direction"], shape, row["dtype"]]
        cells.append(f"{_figure(ours['ms'])} ({_figure(low)} to {_figure(high)})")
        if has_bytes:
            cells += [_figure(ours.get(key)) for key in ("gbs", "percent_of_copy")]
        entries = [row["contenders"].get(name, {}) for name in names]
        lines.append([*cells, *(_figure(entry.get("speedup")) for entry in entries)])
    title = "" if has_preset else f"**{operator}**\n\n"
    return title + _markdown(lines)


def _figure(value: float | None) -> str:
    """Three significant digits, whole numbers in full; – for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _has(row: dict, name: str) -> bool:
    return "ms" in row["contenders"].get(name, {})


def _names(rows: Iterable[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def _order(row: dict) -> tuple:
    keys = "device", "operator", "direction", "preset", "dtype"
    return *(row[key] or "" for key in keys), row["shape"]


if __name__ == "__main__":
    main()
