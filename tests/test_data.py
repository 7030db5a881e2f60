"""Loading, tokenising and batching problems; every refusal says what is wrong and where."""

import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import write_jsonl

from luffy.data import DataError, Ledger, Problem, Stream, load_problems, tokenize
from luffy.problems import ProblemSpec, write_splits
from luffy.setup import from_batches

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6*7?"}]


def row(**changes):
    base = {
        "data_source": "demo",
        "prompt": QUESTION,
        "target": [{"role": "assistant", "content": "6*7=42. \\boxed{42}"}],
        "ability": "math",
        "reward_model": {"ground_truth": "42", "style": "rule"},
        "extra_info": {"index": 5, "split": "default"},
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not there")
    return SHARED / name


class Letters:
    """A stand-in for a prompt template: one id a character, EOS 0, and '#' spells an EOS inside a trace."""

    opens_think = False
    vocab_size: int | None = None

    def encode_prompt(self, messages):
        return [ord(c) for message in messages for c in message["content"]]

    def encode_trace(self, text):
        if "#" in text:
            raise ValueError("EOS inside")
        return [*map(ord, text), 0]


def problem(name, question="why", traces=()):
    messages = ({"role": "user", "content": question},)
    return Problem(id=name, data_source="demo", messages=messages, answer="1", traces=traces)


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_luffy_schema_loads(tmp_path, write):
    suffix = {write_parquet: "parquet", write_jsonl: "jsonl"}[write]
    rows = [row(), row(target=None, extra_info={"index": 6, "split": "default"})]
    loaded = load_problems(write(tmp_path / f"train.{suffix}", rows))
    assert loaded[0] == Problem(
        id="demo/default/5",
        data_source="demo",
        messages=tuple(QUESTION),
        answer="42",
        traces=("6*7=42. \\boxed{42}",),
        extra={"index": 5, "split": "default"},
    )
    assert loaded[1].traces == ()
    assert load_problems(tmp_path, limit=1) == loaded[:1]


def test_optional_columns_may_be_absent(tmp_path):
    rows = [
        row(target=..., data_source=..., extra_info=..., ability=...),
        row(target_lst=["b", "", "6*7=42. \\boxed{42}"]),
    ]
    first, second = load_problems(write_jsonl(tmp_path / "mine.jsonl", rows))
    assert (first.id, first.data_source, first.traces) == ("mine/default/0", "mine", ())
    assert second.traces == ("6*7=42. \\boxed{42}", "b"), "the target first, no duplicates, no empty text"


def test_several_accepted_answers(tmp_path):
    rows = [row(reward_model={"ground_truth": ["42", "42.0"], "style": "rule"})]
    assert load_problems(write_jsonl(tmp_path / "a.jsonl", rows))[0].answer == ("42", "42.0")


def test_ids_are_unique_when_rows_repeat(tmp_path):
    loaded = load_problems(write_jsonl(tmp_path / "a.jsonl", [row()] * 3))
    assert [one.id for one in loaded] == ["demo/default/5", "demo/default/5#2", "demo/default/5#3"]


def test_gsm8k_rows_convert(tmp_path):
    answer = "She has 6*200 = <<6*200=1200>>1200.\nThen $<<1200+34=1234>>1,234.\n#### 1,234"
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "How much?", "answer": answer}])
    assert load_problems(path) == [
        Problem(
            id="gsm8k/0",
            data_source="openai/gsm8k",
            messages=({"role": "user", "content": "How much?"},),
            answer="1234",
            traces=("She has 6*200 = 1200.\nThen $1,234.\nThe answer is \\boxed{1234}.",),
        )
    ]


def test_all_of_gsm8k_converts():
    loaded = load_problems(shared("gsm8k_train.jsonl"))
    assert len(loaded) == len({one.id for one in loaded}) == 7473
    for one in loaded:
        assert one.traces[0].endswith(f"\nThe answer is \\boxed{{{one.answer}}}.")
        assert not {"<<", ">>", "####"} & {one.traces[0][i : i + n] for n in (2, 4) for i in range(len(one.traces[0]))}
        float(one.answer)


def test_the_validation_set_loads():
    loaded = load_problems(shared("luffy_valid.parquet"))
    assert len(loaded) == len({one.id for one in loaded}) == 2019
    assert {one.data_source for one in loaded} == {"aime", "amc", "math", "minerva", "olympiad_bench"}
    assert all(not one.traces and [turn["role"] for turn in one.messages] == ["system", "user"] for one in loaded)
    assert len(load_problems(shared("luffy_arc_c.parquet"))) == 1172


