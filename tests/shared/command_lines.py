"""Seeded command lines: options in any order, with values that fit them and values that do not."""

import random
from collections.abc import Iterator, Mapping, Sequence

VALUES = [
    *("", " ", "x", "-", "--", "0", "1", "2", "-1", "64", "60", "1e3", "nan", "inf", "-inf", "0.5"),
    *(
        "1e308",
        "9" * 30,
        "9" * 5000,
        "٣",
        "true",
        "none",
        "cpu",
        "cuda:99",
        "meta",
        "ddim",
        "euler",
    ),
    *("float32", "bfloat16", "/dev/null", "/dev/null/x", "/", ".", "..", "nowhere", "a" * 300),
    *("\udcff", "a\nb", "12:30", "{", "%s", "*", "[", "~", "'", "out/", "out.mp4", "out.png"),
]


def command_lines(
    options: Mapping[str, Sequence[str]], places: Sequence[Sequence[str]], seeds: range
) -> Iterator[list[str]]:
    """A command line for each seed.

    options: each with values that fit, none for one that takes none; places: of each positional
    argument the values that fit.
    """
    for seed in seeds:
        chance = random.Random(seed)
        fits = chance.choice([0.3, 0.7, 0.95])  # some get far, some not

        def value(fitting, chance=chance, fits=fits):
            return chance.choice(fitting if fitting and chance.random() < fits else VALUES)

        words = [value(fitting) for fitting in places if chance.random() < 0.9]
        for option in chance.sample(sorted(options), chance.randint(0, min(6, len(options)))):
            words.append(option)
            if options[option]:
                words += [value(options[option]) for _ in range(chance.choice([0, 1, 1, 1, 1, 2]))]
            elif chance.random() < 0.05:
                words.append(chance.choice(VALUES))
        yield words
