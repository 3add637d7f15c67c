"""The threads of a command: how many, and how long they spin where they wait for one another.

Both are for commands, which have their process to themselves: as a library gentron_fast leaves them
alone.
"""

import os
import re
from pathlib import Path


def processor() -> str:
    """The CPU's name; where the system does not tell it, its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return re.sub(r"\((R|TM)\)", "", found[1]).strip() if found else os.uname().machine


def available_cores(root: str = "/") -> int:
    """The CPUs that this process may keep busy: those it may run on (its affinity), and no more
    than the CPU quota of its cgroup, rounded up. root: where proc/ and sys/ lie."""
    runtime = _runtime()
    return len(os.sched_getaffinity(0)) if runtime is None else runtime.available_cores(root)


def settle_threads(root: str = "/") -> None:
    """Before a command computes: no more threads than `available_cores`, unless OMP_NUM_THREADS is
    set. From then on, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, OpenMP's threads sleep where
    they wait, in place of spinning, while other processes take the CPUs from this one."""
    runtime = _runtime()
    if runtime is not None:
        runtime.settle_threads(root)


def release_workers() -> bool:
    """End the OpenMP workers of the calling thread; its next computation begins new ones.

    For a thread that leaves the computing to another. OpenMP gives every thread that computes
    workers of its own, and as soon as there are more than cores, GNU's lets none of them wait for
    work awake: every operation of the other then wakes its workers up. False where the C++
    operators were not built, or where a computation is under way.
    """
    import torch

    from gentron_kernels.launch import cpu_library

    return cpu_library() and torch.ops.gentron.release_workers_cpu()


def _runtime():
    """The C++ that the program without Python has too (csrc/runtime/threads.h); None where it is
    not built: then torch's own number of threads stays, by affinity alone."""
    import torch  # noqa: F401  its libraries first

    try:
        from gentron_fast import _runtime
    except ImportError:
        return None
    return _runtime
