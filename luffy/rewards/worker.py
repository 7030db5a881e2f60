"""The process behind one slot of the pool: reads one JSON request a line, writes one JSON reply a line.

Run as `python -P -m luffy.rewards.worker GRADER TIMEOUT_S` with pipes on stdin and stdout; end of input ends it.
The wall clock is the parent's. What this file adds is for when the parent is gone or memory runs out: a backstop alarm
that kills the process, and a memory limit that turns a giant power into a MemoryError. Imports neither torch nor vllm.
"""

import functools
import gc
import json
import logging
import os
import resource
import signal
import sys
from typing import Any, TextIO

from luffy.rewards.golds import hashable

MEMORY_LIMIT_BYTES = 4 << 30
BACKSTOP_S = 2.0
PARSES_KEPT = 4096
"""Texts; math-verify keeps 20 of its own. Answers to one question agree with its gold and with each other."""


def main(argv: list[str]) -> int:
    """Serve requests until end of input; 1 when the grader cannot be loaded (the reason is sent to the parent)."""
    name, timeout_s = argv[0], float(argv[1])
    replies = _claim_stdout()
    for number in (signal.SIGINT, signal.SIGTERM):  # for the whole process group; the trainer still wants its verdicts
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.ERROR)
    _limit_memory()

    from luffy.rewards.graders import SYMBOLIC, find_grader, warm_up

    try:
        grader = find_grader(name)
        if name in SYMBOLIC:
            warm_up()
            _spare_work()
    except Exception as error:  # importing someone's module can raise anything
        _send(replies, {"failed": str(error)})
        return 1
    _send(replies, {"ready": True})
    for line in sys.stdin:
        response, answer = json.loads(line)
        # SIGALRM's default action needs no Python code to run, so it ends a grader that is stuck in C as well.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + BACKSTOP_S)
        _send(replies, _reply(grader, response, answer))
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


def _reply(grader: Any, response: str, answer: Any) -> dict[str, Any]:
    try:
        reward = float(grader(response, hashable(answer)))
    except Exception as error:  # whatever a grader raises is a counted crash of this answer, not of the pool
        return {"crash": f"{type(error).__name__}: {error}"[:500]}
    return {"reward": reward} if reward == reward else {"crash": "the grader returned NaN"}


def _spare_work() -> None:
    """Parse a text once, and collect garbage rarely: sympy's small trees are seldom cyclic, but there are many of them.

    Together a quarter of the time of LUFFY's validation set.
    """
    from math_verify import parser

    parse = getattr(parser, "parse_latex_cached", None)
    if inner := getattr(parse, "__wrapped__", None):
        parser.parse_latex_cached = functools.lru_cache(PARSES_KEPT)(inner)
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))


def _claim_stdout() -> TextIO:
    """Keep the pipe for replies and point stdout at stderr: a grader that prints cannot break the protocol."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _send(stream: TextIO, message: dict[str, Any]) -> None:
    try:
        stream.write(json.dumps(message) + "\n")
        stream.flush()
    except BrokenPipeError:  # the parent is gone, and nobody is left to tell
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
