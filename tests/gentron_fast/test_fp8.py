"""fp8 projections: what rounding keeps, what is left as it is, and where it is refused."""

from copy import deepcopy

import pytest
import torch

from gentron_fast.fp8 import PROJECTIONS, fp8_rounded, use_fp8
from gentron_fast.generate import main


def test_rounding_keeps_three_bits_of_the_fraction_row_by_row():
    x = (
        torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        * 10.0 ** torch.arange(-3, 2)[:, None]
    )
    rounded = fp8_rounded(x)
    largest = x.abs().amax(1, keepdim=True)
    assert ((rounded - x).abs() <= x.abs() / 16 + largest / 448 / 1024).all()
    assert not torch.equal(rounded, x)
    torch.testing.assert_close(fp8_rounded(rounded), rounded)
    assert fp8_rounded(torch.zeros(1, 4)).eq(0).all()
    assert fp8_rounded(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_emulation_rounds_the_large_projections_alone(make_model, tiny_config):
    model = make_model(tiny_config, torch.float32)
    rounded = deepcopy(model)
    use_fp8(rounded, emulate=True)
    before, after = model.state_dict(), rounded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"blocks.{index}.{name}.weight"
        for index in range(tiny_config.depth)
        for name in PROJECTIONS
    }
    layer, exact = rounded.blocks[0].mlp.fc2, model.blocks[0].mlp.fc2
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    wanted = torch.nn.functional.linear(fp8_rounded(x), fp8_rounded(exact.weight), exact.bias)
    torch.testing.assert_close(layer(x), wanted)


def test_the_cpu_is_refused(make_model, tiny_config):
    with pytest.raises(
        ValueError, match=r"fp8 needs a GPU of compute capability 8\.9 or higher, not cpu"
    ):
        use_fp8(make_model(tiny_config, torch.bfloat16))


def test_the_command_line_refuses_in_one_line(capsys):
    assert main(["a star", "--fp8", "--dtype", "bfloat16", "--offload"]) == 2
    assert "--fp8 keeps the transformer on the GPU" in capsys.readouterr().err
    assert main(["a star", "--fp8"]) == 2
    assert "--fp8 goes with --dtype bfloat16, not float32" in capsys.readouterr().err
    assert main(["a star", "--fp8", "--dtype", "bfloat16", "--device", "cpu"]) == 2
    assert "fp8 needs a GPU" in capsys.readouterr().err
