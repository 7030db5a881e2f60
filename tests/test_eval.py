"""`luffy eval`: answers are kept, counted and graded as they should be."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import refused
from tiny import luffy, make_model

from luffy.cli import build_parser
from luffy.errors import UserError
from luffy.evaluation.answers import Answered, Sampling, Store, blocks, sample
from luffy.evaluation.command import Model, doubts, file_of, grader_of, load_model
from luffy.evaluation.questions import benchmarks_of
from luffy.evaluation.scores import average, compare, grade, judged_part, said, scores
from luffy.evaluation.statistics import difference, interval
from luffy.rewards import VerifierPool
from luffy.rollout.client import Client
from luffy.rollout.engine import Completion
from luffy.rollout.server import free_port


@pytest.fixture(scope="module")
def home(home):
    make_model(home / "other", seed=1)
    rows = [{"prompt": f"What is {n}+{n}?", "answer": str(2 * n), "data_source": "ab"[n % 2]} for n in range(12)]
    (home / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "letters.jsonl").write_text(json.dumps({"prompt": "A or B?", "answer": "A"}) + "\n")
    return home


def examples(*rows: tuple[str, tuple[int, ...], str]) -> list:
    """(source, prompt ids, answer)"""
    made = []
    for at, (source, prompt, answer) in enumerate(rows):
        messages = ({"role": "user", "content": f"question {prompt}"},)
        problem = SimpleNamespace(id=f"{source}/{at}", data_source=source, messages=messages, answer=answer)
        made.append(SimpleNamespace(problem=problem, prompt_ids=prompt))
    return made


def test_rows_that_repeat_a_question_are_answers_to_it():
    """As LUFFY's files repeat AIME: 32 answers to 30 problems are a sample of 30."""
    rows = examples(
        ("aime", (1,), "3"), ("aime", (1,), "3"), ("aime", (2,), "4"), ("amc", (1,), "3"), ("aime", (1,), "5")
    )
    found = benchmarks_of(rows, 2)
    assert {name: [(q.id, q.count) for q in every] for name, every in found.items()} == {
        "aime": [("aime/0", 4), ("aime/2", 2), ("aime/4", 2)],
        "amc": [("amc/3", 2)],
    }
    assert [q.count for q in benchmarks_of(rows, 1, several=False)["aime"]] == [1, 1, 1]


QUESTIONS = benchmarks_of(examples(("x", (1,), "2"), ("x", (2,), "3"), ("x", (3,), "4")), 4)["x"]


def boxes(*values: str) -> list[Answered]:
    return [Answered(f"so \\boxed{{{value}}}" if value else "hm", len(value), bool(value)) for value in values]


ANSWERS = [boxes("2", "2.0", "3", ""), boxes("1", "1", "3", "3"), boxes("5", "6", "7", "8")]


def test_scores():
    with VerifierPool("boxed") as pool, VerifierPool("exact") as other:
        graded = grade(QUESTIONS, ANSWERS, [pool, other], opened=False)
    found = scores("x", graded, "boxed", ks=[1, 2, 4])
    assert (found.questions, found.answers, found.grader) == (3, 12, "boxed-4")
    assert found.by_question == [0.5, 0.5, 0.0]
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.interval == interval([[0.5, 0.5, 0.0]])
    assert found.pass_at == pytest.approx({1: 1 / 3, 2: 2 * (5 / 6) / 3, 4: 2 / 3})
    assert found.majority == pytest.approx((1 + 0.5 + 0) / 3)  # 2 and 2.0 are one vote
    assert found.mean_tokens == pytest.approx((1 + 3 + 1 + 4 + 4) / 12)
    assert found.truncated == found.no_answer == pytest.approx(1 / 12)
    assert found.disagree == pytest.approx({"exact": 1 / 12})  # 2.0 is not 2 there
    assert (found.timeouts, found.crashes) == (0, 0)
    assert "by_question" not in found.record()
    json.dumps(found.record())
    with pytest.raises(ValueError, match=r"pass@5.*--n"):
        scores("x", graded, "boxed", ks=[5])


