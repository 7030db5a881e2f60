"""`luffy eval`: models on benchmarks, several answers to each problem."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luffy.commands.arguments import (
    add_command,
    add_json,
    add_problems,
    add_quiet,
    add_sampling,
    opening_options,
    positive,
)
from luffy.errors import UserError, user_errors
from luffy.evaluation.benchmarks import NAMES, SUITES, benchmarks_in
from luffy.opening import Opened, language_config, open_model, positions_of, start_engine, start_servers
from luffy.seeds import derive
from luffy.wording import counted

NO_LIMIT = 1 << 30
SHOWN = 5
BLOCK = 64
"""Completions that are sampled together on a CPU, and at most lost by an interruption."""


def add_eval(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        run_eval,
        help="accuracy of models on problems with known answers",
        description="Sample answers to every problem, grade them, and say how right they are, with intervals. What is "
        "there in DIR already is not asked again. Rows that repeat a problem count as further answers to it.",
        examples=(
            "luffy eval --model runs/quickstart --data problems.parquet --n 4 --report report.html",
            "luffy eval --suite math --model runs/mine Qwen/Qwen2.5-Math-7B --max-tokens 8192",
            "luffy eval --suite quick --limit 20 --temperature 0 --json",
            "luffy eval --suite ood --model runs/mine --servers 2 --devices 0 1 --shuffle-options",
        ),
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="SOURCE", help="parquet or JSONL files, folders, dataset ids"
    )
    parser.add_argument(
        "--suite", nargs="+", default=[], metavar="NAME", help=f"{', '.join(SUITES)}, or benchmarks: {', '.join(NAMES)}"
    )
    parser.add_argument("--shuffle-options", action="store_true", help="of a suite's multiple choice, by --seed")
    add_problems(parser, "rows of each")
    add_sampling(parser, models=True)
    parser.add_argument(
        "--pass-at", type=positive, nargs="+", default=[], metavar="K", help="unbiased pass@k, k up to --n"
    )
    parser.add_argument("--servers", type=positive, metavar="N", help="start so many vLLM servers and ask them all")
    parser.add_argument("--devices", nargs="+", default=[], metavar="D", help="CUDA_VISIBLE_DEVICES of each: 0,1 2,3")
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="T", help="GPUs of a server (default: %(default)s)"
    )
    parser.add_argument(
        "--urls", nargs="+", default=[], metavar="URL", help="or ask these, started by python -m luffy.rollout.serve"
    )
    parser.add_argument(
        "--grader",
        metavar="GRADER",
        help="as reward.grader (default: `choice` for letters; else the runs' own if they agree, or `boxed`)",
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="GRADER", help="graders that are asked, too")
    parser.add_argument(
        "--report", metavar="FILE.html", help="a page with everything; tables beside it as .md and .tex"
    )
    parser.add_argument("--out", metavar="DIR", default="evals", help="answers and summary.json (default: %(default)s)")
    add_quiet(parser)
    add_json(parser)


@dataclass(slots=True)
class Model:
    opened: Opened
    benchmarks: dict[str, list[Any]]

    @property
    def name(self) -> str:
        return self.opened.name

    @property
    def slug(self) -> str:
        """What its folder is called: no path, whatever the name is."""
        plain = re.sub(r"[^\w.]+", "-", self.name).strip("-.")
        return plain or re.sub(r"\W+", "-", Path(self.name).resolve().name) or "model"


def check_eval(args: argparse.Namespace) -> None:
    """Raises UserError where options do not go together, before anything slow is imported."""
    if not args.data and not args.suite:
        raise UserError(f"eval: --data or --suite ({', '.join(SUITES)}) must say what is asked")
    if unknown := [name for name in benchmarks_in(args.suite) if name not in (*NAMES, "quick")]:
        raise UserError(f"eval: --suite {unknown[0]} is none of {', '.join((*SUITES, *NAMES))}")
    if args.report and Path(args.report).suffix != ".html":
        raise UserError(f"eval: --report {args.report} must end in .html; tables are written beside it")
    if args.report and not Path(args.report).resolve().parent.is_dir():
        raise UserError(f"eval: the folder of --report {args.report} does not exist")
    if args.urls and (args.servers or args.devices):
        raise UserError("eval: --urls are servers that run already; leave --servers and --devices out")
    if args.devices and len(args.devices) != args.servers:
        raise UserError(f"eval: --devices must name those of all --servers, got {len(args.devices)}")
    if args.tensor_parallel > 1 and not args.servers:
        raise UserError("eval: --tensor-parallel is of servers that --servers starts; say how many, such as 1")
    if args.top_p < 1 and not args.temperature:
        raise UserError("eval: --top-p changes nothing at --temperature 0, which is greedy; leave one of them out")
    if len(set(args.model)) < len(args.model):
        raise UserError("eval: a --model is named twice; name each once")


def run_eval(args: argparse.Namespace) -> int:
    from luffy.console import print_json, say, tell
    from luffy.evaluation.answers import Sampling
    from luffy.evaluation.show import print_comparison, print_scores
    from luffy.process import prepare_libraries

    check_eval(args)
    prepare_libraries()
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    models = [load_model(args, name) for name in args.model]
    if len({model.slug for model in models}) < len(models):
        raise UserError("eval: two of the models would share a folder of --out; evaluate them one at a time")
    found: dict[str, list[Any]] = {}
    graded: dict[str, dict[str, list[Any]]] = {}
    fewest = min(q.count for model in models for questions in model.benchmarks.values() for q in questions)
    if max(args.pass_at, default=0) > fewest:
        raise UserError(
            f"eval: pass@{max(args.pass_at)} needs as many answers to every problem, not {fewest}; raise --n"
        )
    with ExitStack() as stack:
        pools = Pools(stack, models[0].opened.config)
        for grader in filter(None, (args.grader, *args.compare)):
            pools[grader]  # one that does not exist is better known now
        graders = {name: grader_of(args, models, name) for name in models[0].benchmarks}
        for model in models:
            check_golds(model, graders, pools)
        for model in models:
            found[model.name], graded[model.name] = evaluate_model(args, model, sampling, pools, graders)
            if not args.json:
                print_scores(model.name, found[model.name])
    summary = write_summary(Path(args.out), args, found)
    if args.json:
        print_json(summary | {"out": args.out})
    else:
        for name in args.model[1:]:
            print_comparison(args.model[0], name, found[args.model[0]], found[name])
        tell(f"answers and summary.json: {args.out}")
    if args.report:
        from luffy.evaluation.html import Evaluated, write_report

        evaluated = [Evaluated(name, every, graded[name]) for name, every in found.items()]
        write_report(Path(args.report), evaluated, settings_of(args), doubts(models))
        (say if args.json else tell)(f"report: {args.report}")
    return 0


def doubts(models: Sequence[Model]) -> list[str]:
    """What a reader should know before the numbers: problems that chose a run's best checkpoint are judged by again."""
    from luffy.data import load_problems
    from luffy.data_check import plain_text

    found = []
    for model in models:
        validation = model.opened.config.eval.validation
        if not validation or not Path(validation).exists():
            continue
        with user_errors("eval"):
            chosen = {plain_text(p.messages[-1]["content"]) for p in load_problems(validation)}
        for name, questions in model.benchmarks.items():
            if shared := sum(plain_text(question.text) in chosen for question in questions):
                found.append(
                    f"{shared} of {len(questions)} problems of {name} are in {validation}, by which {model.name}'s "
                    f"best checkpoint was chosen."
                )
    return found


