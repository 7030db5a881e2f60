"""Families about expressions: chains of sums, nested operations, linear equations, polynomials."""

from luffy.problems.family import Family, Params, Pen, Solution, integer, number


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
        name="polynomial",
        knobs={"degree": (2, 2)},
        ood=(3, 4),
        draw=_draw_polynomial,
        ask=_ask_polynomial,
        solve=_solve_polynomial,
    ),
)
