"""Few cases that try every pair of options together."""

import itertools
import random


def pairwise(options: dict[str, tuple], without=lambda case: False) -> list[dict]:
    """Cases in which every value of an option meets every value of every other.

    without: whether a case, of which only some options may be given, must not occur.
    """
    draw = random.Random(0)
    names = list(options)
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(options[a], options[b])
        if not without({a: x, b: y})
    }

    def covered(case: dict) -> set:
        return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)} & missing

    cases = []
    while missing:
        wanted = sorted(missing, key=lambda pair: sorted(map(str, pair)))[0]
        candidates = [
            {name: draw.choice(values) for name, values in options.items()} | dict(wanted)
            for _ in range(30)
        ]
        candidates = [case for case in candidates if not without(case)]
        if candidates:
            best = max(candidates, key=lambda case: len(covered(case)))
            missing -= covered(best)
            cases.append(best)
    return cases
