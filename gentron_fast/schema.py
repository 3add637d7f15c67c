"""Types and ranges of what JSON files hold: a schema names fields, each with its kind."""

import reprlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

# No model is near these. What goes beyond them is a mistake, and would take hours or all memory.
MOST_LAYERS, MOST_WIDTH, MOST_TOKENS, MOST_TIMESTEPS = 1024, 2**16, 2**24, 10**5


class Kind(NamedTuple):
    """What a field holds, in words, and whether a value is such."""

    words: str
    fits: Callable[[object], bool]


Schema = Mapping[str, Kind]
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def whole(low: int, high: int) -> Kind:
    """Whole numbers from low to high."""
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def real(low: float, high: float) -> Kind:
    """Finite numbers from low to high."""
    return Kind(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
    )


def text(least: int, most: int) -> Kind:
    """Text of so many characters that UTF-8 can hold."""

    def fits(value) -> bool:
        if not isinstance(value, str) or not least <= len(value) <= most:
            return False
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True

    return Kind(f"text of {least} to {most} characters", fits)


def one_of(*words: str) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(words)}", lambda value: value in words)


def optional(kind: Kind) -> Kind:
    """The same, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


def several(kind: Kind, least: int, most: int) -> Kind:
    """A list of them."""
    count = f"{least}" if least == most else f"{least} to {most}"
    return Kind(
        f"a list of {count}, each {kind.words}",
        lambda value: (
            isinstance(value, list | tuple)
            and least <= len(value) <= most
            and all(map(kind.fits, value))
        ),
    )


def each(kind: Kind) -> Kind:
    """An object whose every value is of a kind."""
    return Kind(
        f"an object, each value {kind.words}",
        lambda value: isinstance(value, dict) and all(map(kind.fits, value.values())),
    )


def check(values: Mapping, schema: Schema, where: str = "") -> None:
    """ValueError, in one line, where a field that is there is of another kind than the schema's."""
    for name, kind in schema.items():
        if name in values and not kind.fits(values[name]):
            of = where and f" of {where}"
            raise ValueError(f"{name}{of} is {reprlib.repr(values[name])}, wanted {kind.words}")


def check_fields(values: Mapping, schema: Schema, where: str) -> None:
    """The same where every field of the schema must be there, and no other may."""
    if values.keys() != schema.keys():
        raise ValueError(f"{where} has {', '.join(sorted(values))}; wanted {', '.join(schema)}")
    check(values, schema, where)
