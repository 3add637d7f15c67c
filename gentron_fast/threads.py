"""The threads that a CPU computes with."""

import torch

from gentron_kernels.launch import cpu_library


def release_workers() -> bool:
    """End the OpenMP workers of the calling thread; its next computation begins new ones.

    For a thread that leaves the computing to another. OpenMP gives every thread that computes
    workers of its own, and as soon as there are more than cores, GNU's lets none of them wait for
    work awake: every operation of the other then wakes its workers up. False where the C++
    operators were not built, or where a computation is under way.
    """
    return cpu_library() and torch.ops.gentron.release_workers_cpu()
