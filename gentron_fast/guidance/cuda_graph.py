"""A function of tensors, replayed as a CUDA graph, and when that is worth it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

# What a graph saves is the host's time for a block: some 24 launches, of 10 µs each with PyTorch's
# own work. The GPU needs longer than that from about 4 million elements on: at width 1152 a block
# of so many has 0.14 TFLOP (at 0.6 PFLOP/s 0.23 ms) and moves 0.3 GB beside (at 4.3 TB/s 0.08 ms).
# Predicted for an H200, not measured. Above it a graph would only hold its activations' memory.
MOST_ELEMENTS = 4 << 20
# A capture launches its step three times, waits for the GPU and empties the allocator's cache.
LEAST_STEPS = 6
Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


def is_bound_by_launches(tokens: int, width: int) -> bool:
    """Whether the host takes longer to launch a block on (tokens, width) than a GPU to run it."""
    return tokens * width <= MOST_ELEMENTS


def are_worth_capturing(graphs: int, steps: int) -> bool:
    """Whether so many graphs are replayed often enough for what their captures take."""
    return steps >= LEAST_STEPS * graphs


class ReplayedGraph:
    """`run` captured with inputs of one kind; its buffers are its own, and so is its result."""

    def __init__(self, run: Callable[..., Result], inputs: tuple[Tensor, ...]):
        self._inputs = [tensor.clone() for tensor in inputs]
        device = self._inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and fills caches, which no capture may do
                run(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # The stream names the device: the current one may be another.
        with torch.cuda.graph(self._graph, stream=stream):
            self._result = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Result:
        """The result for other values of the inputs; the next call overwrites it."""
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self._graph.replay()
        return self._result