def test_averages_and_differences():
    with VerifierPool("boxed") as pool:
        one = scores("x", grade(QUESTIONS, ANSWERS, [pool], opened=False), "boxed")
        all_right = [boxes(q.answer) * 4 for q in QUESTIONS]
        two = scores("y", grade(QUESTIONS, all_right, [pool], opened=False), "boxed")
    assert average([one, two]).accuracy == pytest.approx((1 / 3 + 1) / 2)
    assert average([one, two]).interval == interval([one.by_question, two.by_question])
    found = compare([two, two], [one, two])
    assert found["y"] == difference([two.by_question], [two.by_question])
    assert found["average"][0] == pytest.approx(1 / 3)


def test_thoughts_are_not_graded():
    assert judged_part("\\boxed{2}</think> \\boxed{3}", opened=True) == " \\boxed{3}"
    assert judged_part("\\boxed{2}", opened=True) == ""
    assert judged_part("<think>\\boxed{2}", opened=False) == ""
    assert judged_part("\\boxed{2}", opened=False) == "\\boxed{2}"
    texts = ["\\boxed{2}", "\\boxed{2}</think> it is 2", "\\boxed{3}</think> \\boxed{2}", "</think> 2"]
    answers = [[Answered(text, 1, True) for text in texts]]
    with VerifierPool("boxed") as boxed, VerifierPool("train") as train:
        [found] = grade(QUESTIONS[:1], answers, [boxed, train], opened=True)
    assert [v.reward for v in found.verdicts] == [0, 0, 1, 0]
    assert [v.reward for v in found.others["train"]] == [0, 1, 1, 1]


ABOUT = {"model": "m", "temperature": 0.6}


