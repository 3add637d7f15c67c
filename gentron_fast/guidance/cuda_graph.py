"""A function of tensors, replayed as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


class ReplayedGraph:
    """`run` captured with inputs of one kind; its buffers are its own, and so is its result."""

    def __init__(self, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
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

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result for other values of the inputs; the next call overwrites it."""
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self._graph.replay()
        return self._result
