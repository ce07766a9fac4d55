"""Pairwise option tables: every pair of option values occurs in at least one case."""

from itertools import combinations, product


def pairwise(**options: list) -> list[dict]:
    """A short list of dicts, one value for each option, that covers all pairs of values (greedy)."""
    names = list(options)
    missing = {
        (a, i, b, j)
        for a, b in combinations(names, 2)
        for i, j in product(range(len(options[a])), range(len(options[b])))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing, key=lambda m: (names.index(m[0]), m[1], names.index(m[2]), m[3]))
        chosen = {a: i, b: j}
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    range(len(options[name])), key=lambda v: _gain(names, chosen, name, v, missing)
                )
        missing -= {(a, chosen[a], b, chosen[b]) for a, b in combinations(names, 2)}
        cases.append({name: options[name][chosen[name]] for name in names})
    return cases


def _gain(names, chosen, name, value, missing) -> int:
    """How many missing pairs `value` would cover with what is chosen already."""
    gain = 0
    for other, index in chosen.items():
        first, second = (name, value), (other, index)
        if names.index(other) < names.index(name):
            first, second = second, first
        gain += (*first, *second) in missing
    return gain


def case_id(case: dict) -> str:
    """A readable test id."""
    return "-".join(f"{k}={v}" for k, v in case.items())
