"""Which problems a data set holds: families, counts, splits, and how imperfect the teacher is.

Problem `index` of a split is a pure function of (spec, split, index). The question, each kind of noise and the choice
of teacher have a random stream each, so turning a noise knob never changes a question.

Splits are disjoint by construction: a stable hash of a question's canonical key says whether it belongs to `train` or
`heldout`, whatever the seed; `ood` questions are harder than any training question of their family. A question may
occur twice within one split when its family is small.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luffy.problems import algebra, digits, measures
from luffy.problems.family import Family, Params, Pen, Range, integer, solve_wrong
from luffy.problems.teachers import TEACHERS, VERBOSE, write_trace

GENERATOR_VERSION = 1
FAMILIES: dict[str, Family] = {
    family.name: family for family in (*digits.FAMILIES, *algebra.FAMILIES, *measures.FAMILIES)
}
SPLITS = ("train", "heldout", "ood")
HELDOUT_SHARE = 0.25
MAX_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSpec:
    """What to generate.

    families: names, or name -> {knob: (low, high) or one number}, inclusive; `ood_<first knob>` sets the harder range.
    train, heldout, ood: number of problems in each split.
    wrong, missing, verbose: fractions of training problems whose trace ends wrong, is absent, or is long-winded.
    teachers: styles mixed evenly, names of `TEACHERS`. traces: of a training problem, each of another teacher.
    suffix: added to every question. system: text of a system turn, none if empty.
    think: traces put their steps between think tags, as the `train` grader demands.
    Raises ValueError for an unknown name or an impossible range.
    """

    families: Mapping[str, Mapping[str, int | Sequence[int]]] | Sequence[str] = ("digit_sum",)
    train: int = 1000
    heldout: int = 200
    ood: int = 200
    seed: int = 0
    wrong: float = 0.0
    missing: float = 0.0
    verbose: float = 0.0
    teachers: Sequence[str] = ("terse",)
    traces: int = 1
    suffix: str = " Put the answer in \\boxed{}."
    system: str = ""
    think: bool = False

    def __post_init__(self) -> None:
        if not self.families:
            raise ValueError("ProblemSpec: families must name at least one family")
        for name in self.families:
            self.ranges(name)
        if not self.teachers:
            raise ValueError("ProblemSpec: teachers must name at least one teacher")
        for teacher in self.teachers:
            if teacher not in TEACHERS:
                raise ValueError(f"ProblemSpec: teachers must be among {', '.join(TEACHERS)}, got {teacher!r}")
        if not 1 <= self.traces <= (most := len(set(self.teachers))):
            raise ValueError(f"ProblemSpec: traces must be 1 to the number of teachers, got {self.traces} of {most}")
        for field in ("wrong", "missing", "verbose"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"ProblemSpec: {field} must be a fraction in [0, 1], got {getattr(self, field)}")
        for split in SPLITS:
            if getattr(self, split) < 0:
                raise ValueError(f"ProblemSpec: {split} must be a count >= 0, got {getattr(self, split)}")

    def ranges(self, name: str) -> tuple[dict[str, Range], Range]:
        """(training range of each knob, ood range of the first knob) of a family, with this spec's overrides."""
        family = FAMILIES.get(name)
        if family is None:
            raise ValueError(f"ProblemSpec: families must be among {', '.join(FAMILIES)}, got {name!r}")
        knobs, ood = dict(family.knobs), family.ood
        given = self.families[name] if isinstance(self.families, Mapping) else {}
        for knob, value in given.items():
            bounds = (value, value) if isinstance(value, int) else value
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"ProblemSpec: {name}.{knob} must be (low, high) with 1 <= low <= high, got {bounds}")
            if knob == f"ood_{family.difficulty}":
                ood = (bounds[0], bounds[1])
            elif knob in knobs:
                knobs[knob] = (bounds[0], bounds[1])
            else:
                known = ", ".join([*knobs, f"ood_{family.difficulty}"])
                raise ValueError(f"ProblemSpec: {name} has the knobs {known}, got {knob!r}")
        if self.ood and ood[0] <= knobs[family.difficulty][1]:
            raise ValueError(
                f"ProblemSpec: {name}.ood_{family.difficulty} must lie above the training range "
                f"{knobs[family.difficulty]}, got {ood}"
            )
        return knobs, ood

    def canonical(self) -> dict[str, Any]:
        """The spec as plain JSON values with every range spelled out; equal specs give equal dicts."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        ranges = {name: self.ranges(name) for name in self.families}
        plain["families"] = {
            name: {**{knob: list(bounds) for knob, bounds in knobs.items()}, "ood": list(ood)}
            for name, (knobs, ood) in ranges.items()
        }
        plain["teachers"] = list(self.teachers)
        return plain

    def fingerprint(self) -> str:
        """Hex digest of the canonical spec and the generator's version: equal digests mean equal data."""
        # Key order is kept, not sorted: the order of families decides which one an index draws.
        text = json.dumps([GENERATOR_VERSION, self.canonical()])
        return hashlib.sha256(text.encode()).hexdigest()


