"""What a caller gives: Python's numbers and numpy's, one value or any iterable of them, are taken;
everything else is a ValueError of one line."""

import math
import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gentron_fast.config import MAX_SIDE


def whole(name: str, value, low: int, high: int) -> int:
    """A whole number from low to high."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        got = reprlib.repr(value)
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {got}")
    return number


def real(name: str, value) -> float:
    """A finite number."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {reprlib.repr(value)}")
    return number


def numbers(name: str, value) -> Tensor:
    """Finite numbers, one or many of any shape, as fp64 on the CPU."""
    if isinstance(value, Iterable) and not hasattr(value, "__array__"):  # a generator, a list
        value = list(several(name, value))
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError):
        tensor = None
    if tensor is None or not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be a number, got {reprlib.repr(value)}")
    return tensor


def several(name: str, value) -> list:
    """What an iterable gives; text and None are none."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be one or many in a row, got {reprlib.repr(value)}")
    try:
        return list(value)
    except TypeError:  # a tensor or an array of no dimension
        return [value]


def texts(name: str, value) -> list[str]:
    """One text or many."""
    found = [value] if isinstance(value, str) else several(name, value)
    for text in found:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {reprlib.repr(text)}")
    return found


def seeds(value, count: int) -> list[int] | int:
    """A seed, or as many as there are clips, each from 0 to 2**64 - 1."""
    most = 2**64 - 1
    try:
        operator.index(value)
    except TypeError:
        found = [whole("a seed", seed, 0, most) for seed in several("seed", value)]
        if len(found) != count:
            raise ValueError(f"{len(found)} seeds for {count} clips") from None
        return found
    return whole("seed", value, 0, most)


def size(value) -> tuple[int, int]:
    """Height and width in pixels; one number is both."""
    try:
        sides = [operator.index(value)] * 2
    except TypeError:
        sides = several("size", value)
    if len(sides) != 2:
        raise ValueError(f"size must be height and width, got {reprlib.repr(sides)}")
    height, width = (whole("a side of size", side, 1, MAX_SIDE) for side in sides)
    return height, width


def not_learnt(
    learnt: Mapping[str, Sequence[float]], scales: Mapping[str, float | Tensor]
) -> list[str]:
    """A line for each guidance, by name, that lies outside of what a distilled model was trained
    with, `learnt`: the lowest and the highest."""
    told = []
    for name, scale in scales.items():
        if name not in learnt:
            continue
        (low, high), asked = learnt[name], torch.as_tensor(scale)
        outside = asked[(asked < low) | (asked > high)]
        if len(outside):
            told.append(
                f"the model was distilled with {name} from {low:g} to {high:g}, "
                f"and may not know {outside[0]:g}"
            )
    return told
