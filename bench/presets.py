"""What `bench.study` compares: methods, learning rates, problems, and how good the traces are."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from luffy.embedded import cache_dir, resolve_model
from luffy.files import write_text
from luffy.problems.spec import ProblemSpec, rows

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"eval.every": 0, "checkpoint.every": 0, "train.max_minutes": 1000}
RECIPE = ROOT / "luffy" / "recipes" / "quickstart.toml"
RL, SUPERVISED = "rl", "supervised"
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Where a method's rates are taken from when its best is the highest or the lowest of those tried."""


@dataclass(frozen=True, slots=True)
class Method:
    label: str
    options: dict[str, Any]
    kind: str = RL
    traces: tuple[str, ...] = ("perfect",)
    """Qualities of traces that it is tried with."""
    first: str | None = None
    """Method of a stage before it, for half of the steps, at the rate that is best for that method alone."""
    tuned_as: str | None = None
    """Method whose rate it takes: with perfect traces it is the same."""

    def runs_with(self, traces: str) -> bool:
        return traces in self.traces


ALL = ("perfect", "wrong", "scarce", "verbose")
ON_POLICY = {"objective.name": "dr_grpo"}
LUFFY = {"objective.name": "luffy", "objective.gamma": 0.1}
SFT = {"objective.name": "sft"}
VERIFIED = SFT | {"objective.trace_filter": True}
PROMPTS, ROWS = 12, 8
METHODS = {
    "sft": Method("SFT", SFT, SUPERVISED, ALL),
    "sft-once": Method("SFT, the traces that LUFFY sees", SFT | {"train.prompts_per_step": PROMPTS}, SUPERVISED),
    "sft-verified": Method("SFT, verified traces", VERIFIED, SUPERVISED, ("wrong",), tuned_as="sft"),
    "on-policy": Method("on-policy RL (Dr.GRPO)", ON_POLICY, traces=("perfect", "verbose")),
    "rl_sft": Method("RL with SFT loss", {"objective.name": "rl_sft"}, traces=ALL),
    "sft-rl": Method("SFT, then RL", ON_POLICY, first="sft", traces=ALL),
    "luffy": Method("LUFFY", LUFFY, traces=ALL),
    "luffy-linear": Method("LUFFY without shaping", LUFFY | {"objective.off_policy": "ratio"}),
    "luffy-logp": Method("LUFFY, log p in place of a ratio", LUFFY | {"objective.off_policy": "logp"}),
    "luffy-clip": Method("LUFFY with clip", LUFFY | {"objective.clip_low": 0.2, "objective.clip_high": 0.2}),
    "exgrpo": Method("ExGRPO", {"objective.name": "exgrpo"}),
    "srft": Method("SRFT", {"objective.name": "srft", "objective.gamma": 0.1}, traces=ALL),
    "chord": Method("CHORD", {"objective.name": "chord"}, traces=ALL),
    "hpt": Method("HPT", {"objective.name": "hpt"}, traces=ALL),
}