def load_model(args: argparse.Namespace, name: str) -> Model:
    from luffy.console import say
    from luffy.data import load_problems
    from luffy.evaluation.questions import benchmarks_of
    from luffy.evaluation.suites import problems_of
    from luffy.sources import tokenized

    opened = open_model(name, **opening_options(args))
    opened.config.data.max_prompt_tokens = NO_LIMIT
    rollout = opened.config.rollout
    rollout.engine = "server" if args.servers or args.urls else "colocated"
    rollout.servers, rollout.devices, rollout.urls = args.servers or 1, args.devices, args.urls
    if rollout.engine == "server":
        rollout.tensor_parallel = args.tensor_parallel
    asked: list[tuple[str, Any, int]] = []
    with user_errors("data"):
        asked += [(source, load_problems(source, split=args.split, limit=args.limit), 1) for source in args.data]
    for benchmark in benchmarks_in(args.suite):
        seed = derive(args.seed, "options") if args.shuffle_options else 0
        repeats = NAMES[benchmark].repeats if benchmark in NAMES else 1
        asked.append((benchmark, problems_of(benchmark, seed=seed, limit=args.limit), repeats))
    found: dict[str, list[Any]] = {}
    for source, problems, repeats in asked:
        loaded = tokenized(problems, opened.template, opened.config)
        if lost := loaded.report.problems - loaded.report.kept:
            say(f"{source}: {counted(lost, 'problem')} cannot be asked: {loaded.report}")
        made = benchmarks_of(loaded.examples, args.n * repeats, several=bool(args.temperature))
        if twice := found.keys() & made.keys():
            raise UserError(f"eval: two sources have problems of {min(twice)}; evaluate them one at a time")
        found |= made
    return Model(opened, found)


