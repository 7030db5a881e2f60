"""Seeded, verifiable arithmetic problems with short worked traces, for studies on a small machine.

    spec = ProblemSpec(families=["digit_sum"], train=1000, heldout=200, ood=200, wrong=0.1)
    paths = write_splits(spec, "runs/digit_sum")

A family has a procedure a small model can learn and does not know. `python -m luffy.problems --family digit_sum`
prints samples. Deliberately absent: word problems, anything that needs a data set from elsewhere.
"""

from luffy.problems.spec import FAMILIES, GENERATOR_VERSION, SPLITS, ProblemSpec, make_row, rows
from luffy.problems.teachers import TEACHERS
from luffy.problems.write import write_splits

__all__ = [
    "FAMILIES",
    "GENERATOR_VERSION",
    "SPLITS",
    "TEACHERS",
    "ProblemSpec",
    "make_row",
    "rows",
    "write_splits",
]
