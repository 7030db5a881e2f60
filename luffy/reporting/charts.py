"""What is drawn, and what its numbers mean. Keys are those of metrics.jsonl."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    """(label, key)"""
    note: str = ""
    share: bool = False
    """From 0 to 1."""
    log: bool = False


HELD_OUT = "Held-out accuracy"
CHARTS = (
    Chart(
        "Reward",
        "mean of the step's answers",
        (("rollouts", "on_off_metrics/on_score"), ("traces", "on_off_metrics/off_score")),
        "Traces are verified: below 1 the verifier or the template does not fit them.",
        share=True,
    ),
    Chart(
        "Entropy",
        "nats per token",
        (("responses", "actor/entropy_loss"),),
        "Near 0 the model has stopped exploring.",
    ),
    Chart(
        "Probability of tokens",
        "mean",
        (("of traces", "actor/off_policy_prob"), ("of rollouts", "actor/on_policy_prob")),
        "Traces approach rollouts as the model learns from them.",
        share=True,
    ),
    Chart(
        "Response length",
        "tokens, mean",
        (("rollouts", "on_off_metrics/on_response_length_mean"), ("traces", "on_off_metrics/off_response_length_mean")),
    ),
    Chart(
        "Answers cut off",
        "share that reached the limit",
        (("rollouts", "response_length/clip_ratio"),),
        share=True,
    ),
    Chart("Gradient norm", "before clipping", (("all", "actor/grad_norm"),), log=True),
    Chart(
        "Sampler against trainer",
        "KL, nats per token",
        (("k3 estimate", "rollout/kl_k3"),),
        "The same weights computed twice: growth means that the sampler's are old.",
        log=True,
    ),
    Chart(
        "Ratio to the sampler",
        "policy / sampler",
        (("largest", "rollout/ratio_max"), ("mean", "rollout/ratio_mean"), ("smallest", "rollout/ratio_min")),
        log=True,
    ),
    Chart(
        "Clipped",
        "share of tokens",
        (("rollouts", "actor/pg_clipfrac"), ("traces", "actor/off_pg_clipfrac")),
        share=True,
    ),
    Chart(
        "Groups without signal",
        "of a step",
        (("none right", "batch/solve_none"), ("all right", "batch/solve_all")),
        "Neither teaches anything: problems are too hard, or done.",
    ),
    Chart("Rows without gradient", "of a step", (("without gradient", "batch/zero_rows"), ("all", "batch/rows"))),
    Chart("Verifier", "answers of a step", (("timeouts", "verify/timeouts"), ("crashes", "verify/crashes"))),
    Chart("Speed", "response tokens a second", (("all", "perf/tokens_per_s"),)),
    Chart(
        "Time of a step",
        "seconds",
        (
            ("sampling", "timing_s/rollout"),
            ("update", "timing_s/update"),
            ("verifying", "timing_s/verify"),
            ("weights to the sampler", "timing_s/sync"),
        ),
    ),
    Chart("Memory", "GiB, peak", (("peak", "perf/peak_memory_gib"),)),
    Chart("Learning rate", "", (("actor", "actor/lr"),)),
)
PHASES = ("rollout", "verify", "gather", "update", "sync")
"""Of `timing_s/`, which the summary adds up."""