class Pools:
    """Verifier pools by grader, started when they are first needed."""

    def __init__(self, stack: ExitStack, config: Any) -> None:
        self._stack, self._config, self._open = stack, config, dict[str, Any]()

    def __getitem__(self, grader: str) -> Any:
        from luffy.rewards import VerifierPool

        if grader not in self._open:
            with user_errors("eval"):
                pool = VerifierPool(grader, self._config.reward.workers, self._config.reward.timeout_s)
            self._open[grader] = self._stack.enter_context(pool)
        return self._open[grader]


def grader_of(args: argparse.Namespace, models: Sequence[Model], benchmark: str) -> str:
    """One for all models: `choice` for letters, which a run's own may not read; else that, where all are runs that
    agree."""
    if args.grader:
        return args.grader
    answers = [one for question in models[0].benchmarks[benchmark] for one in golds(question)]
    if all(re.fullmatch(r"[A-J]|[1-5]", one) for one in answers) and not all(map(str.isdigit, answers)):
        return "choice"
    own = {model.opened.config.reward.grader for model in models}
    return (min(own) if len(own) == 1 else "") or "boxed"


def golds(question: Any) -> tuple[str, ...]:
    return (question.answer,) if isinstance(question.answer, str) else question.answer


def check_golds(model: Model, graders: dict[str, str], pools: Pools) -> None:
    """Say which answers no response could give, before hours are spent on them."""
    from luffy.console import say
    from luffy.rewards.graders import SYMBOLIC

    for benchmark, questions in model.benchmarks.items():
        grader = graders[benchmark]
        if grader not in (*SYMBOLIC, "choice", "exact", "number"):
            continue
        verdicts = pools[grader].grade([(f"</think> \\boxed{{{golds(q)[0]}}}", q.answer) for q in questions])
        bad = [q for q, verdict in zip(questions, verdicts, strict=True) if verdict.reward < 1]
        if bad:
            shown = ", ".join(f"{q.id} ({golds(q)[0]!r:.40})" for q in bad[:SHOWN])
            say(f"{benchmark}: `{grader}` does not accept {len(bad)} of the answers word by word: {shown}")


