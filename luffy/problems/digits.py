"""Families about the digits of numbers: sums, counts, bases, remainders, long multiplication."""

from luffy.problems.family import Family, Params, Pen, Solution, integer, number


def _solve_digit_sum(params: Params, pen: Pen) -> Solution:
    digits = [int(c) for c in str(params[0])]
    steps, total = [], digits[0]
    for digit in digits[1:]:
        before, total = total, pen(total + digit)
        steps.append(f"{before}+{digit}={total}")
    return steps, str(total)


def _draw_count(rng, knobs) -> Params:
    value = number(rng, knobs["digits"])
    digits = str(value)
    # Mostly a digit that occurs, else the answer is 0 too often to teach anything.
    wanted = int(digits[integer(rng, 0, len(digits) - 1)]) if rng.random() < 0.85 else integer(rng, 0, 9)
    return value, wanted


def _solve_count(params: Params, pen: Pen) -> Solution:
    value, wanted = params
    steps, count = [], 0
    for c in str(value):
        count = pen(count + (int(c) == wanted))
        steps.append(f"{c}:{count}")
    return steps, str(count)


def _draw_bits(rng, knobs) -> Params:
    bits = knobs["bits"]
    return (integer(rng, 2 ** (bits - 1), 2**bits - 1),)


def _solve_to_decimal(params: Params, pen: Pen) -> Solution:
    bits = f"{params[0]:b}"
    steps, value = [bits[0]], 1
    for bit in bits[1:]:
        before, value = value, pen(2 * value + int(bit))
        steps.append(f"{before}*2+{bit}={value}")
    return steps, str(value)


def _solve_to_binary(params: Params, pen: Pen) -> Solution:
    rest, steps, bits = params[0], [], ""
    while rest:
        half = pen(rest // 2)
        steps.append(f"{rest}/2={half} r{rest % 2}")
        rest, bits = half, f"{rest % 2}{bits}"
    return [*steps, f"backwards {bits}"], bits


def _draw_remainder(rng, knobs) -> Params:
    return number(rng, knobs["digits"]), integer(rng, 3, 9)


def _solve_remainder(params: Params, pen: Pen) -> Solution:
    value, divisor = params
    steps, rest = [], 0
    for c in str(value):
        here = 10 * rest + int(c)
        rest = pen(here % divisor)
        steps.append(f"{here}-{here - here % divisor}={rest}")
    return steps, str(rest)


def _draw_product(rng, knobs) -> Params:
    # The longer factor first: its length is the difficulty whichever way round the question is read.
    return number(rng, knobs["digits"]), number(rng, min(knobs["digits"], knobs["other_digits"]))


def _places(value: int) -> list[int]:
    """207 -> [200, 7]: the parts of long multiplication, zeros left out."""
    text = str(value)
    return [int(c) * 10 ** (len(text) - 1 - i) for i, c in enumerate(text) if c != "0"]


def _solve_product(params: Params, pen: Pen) -> Solution:
    steps: list[str] = []
    total = None
    for right in _places(params[1]):
        for left in _places(params[0]):
            part = pen(left * right)
            steps.append(f"{left}*{right}={part}")
            if total is None:
                total = part
                continue
            before, total = total, pen(total + part)
            steps.append(f"{before}+{part}={total}")
    return steps, str(total)


FAMILIES = (
    Family(
        name="digit_sum",
        knobs={"digits": (4, 7)},
        ood=(8, 10),
        draw=lambda rng, knobs: (number(rng, knobs["digits"]),),
        ask=lambda p: f"What is the sum of the digits of {p[0]}?",
        solve=_solve_digit_sum,
    ),
    Family(
        name="count_digit",
        knobs={"digits": (5, 8)},
        ood=(9, 11),
        draw=_draw_count,
        ask=lambda p: f"How many times does {p[1]} appear in {p[0]}?",
        solve=_solve_count,
    ),
    Family(
        name="binary_to_decimal",
        knobs={"bits": (5, 7)},
        ood=(8, 9),
        draw=_draw_bits,
        ask=lambda p: f"Convert binary {p[0]:b} to decimal.",
        solve=_solve_to_decimal,
    ),
    Family(
        name="decimal_to_binary",
        knobs={"bits": (4, 6)},
        ood=(7, 8),
        draw=_draw_bits,
        ask=lambda p: f"Convert {p[0]} to binary.",
        solve=_solve_to_binary,
    ),
    Family(
        name="remainder",
        knobs={"digits": (3, 5)},
        ood=(6, 7),
        draw=_draw_remainder,
        ask=lambda p: f"What is the remainder of {p[0]} divided by {p[1]}?",
        solve=_solve_remainder,
    ),
    Family(
        name="product",
        knobs={"digits": (2, 3), "other_digits": (1, 1)},
        ood=(4, 5),
        draw=_draw_product,
        ask=lambda p: f"What is {p[0]} times {p[1]}?",
        solve=_solve_product,
        key=lambda p: tuple(sorted(p)),
    ),
)
