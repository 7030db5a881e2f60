"""The grader of programs: the last fenced block of a response is run against the problem's tests, in `sandbox.py`.

An answer is Python that asserts, to be run after the program; or JSON of what it reads and prints:

    "assert add(2, 3) == 5"
    {"cases": [{"input": "2 3\\n", "output": "5\\n"}, ...]}

All tests pass: 1.0, else 0.0. A program that never ends has `SECONDS` of a processor for each run; `reward.timeout_s`
is the clock of all runs together. It is a guard against accidents, not against a program that looks for the tests.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from luffy.rewards.golds import Answer

SANDBOX = Path(__file__).with_name("sandbox.py")
SECONDS = 5
MEMORY_BYTES = 1 << 30
OUTPUT_BYTES = 1 << 20

_FENCED = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def grade_code(response: str, answer: Answer) -> float:
    """1.0 when the last fenced program passes every test of the answer, else 0.0.

    Raises:
        ValueError: JSON without `cases`, or with none: a problem that any program would solve.
    """
    blocks = _FENCED.findall(response)
    if not blocks:
        return 0.0
    text = answer if isinstance(answer, str) else "\n".join(answer)
    if not text.lstrip().startswith("{"):
        return float(_asserts(blocks[-1], text))
    cases = json.loads(text).get("cases")
    if not cases:
        raise ValueError('code: an answer in JSON needs "cases", at least one {"input", "output"}')
    return float(all(_prints(blocks[-1], case["input"], case["output"]) for case in cases))


def _asserts(program: str, tests: str) -> bool:
    """Passed: it came to the end of the tests, which a program that leaves early cannot say."""
    token = secrets.token_hex(16)
    said = run(f"{program}\n\n{tests}\n\nprint({token!r})\n")
    return said is not None and said.rstrip().endswith(token)


def _prints(program: str, given: str, wanted: str) -> bool:
    said = run(program, given)
    return said is not None and _lines(said) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run(program: str, stdin: str = "") -> str | None:
    """What a program prints; None where it fails, is killed, or takes longer than its processor time allows."""
    with tempfile.TemporaryDirectory(prefix="luffy-code-") as folder:
        file = Path(folder, "program.py")
        file.write_text(program, encoding="utf-8")
        command = [sys.executable, "-I", "-S", "-B", str(SANDBOX), str(file), str(SECONDS), str(MEMORY_BYTES)]
        with Path(folder, "out").open("w+b") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            try:
                with suppress(subprocess.TimeoutExpired):  # asleep, it would use no processor
                    process.communicate(stdin.encode(), timeout=2 * SECONDS)
            finally:
                _kill(process)
            out.seek(0)
            said = out.read(OUTPUT_BYTES + 1)
    if process.returncode != 0 or len(said) > OUTPUT_BYTES:
        return None
    return said.decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
