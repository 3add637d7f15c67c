"""What a GPU would have met before any ran this code, and the test that fails if it comes back."""

import ast
import contextlib
from pathlib import Path

import pretended_gpu
import pytest
import torch

TESTS = Path(__file__).parents[1]
FOUND = {
    "a kernel names what Inductor does not copy": "kernels/test_launch.py::"
    "test_a_kernel_names_nothing_that_inductor_does_not_copy",
    "a bool is read as bits in a compiled block": "cuda/test_graphs.py::"
    "test_a_compiled_block_trains",
    "a kernel wants more shared memory than a block has": "kernels/test_layernorm_modulate.py::"
    "test_kernels_compile_without_spills",
    "the GPU run does not fit its minutes": "test_bench.py::"
    "test_the_gpu_run_is_rehearsed_and_fits_its_minutes",
    "stores between loads serialise them": "kernels/test_predictions.py::"
    "test_the_page_tells_of_every_aim_and_of_loads_before_stores",
    "a CUDA graph is captured on another device": "cuda/test_faults.py::"
    "test_a_graph_is_captured_on_the_device_of_its_inputs",
    "-lcuda is not found": "gentron_fast/compiled/test_compilation.py::"
    "test_a_graph_for_cuda_links_with_the_driver_that_is_loaded",
    "a step's rows begin where a graph would copy them": "gentron_fast/test_export.py::"
    "test_one_plan_three_users",
    "the export guards on the batch": "cuda/test_graphs.py::test_the_graphs_compile",
    "a step of sampling copies or waits": "cuda/test_host.py::test_the_guided_loop",
    "a step of training copies or waits": "cuda/test_host.py::test_a_micro_step_of_training",
    "the host takes longer for a call than the plain calls do": "kernels/test_kept_launches.py::"
    "test_the_host_cost_is_that_of_the_plain_calls",
    "parts of a sub-layer's output are joined by a copy": "cuda/test_graphs.py::"
    "test_the_graphs_compile",
    "kernels are compiled for other strides than those of calls": "cuda/test_kernels.py::"
    "test_the_kernels_of_real_calls",
}


def test_in_a_process_of_its_own(run_pretended):
    run_pretended(__file__)


@pytest.mark.parametrize("fault", FOUND)
def test_each_has_its_test(fault):
    file, _, name = FOUND[fault].partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_graph_is_captured_on_the_device_of_its_inputs(monkeypatch):
    """cuda:1, while cuda:0 is the current one."""
    from gentron_fast.guidance.cuda_graph import ReplayedGraph

    captured = []

    def capture(graph, stream=None, **_):
        captured.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", capture)
    with pretended_gpu.Host():
        x = torch.rand(2).to("cuda:1")
        graph = ReplayedGraph(lambda x: x + 1, (x,))
        assert graph(x).device == x.device
    assert [stream.device for stream in captured] == [x.device]
