"""The graphs of compiled samplers go through torch.export and Inductor to machine code."""

from dataclasses import replace

import pretended_gpu
import pytest
import torch

from gentron_fast import PRESETS, GenTron
from gentron_fast.compiled.graphs import sampling_graphs
from gentron_fast.diffusion import SCHEDULER_CONFIG
from gentron_fast.solvers import make_table


def test_in_a_process_of_its_own(run_pretended):
    run_pretended(__file__)


def graphs(config, shape, max_batch=16, solver="dpm++"):
    """The graphs of a compiled sampler of bf16 weights on the GPU."""
    table = make_table(solver, SCHEDULER_CONFIG, 20)
    with pretended_gpu.Host():
        model = GenTron(replace(config, depth=2)).to("cuda", torch.bfloat16).requires_grad_(False)
        tokens = {"clip": 40, "t5": 40}
        return list(sampling_graphs(model, shape, table, max_batch, tokens))


@pytest.mark.parametrize("name", ["step-111"])
def test_a_graph_compiles(name, tmp_path):
    (graph,) = (g for g in graphs(PRESETS["small-T2V"], (4, 8, 8, 8)) if g.name == name)
    graph.compile(tmp_path / "graph.pt2")
    kernels = pretended_gpu.cubins(tmp_path / "graph.pt2")
    assert set(kernels.values()) == {pretended_gpu.ARCHITECTURE}
    assert {"_forward_kernel", "_guided_step_kernel"} <= set(kernels)
