"""Families about expressions: chains of sums, nested operations, equations, sequences, units, gcd, polynomials."""

from luffy.problems.family import Family, Params, Pen, Solution, integer, number

# bigger unit, smaller unit, how many of the smaller make one of the bigger
UNITS = (
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("pounds", "ounces", 16),
)


def _draw_chain(rng, knobs) -> Params:
    return tuple(number(rng, knobs["digits"]) for _ in range(knobs["terms"]))


def _solve_chain(params: Params, pen: Pen) -> Solution:
    steps, total = [], params[0]
    for term in params[1:]:
        before, total = total, pen(total + term)
        steps.append(f"{before}+{term}={total}")
    return steps, str(total)


def _draw_nested(rng, knobs) -> Params:
    """First value, then (operator, operand) pairs: operators 0 is +, 1 is -, 2 is *; values stay in 1..99."""
    value = integer(rng, 2, 9)
    params = [value]
    last = 0
    for _ in range(knobs["depth"]):
        options = [0] * (value <= 90) + [1] * (value > 2) + [2] * (value <= 24 and last != 2)
        last = options[integer(rng, 0, len(options) - 1)]
        top = (9, min(9, value - 1), min(9, 99 // value))[last]
        operand = integer(rng, 2 if last == 2 else 1, top)
        value = (value + operand, value - operand, value * operand)[last]
        params += [last, operand]
    return tuple(params)


def _ask_nested(params: Params) -> str:
    text, pairs = str(params[0]), list(zip(params[1::2], params[2::2], strict=True))
    for i, (operator, operand) in enumerate(pairs):
        # Brackets only where precedence needs them keep the question short.
        if operator == 2 and i:
            text = f"({text})"
        text = f"{text}{'+-*'[operator]}{operand}"
    return f"What is {text}?"


def _solve_nested(params: Params, pen: Pen) -> Solution:
    steps, value = [], params[0]
    for operator, operand in zip(params[1::2], params[2::2], strict=True):
        before = value
        value = pen((value + operand, value - operand, value * operand)[operator])
        steps.append(f"{before}{'+-*'[operator]}{operand}={value}")
    return steps, str(value)


def _draw_linear(rng, knobs) -> Params:
    """The root, then the numbers on the left: coefficient, constant, coefficient, ..."""
    root = integer(rng, 2, 9)
    return (root, *(integer(rng, 2, 9) for _ in range(knobs["terms"])))


def _linear_right(params: Params) -> int:
    return params[0] * sum(params[1::2]) + sum(params[2::2])


def _ask_linear(params: Params) -> str:
    left = "+".join(f"{n}x" if i % 2 == 0 else str(n) for i, n in enumerate(params[1:]))
    return f"Solve {left}={_linear_right(params)} for x."


def _solve_linear(params: Params, pen: Pen) -> Solution:
    steps, slope, right = [], params[1], _linear_right(params)
    for coefficient in params[3::2]:
        before, slope = slope, pen(slope + coefficient)
        steps.append(f"{before}x+{coefficient}x={slope}x")
    for constant in params[2::2]:
        before, right = right, pen(right - constant)
        steps.append(f"{before}-{constant}={right}")
    root = pen(right // max(slope, 1))
    return [*steps, f"{right}/{slope}={root}"], str(root)


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
    while True:
        shared = integer(rng, 1, 12)
        b = shared * integer(rng, 2, 99 // shared)
        a = shared * integer(rng, 2, 99 // shared)
        if a > b and _euclid_length(a, b) == knobs["divisions"]:
            return a, b


def _solve_gcd(params: Params, pen: Pen) -> Solution:
    (a, b), steps = params, []
    while b:
        rest = pen(a % b)
        steps.append(f"{a} mod {b}={rest}")
        a, b = b, rest
    return steps, str(a)


def _draw_polynomial(rng, knobs) -> Params:
    return integer(rng, 2, 5), *(integer(rng, 1, 9) for _ in range(knobs["degree"] + 1))


def _ask_polynomial(params: Params) -> str:
    degree = len(params) - 2
    powers = ("", "x", *(f"x^{n}" for n in range(2, degree + 1)))
    text = "+".join(f"{c}{powers[degree - i]}" for i, c in enumerate(params[1:]))
    return f"What is {text} at x={params[0]}?"


def _solve_polynomial(params: Params, pen: Pen) -> Solution:
    x, value, *rest = params
    steps = [str(value)]
    for coefficient in rest:
        before, value = value, pen(value * x + coefficient)
        steps.append(f"{before}*{x}+{coefficient}={value}")
    return steps, str(value)


FAMILIES = (
    Family(
        name="addition_chain",
        knobs={"terms": (3, 4), "digits": (2, 2)},
        ood=(5, 6),
        draw=_draw_chain,
        ask=lambda p: f"What is {'+'.join(map(str, p))}?",
        solve=_solve_chain,
        key=lambda p: tuple(sorted(p)),
    ),
    Family(
        name="nested_expression",
        knobs={"depth": (3, 4)},
        ood=(5, 6),
        draw=_draw_nested,
        ask=_ask_nested,
        solve=_solve_nested,
    ),
    Family(
        name="linear_equation",
        knobs={"terms": (2, 3)},
        ood=(4, 5),
        draw=_draw_linear,
        ask=_ask_linear,
        solve=_solve_linear,
    ),
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
    Family(
        name="polynomial",
        knobs={"degree": (2, 2)},
        ood=(3, 4),
        draw=_draw_polynomial,
        ask=_ask_polynomial,
        solve=_solve_polynomial,
    ),
)