def test_generated_splits_load_by_name(tmp_path):
    write_splits(ProblemSpec(families=["gcd"], train=8, heldout=4, ood=2, missing=0.5), tmp_path)
    assert [len(load_problems(tmp_path, split=split)) for split in ("train", "heldout", "ood")] == [8, 4, 2]
    assert load_problems(tmp_path / "train.parquet", split="train")[0].extra["family"] == "gcd"
    with pytest.raises(DataError, match="holds heldout, ood, train; say which with split"):
        load_problems(tmp_path)
    with pytest.raises(DataError, match="no split 'test', the folder holds heldout, ood, train"):
        load_problems(tmp_path, split="test")
    with pytest.raises(DataError, match="no rows of split 'ood', the file holds train"):
        load_problems(tmp_path / "train.parquet", split="ood")


def test_sharded_splits_are_read_in_order(tmp_path):
    for shard in (1, 0):
        one = row(extra_info={"index": shard, "split": "train"})
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", [one])
    assert [one.extra["index"] for one in load_problems(tmp_path, split="train")] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": ..., "prompts": QUESTION},
            "line 2: column 'prompt' is missing, the nearest column present is 'prompts'",
        ),
        ({"reward_model": ...}, "line 2: column 'reward_model' is missing"),
        ({"target": ..., "targets": None}, "line 2: column 'targets' is unknown, is it 'target'"),
        ({"prompt": "What?"}, "line 2: column 'prompt' must be a list of .*got str 'What"),
        ({"prompt": [{"role": "user"}]}, "line 2: column 'prompt' must be a list of .*with string values"),
        ({"prompt": []}, "line 2: column 'prompt' must not be empty"),
        (
            {"reward_model": {"ground_truth": 42}},
            "line 2: column 'reward_model.ground_truth' must be a string.*got int 42",
        ),
        ({"reward_model": {"ground_truth": [""]}}, "line 2: column 'reward_model.ground_truth'"),
        ({"prompt": [{"role": "assistant", "content": "?"}]}, "line 2: column 'prompt' must end with a user's turn"),
        ({"prompt": [{"role": "user", "content": " "}]}, "line 2: column 'prompt' must end with a user's turn"),
        ({"target": [{"role": "user", "content": "!"}]}, "'target' must hold one assistant turn, got 1 turns .user."),
        ({"target": None, "target_ds_qwen_7b_probs": [0.5]}, "'target_ds_qwen_7b_probs' is of 'target', which"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, "line 2: a text holds .*half of a character"),
        ({"target": "6*7=42"}, "line 2: column 'target' must be a list"),
        ({"target": QUESTION}, "line 2: column 'target' must hold one assistant turn, got 2"),
        ({"target_lst": "abc"}, "line 2: column 'target_lst' must be a list of strings"),
        ({"extra_info": "x"}, "line 2: column 'extra_info' must be a struct"),
    ],
)
def test_bad_rows_are_named(tmp_path, changes, message):
    path = write_jsonl(tmp_path / "bad.jsonl", [row(), row(**changes)])
    with pytest.raises(DataError, match=message):
        load_problems(path)


def test_a_row_without_an_answer_is_left_to_be_counted(tmp_path):
    rows = [row(reward_model={"ground_truth": truth}) for truth in ("", "  ", None)]
    assert [problem.answer for problem in load_problems(write_jsonl(tmp_path / "data.jsonl", rows))] == ["", "", ""]


def test_how_many_rows_are_refused_is_said(tmp_path):
    rows = [row(), *[row(target_teachers=["a", "b"])] * 3, row()]
    words = "'target_teachers' must have an entry for each trace, 1 in all, got 2; of 3 rows after it 2 are"
    with pytest.raises(DataError, match=words):
        load_problems(write_jsonl(tmp_path / "data.jsonl", rows))


def test_traces_that_a_schema_does_not_read_are_refused(tmp_path):
    plain = {"prompt": "1+1?", "answer": "2", "target": [{"role": "assistant", "content": "2"}]}
    with pytest.raises(
        DataError, match="column 'target' is read with prompt and reward_model; beside prompt and answer"
    ):
        load_problems(write_jsonl(tmp_path / "data.jsonl", [plain]))


