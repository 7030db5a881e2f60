"""Rewards: pure graders, and a pool of processes that runs them under a hard wall clock.

    with VerifierPool("train", workers=2, timeout_s=5) as pool:
        verdicts = pool.grade([(response_text, answer), ...])

A grader maps (response text, answer) to a float and may hang or die; the pool's verdict then says `timeout` or `crash`
with reward 0. Deliberately absent: advantages, and any judgement of what a trace is worth without grading it.
"""

from luffy.rewards.code import grade_code
from luffy.rewards.graders import GRADERS, grade_answer, grade_number, grade_train, label
from luffy.rewards.gym import grade_gym
from luffy.rewards.pool import Verdict, VerifierPool
from luffy.rewards.strict import grade_boxed, grade_deepscaler, grade_deepscaler_v0, grade_deepscaler_v1
from luffy.rewards.texts import grade_choice, grade_exact, grade_regex

__all__ = [
    "GRADERS",
    "Verdict",
    "VerifierPool",
    "grade_answer",
    "grade_boxed",
    "grade_choice",
    "grade_code",
    "grade_deepscaler",
    "grade_deepscaler_v0",
    "grade_deepscaler_v1",
    "grade_exact",
    "grade_gym",
    "grade_number",
    "grade_regex",
    "grade_train",
    "label",
]
