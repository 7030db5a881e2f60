"""Bad input of rollouts, of data and objectives, and of evaluation, for test_bad_input_walk.py."""

from pathlib import Path
from typing import Any

import pytest
from bad_inputs import (
    CONTEXT,
    GOOD,
    Bad,
    Home,
    Says,
    make_narrow_model,
    trace_row,
)
from bad_runs import without_template
from tiny import make_tokenizer

from luffy import distributed
from luffy.config import MeshConfig, RolloutConfig
from luffy.data import Problem, tokenize
from luffy.objectives import make_objective, options_of
from luffy.prompts import PromptTemplate
from luffy.rollout.engine import Request, generate
from luffy.rollout.servers import Servers

SIZES = {"vocabulary": 258, "hidden size": 64, "blocks": 2}

# --- rollouts ---------------------------------------------------------------------------------------------------------


def ask(home: Home, url: str, model: Path, *more: str):
    options = ["--max-tokens", "4", "--out", home.path / "evals", *more]
    return home.cli("eval", "--data", home.asked, "--model", model, "--urls", url, *options)


def another(name: str, **sizes: int):
    return lambda home: ask(home, home.url, make_narrow_model(home.path / name, **sizes))


def version_skew(home: Home):
    start = ask(home, home.url, home.model)

    def act() -> int:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("luffy.versions.of_rollouts", lambda: {"vLLM": "0.33.0"})
            return start()

    return act


def refused_prompt(home: Home):
    config = RolloutConfig(engine="server", urls=[home.url])
    about = {"dtype": "float32", "eos_token_id": 2, "sizes": SIZES, "max_model_len": CONTEXT}
    requests = [Request((5,) * tokens, 1, 4, tokens) for tokens in (9, CONTEXT + 1)]

    def act() -> int:
        world = distributed.start(MeshConfig())
        try:
            with Servers(str(home.model), config, **about, folder=home.path / "asking", world=world) as servers:
                assert [len(answers) for answers in generate(servers, requests, 1.0)] == [1, 0]
                assert servers.metrics()["rollout/refused"] == 1
        finally:
            distributed.close()
        return 0

    return act


ROLLOUTS = [
    Bad(
        error="server of another model",
        provoke=another("deep", num_hidden_layers=3),
        says=Says(
            "rollout: http://127.0.0.1:",
            "and the trainer's 3",
            "has another model: its blocks is 2",
            "start it with the run's model.name",
        ),
        needs=("server",),
        leaves="evals/",
    ),
    Bad(
        error="server of another vocabulary",
        provoke=another("worded", vocab_size=300),
        says=Says(
            "rollout: http://127.0.0.1:",
            "and the trainer's 300",
            "has another model: its vocabulary is 258",
            "start it with the run's model.name",
        ),
        needs=("server",),
        leaves="evals/",
    ),
    Bad(
        error="unreachable URL",
        provoke=lambda home: ask(home, "http://127.0.0.1:1", home.model),
        says=Says("http://127.0.0.1:1 ", "no server answers at", "refused", "start it, or mend rollout.urls (--urls)"),
        leaves="evals/",
    ),
    Bad(
        error="version skew",
        provoke=version_skew,
        says=Says("rollout: http://127.0.0.1:", "and the trainer 0.33.0", "runs vLLM ", "install the same on both"),
        needs=("server",),
        leaves="evals/",
    ),
    Bad(
        error="too little memory for KV at the requested context",
        provoke=lambda home: home.process(
            "generate", "?", "--max-tokens", "300", "--kv-cache-gib", "1e-4", "--model", home.model
        ),
        says=Says(
            "one sequence of ", " GiB of KV cache and there are ", " GiB are missing", "raise rollout.kv_cache_gib to"
        ),
    ),
    Bad(
        error="a prompt that vLLM rejects",
        provoke=refused_prompt,
        code=0,
        shows=("rollout: 1 prompt was refused and is skipped: ",),
        needs=("server",),
    ),
]

# --- objectives and data ----------------------------------------------------------------------------------------------


def told(home: Home):
    """What `luffy data check` says, after what training has said of the same problems."""
    options = ["--model", home.model, "--max-prompt-tokens", "100", "--max-trace-tokens", "100"]
    check = home.cli("data", "check", home.data, *options)

    def act() -> int:
        print((home.path / "whole.out").read_text())
        return check()

    return act


def other_log_probs(home: Home):
    tokens = len(GOOD.encode()) + 1
    rows = [trace_row(f"{n}: what is 1+1?", number=n, target_logps=[[-0.1] * (tokens + n)]) for n in (-1, 0, 1)]
    return home.train(data__path=home.parquet("scored.parquet", rows))


def no_traces(home: Home):
    row = trace_row("What is 1+1?")
    del row["target"]
    return home.train(data__path=home.parquet("bare.parquet", [row, row]))


def learns_from_traces(name: str):
    def provoke(home: Home):
        template = PromptTemplate(make_tokenizer())
        turns = ({"role": "user", "content": "What is 1+1?"},)
        problems = [Problem(id=f"p{n}", data_source="s", messages=turns, answer="2", traces=()) for n in range(2)]
        examples, _ = tokenize(problems, template, max_prompt_tokens=100, max_trace_tokens=100)
        return lambda: make_objective(options_of(name)()).prepare(examples)

    return Bad(
        error=f"an objective given data it cannot use: {name}",
        provoke=provoke,
        says=Says(
            f"objective: {name}", "learns from traces", "none of the 2 problems has one", "bring data with traces"
        ),
    )


