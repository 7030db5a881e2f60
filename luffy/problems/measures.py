"""Families about sequences, units of measure and common divisors."""

from luffy.problems.family import Family, Params, Pen, Solution, integer

# bigger unit, smaller unit, how many of the smaller make one of the bigger
UNITS = (
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("pounds", "ounces", 16),
)


def _draw_sequence(rng, knobs) -> Params:
    return integer(rng, 1, 20), integer(rng, 2, 9), knobs["position"]


def _solve_sequence(params: Params, pen: Pen) -> Solution:
    first, step, position = params
    gaps = pen(position - 1)
    rise = pen(gaps * step)
    last = pen(first + rise)
    return [f"step {step}", f"{position}-1={gaps}", f"{gaps}*{step}={rise}", f"{first}+{rise}={last}"], str(last)


def _draw_units(rng, knobs) -> Params:
    kind = integer(rng, 0, len(UNITS) - 1)
    return kind, knobs["amount"], integer(rng, 1, UNITS[kind][2] - 1)


def _ask_units(params: Params) -> str:
    big, small, _ = UNITS[params[0]]
    return f"How many {small} are {params[1]} {big} and {params[2]} {small}?"


def _solve_units(params: Params, pen: Pen) -> Solution:
    kind, amount, rest = params
    factor = UNITS[kind][2]
    whole = pen(amount * factor)
    total = pen(whole + rest)
    return [f"{amount}*{factor}={whole}", f"{whole}+{rest}={total}"], str(total)


def _euclid_length(a: int, b: int) -> int:
    return 0 if b == 0 else 1 + _euclid_length(b, a % b)


def _draw_gcd(rng, knobs) -> Params:
    for _ in range(20_000):
        shared = integer(rng, 1, 12)
        b = shared * integer(rng, 2, 99 // shared)
        a = shared * integer(rng, 2, 99 // shared)
        if a > b and _euclid_length(a, b) == knobs["divisions"]:
            return a, b
    raise ValueError(f"gcd: no pair below 100 takes {knobs['divisions']} divisions; 1 to 8 are possible")


def _solve_gcd(params: Params, pen: Pen) -> Solution:
    (a, b), steps = params, []
    while b:
        rest = pen(a % b)
        steps.append(f"{a} mod {b}={rest}")
        a, b = b, rest
    return steps, str(a)


FAMILIES = (
    Family(
        name="arithmetic_sequence",
        knobs={"position": (5, 12)},
        ood=(13, 20),
        draw=_draw_sequence,
        ask=lambda p: f"What is term {p[2]} of {p[0]}, {p[0] + p[1]}, {p[0] + 2 * p[1]}, ...?",
        solve=_solve_sequence,
    ),
    Family(
        name="unit_conversion",
        knobs={"amount": (2, 9)},
        ood=(10, 19),
        draw=_draw_units,
        ask=_ask_units,
        solve=_solve_units,
    ),
    Family(
        name="gcd",
        knobs={"divisions": (2, 3)},
        ood=(4, 5),
        draw=_draw_gcd,
        ask=lambda p: f"What is the greatest common divisor of {p[0]} and {p[1]}?",
        solve=_solve_gcd,
    ),
)
