"""Accuracy on a set of problems: one answer each, graded by the verifier pool."""

import hashlib
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from luffy.data import Example
from luffy.distributed import World
from luffy.evaluation.statistics import wilson
from luffy.files import write_text
from luffy.prompts import PromptTemplate
from luffy.rewards import VerifierPool
from luffy.rollout.engine import Completion, Engine, Request, generate
from luffy.seeds import derive


@dataclass(slots=True, kw_only=True)
class Evaluation:
    name: str
    num_problems: int
    accuracy: float
    interval: tuple[float, float]
    """95 % Wilson interval over problems."""
    mean_tokens: float
    truncated: float
    """Fraction of answers cut off at the token limit."""
    timeouts: int
    by_source: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def record(self) -> dict[str, Any]:
        """Everything but the samples."""
        return {key: value for key, value in asdict(self).items() if key != "samples"}

    def scores(self) -> dict[str, float]:
        """Accuracy by source and their unweighted mean, under the names of LUFFY's logs."""
        by_source = {f"val/test_score/{source}": value for source, value in self.by_source.items()}
        return by_source | {"val/avg_score": fmean(self.by_source.values())}

    def write_samples(self, path: Path) -> None:
        import json

        write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples))


def digest_of(name: str, examples: list[Example]) -> str:
    """What tells these problems of a set from others: another has another."""
    problems = [(example.problem.id, example.prompt_ids, example.problem.answer) for example in examples]
    return hashlib.sha256(repr((name, problems)).encode()).hexdigest()[:16]


def recorded(line: dict[str, Any]) -> dict[str, Any]:
    """What `Evaluation.record` gave, of a line of evals.jsonl, which has more."""
    return {field.name: line[field.name] for field in fields(Evaluation) if field.name != "samples"}


def evaluate(
    name: str,
    examples: list[Example],
    engine: Engine,
    verifier: VerifierPool,
    template: PromptTemplate,
    *,
    temperature: float,
    max_tokens: int,
    seed: int = 0,
    world: World | None = None,
) -> Evaluation:
    """One answer to each problem; greedy at temperature 0. With a `world` every rank answers its share of them."""
    seeds = [derive(seed, "eval", index) for index in range(len(examples))]
    mine = examples if world is None else world.share(examples)
    requests = [
        Request(example.prompt_ids, 1, max_tokens, seed)
        for example, seed in zip(mine, seeds if world is None else world.share(seeds), strict=True)
    ]
    # a problem that the engine refuses has no answer, which is not a right one
    completions = [found or [Completion((), (), False)] for found in generate(engine, requests, temperature)]
    texts = [template.decode(answer.token_ids) for [answer] in completions]
    verdicts = verifier.grade([(text, ex.problem.answer) for text, ex in zip(texts, mine, strict=True)])
    judged = [(answer, text, verdict) for [answer], text, verdict in zip(completions, texts, verdicts, strict=True)]
    answers, texts, verdicts = map(list, zip(*(judged if world is None else world.gather(judged)), strict=True))
    correct = [verdict.reward >= 1 for verdict in verdicts]
    by_source: dict[str, list[bool]] = defaultdict(list)
    for example, right in zip(examples, correct, strict=True):
        by_source[example.problem.data_source].append(right)
    return Evaluation(
        name=name,
        num_problems=len(examples),
        accuracy=fmean(correct),
        interval=wilson(sum(correct), len(correct)),
        mean_tokens=fmean(len(answer.token_ids) for answer in answers),
        truncated=fmean(not answer.finished for answer in answers),
        timeouts=sum(verdict.status != "ok" for verdict in verdicts),
        by_source={source: fmean(right) for source, right in sorted(by_source.items())},
        samples=[
            {
                "id": example.problem.id,
                "question": example.problem.messages[-1]["content"],
                "response": text,
                "answer": example.problem.answer,
                "reward": verdict.reward,
                "verdict": verdict.status,
                "tokens": len(answer.token_ids),
                "finished": answer.finished,
            }
            for example, text, verdict, answer in zip(examples, texts, verdicts, answers, strict=True)
        ],
    )