DATA = [
    Bad(
        error="a trace without a verifiable answer",
        provoke=told,
        code=1,
        shows=("2 traces have no \\boxed{} nor another verifiable answer, such as mine/train/10, mine/train/11",),
        needs=("run",),
    ),
    Bad(
        error="a trace with the tag twice",
        provoke=told,
        code=1,
        shows=(
            "2 with a think tag twice (e.g. mine/train/2)",
            "2 traces cannot be learnt from: with a think tag twice, such as mine/train/2, mine/train/3",
        ),
        needs=("run",),
    ),
    Bad(
        error="a trace with the tag never closed",
        provoke=told,
        code=1,
        shows=(
            "2 with a think tag that is never closed (e.g. mine/train/4)",
            "2 traces cannot be learnt from: with a think tag that is never closed, such as mine/train/4, mine/train/5",
        ),
        needs=("run",),
    ),
    Bad(
        error="a trace with tokens outside the vocabulary",
        provoke=told,
        code=1,
        shows=(
            "2 with tokens outside the model's vocabulary (e.g. mine/train/6)",
            "2 traces cannot be learnt from: with tokens outside the model's vocabulary, such as mine/train/6",
        ),
        needs=("run",),
    ),
    Bad(
        error="a trace longer than the limit",
        provoke=told,
        code=1,
        shows=(
            "kept 4 of 12 traces: 2 too long",
            "2 traces cannot be learnt from: too long, such as mine/train/8, mine/train/9",
        ),
        needs=("run",),
    ),
    Bad(
        error="target probabilities of another length than the trace",
        provoke=other_log_probs,
        says=Says(
            "mine/train/-1: trace 1 has",
            "EOS included",
            "2 of 3 traces have other teacher log-probs than tokens",
            "score them with this model's tokenizer and prompt style (luffy data score)",
        ),
    ),
    Bad(
        error="an objective given data it cannot use: luffy on a set with no traces",
        provoke=no_traces,
        says=Says(
            "objective: luffy",
            "learns from traces",
            "none of the 2 problems has one that it may take",
            "bring data with traces (target), raise data.max_trace_tokens, or choose another one",
        ),
    ),
    *map(learns_from_traces, ["sft", "rl_sft", "bread", "relift", "sort"]),
    Bad(
        error="an objective given data it cannot use: teachers' log-probs that nobody gives",
        provoke=lambda home: home.train(objective__off_policy="shaped_teacher"),
        says=Says(
            "objective: off_policy 'shaped_teacher'",
            "compares with the teacher",
            "of 4 problems with traces none has its log-probs (target_logps)",
            "run luffy data score, or take shaped",
        ),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------


ODD_GOLD = "`boxed` does not accept 1 of the answers word by word: odd/0 ('$ $')"


def odd_gold(home: Home, url: str, folder: str):
    home.jsonl("odd.jsonl", [{"prompt": "?", "answer": "$ $"}, {"prompt": "!", "answer": "3"}])
    options = ["--max-tokens", "2", "--out", home.path / folder, "--urls", url]
    return home.cli("eval", "--data", home.path / "odd.jsonl", "--model", home.model, *options)


def graded(name: str, *rows: dict[str, Any]):
    good = {"response": "\\boxed{1}", "answer": "1"}

    def provoke(home: Home):
        file = home.jsonl(f"{name}.jsonl", [good | {"id": 0}, *(good | row for row in rows)])
        file.write_text(file.read_text().replace('"response": null, ', ""))
        return home.cli("grade", file, "--grader", "boxed", "--out", home.path / "graded.jsonl")

    return provoke


def offline_suite(home: Home):
    return home.cli("eval", "--suite", "math", "--model", home.model, "--out", home.path / "none")


EVALUATION = [
    Bad(
        error="gold that cannot be parsed",
        provoke=lambda home: odd_gold(home, home.url, "golds"),
        code=0,
        shows=(ODD_GOLD,),
        needs=("server",),
        leaves="golds/",
    ),
    Bad(
        error="gold that cannot be parsed, listed before generation starts: nobody can generate here",
        provoke=lambda home: odd_gold(home, "http://127.0.0.1:1", "no-golds"),
        says=Says("http://127.0.0.1:1 ", "no server answers at", "refused", "start it, or mend rollout.urls (--urls)"),
        shows=(ODD_GOLD,),
        leaves="no-golds/",
    ),
    Bad(
        error="duplicate ids",
        provoke=graded("twice", {"id": 1}, {"id": 1}),
        says=Says("twice.jsonl, line 3", "ids must differ", "id 1 is also that of line 2", "or `sample`"),
    ),
    Bad(
        error="predictions file with missing fields",
        provoke=graded("holes", {"response": None}),
        says=Says(
            "holes.jsonl, line 2: no field `response`",
            "needs `response` and `answer`",
            "has answer",
            "add it, or rename one",
        ),
    ),
    Bad(
        error="a suite that cannot be downloaded",
        provoke=offline_suite,
        says=Says(
            "AIME 2024",
            "with the columns problem, answer",
            "cannot be downloaded (",
            "/cache/benchmarks/aime24.parquet (or .jsonl)",
        ),
        shows=("place its rows at ",),
    ),
    Bad(
        error="a model without chat template",
        provoke=lambda home: home.cli(
            "eval", "--data", home.asked, "--model", without_template(home, "mute-eval"), "--out", home.path / "none"
        ),
        says=Says(
            "mute-eval'", "give one as chat_template", "has no chat template", "'plain' (--template of a command)"
        ),
    ),
]