def evaluate_model(
    args: argparse.Namespace, model: Model, sampling: Any, pools: Pools, graders: dict[str, str]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Scores of each benchmark, and the graded answers that they are made of."""
    from concurrent.futures import ThreadPoolExecutor

    from luffy.console import say
    from luffy.evaluation.answers import Store, sample
    from luffy.evaluation.progress import QuestionProgress
    from luffy.evaluation.scores import grade, scores
    from luffy.load import identity

    folder = Path(args.out, model.slug)
    if folder.resolve() in (Path(model.opened.path).resolve(), Path(model.name).resolve()):
        raise UserError(f"eval: answers of {model.name} would lie in the model's own folder; take another --out")
    longest = check_positions(model, args.max_tokens)
    about = {"model": model.name, "weights": identity(model.opened.path), "prompt": prompt_of(model)} | asdict(sampling)
    opened = model.opened.template.opens_think
    found, answers = [], {}
    with ExitStack() as stack:
        stores = {name: stack.enter_context(Store(folder / file_of(name), about)) for name in model.benchmarks}
        stack.enter_context(interruption(model, stores, folder))
        left = {n: sum(q not in stores[n] for q in questions) for n, questions in model.benchmarks.items()}
        total = sum(map(len, model.benchmarks.values()))
        if done := total - sum(left.values()):
            say(f"{model.name}: {done} of {total} problems are answered in {folder} already")
        engine, block = None, block_of(model.opened.config.rollout)
        if any(left.values()):
            engine = stack.enter_context(engine_of(model.opened, longest + args.max_tokens, folder))
        for name, questions in model.benchmarks.items():
            grader = graders[name]
            asked = [pools[grader], *(pools[other] for other in dict.fromkeys(args.compare) if other != grader)]
            if engine is not None and left[name]:
                with ThreadPoolExecutor(1) as grading, QuestionProgress(name, len(questions), left[name]) as progress:

                    def answered(question: Any, answers: Any, progress: Any = progress, pool: Any = asked[0]) -> None:
                        grading.submit(lambda: progress.add(grade([question], [answers], [pool], opened)[0].accuracy))

                    sample(engine, model.opened.template, questions, sampling, stores[name], answered, block)
            answers[name] = grade(questions, [stores[name][q] for q in questions], asked, opened)
            with user_errors("eval"):
                found.append(scores(name, answers[name], grader, args.pass_at, args.seed))
    return found, answers


@contextmanager
def interruption(model: Model, stores: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Ctrl-C, wherever it comes, says what there is."""
    try:
        yield
    except KeyboardInterrupt:
        there = [question in stores[name] for name, every in model.benchmarks.items() for question in every]
        raise KeyboardInterrupt(
            f"stopped; {sum(there)} of {len(there)} problems are answered in {folder}, the same command goes on"
        ) from None


def engine_of(opened: Opened, context: int, folder: Path) -> AbstractContextManager[Any]:
    if opened.config.rollout.engine == "server":
        return start_servers(opened, context, folder / "serving")  # a folder of their own: they clear what is in it
    return start_engine(opened, context)


def block_of(rollout: Any) -> int | None:
    """Of `sample`, so that rounding is the same whenever something is sampled; None where it is not anyway: on GPUs,
    and by servers."""
    import torch

    return None if torch.cuda.is_available() or rollout.engine == "server" else BLOCK


def file_of(benchmark: str) -> str:
    """Another for every benchmark, whatever its name is made of."""
    plain = re.sub(r"[^a-zA-Z0-9_.]+", "-", benchmark)
    return f"{plain}.jsonl" if plain == benchmark else f"{plain}-{derive(0, benchmark):08x}.jsonl"


def check_positions(model: Model, max_tokens: int) -> int:
    """Tokens of the longest prompt. Raises UserError where it and the longest answer do not fit the model."""
    positions = positions_of(language_config(model.opened))
    longest = max((q for questions in model.benchmarks.values() for q in questions), key=lambda q: len(q.prompt_ids))
    tokens = len(longest.prompt_ids)
    if positions is not None and tokens + max_tokens > positions:
        raise UserError(
            f"eval: {model.name} has {positions} positions, and the prompt of {longest.id} ({tokens} tokens) with "
            f"--max-tokens {max_tokens} makes {tokens + max_tokens}; lower --max-tokens"
        )
    return tokens


def prompt_of(model: Model) -> str:
    """How a question is put; what answers depend on besides the weights."""
    return model.opened.template.render([{"role": "user", "content": "?"}])


def write_summary(folder: Path, args: argparse.Namespace, found: dict[str, list[Any]]) -> dict[str, Any]:
    """Write summary.json; returns what is in it."""
    from luffy.evaluation.scores import average, compare
    from luffy.files import write_json
    from luffy.run_folder import environment

    models = {}
    for name, every in found.items():
        models[name] = {"benchmarks": [one.record() for one in every], "average": asdict(average(every))}
        if name != args.model[0]:
            against = compare(every, found[args.model[0]])
            models[name]["difference"] = {
                key: dict(zip(("mean", "low", "high", "p"), value, strict=True)) for key, value in against.items()
            }
            models[name]["difference_to"] = args.model[0]
    summary = {"settings": settings_of(args), "environment": environment(), "models": models}
    write_json(folder / "summary.json", summary)
    return summary


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    sampled = ("n", "temperature", "top_p", "max_tokens", "seed", "template", "checkpoint")
    names = ("data", "suite", "split", "limit", "shuffle_options", *sampled, "pass_at", "compare")
    return {name: getattr(args, name) for name in names}
