"""Bad data, one case after the other: one sentence says what is missing and how many rows it concerns, in training and
in `luffy data check`."""

import pytest
from tiny import make_tokenizer

from luffy.data import DataError, Problem, tokenize
from luffy.data_check import check
from luffy.errors import UserError
from luffy.objectives import make_objective, options_of
from luffy.prompts import PromptTemplate
from luffy.rewards import VerifierPool

RARE = "\u00ed"  # whose last byte is the last of the vocabulary
GOOD = "<think>\n1+1=2\n</think>\nIt is \\boxed{2}."
CASES = {
    "the tag twice": (GOOD + "<think>", "2 with a think tag twice (e.g. p1)", "2 traces cannot be learnt from: with a"),
    "never closed": (
        "<think>\n1+1=2, so \\boxed{2}",
        "2 with a think tag that is never closed (e.g. p1)",
        "2 traces cannot be learnt from: with a think tag that is never closed, such as p1, p2",
    ),
    "an EOS inside": (
        "one<|im_end|>two \\boxed{2}",
        "2 with an EOS inside",
        "2 traces cannot be learnt from: with an EOS",
    ),
    "outside the vocabulary": (
        f"{RARE} \\boxed{{2}}",
        "2 with tokens outside the model's vocabulary (e.g. p1)",
        "2 traces cannot be learnt from: with tokens outside the model's vocabulary, such as p1, p2",
    ),
    "longer than the limit": ("x" * 200 + "\\boxed{2}", "2 too long", "2 traces cannot be learnt from: too long"),
}


def problem(name: str, trace: str, **more) -> Problem:
    turns = ({"role": "user", "content": f"What is {name}?"},)
    return Problem(id=name, data_source="s", messages=turns, answer="2", traces=(trace,) if trace else (), **more)


@pytest.fixture(scope="module")
def template():
    tokenizer = make_tokenizer()
    outside = max(tokenizer.encode(RARE, add_special_tokens=False))
    made = PromptTemplate(tokenizer, vocab_size=len(tokenizer))
    made.outside = PromptTemplate(tokenizer, vocab_size=outside)  # a model that has no embedding for its last byte
    return made


def of(template, name: str):
    return template.outside if name == "outside the vocabulary" else template


LIMITS = {"max_prompt_tokens": 200, "max_trace_tokens": 100}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_trace_is_dropped_and_counted(template, name):
    trace, said, found = CASES[name]
    problems = [problem("p0", GOOD), problem("p1", trace), problem("p2", trace)]
    examples, report = tokenize(problems, of(template, name), **LIMITS)
    assert [len(example.traces) for example in examples] == [1, 0, 0], "the problems stay, without it"
    assert said in str(report)
    assert "kept 1 of 3 traces" in str(report)
    wrong = check(problems, of(template, name), None, {}, **LIMITS).wrong
    assert any(sentence.startswith(found) for sentence in wrong), wrong


def test_traces_without_a_verifiable_answer(template):
    problems = [problem("p0", GOOD), problem("p1", "I do not know."), problem("p2", "</think> Nobody knows.")]
    with VerifierPool("answer", 1, 20.0) as verifier:
        wrong = check(problems, template, verifier, {}, **LIMITS).wrong
    assert "2 traces have no \\boxed{} nor another verifiable answer, such as p1, p2" in wrong


def test_teacher_log_probs_of_another_length(template):
    tokens = len(template.encode_trace(GOOD))
    logps = [((-0.1,) * n,) for n in (tokens, tokens - 1, tokens + 1)]
    problems = [problem(f"p{i}", GOOD, trace_logps=known) for i, known in enumerate(logps)]
    words = f"2 of 3 traces have other teacher log-probs than tokens .p1: trace 1 has {tokens - 1} and {tokens} tokens"
    with pytest.raises(DataError, match=words):
        tokenize(problems, template, **LIMITS)
    assert check(problems, template, None, {}, **LIMITS).wrong[0] == (
        "2 traces have other teacher log-probs than tokens, such as p1, p2"
    )


@pytest.mark.parametrize("name", ["luffy", "sft", "rl_sft", "bread", "relift", "sort"])
def test_an_objective_of_traces_on_problems_without(template, name):
    examples, _ = tokenize([problem("p0", ""), problem("p1", "x" * 200)], template, **LIMITS)
    with pytest.raises(
        UserError, match=f"{name} learns from traces, and none of the 2 problems has one that it may take"
    ):
        make_objective(options_of(name)()).prepare(examples)


def test_teachers_probabilities_that_nobody_gives(template):
    examples, _ = tokenize([problem("p0", GOOD), problem("p1", GOOD)], template, **LIMITS)
    with pytest.raises(UserError, match="of 2 problems with traces none has its log-probs"):
        make_objective(options_of("luffy")(off_policy="shaped_teacher")).prepare(examples)
