"""What one call costs the host, its launch stubbed: no GPU is needed, none is used.

pytest bench/bench_host.py --benchmark-only
"""

import pytest
import torch

from gentron_kernels import layernorm_modulate, temporal_attention

pytest.importorskip("triton")


def chain_inputs(grad: bool):
    x, y = torch.randn(2, 1, 4, 192), torch.randn(2, 1, 4, 192)
    rows = torch.randn(2, 6, 192).requires_grad_(grad)
    return x.requires_grad_(grad), y, *rows.unbind(1)[:3]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "with a gradient"])
@pytest.mark.parametrize("name", ["ours", "plain"])
def test_chain(benchmark, name, grad):
    from stubbed_launches import plain_chain

    run = layernorm_modulate.residual_layernorm_modulate if name == "ours" else plain_chain
    _measure(benchmark, run, chain_inputs(grad), grad)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "with a gradient"])
def test_temporal(benchmark, grad):
    qkv = torch.randn(2, 4, 3, 3, 2, 48).requires_grad_(grad)
    flags = torch.tensor([True, False])
    _measure(benchmark, temporal_attention.temporal_attention, (qkv, flags), grad)


def _measure(benchmark, run, inputs, grad: bool) -> None:
    if torch.cuda.is_available():
        pytest.skip("a launch would reach the GPU")
    from stubbed_launches import stubbed_launches

    stubbed = stubbed_launches(layernorm_modulate, temporal_attention, note=False)
    with stubbed, torch.set_grad_enabled(grad):
        benchmark.pedantic(run, inputs, rounds=200, iterations=20, warmup_rounds=2)