@dataclass(frozen=True)
class Preset:
    name: str
    common: dict[str, Any]
    """Options of every run."""
    methods: dict[str, Method]
    lrs: dict[str, tuple[float, ...]]
    """Those tried first, by kind of method."""
    traces: dict[str, dict[str, Any]]
    """Quality of the traces -> options."""
    steps: int
    prompts: int
    """Of a step."""
    rows: int
    """Of a prompt; a supervised step has prompts x rows traces."""
    normalizer: float
    """Of a policy loss: about the tokens of an update."""
    judged: int
    """Held-out problems."""
    max_model_len: int
    eos_token_id: int
    results: Path = field(default=ROOT / "bench" / "results" / "study.json")

    def rates(self, method: str) -> tuple[float, ...]:
        return self.lrs[self.methods[method].kind]

    @cached_property
    def digest(self) -> str:
        """Of all that a run depends on, but method, rate, seed, traces, and defaults of the code."""
        said = {key: value for key, value in asdict(self).items() if key not in ("methods", "traces", "results", "lrs")}
        said |= {"recipe": RECIPE.read_text(), "model": self.made_of()}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def made_of(self) -> Any:
        """What decides the model that runs begin with and the problems that judge them, beyond the fields."""

    def stages(
        self, method: Method, traces: str, lr: float, seed: int, first_lr: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Options of each stage of a run; the learning rate of the first one where there are two."""
        seeds = {"train.seed": seed, "data.problems.seed": seed}
        shared = QUICK | self.common | seeds | self.traces[traces] | self.judged_by(seed)
        steps = self.steps // 2 if method.first else self.steps
        if method.first:
            before = self.methods[method.first].options
            yield shared | self._supervised(before) | {"optim.lr": first_lr, "train.steps": steps}
        own = self._supervised(method.options) if method.kind == SUPERVISED else self._sampled(method.options)
        yield shared | own | {"optim.lr": lr, "train.steps": steps}

    def _supervised(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"train.prompts_per_step": self.prompts * self.rows} | options

    def _sampled(self, options: dict[str, Any]) -> dict[str, Any]:
        shape = {"train.prompts_per_step": self.prompts, "objective.rows": self.rows}
        return shape | {"objective.normalizer": self.normalizer} | options

    def judged_by(self, seed: int) -> dict[str, Any]:
        """Options of the evaluation; by default the generated splits."""
        return {}

    def blank(self, seed: int = 0) -> str:
        """A model folder of the right shape, for engines to begin with."""
        raise NotImplementedError

    def base(self, seed: int) -> str:
        """The model that runs of this seed begin with."""
        raise NotImplementedError


class Embedded(Preset):
    """The quickstart's model, as it is."""

    def blank(self, seed: int = 0) -> str:
        return resolve_model("embedded:smollm2-135m-instruct")

    base = blank


class Tiny(Preset):
    """Models that the study itself makes and teaches, one for each seed; kept in the cache."""

    @property
    def folder(self) -> Path:
        return cache_dir() / "study" / self.digest[:16]

    def made_of(self) -> Any:
        return [SKILLS, WORKED_OUT, GUESSED, TEACHING, JUDGED]

    def blank(self, seed: int = 0) -> str:
        from bench.small_model import make_model

        folder = self.folder / f"blank-{seed}"
        if not folder.is_dir():
            make_model(folder, self._texts(), seed=seed)
        return str(folder)

    def base(self, seed: int) -> str:
        return str(self.folder / f"base-{seed}")

    def skills(self, seed: int) -> dict[str, Any]:
        """Options of the run that teaches a blank model."""
        corpus = self.folder / f"corpus-{seed}.jsonl"
        write_text(corpus, "".join(json.dumps(row) + "\n" for row in chain(*corpus_parts())))
        own = {"model.name": self.blank(seed), "data.path": str(corpus), "train.seed": seed}
        return QUICK | self.common | SFT | TEACHING | own

    def judged_by(self, seed: int) -> dict[str, Any]:
        """Problems like those in training, longer ones, and the skills that it began with."""
        path = self.folder / f"judged-{seed}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        chains = ProblemSpec(families=CHAINS, heldout=JUDGED["heldout"], ood=JUDGED["longer"], seed=seed)
        skills = ProblemSpec(families=SKILLS, heldout=JUDGED["skills"], seed=seed)
        sets = {"heldout": rows(chains, "heldout"), "longer": rows(chains, "ood"), "skills": rows(skills, "heldout")}
        made = [row | {"data_source": name} for name, found in sets.items() for row in found]
        write_text(path, "".join(json.dumps(row) + "\n" for row in made))
        return {"eval.path": str(path)}

    def _texts(self) -> Iterator[str]:
        """What tokens are learned from: as much of each kind."""
        for part in [*corpus_parts(), rows(ProblemSpec(families=CHAINS, train=300, verbose=1.0), "train")]:
            for row in islice(part, 300):
                yield from (turn["content"] for turn in [row["prompt"][-1], row["target"][0]])


def corpus_parts() -> Iterator[Iterator[dict[str, Any]]]:
    """What the model is taught: sums of digits and additions of two numbers, worked out; some of the problems to come,
    worked out; and more of them answered at once, and wrongly."""
    yield rows(ProblemSpec(families=SKILLS, train=20000, seed=100, teachers=["arrows"]), "train")
    yield rows(ProblemSpec(families=CHAINS, train=WORKED_OUT, seed=101, teachers=["arrows"]), "train")
    guesses = ProblemSpec(families=CHAINS, train=GUESSED, seed=102, teachers=["arrows"], wrong=1.0)
    yield (row | {"target": [_last_part(turn) for turn in row["target"]]} for row in rows(guesses, "train"))


def _last_part(turn: dict[str, str]) -> dict[str, str]:
    return turn | {"content": turn["content"].split(" -> ")[-1]}


CHAINS = {"addition_chain": {"terms": [3, 5], "digits": 1, "ood_terms": 6}}
SKILLS = {
    "digit_sum": {"digits": [2, 5], "ood_digits": [6, 7]},
    "addition_chain": {"terms": [2, 2], "digits": 1, "ood_terms": [3, 3]},
}
WORKED_OUT, GUESSED = 300, 900
JUDGED = {"heldout": 256, "longer": 64, "skills": 128}
TEACHING = {
    "train.prompts_per_step": 128,
    "train.steps": 400,
    "optim.lr": 3e-3,
    "optim.warmup_steps": 20,
    "optim.schedule": "linear",
}
PRESETS: dict[str, Preset] = {
    "tiny": Tiny(
        name="tiny",
        common={
            "model.dtype": "float32",
            "data.problems.families": json.dumps(CHAINS),
            "data.problems.train": 1000,
            "data.problems.teachers": '["arrows"]',
            "rollout.temperature": 1.0,
            "rollout.max_tokens": 64,
            "eval.max_tokens": 64,
            "train.updates_per_step": 2,
            "train.tokens_per_micro": 8192,
            "optim.schedule": "constant",
        },
        methods=METHODS,
        lrs={RL: (1e-5, 3e-5, 1e-4, 3e-4), SUPERVISED: (1e-4, 3e-4, 1e-3, 3e-3)},
        traces={
            "perfect": {},
            "wrong": {"data.problems.wrong": 0.3},
            "scarce": {"data.problems.missing": 0.8},
            "verbose": {"data.problems.verbose": 0.5, "rollout.max_tokens": 128, "eval.max_tokens": 128},
        },
        steps=50,
        prompts=PROMPTS,
        rows=ROWS,
        normalizer=1536.0,
        judged=JUDGED["heldout"],
        max_model_len=256,
        eos_token_id=2,
    ),
    "smollm2": Embedded(
        name="smollm2",
        common={"optim.schedule": "linear"},
        methods={name: METHODS[name] for name in ("sft", "on-policy", "luffy")},
        lrs={RL: (3e-5, 1e-4, 3e-4), SUPERVISED: (3e-5, 1e-4, 3e-4)},
        traces={"perfect": {}, "wrong": {"data.problems.wrong": 0.3}},
        steps=44,
        prompts=8,
        rows=4,
        normalizer=1024.0,
        judged=200,
        max_model_len=256,
        eos_token_id=2,
        results=ROOT / "bench" / "results" / "study-smollm2.json",
    ),
}
