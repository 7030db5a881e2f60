"""The compiled kernels, on a machine without a GPU: what bench.aot finds in them, and that it finds faults."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot, sass

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "kernels/luffy_kernels/_triton"


def child(*arguments):
    """A python without the interpreter of conftest.py."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def trees():
    return [ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py")]


def test_every_kernel_that_is_launched_is_compiled():
    calls = [node.func for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    launched = {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}
    assert launched == set(aot.KERNELS) == set(aot.BYTES)


def test_every_argument_of_a_kernel_has_a_type():
    sizes = {"OPERAND", "WHOLE", "GROUP", "TMA", "BLOCK", "SPLIT", "BLOCK_M", "BLOCK_N", "BLOCK_K"}
    functions = [node for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if node.name in aot.KERNELS]
    assert len(kernels) == len(aot.KERNELS)
    for kernel in kernels:
        for argument in kernel.args.args:
            known = sizes | set(aot.FLAGS) if argument.annotation else set(aot.ARGUMENTS)
            assert argument.arg in known, f"{kernel.name}: {argument.arg}"


@pytest.mark.slow
def test_finds_wide_accesses_matrix_instructions_and_no_spills(tmp_path):
    kernels, archs = ("grad_rows_kernel", "grad_kernel"), ("sm_90", "gfx942")
    path = tmp_path / "facts.json"
    done = child("-m", "bench.aot", "--quick", "--kernel", *kernels, "--arch", *archs, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    facts = {(x["kernel"], x["arch"]): x for x in json.loads(path.read_text())}
    assert set(facts) == {(kernel, arch) for kernel in kernels for arch in archs}
    for x in facts.values():
        assert x["spills"] == 0
        assert 0 < x["registers"] <= 512
        assert x["shared"] <= sass.SHARED_KIB[x["arch"]] * 1024
        assert (x["load"], x["store"]) == (16, 16)
    assert all(facts["grad_rows_kernel", arch]["ordered"] for arch in archs)
    assert facts["grad_kernel", "sm_90"]["matrix"] == "HGMMA"
    assert facts["grad_kernel", "gfx942"]["matrix"] == "v_mfma"


BAD = """
import sys
from bench import aot
if __name__ == "__main__":
    huge = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4, "GROUP": 16, "TMA": False}
    block = {"BLOCK": 4096, "num_warps": 8}
    aot.cases = lambda *_: [
        aot.Case("grad_rows_kernel", "plain", "bf16", "sm_90", "", block, odd=True),
        aot.Case("grad_kernel", "plain", "bf16", "sm_80", "16", huge),
        aot.Case("grad_kernel", "plain", "bf16", "sm_80", "16", {"num_warps": 4, "GROUP": 16, "TMA": False}),
    ]
    sys.exit(aot.main([]))
"""


@pytest.mark.slow
def test_fails_on_narrow_loads_spills_shared_memory_and_what_does_not_compile(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{BAD}")
    done = child(str(script))
    assert done.returncode == 1, done.stdout + done.stderr
    faults = [line for line in done.stderr.splitlines() if "_kernel" in line]

    def found(where, what):
        return any(where in line and what in line for line in faults)

    assert found("grad_rows_kernel", "loads 8 bytes at a time, not 16")
    assert found("M=256 N=256", "spills")
    assert found("M=256 N=256", "bytes of shared memory of 166912")
    assert found("sm_80  warps=4", "'BLOCK_M' is neither")


def test_a_barrier_must_part_the_loads_of_a_block_from_its_stores():
    assert sass.ordered("LLBSS")
    assert sass.ordered("LLBBLLBSSLLBSS")
    assert not sass.ordered("LLBLS")
    assert not sass.ordered("LSBS")
    assert not sass.ordered("LLSS")
