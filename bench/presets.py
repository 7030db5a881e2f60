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
RL, SUPERVISED = "rl", "supervised"


@dataclass(frozen=True, slots=True)
class Method:
    label: str
    options: dict[str, Any]
    kind: str = RL
    traces: tuple[str, ...] = ("perfect",)
    """Qualities of traces that it is tried with."""
    first: dict[str, Any] | None = None
    """A supervised stage for half of the steps before it."""

    def runs_with(self, traces: str) -> bool:
        return traces in self.traces


ALL = ("perfect", "wrong", "scarce", "verbose")
ON_POLICY = {"objective.name": "dr_grpo"}
LUFFY = {"objective.name": "luffy", "objective.gamma": 0.1}
SFT = {"objective.name": "sft"}
VERIFIED = SFT | {"objective.trace_filter": True}
METHODS = {
    "sft": Method("SFT", SFT, SUPERVISED, ALL),
    "sft-verified": Method(
        "SFT, verified traces", SFT | {"objective.trace_filter": True}, SUPERVISED, ("perfect", "wrong")
    ),
    "on-policy": Method("on-policy RL (Dr.GRPO)", ON_POLICY),
    "rl_sft": Method("RL with SFT loss", {"objective.name": "rl_sft"}, traces=ALL),
    "sft-rl": Method("SFT, then RL", ON_POLICY, first=SFT, traces=ALL),
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
    """Those tried, by kind of method."""
    traces: dict[str, dict[str, Any]]
    """Quality of the traces -> options."""
    first_lr: float
    """Of the supervised stage before RL: what plain SFT did best with."""
    steps: int
    prompts: int
    """Of a step."""
    rows: int
    """Of a prompt; a supervised step has prompts x rows traces."""
    normalizer: float
    """Of a policy loss: about the tokens of an update."""
    max_model_len: int
    eos_token_id: int
    results: Path = field(default=ROOT / "bench" / "results" / "study.json")

    def rates(self, method: str) -> tuple[float, ...]:
        return self.lrs[self.methods[method].kind]

    @cached_property
    def digest(self) -> str:
        said = {key: value for key, value in asdict(self).items() if key not in ("methods", "traces", "results", "lrs")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def stages(self, method: Method, traces: str, lr: float, seed: int) -> Iterator[dict[str, Any]]:
        """Options of each stage of a run."""
        seeds = {"train.seed": seed, "data.problems.seed": seed}
        shared = QUICK | self.common | seeds | self.traces[traces] | self.judged_by(seed)
        steps = self.steps // 2 if method.first else self.steps
        if method.first:
            yield shared | self._supervised(method.first) | {"optim.lr": self.first_lr, "train.steps": steps}
        own = self._supervised(method.options) if method.kind == SUPERVISED else self._sampled(method.options)
        yield shared | own | {"optim.lr": lr, "train.steps": steps}

    def _supervised(self, options: dict[str, Any]) -> dict[str, Any]:
        return options | {"train.prompts_per_step": self.prompts * self.rows}

    def _sampled(self, options: dict[str, Any]) -> dict[str, Any]:
        shape = {"train.prompts_per_step": self.prompts, "objective.rows": self.rows}
        return shape | {"objective.normalizer": self.normalizer} | options

    def judged_by(self, seed: int) -> dict[str, Any]:
        """Options of the evaluation; by default the generated splits."""
        return {}

    def blank(self) -> str:
        """A model folder of the right shape, for engines to begin with."""
        raise NotImplementedError

    def base(self) -> str:
        """The model that every run begins with."""
        raise NotImplementedError


class Embedded(Preset):
    """The quickstart's model, as it is."""

    def blank(self) -> str:
        return resolve_model("embedded:smollm2-135m-instruct")

    base = blank


class Tiny(Preset):
    """A model that the study itself makes and teaches; kept in the cache."""

    @property
    def folder(self) -> Path:
        return cache_dir() / "study" / self.digest[:16]

    def blank(self) -> str:
        from bench.small_model import make_model

        folder = self.folder / "blank"
        if not folder.is_dir():
            make_model(folder, self._texts(), seed=0)
        return str(folder)

    def base(self) -> str:
        return str(self.folder / "base")

    def skills(self) -> dict[str, Any]:
        """Options of the run that teaches the blank model."""
        corpus = self.folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in chain(*corpus_parts())))
        return QUICK | self.common | SFT | TEACHING | {"model.name": self.blank(), "data.path": str(corpus)}

    def judged_by(self, seed: int) -> dict[str, Any]:
        """Problems like those in training, longer ones, and the skills that it began with."""
        path = self.folder / f"judged-{seed}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        chains = ProblemSpec(families=CHAINS, heldout=256, ood=64, seed=seed)
        skills = ProblemSpec(families=SKILLS, heldout=128, seed=seed)
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
        first_lr=3e-4,
        traces={
            "perfect": {},
            "wrong": {"data.problems.wrong": 0.3},
            "scarce": {"data.problems.missing": 0.8},
            "verbose": {"data.problems.verbose": 0.5, "rollout.max_tokens": 128, "eval.max_tokens": 128},
        },
        steps=50,
        prompts=12,
        rows=8,
        normalizer=1536.0,
        max_model_len=256,
        eos_token_id=2,
    ),
    "smollm2": Embedded(
        name="smollm2",
        common={"optim.schedule": "linear"},
        methods={name: METHODS[name] for name in ("sft", "on-policy", "luffy")},
        lrs={RL: (4e-5, 8e-5, 1.6e-4), SUPERVISED: (4e-5, 8e-5, 1.6e-4)},
        first_lr=8e-5,
        traces={"perfect": {}, "wrong": {"data.problems.wrong": 0.3}},
        steps=44,
        prompts=8,
        rows=4,
        normalizer=1024.0,
        max_model_len=256,
        eos_token_id=2,
        results=ROOT / "bench" / "results" / "study-smollm2.json",
    ),
}
