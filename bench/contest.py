"""One row of a benchmark: several ways to the same result, measured side by side.

A sample is one pass over input sets that together outgrow the last-level cache. The contenders take
turns pass by pass, and a copy of as many bytes as the operator must move takes its turn with them.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import environment
from torch import Tensor

from gentron_train.allocator import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}[DEVICE]
PRESET_NAMES = ["XL/2-T2V", "G/2-T2V"]

OURS, COPY, COMPILE = "ours", "copy", "torch.compile"
OPENVINO, ZENTORCH = "OpenVINO", "zentorch"
# ‖out - reference‖ / ‖reference‖ above which a contender computes something else.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# On the CPU max-autotune chooses among templates of matrix products with frozen weights and tunes
# Triton's launches; a compiled operator has neither, and both modes write the same C++.
COMPILE_MODES = {"cpu": ["default"], "cuda": ["default", "max-autotune-no-cudagraphs"]}

SECONDS = 3.0  # of measuring a row, within
ROUNDS, BRIEF_ROUNDS = (9, 100), (5, 50)
PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
REST = 0.01  # seconds in which threads without work leave the cores
SLEEP_HZ = 2e9  # at least the GPU's clock, so that a sleep is never shorter than meant


@dataclass(frozen=True)
class Contender:
    """A way to the result.

    run: a function of one input set, None where it is absent; note: its variant, or why it is
    absent. Of several contenders with one name the fastest counts. checked: held against the
    definition; another model for the same task is not. exact: False for an approximation, whose
    error is told and not judged. flops: of one call, where they are not ours'. own_threads: it
    computes in threads that are not torch's, which wait for more work in a loop: before every pass
    of such a row they get the time to give up.
    """

    name: str
    run: Callable[..., Any] | None
    note: str = ""
    checked: bool = True
    exact: bool = True
    flops: int | None = None
    own_threads: bool = False


def absent(name: str, reason: str) -> Contender:
    return Contender(name, None, reason)


class _Absent(Exception):
    """Why a contender is not measured."""


@dataclass(frozen=True)
class _InputSet:
    tensors: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...] = ()  # inputs that get gradients
    gradients: tuple[Tensor, ...] = ()  # of the outputs


@dataclass
class Contest:
    """Measures rows on one device.

    smoke: no figures; every contender runs once on few tokens, uncompiled, and is checked.
    brief: few rounds, torch.compile in one mode; whole models have fewer peers.
    """

    device: str
    smoke: bool = False
    brief: bool = False
    command: str = ""
    _product_rates: dict = field(default_factory=dict)

    def compiled(
        self, function: Callable[..., Any], name: str = COMPILE, modes: Sequence[str] | None = None
    ) -> list[Contender]:
        """The function under torch.compile, in the modes that can differ on this device."""
        if self.smoke:
            return [absent(name, "not compiled in a dry run")]
        return [
            Contender(name, torch.compile(function, dynamic=False, mode=mode), mode)
            for mode in modes or COMPILE_MODES[self.device][: 1 if self.brief else None]
        ]

    def engines(self, make: Callable[[], list[Contender]]) -> list[Contender]:
        """The contenders that `make` converts or compiles a whole model for."""
        if self.smoke:
            return [absent(name, "not converted in a dry run") for name in (OPENVINO, ZENTORCH)]
        return make()

    def measure(
        self,
        operator: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        make: Callable[..., tuple[Tensor, ...]],
        definition: Callable[..., Any],
        contenders: Sequence[Contender],
        nbytes: int | None = None,
        flops: int | None = None,
        backward: bool = False,
        times_launch: bool = False,
        preset: str | None = None,
        direction: str | None = None,
        **extra: Any,
    ) -> tuple[dict, Callable[[], Callable[[], Any]]]:
        """One row, and a function that prepares one more call of ours.

        make(randn) builds one input set, a tuple of tensors, from randn(*shape, dtype=dtype);
        definition is the operator in plain torch, called on wider inputs; nbytes and flops: what
        one call must move and compute. backward: the gradient of all floating-point inputs is
        timed, its forward is not. times_launch: the host's work counts where the GPU waits for it,
        as it does for a user; of an operator alone it does not. direction: what the row says it is
        where it is neither forward nor backward. extra: what else the row is to hold.

        Raises AssertionError where ours differs from the definition; another contender that
        differs or fails is absent, with the reason.
        """
        if "torch._dynamo" in sys.modules:  # seconds to import, and nothing to forget
            torch._dynamo.reset()
        sets = self._input_sets(make, dtype, nbytes)
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        sets, reference = self._with_reference(sets, definition, wide, backward)
        errors, missing = {}, {}
        for contender in contenders:
            try:
                errors[contender] = self._error(contender, sets[0], reference, dtype)
            except _Absent as reason:
                missing.setdefault(contender.name, {"absent": str(reason)})
        del reference
        calls = {contender: partial(_prepare, contender.run, sets) for contender in errors}
        if nbytes is not None:
            copies = self._copies(nbytes, len(sets))
            calls[Contender(COPY, None)] = lambda: copies
        timed: dict[str, dict] = {}
        for contender, seconds in self._take_turns(calls, times_launch).items():
            entry = _summary(seconds) | {"note": contender.note, "error": errors.get(contender)}
            entry["flops"] = contender.flops
            best = timed.setdefault(contender.name, entry)
            if entry["ms"] < best["ms"]:
                timed[contender.name] = entry
        copy = timed.pop(COPY, None)
        names = dict.fromkeys(contender.name for contender in contenders)
        row = {
            "operator": operator,
            "direction": direction or ("backward" if backward else "forward"),
            "preset": preset,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            **environment(self.device),
            "command": self.command,
            "bytes": nbytes,
            "flops": flops,
            "input_sets": len(sets),
            "copy": copy,
            "product_tflops": None if flops is None else self._product_rate(dtype),
            "contenders": {name: timed.get(name) or missing[name] for name in names},
            **extra,
        }
        _add_rates(row)
        ours = next(contender for contender in contenders if contender.name == OURS)
        turns = cycle(sets)
        return row, lambda: _prepare(ours.run, [next(turns)])[0]

    def _input_sets(self, make, dtype: torch.dtype, nbytes: int | None) -> list[_InputSet]:
        """Sets whose inputs and outputs outgrow the cache twice over in a pass, memory allowing."""
        count = 1 if self.smoke else 2
        if nbytes is not None and not self.smoke:
            wanted = max(4, math.ceil(2 * cache_bytes(self.device) / nbytes))
            count = max(count, min(wanted, memory_bytes(self.device) // 16 // nbytes))
        generator = torch.Generator(self.device)

        def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(dtype)

        sets = []
        for seed in range(count):
            generator.manual_seed(seed)
            sets.append(_InputSet(make(randn)))
        return sets

    def _with_reference(self, sets, definition, wide: torch.dtype, backward: bool):
        """The sets, made ready for gradients where asked; the definition's results of the first."""
        tensors = sets[0].tensors
        widened = tuple(t.to(wide) if t.is_floating_point() else t for t in tensors)
        if not backward:
            return sets, _results(definition, _InputSet(widened))
        with torch.no_grad():
            shapes = [out.shape for out in _as_tuple(definition(*widened))]
        generator = torch.Generator(self.device).manual_seed(len(sets))
        ready = []
        for inputs in sets:
            leaves = tuple(t.requires_grad_() for t in inputs.tensors if t.is_floating_point())
            gradients = tuple(
                torch.randn(shape, generator=generator, device=self.device).to(leaves[0].dtype)
                for shape in shapes
            )
            ready.append(_InputSet(inputs.tensors, leaves, gradients))
        widened = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in widened)
        leaves = tuple(t for t in widened if t.requires_grad)
        gradients = tuple(gradient.to(wide) for gradient in ready[0].gradients)
        return ready, _results(definition, _InputSet(widened, leaves, gradients))

    def _error(self, contender: Contender, inputs: _InputSet, reference, dtype) -> float:
        """The relative error against the definition; _Absent, with the reason, for a peer."""
        if contender.run is None:
            raise _Absent(contender.note)
        try:
            results = _results(contender.run, inputs)
            error = _relative_error(results, reference) if contender.checked else 0.0
        except Exception as failure:
            if contender.name == OURS:
                raise
            # Whatever keeps a peer from running is why it is absent.
            message = f"{type(failure).__name__}: {failure}"
            raise _Absent(message.splitlines()[0][:160]) from failure
        if contender.exact and error > TOLERANCE[dtype]:
            message = f"differs from the definition by {error:.1e}, relative"
            assert contender.name != OURS, message
            raise _Absent(message)
        return error

    def _copies(self, nbytes: int, count: int) -> list[Callable[[], Any]]:
        """Copies that read half of nbytes and write the other half."""

        # Written pages: an untouched one is the zero page, which the cache always holds.
        def buffer() -> Tensor:
            return torch.randn(max(1, nbytes // 8), device=self.device)

        return [partial(buffer().copy_, buffer()) for _ in range(count)]

    def _take_turns(
        self, calls: dict[Contender, Callable], times_launch: bool = False
    ) -> dict[Contender, list[float]]:
        """Seconds a call, one sample a round and contender, the order moving on every round."""
        if self.device == "cpu":
            keep_freed_memory()  # as the CUDA allocator does: no page fault is timed
        order = list(calls)
        rest = REST if any(contender.own_threads for contender in order) else 0.0
        launch = {}  # the host's seconds for a pass
        for _ in range(1 if self.smoke else 2):
            start = time.perf_counter()
            for contender in order:
                launch[contender] = self._pass(calls[contender], rest=rest)[1]
            elapsed = time.perf_counter() - start
        low, high = BRIEF_ROUNDS if self.brief else ROUNDS
        rounds = 1 if self.smoke else min(high, max(low, int(SECONDS / elapsed)))
        samples: dict[Contender, list[float]] = {contender: [] for contender in order}
        for _ in range(rounds):
            for contender in order:
                lead = 0.0 if times_launch else launch[contender]
                samples[contender].append(self._pass(calls[contender], lead, rest)[0])
            order = order[1:] + order[:1]
        return samples

    def _pass(
        self, prepare: Callable, launch: float = 0.0, rest: float = 0.0
    ) -> tuple[float, float]:
        """Seconds a call over one pass, after so many of rest, and the host's for the pass.

        launch: the host's seconds to launch a pass on the GPU, which sleeps as long before it
        begins: the kernels lie ready, and no launch is timed. Results live to the pass's end: a
        block that is freed at once would be written again while the cache still holds it.
        """
        calls = prepare()
        time.sleep(rest)
        with torch.no_grad():
            if self.device == "cpu":
                start = time.perf_counter()
                results = [call() for call in calls]
                host = time.perf_counter() - start
                del results
                return host / len(calls), host
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(min(1.5 * launch, 0.05) * SLEEP_HZ))
            start = time.perf_counter()
            begin.record()
            results = [call() for call in calls]
            end.record()
            host = time.perf_counter() - start
            end.synchronize()
            del results
            return begin.elapsed_time(end) / 1e3 / len(calls), host

    def _product_rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a large matrix product in this dtype, measured once a run: the roof."""
        if dtype not in self._product_rates:
            side = 64 if self.smoke else PRODUCT_SIDE[self.device]
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            product = Contender("product", None)
            seconds = self._take_turns({product: lambda: [partial(torch.mm, a, b)]})[product]
            self._product_rates[dtype] = 2 * side**3 / float(np.median(seconds)) / 1e12
        return self._product_rates[dtype]


def cache_bytes(device: str) -> int:
    """Size of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=32 * 2**20)


def memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties().total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(rows: Sequence[dict]) -> list[str]:
    """The rows as text, one block a row and one line a contender."""
    lines = []
    for row in rows:
        title = " ".join(filter(None, (row["operator"], row["direction"], row["preset"])))
        lines += ["", f"{title} {tuple(row['shape'])} {row['dtype']}"]
        entries = row["contenders"] | ({COPY: row["copy"]} if row["copy"] else {})
        lines += [f"  {name:<22}{_columns(entry)}" for name, entry in entries.items()]
        if row.get("floor_ms"):
            lines.append(f"  {'floor':<22}{row['floor_ms']:10.4f} ms")
        if row.get("predicted_percent"):
            lines.append(f"  {'predicted':<22}{row['predicted_percent']:10.0f} % of copy")
    return lines


def _columns(entry: dict) -> str:
    if "absent" in entry:
        return f"absent: {entry['absent']}"
    low, high = entry["iqr"]
    parts = [f"{entry['ms']:10.4f} ms  [{low:.4f}, {high:.4f}]"]
    for key, template in {
        "gbs": "{:8.1f} GB/s",
        "percent_of_copy": "{:5.1f} % of copy",
        "tflops": "{:8.3g} TFLOP/s",
        "speedup": "ours is {:.2f} x as fast",
        "note": "({})",
    }.items():
        if entry.get(key):
            parts.append(template.format(entry[key]))
    return "  ".join(parts)


