"""The threads that a CPU computes with."""

import subprocess
import sys

# Threads of the system are counted around computations: by the main thread, which then releases its
# workers, and by one beside it.
RELEASED = """
import os, threading, torch
from gentron_fast.threads import release_workers

torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
alone = count()
numbers = torch.ones(1 << 20)
working = count()
assert release_workers()
for _ in range(1000):  # they end by themselves
    if count() == alone:
        break
    threading.Event().wait(0.01)
released = count()
numbers.exp()
print(working - alone, released - alone, count() - alone)
"""


def test_a_thread_lets_its_workers_go_and_has_them_again():
    told = subprocess.run([sys.executable, "-c", RELEASED], capture_output=True, text=True)
    assert told.stdout.split() == ["2", "0", "2"], told