def _stream(*key: object) -> random.Random:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def question_split(family: Family, params: Params) -> str:
    """`train` or `heldout` for an in-distribution question: fixed by the question alone, not by any seed."""
    return "heldout" if _stream("split", family.name, family.key(params)).random() < HELDOUT_SHARE else "train"


def _draw(spec: ProblemSpec, split: str, index: int) -> tuple[Family, int, Params]:
    rng = _stream("question", spec.seed, split, index)
    names = list(spec.families)
    family = FAMILIES[names[integer(rng, 0, len(names) - 1)]]
    knobs, ood = spec.ranges(family.name)
    if split == "ood":
        knobs[family.difficulty] = ood
    for _ in range(MAX_DRAWS):
        values = {knob: integer(rng, low, high) for knob, (low, high) in knobs.items()}
        params = family.draw(rng, values)
        if split == "ood" or question_split(family, params) == split:
            return family, values[family.difficulty], params
    raise ValueError(f"ProblemSpec: {family.name} has no {split} question with knobs {knobs}; widen a range")


def _chance(spec: ProblemSpec, noise: str, split: str, *key: int) -> bool:
    return split == "train" and _stream(noise, spec.seed, split, *key).random() < getattr(spec, noise)


def _trace(
    spec: ProblemSpec, split: str, index: int, family: Family, params: Params, number: int
) -> tuple[str, str, bool]:
    """(text, teacher, whether it ends wrong) of one of a problem's traces; each goes wrong or on and on by itself."""
    key = (index, number) if number else (index,)
    first = integer(_stream("teacher", spec.seed, split, index), 0, len(spec.teachers) - 1)
    order = list(dict.fromkeys([*spec.teachers[first:], *spec.teachers[:first]]))
    teacher = VERBOSE if _chance(spec, "verbose", split, *key) else order[number]
    steps, answer = family.solve(params, Pen())
    if wrong := _chance(spec, "wrong", split, *key):
        steps, answer = solve_wrong(family, params, _stream("slip", spec.seed, split, *key))
    return write_trace(teacher, steps, answer, think=spec.think), teacher, wrong


def make_row(spec: ProblemSpec, split: str, index: int) -> dict[str, Any]:
    """Problem `index` of a split, as one row of the training schema. Noise applies to `train` only."""
    family, difficulty, params = _draw(spec, split, index)

    missing = _chance(spec, "missing", split, index)
    truth = family.solve(params, Pen())[1]
    told = [] if missing else [_trace(spec, split, index, family, params, number) for number in range(spec.traces)]
    texts, teachers, wrong = map(list, zip(*told, strict=True)) if told else ([], [], [])
    turns = [{"content": spec.system, "role": "system"}] if spec.system else []
    return {
        "data_source": f"luffy/{family.name}",
        "prompt": [*turns, {"content": family.ask(params) + spec.suffix, "role": "user"}],
        "target": [{"content": texts[0], "role": "assistant"}] if texts else None,
        "target_lst": texts[1:],
        "target_teachers": teachers,
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {
            "index": index,
            "split": split,
            "family": family.name,
            "difficulty": difficulty,
            "teacher": teachers[0] if teachers else "",
            "wrong": any(wrong),
        },
    }


def rows(spec: ProblemSpec, split: str) -> Iterator[dict[str, Any]]:
    """All rows of a split in order. Raises ValueError for a split that is none."""
    if split not in SPLITS:
        raise ValueError(f"rows: split must be among {', '.join(SPLITS)}, got {split!r}")
    return (make_row(spec, split, index) for index in range(getattr(spec, split)))
