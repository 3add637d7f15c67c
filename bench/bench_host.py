"""What one call costs the host beside PyTorch's own calls, its launch stubbed: needs no GPU.

pytest bench/bench_host.py --benchmark-only -s
"""

import os
import time

import pytest
import torch
from plain import residual_modulated
from records import append_row, environment

from gentron_kernels import layernorm_modulate, temporal_attention

pytest.importorskip("triton")
ROUNDS, CALLS = 15, 200


def cases(grad: bool) -> dict:
    """Functions and their inputs by name."""
    x, y = torch.randn(2, 1, 4, 192), torch.randn(2, 1, 4, 192)
    rows = torch.randn(2, 6, 192).requires_grad_(grad)
    chain = x.requires_grad_(grad), y, *rows.unbind(1)[:3]
    qkv = torch.randn(2, 4, 3, 3, 2, 48).requires_grad_(grad), torch.tensor([True, False])
    return {
        "the chain in PyTorch's calls": (residual_modulated, chain),
        "chain": (layernorm_modulate.residual_layernorm_modulate, chain),
        "temporal attention": (temporal_attention.temporal_attention, qkv),
    }


def seconds(function, inputs, calls: int = CALLS) -> float:
    """Of a call, in this thread's own time."""
    start = time.thread_time()
    for _ in range(calls):
        function(*inputs)
    return (time.thread_time() - start) / calls


def least_seconds(contenders: dict) -> dict[str, float]:
    """The least of rounds in which they take turns: others may be at work."""
    for contender in contenders.values():
        seconds(*contender, calls=3)
    least = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            least[name] = min(least[name], seconds(*contender))
    return least


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "with a gradient"])
def test_host_cost(benchmark, grad):
    """A row of microseconds, and of each as a multiple of the chain in PyTorch's calls."""
    if torch.cuda.is_available():
        pytest.skip("a launch would reach the GPU")
    from stubbed_launches import stubbed_launches

    contenders = cases(grad)
    stubbed = stubbed_launches(layernorm_modulate, temporal_attention, note=False)
    with stubbed, torch.set_grad_enabled(grad):
        least = least_seconds(contenders)
        benchmark.pedantic(*contenders["chain"], rounds=5, iterations=20)
    plain = next(iter(least.values()))
    row = {"operator": "host cost", "direction": "with a gradient" if grad else "inference"}
    row["microseconds"] = {name: 1e6 * own for name, own in least.items()}
    row["times_plain"] = {name: own / plain for name, own in least.items()}
    print()
    for name, own in least.items():
        print(f"{row['direction']}: {name:<30}{1e6 * own:6.1f} us, {own / plain:.2f} x PyTorch's")
    if os.environ.get("RESULTS"):
        append_row(os.environ["RESULTS"], "host", row | environment("cpu"))
