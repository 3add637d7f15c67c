"""Processes that are not to outlive the one that started them."""

import ctypes

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def signal_at_parents_end(number: int) -> None:
    """Have this process sent a signal once its parent has ended, also by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
