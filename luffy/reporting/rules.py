"""What is wrong with a run, by rules: the causes that explain most come first.

A rule says what it saw, with numbers, and what to do. Rules look at the first and last fifth of a run's steps, so they
say little about runs of a few steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from luffy.reporting.runs import Run

FEW = 5
"""Steps below which trends are none."""
FAR = 0.02
"""Nats per token between policies whose probabilities differ by a fifth, as far as PPO lets a ratio go (0.2 ** 2 / 2).
Rounding to bfloat16 accounts for less than a quarter of it (tests/test_failing_runs.py)."""
FAR_AHEAD = 0.5
"""The same where sampling is ahead: healthy runs one step and two steps ahead had up to 0.3 and 0.8, in a few steps
(docs/correction.md)."""
FEW_RIGHT = 0.1
"""Share of right rollouts below which every second group of eight, or nearly, has none (0.9 ** 8 = 0.43)."""


@dataclass(frozen=True, slots=True)
class Finding:
    cause: str
    seen: str
    remedy: str


def findings(run: Run) -> list[Finding]:
    """Of what would explain the others first."""
    return [found for rule in RULES for found in rule(run)]


def broken_numbers(run: Run) -> Iterator[Finding]:
    bad = [one["step"] for one in run.steps if one.get("actor/bad_updates") or one.get("actor/loss", 0) is None]
    if bad:
        yield Finding(
            "numbers that are not finite",
            f"{len(bad)} of {len(run.steps)} steps had a loss or gradient that is no number, first step {bad[0]}",
            "lower optim.lr; if it happens from the first step on, look for bad weights or data",
        )


def verifier(run: Run) -> Iterator[Finding]:
    """Traces are right by construction: whoever grades them wrong is broken."""
    score = run.last("on_off_metrics/off_score")
    if score is not None and score < 0.5:
        yield Finding(
            "a verifier that turns down verified traces",
            f"traces got a reward of {score:.2f} in the last steps, where 1 is right",
            "run `luffy data check` on the data, and compare reward.grader with the form of the answers",
        )
    rows = run.total("batch/rows") or 1
    failed = run.total("verify/timeouts") + run.total("verify/crashes")
    if failed / rows > 0.05:
        yield Finding(
            "verifier timeouts",
            f"{failed:.0f} of {rows:.0f} answers were not graded in time, and got no reward",
            "raise reward.timeout_s or reward.workers; a grader of your own may be slow",
        )


def old_weights(run: Run) -> Iterator[Finding]:
    """Equal weights differ by rounding alone, and the first step shows how much that is on this machine."""
    first, last = run.untouched("rollout/kl_k3"), run.last("rollout/kl_k3")
    if first is None or last is None or len(run.steps) < 3:
        return
    ahead = run.total("rollout/staleness_max") > 0
    if last > (FAR_AHEAD if ahead else FAR) and last > 5 * first:
        yield Finding(
            "a sampler whose weights fall behind",
            f"the divergence of trainer and sampler grew from {first:.1g} to {last:.1g} nats per token, "
            + ("more than sampling ahead accounts for" if ahead else "though the sampler said that it had the newest"),
            "lower rollout.max_staleness; look at rollout/updates_missed and timing_s/sync"
            if ahead
            else "look whether the engine takes new weights (its log; rollout.urls), and start a new run",
        )


def too_fast(run: Run) -> Iterator[Finding]:
    """A fall of held-out accuracy that its intervals could hide is none."""
    held = run.accuracy()
    best = max(held, key=lambda one: one[1], default=(0, 0.0, 0.0, 0.0))
    fell = bool(held) and held[-1][1] < 0.5 * best[1] and held[-1][3] < best[2]
    probability = run.series("actor/off_policy_prob")
    likely = max((value for _, value in probability), default=0.0)
    forgot = len(probability) >= FEW and likely > 0.05 and (run.last("actor/off_policy_prob") or 0) < 0.5 * likely
    if fell or forgot:
        seen = f"held-out accuracy fell from {best[1]:.0%} to {held[-1][1]:.0%}" if fell else (
            f"the probability of traces fell from {likely:.2f} to {run.last('actor/off_policy_prob'):.2f}"
        )  # fmt: skip
        yield Finding(
            "updates that are too large", seen, "lower optim.lr, or clip gradients harder (optim.max_grad_norm)"
        )


def template(run: Run) -> Iterator[Finding]:
    """Prompts that lack what the model was trained to see, or a model that ended no answer before any update and ends
    none now; what succeeds is left alone, for other prompts than a model's own can be meant."""
    right, cut = "on_off_metrics/on_score", "response_length/clip_ratio"
    doubt, score = run.environment.get("prompts", {}).get("doubt"), run.last(right)
    most_right = max(run.untouched(right) or 0, score or 0)
    least_cut = min(run.untouched(cut) or 0, run.last(cut) or 0)
    unended = len(run.steps) >= FEW and most_right < 0.02 and least_cut > 0.5
    if score is not None and ((doubt and score < FEW_RIGHT) or unended):
        yield Finding(
            "prompts in a form that the model does not know",
            f"{doubt or f'{least_cut:.0%} of answers never ended'}; {score:.0%} of the last rollouts were right",
            "compare model.prompt_style and model.chat_template with what the model was trained on",
        )