def test_the_store_keeps_what_is_whole(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    with Store(path, ABOUT) as store:
        store.add(QUESTIONS[0], ANSWERS[0])
        store.add(QUESTIONS[1], ANSWERS[1])
    path.write_bytes(path.read_bytes()[:-7])  # killed in the middle of a line
    with Store(path, ABOUT) as store:
        assert [q in store for q in QUESTIONS] == [True, False, False]
        assert store[QUESTIONS[0]] == ANSWERS[0]
        fewer, more = replace(QUESTIONS[0], count=2), replace(QUESTIONS[0], count=5)
        assert fewer in store
        assert store[fewer] == ANSWERS[0][:2]
        assert more not in store
        store.add(QUESTIONS[1], ANSWERS[1])
    with Store(path, ABOUT) as store:
        assert [q in store for q in QUESTIONS] == [True, True, False]
        assert replace(QUESTIONS[1], prompt_ids=(9, 9)) not in store


def test_answers_of_something_else_are_not_gone_on_with(tmp_path):
    Store(tmp_path / "x.jsonl", ABOUT).__exit__(None, None, None)
    with pytest.raises(UserError, match=r"another temperature \(0.6, now 1.0\); take another --out"):
        Store(tmp_path / "x.jsonl", ABOUT | {"temperature": 1.0})
    (tmp_path / "y.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(UserError, match=r"y.jsonl is not a file of theirs"):
        Store(tmp_path / "y.jsonl", ABOUT)
    assert (tmp_path / "y.jsonl").read_text() == '{"id": 3}\n'


class Fake:
    """An engine that answers one request at a time, and may be interrupted."""

    def __init__(self, stop_after: int = 99) -> None:
        self.asked, self.stopped, self.stop_after = [], False, stop_after
        self.begun, self.forgot = [], 0

    def awake(self):
        import contextlib

        return contextlib.nullcontext()

    def forget_prompts(self):
        self.forgot += 1

    def begin(self, requests, temperature):
        self.begun.append([request.prompt for request in requests])
        self.asked += requests
        self.left = list(enumerate(requests))
        return self

    @property
    def waiting(self):
        return len(self.left)

    def take(self, timeout):
        if len(self.asked) - len(self.left) == self.stop_after:
            raise KeyboardInterrupt
        index, request = self.left.pop()
        if request.prompt == (2,):
            return [(index, [])]  # refused
        return [(index, [Completion((request.seed % 7, n), (), True) for n in range(request.count)])]

    def stop(self):
        self.stopped = True


def test_sampling_goes_on_where_it_was_stopped(tmp_path):
    template, sampling = SimpleNamespace(decode=lambda ids: str(ids)), Sampling(0.6, 0.9, 5, 3)
    whole, engine, seen = Store(tmp_path / "whole.jsonl", ABOUT), Fake(), []
    sample(engine, template, QUESTIONS, sampling, whole, lambda q, answers: seen.append(q.id))
    assert sorted(seen) == [q.id for q in QUESTIONS]
    assert {(r.count, r.max_tokens, r.top_p) for r in engine.asked} == {(4, 5, 0.9)}
    seeds = {r.seed for r in engine.asked}
    assert len(seeds) == 3
    other = Fake()
    sample(other, template, QUESTIONS, replace(sampling, seed=4), Store(tmp_path / "4.jsonl", ABOUT), lambda *_: None)
    assert not seeds & {r.seed for r in other.asked}
    assert whole[QUESTIONS[1]] == [Answered("()", 0, False)] * 4  # refused is not right, and not asked again
    parts, engine = Store(tmp_path / "parts.jsonl", ABOUT), Fake(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        sample(engine, template, QUESTIONS, sampling, parts, lambda *_: None)
    assert engine.stopped
    engine = Fake()
    sample(engine, template, QUESTIONS, sampling, parts, lambda *_: None)
    assert len(engine.asked) == 2
    assert [parts[q] for q in QUESTIONS] == [whole[q] for q in QUESTIONS]


def test_a_block_is_asked_as_a_whole_whatever_is_there(tmp_path):
    """What else is sampled at the time has a part in rounding."""
    template, sampling = SimpleNamespace(decode=lambda ids: str(ids)), Sampling(0.6, 0.9, 5, 3)
    whole, engine = Store(tmp_path / "whole.jsonl", ABOUT), Fake()
    sample(engine, template, QUESTIONS, sampling, whole, lambda *_: None, 8)
    assert engine.begun == [[(1,), (2,)], [(3,)]]
    assert engine.forgot == 2
    parts, first, seen = Store(tmp_path / "parts.jsonl", ABOUT), Fake(stop_after=1), []
    with pytest.raises(KeyboardInterrupt):
        sample(first, template, QUESTIONS, sampling, parts, lambda q, _: seen.append(q.id), 8)
    again = Fake()
    sample(again, template, QUESTIONS, sampling, parts, lambda q, _: seen.append(q.id), 8)
    assert again.begun == engine.begun
    assert sorted(seen) == [q.id for q in QUESTIONS]  # each once
    assert (tmp_path / "parts.jsonl").read_text().count("\n") == 1 + len(QUESTIONS)
    more = Fake()
    sample(more, template, QUESTIONS, sampling, parts, lambda *_: None, 8)
    assert not more.begun
    assert [len(part) for part in blocks(QUESTIONS, 1)] == [1, 1, 1]


def test_two_models_on_two_benchmarks(home):
    """Through vLLM; a second time nothing is asked."""
    options = ["--model", home / "model", home / "other", "--data", home / "sums.jsonl", home / "letters.jsonl"]
    options += ["--n", "3", "--max-tokens", "6", "--pass-at", "2", "--compare", "answer", "--out", home / "out"]
    done = luffy("eval", *options, cwd=home, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "average: " in done.stdout
    assert "p = " in done.stdout
    summary = json.loads((home / "out" / "summary.json").read_text())
    first, second = summary["models"].values()
    assert [b["benchmark"] for b in first["benchmarks"]] == ["a", "b", "letters"]
    assert [b["grader"] for b in first["benchmarks"]] == ["boxed-4", "boxed-4", "choice-1"]
    assert [b["answers"] for b in first["benchmarks"]] == [18, 18, 3]
    assert all(b["disagree"].keys() == {"answer"} and b["pass_at"].keys() == {"2"} for b in first["benchmarks"])
    assert second["difference"].keys() == {"a", "b", "letters", "average"}
    files = {path: path.read_bytes() for path in home.glob("out/*/*.jsonl")}
    assert len(files) == 6
    again = luffy("eval", *options, "--limit", "1", cwd=home)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("2 of 2 problems are answered in") == 2
    assert {path: path.read_bytes() for path in files} == files
    other = luffy("eval", *options, "--temperature", "1", cwd=home)
    assert refused(other, "another temperature (0.6, now 1.0)")


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(home):
    """Comes to what an evaluation comes to that nobody interrupts."""
    options = ["--model", home / "model", "--data", home / "sums.jsonl", "--n", "2", "--max-tokens", "400"]
    whole = luffy("eval", *options, "--out", home / "whole", cwd=home)
    assert whole.returncode == 0, whole.stderr[-3000:]
    command = [sys.executable, "-m", "luffy", "eval", *map(str, options), "--out", str(home / "parts")]
    process = subprocess.Popen(
        command,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may ignore it
    )
    answers, deadline = home / "parts" / whole_slug(home) / "a.jsonl", time.monotonic() + 120
    while not (answers.exists() and answers.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-3000:]
    assert "of 12 problems are answered in" in errors
    assert "the same command goes on" in errors
    assert not (home / "parts" / "summary.json").exists()
    rest = luffy("eval", *options, "--out", home / "parts", cwd=home)
    assert rest.returncode == 0, rest.stderr[-3000:]
    assert lines(home / "parts") == lines(home / "whole")
    one, two = (json.loads((home / name / "summary.json").read_text()) for name in ("whole", "parts"))
    assert one == two


def whole_slug(home) -> str:
    return next((home / "whole").glob("*/")).name


def lines(folder) -> dict[str, list[str]]:
    return {str(path.relative_to(folder)): sorted(path.read_text().splitlines()) for path in folder.glob("*/*.jsonl")}


@pytest.mark.slow
def test_what_cannot_be_asked(home):
    base = ["eval", "--data", home / "sums.jsonl", "--model", home / "model", "--out", home / "none"]
    assert refused(luffy(*base, "--temperature", "0", "--top-p", "0.9", cwd=home), "--top-p", "greedy")
    assert refused(luffy(*base[:-2], "--model", "m", "m", cwd=home), "named twice")
    assert refused(luffy(*base, "--grader", "boxd", cwd=home), "boxd")
    assert refused(luffy("eval", "--data", home / "no.parquet", "--model", home / "model", cwd=home), "no.parquet")
    assert refused(luffy(*base, "--max-tokens", "9999", cwd=home), "positions", "lower --max-tokens")
    assert refused(luffy(*base, "--pass-at", "3", cwd=home), "pass@3", "--n")
    assert not (home / "none").exists()


def test_golds_that_nobody_could_give_are_said_first(home):
    (home / "odd.jsonl").write_text('{"prompt": "?", "answer": "$ $"}\n{"prompt": "!", "answer": "3"}\n')
    options = ["--data", home / "odd.jsonl", "--max-tokens", "2", "--out", home / "odd"]
    done = luffy("eval", "--model", home / "model", *options, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "`boxed` does not accept 1 of the answers word by word: odd/0 ('$ $')" in done.stderr


@pytest.mark.slow
def test_a_model_without_a_chat_template(home):
    folder = make_model(home / "bare")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = folder / name
        if name.endswith("jinja"):
            file.unlink(missing_ok=True)
        elif file.exists():
            kept = {k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}
            file.write_text(json.dumps(kept))
    done = luffy("eval", "--data", home / "sums.jsonl", "--model", folder, "--out", home / "bare-out", cwd=home)
    assert refused(done, "no chat template", "--template")
    options = ["--template", "plain", "--max-tokens", "2", "--out", home / "bare-out"]
    assert luffy("eval", "--data", home / "sums.jsonl", "--model", folder, *options, cwd=home).returncode == 0


def test_benchmarks_have_files_of_their_own_and_models_one_grader(home):
    """Also of names that are no file names; a run of one model does not bring its grader to the comparison."""
    names = ["a b", "a-b", "a/b", "\u6570\u5b66", "\u7269\u7406", "A"]
    assert len({file_of(name) for name in names}) == len(names)
    assert all("/" not in file_of(name) for name in names)
    assert file_of("aime24") == "aime24.jsonl"

    def model(grader, answer="12"):
        config = SimpleNamespace(reward=SimpleNamespace(grader=grader))
        return Model(SimpleNamespace(name="m", config=config), {"x": [SimpleNamespace(answer=answer)]})

    none = SimpleNamespace(grader=None)
    assert grader_of(none, [model("train"), model("")], "x") == "boxed"
    assert grader_of(none, [model("train"), model("number")], "x") == "boxed"
    assert grader_of(none, [model("train")], "x") == "train"
    assert grader_of(none, [model(""), model("")], "x") == "boxed"
    assert grader_of(none, [model("", "C")], "x") == "choice"
    assert grader_of(none, [model("number", "C")], "x") == "choice"
    assert grader_of(none, [model("number", "3")], "x") == "number"
    assert grader_of(SimpleNamespace(grader="exact"), [model("train")], "x") == "exact"


def asked_of(home, *options) -> dict:
    """Questions of `luffy eval`, by benchmark."""
    args = build_parser().parse_args(["eval", "--model", str(home / "model"), *map(str, options)])
    model = load_model(args, args.model[0])
    prompts = {name: [model.opened.template.decode(q.prompt_ids) for q in qs] for name, qs in model.benchmarks.items()}
    return {"prompts": prompts, "answers": {name: [q.answer for q in qs] for name, qs in model.benchmarks.items()}}


def test_splits_templates_and_options(home, tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{split}.jsonl").write_text(json.dumps({"prompt": f"A {split}?", "answer": "1"}) + "\n")
    ask = ["--data", tmp_path / "set", "--split"]
    for split in ("train", "test"):
        [[prompt]] = asked_of(home, *ask, split)["prompts"].values()
        assert f"A {split}?" in prompt
    [[qwen]] = asked_of(home, *ask, "test", "--template", "qwen-math")["prompts"].values()
    assert "Please reason step by step, and put your final answer within \\boxed{}." in qwen
    assert "<|im_start|>system" in qwen
    [[plain]] = asked_of(home, *ask, "test", "--template", "plain")["prompts"].values()
    assert "boxed" not in plain
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path))
    (tmp_path / "benchmarks").mkdir()
    row = {"question": "Which?", "options": list("abcdefghij"), "answer": "J", "answer_index": 9}
    rows = [row | {"question": f"Which {n}?"} for n in range(30)]
    (tmp_path / "benchmarks" / "mmlu_pro.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ["--suite", "mmlu_pro"]
    assert set(asked_of(home, *ask)["answers"]["mmlu_pro"]) == {"J"}
    shuffled = asked_of(home, *ask, "--shuffle-options")
    assert len(set(shuffled["answers"]["mmlu_pro"])) > 4
    assert shuffled == asked_of(home, *ask, "--shuffle-options")
    assert shuffled != asked_of(home, *ask, "--shuffle-options", "--seed", "1")


def test_a_report_doubts_what_chose_the_checkpoint(tmp_path):
    (tmp_path / "valid.jsonl").write_text('{"prompt": "What is  2+2?", "answer": "4"}\n')

    def model(validation):
        config = SimpleNamespace(eval=SimpleNamespace(validation=validation))
        questions = [SimpleNamespace(text="what is 2+2?"), SimpleNamespace(text="What is 3+3?")]
        return Model(SimpleNamespace(name="run", config=config), {"sums": questions})

    [said] = doubts([model(str(tmp_path / "valid.jsonl"))])
    assert said.startswith("1 of 2 problems of sums are in ")
    assert "run's best checkpoint" in said
    assert doubts([model(None), model(str(tmp_path / "gone.jsonl"))]) == []


@pytest.mark.slow
def test_servers_leave_alone_what_is_not_theirs(home, tmp_path):
    """A folder `weights` of somebody's; and no answers go into a model."""
    model = make_model(tmp_path / "mine")
    done = luffy("eval", "--data", home / "sums.jsonl", "--model", "mine", "--out", ".", cwd=tmp_path)
    assert refused(done, "the model's own folder", "--out")
    assert not list(model.glob("*.jsonl"))
    theirs = Path("evals") / "mine" / "weights" / "mine.txt"
    (tmp_path / theirs).parent.mkdir(parents=True)
    (tmp_path / theirs).write_text("x")
    options = ["--model", "mine", "--limit", "1", "--max-tokens", "2", "--servers", "1"]
    done = luffy("eval", "--data", home / "letters.jsonl", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / theirs).read_text() == "x"


def test_what_is_said_is_read_at_once():
    """In this process, where no clock runs."""
    began = time.monotonic()
    for text in ("5" + "\\text{ cm}" * 200 + "x", "5" + "   cm" * 300 + " x", "5" + " \\text{cm} " * 150 + "x"):
        said("\\boxed{" + text + "}", "boxed")
    said("answer is" + " \n" * 100_000, "choice")
    assert said("answer is :  \n B", "choice") == "B"
    assert time.monotonic() - began < 3


def test_a_models_folder_lies_in_out(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    slugs = {name: Model(SimpleNamespace(name=name), {}).slug for name in (".", "..", "../x", "a/b", "/", "runs/..")}
    assert slugs["."] == "deep"
    assert slugs[".."] == tmp_path.name
    assert all(slug and slug not in (".", "..") and "/" not in slug for slug in slugs.values()), slugs


@pytest.mark.slow
def test_servers_answer_as_the_engine_in_this_process(home):
    """And what cannot be served is said before anything starts."""
    options = ["--model", home / "model", "--data", home / "sums.jsonl", "--n", "2", "--max-tokens", "12"]
    for more, name in (([], "here"), (["--servers", "2"], "served")):
        done = luffy("eval", *options, *more, "--out", home / name, cwd=home)
        assert done.returncode == 0, done.stderr[-3000:]
    assert lines(home / "served") == lines(home / "here")
    assert len(list((home / "served").glob("*/serving/servers/server-*.log"))) == 2
    assert refused(luffy("eval", *options, "--urls", "http://x", "--servers", "1", cwd=home), "--urls", "--servers")
    assert refused(luffy("eval", *options, "--servers", "2", "--devices", "0", cwd=home), "--devices", "--servers")
    assert refused(luffy("eval", *options, "--tensor-parallel", "2", cwd=home), "--servers")


@pytest.mark.slow
def test_a_server_that_runs_gets_the_models_weights(home):
    """Whatever it was started with."""
    port = free_port()
    command = [sys.executable, "-m", "luffy.rollout.serve", "--model", str(home / "other"), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 28)]
    log = (home / "serve.log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while not Client(url, None, 1).ready():
            assert server.poll() is None, (home / "serve.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        options = ["--model", home / "model", home / "other", "--data", home / "sums.jsonl", "--max-tokens", "12"]
        options += ["--temperature", "1", "--kv-cache-gib", "0.25"]
        for more, name in (["--urls", url], "by-url"), ([], "by-none"):
            done = luffy("eval", *options, *more, "--out", home / name, cwd=home)
            assert done.returncode == 0, done.stderr[-3000:]
        assert lines(home / "by-url") == lines(home / "by-none")
        assert (home / "model" / "model.safetensors").exists()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


def test_what_an_answer_says():
    assert said("so \\boxed{\\frac12}", "boxed") == said("\\boxed{0.5}", "boxed")
    assert said("B) because", "choice") == said("\\boxed{B}", "choice") == "B"
    assert said("I do not know.", "choice") == ""
    assert said("\\boxed{" + "\\frac{1}{" * 1200 + "2" + "}" * 1200 + "}", "boxed") == ""
    answers = [boxes("2", "2", "3", "3")]
    with VerifierPool("answer") as pool:
        found = scores("x", grade(QUESTIONS[:1], answers, [pool], opened=False), "answer")
    assert (found.majority, found.no_answer) == (None, None)  # nobody knows what math-verify took
