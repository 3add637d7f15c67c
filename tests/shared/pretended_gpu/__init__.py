"""A CUDA machine that is not there: an H200 on which tensors are fake and launches do nothing.

What is decided before a GPU is reached can be seen without one: whether the kernels and graphs
compile, for which device, and what the host sends and waits for. `python -m pretended_gpu` is
pytest in a process that sees the H200.
"""

from pretended_gpu.device import ARCHITECTURE, PROPERTIES, is_pretended, loaded, pretend
from pretended_gpu.host import Event, Host
from pretended_gpu.inductor import architecture, cubins

__all__ = [
    "ARCHITECTURE",
    "PROPERTIES",
    "Event",
    "Host",
    "architecture",
    "cubins",
    "is_pretended",
    "loaded",
    "pretend",
]