def test_a_gsm8k_row_without_gold_is_named(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"question": "How much?", "answer": "12"}])
    with pytest.raises(DataError, match="line 1: column 'answer' must end in a line '#### <gold>'"):
        load_problems(path)


def test_bad_parquet_columns_are_named(tmp_path):
    path = write_parquet(tmp_path / "bad.parquet", [{"question": "x", "solution": "y"}])
    with pytest.raises(DataError, match="column 'problem' is missing, the columns present are 'question', 'solution'"):
        load_problems(path)
    path = write_parquet(
        tmp_path / "bad.parquet",
        [row(), row(reward_model={"ground_truth": "", "style": "rule"}), row(reward_model=None)],
    )
    with pytest.raises(DataError, match="row 3: column 'reward_model' must be"):
        load_problems(path)


def test_unreadable_files_are_named(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", [row()])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet: unreadable or truncated parquet"):
        load_problems(cut)
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps(row()) + "\n" + json.dumps(row())[:50])
    with pytest.raises(DataError, match=r"cut\.jsonl, line 2: not valid JSON"):
        load_problems(cut)
    for more_than_python_reads in ("[" * 10**6, '{"a": ' + "1" * 5000 + "}"):
        cut.write_text(more_than_python_reads)
        with pytest.raises(DataError, match="line 1: not valid JSON"):
            load_problems(cut)
    cut.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: must be a JSON object, got list"):
        load_problems(cut)
    cut.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="unreadable"):
        load_problems(cut)


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load_problems(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no such file or folder"):
        load_problems("data/train.jsonl")
    with pytest.raises(DataError, match="the folder has no"):
        load_problems(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no rows"):
        load_problems(tmp_path / "empty.jsonl")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="must end in .parquet or .jsonl"):
        load_problems(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_problems(tmp_path, limit=0)


def test_a_hub_id_without_the_datasets_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the datasets package"):
        load_problems("owner/name")


def test_a_hub_id_goes_through_the_datasets_package(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if name == "owner/gone":
            raise ConnectionError("no network")
        return [row()]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_problems("owner/name:main", split="test")[0].answer == "42"
    assert load_problems("owner/name")[0].answer == "42"
    assert asked == [("owner/name", "main", "test"), ("owner/name", None, "train")]
    with pytest.raises(DataError, match="owner/gone: split 'train' could not be loaded, offline.*no network"):
        load_problems("owner/gone")


def test_tokenize_filters_and_counts():
    problems = [
        problem("fits", traces=("ab", "abcdefgh", "a#b")),
        problem("long", question="y" * 21, traces=("ab",)),
        problem("longest", question="y" * 30),
        problem("bare"),
        problem("dropped", traces=("abcdefgh",)),
        problem("edge", question="y" * 20, traces=("abcd",)),
    ]
    examples, report = tokenize(problems, Letters(), max_prompt_tokens=20, max_trace_tokens=5)
    assert [example.problem.id for example in examples] == ["fits", "bare", "dropped", "edge"]
    assert examples[0].prompt_ids == tuple(map(ord, "why"))
    assert examples[0].traces == ((ord("a"), ord("b"), 0),), "the EOS is part of the trace; nothing is truncated"
    assert examples[2].traces == ()
    assert len(examples[3].traces[0]) == 5, "the limits are inclusive and the EOS counts"
    assert (report.problems, report.kept, report.prompts_too_long, report.longest_prompt_id) == (6, 4, 2, "longest")
    assert (report.traces, report.traces_too_long, report.traces_broken) == (5, 2, 1)
    assert (report.no_trace, report.on_policy_only) == (1, 2)
    line = str(report)
    assert "\n" not in line
    assert "kept 4 of 6 problems: 2 prompts too long (e.g. longest); kept 2 of 5 traces: 2 too long, 1 with" in line


def test_traces_that_cannot_be_learnt_from_are_dropped_and_counted():
    template = Letters()
    template.vocab_size = 200
    opened = ("<think>\na</think>b", "<think>\na", "<think>a<think>b</think>c", "<think>a</think>b</think>", "\xff")
    given = [problem("tags", traces=opened), problem("outside", question="\xff"), problem("fine", traces=("ab",))]
    given.append(Problem(id="bare", data_source="d", messages=given[0].messages, answer="", traces=("ab",)))
    examples, report = tokenize(given, template, max_prompt_tokens=20, max_trace_tokens=50)
    assert [(example.problem.id, len(example.traces)) for example in examples] == [("tags", 1), ("fine", 1)]
    assert (report.no_answer, report.prompts_outside, report.traces) == (1, 1, 6)
    assert (report.traces_unclosed, report.traces_repeated, report.traces_outside) == (1, 2, 1)
    line = str(report)
    for words in ("1 without an answer (e.g. bare)", "kept 2 of 6 traces", "2 with a think tag twice (e.g. tags)"):
        assert words in line
    assert "never closed" not in str(tokenize([problem("a")], Letters(), max_prompt_tokens=9, max_trace_tokens=9)[1])


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(DataError, match="no example is left with max_prompt_tokens=2: kept 0 of 1 problem: 1 prompt"):
        tokenize([problem("a")], Letters(), max_prompt_tokens=2, max_trace_tokens=5)


def indices(stream: Stream, first: int, count: int) -> list[int]:
    return [stream.index(first + i) for i in range(count)]


def test_epochs_are_permutations_that_differ_by_epoch_and_seed():
    stream = Stream(10, 3, seed=47)
    epochs = [indices(stream, 9 * epoch, 9) for epoch in range(3)]
    for seen in epochs:
        assert len(set(seen)) == 9, "no index twice in an epoch, and the partial batch is dropped"
        assert set(seen) <= set(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    assert indices(Stream(10, 3, seed=47), 9, 9) == epochs[1]
    assert [stream.index(p) for p in (18, 8, 9, 17, 8)] == [epochs[2][0], epochs[0][8], *epochs[1][::8], epochs[0][8]]
    assert indices(Stream(10, 3, seed=48), 0, 9) != epochs[0]
    # Pinned, because a resumed run must see the same batches under every Python version.
    assert indices(Stream(5, 5, seed=0), 0, 5) == PINNED_ORDER


PINNED_ORDER = [1, 0, 4, 3, 2]


def take(positions: Iterator[int], count: int) -> list[int]:
    return list(itertools.islice(positions, count))


def test_a_ledger_gives_every_position_to_one_rank_and_once():
    ledger = Ledger(Stream(100, 5, seed=1))
    two = [ledger.unused(rank, 2) for rank in range(2)]
    assert [take(two[0], 6), take(two[1], 4)] == [[0, 2, 4, 5, 7, 9], [1, 3, 6, 8]]  # 3 and 2 of a batch of 5
    ledger.use([0, 2, 4, 7, 1])
    assert (ledger.low, ledger.beyond) == (3, {4, 7})
    with pytest.raises(ValueError, match="position 4 is used twice"):
        ledger.use([4])
    with pytest.raises(ValueError, match="position 2 is used twice"):
        ledger.use([2])
    resumed = Ledger(Stream(100, 5, seed=1))
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert take(resumed.unused(0, 1), 5) == [3, 5, 6, 8, 9]  # what was under way, and what nobody began
    assert [take(resumed.unused(rank, 2), 3) for rank in range(2)] == [[5, 9, 10], [3, 6, 8]]
    assert ledger.state_dict() == {"n": 100, "batch_size": 5, "seed": 1, "low": 3, "beyond": [4, 7]}


def test_a_checkpoint_with_whole_batches_goes_on():
    ledger = Ledger(Stream(10, 3, seed=1))
    ledger.load_state_dict(from_batches({"n": 10, "batch_size": 3, "seed": 1, "epoch": 2, "cursor": 1}))
    assert (ledger.low, take(ledger.unused(0, 1), 2)) == (2 * 9 + 3, [21, 22])


def test_streams_and_ledgers_refuse_what_cannot_work():
    with pytest.raises(ValueError, match=r"batch_size must be at most the number of examples \(3\), got 4"):
        Stream(3, 4, seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Stream(3, 0, seed=0)
    state = Ledger(Stream(8, 2, seed=0)).state_dict()
    for other, name in (
        (Stream(9, 2, seed=0), "n"),
        (Stream(8, 4, seed=0), "batch_size"),
        (Stream(8, 2, seed=1), "seed"),
    ):
        with pytest.raises(ValueError, match=f"Ledger: {name} must be"):
            Ledger(other).load_state_dict(state)


def test_importing_stays_light():
    import subprocess

    heavy = "{'torch', 'transformers', 'vllm', 'pyarrow', 'sympy', 'datasets'}"
    code = (
        f"import sys, luffy.data, luffy.prompts, luffy.problems, luffy.rewards; assert not {heavy} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