def truncated(run: Run) -> Iterator[Finding]:
    cut = run.last("response_length/clip_ratio")
    if cut is not None and cut > 0.5 and not any(template(run)):
        yield Finding(
            "truncated answers",
            f"{cut:.0%} of the last answers reached the limit",
            "raise rollout.max_tokens, or look whether answers repeat themselves",
        )


def no_signal(run: Run) -> Iterator[Finding]:
    zero, rows = run.last("batch/zero_rows"), run.last("batch/rows")
    if zero is not None and rows and zero / rows > 0.8 and len(run.steps) >= FEW:
        none, every = run.last("batch/solve_none") or 0, run.last("batch/solve_all") or 0
        yield Finding(
            "groups without signal",
            f"{zero / rows:.0%} of the last rows had no gradient: {'none' if none > every else 'all'} of a group right",
            "choose problems of another difficulty, or sample others in their place (rollout.refill)",
        )


def collapse(run: Run) -> Iterator[Finding]:
    first, last = run.first("actor/entropy_loss"), run.last("actor/entropy_loss")
    held = [accuracy for _, accuracy, *_ in run.accuracy()]
    learned = len(held) > 1 and held[-1] > held[0] + 0.1
    if first and last is not None and last < min(0.05, 0.1 * first) and len(run.steps) >= FEW and not learned:
        yield Finding(
            "entropy collapse",
            f"entropy fell from {first:.2g} to {last:.2g} nats per token, and held-out accuracy did not rise",
            "add an entropy term (objective.entropy_coef), more or other traces, or a lower optim.lr",
        )


def hacking(run: Run) -> Iterator[Finding]:
    before, after = (f("on_off_metrics/on_response_length_mean") for f in (run.first, run.last))
    reward = [f("on_off_metrics/on_score") for f in (run.first, run.last)]
    held = [accuracy for _, accuracy, *_ in run.accuracy()]
    if None in (before, after, *reward) or len(held) < 2 or len(run.steps) < FEW:
        return
    assert before is not None
    assert after is not None
    if after > 2 * before and (reward[1] or 0) > (reward[0] or 0) + 0.1 and held[-1] <= held[0]:
        yield Finding(
            "reward that comes from length",
            f"answers grew from {before:.0f} to {after:.0f} tokens and the reward with them, held-out accuracy did not",
            "read samples of the last evaluation; make the grader stricter",
        )


RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    broken_numbers,
    verifier,
    old_weights,
    template,
    too_fast,
    truncated,
    no_signal,
    collapse,
    hacking,
)