def _summary(seconds: list[float]) -> dict:
    low, median, high = np.percentile(np.array(seconds) * 1e3, [25, 50, 75]).tolist()
    return {"ms": median, "iqr": [low, high], "samples": len(seconds)}


def _add_rates(row: dict) -> None:
    """GB/s, TFLOP/s, % of copy and the speed-up of ours over each contender that was timed; the
    floor: what the FLOPs take at a large product's rate, or the bytes at a copy's, if that is more.
    """
    copy, timed = row["copy"], [e for e in row["contenders"].values() if "ms" in e]
    of_flops = row["flops"] / row["product_tflops"] / 1e9 if row["product_tflops"] else 0.0
    row["floor_ms"] = max(of_flops, copy["ms"] if copy else 0.0) or None
    for entry in [*timed, *([copy] if copy else [])]:
        if row["bytes"] is not None:
            entry["gbs"] = row["bytes"] / entry["ms"] / 1e6
    for entry in timed:
        if copy:
            entry["percent_of_copy"] = 100 * copy["ms"] / entry["ms"]
        if row["flops"] is not None:
            entry["tflops"] = (entry["flops"] or row["flops"]) / entry["ms"] / 1e9
        if entry is not row["contenders"][OURS]:
            entry["speedup"] = entry["ms"] / row["contenders"][OURS]["ms"]


def _prepare(run: Callable[..., Any], sets: Sequence[_InputSet]) -> list[Callable[[], Any]]:
    """The calls of one pass: forward, or backward with its graph already built."""
    calls = []
    for inputs in sets:
        call = partial(run, *inputs.tensors)
        if inputs.leaves:
            outputs = _as_tuple(call())
            call = partial(torch.autograd.grad, outputs, inputs.leaves, inputs.gradients)
        calls.append(call)
    return calls


def _results(run: Callable[..., Any], inputs: _InputSet) -> tuple[Tensor, ...]:
    (call,) = _prepare(run, [inputs])
    with torch.no_grad():
        return _as_tuple(call())


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _relative_error(results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest ‖out - reference‖ / ‖reference‖; infinite for NaN and for another shape."""
    worst = 0.0
    for out, exact in zip(results, reference, strict=True):
        if out.shape != exact.shape:
            return math.inf
        norm = exact.norm().clamp(min=torch.finfo(exact.dtype).tiny)
        error = float((out.to(exact.dtype) - exact).norm() / norm)
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst
