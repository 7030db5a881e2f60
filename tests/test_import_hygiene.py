"""The dependency direction of the house, asserted over the source tree: who may import whom, and what stays fast."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "luffy", "bench", "scripts", "tests")
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names that a file imports anywhere in it, lazily or not, with line numbers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


def offenders(banned: set[str], inside: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """`file:line imports name` for every banned import under `inside`, outside the `allowed` files and folders."""
    found = []
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        if where.startswith(inside) and not where.startswith(allowed):
            found += [f"{where}:{line} imports {name}" for name, line in imports(path) if name in banned]
    return found


def test_there_is_something_to_check():
    assert any(p.is_relative_to(ROOT / "luffy") for p in SOURCES)


def test_the_kernel_package_stands_alone():
    """Frameworks drop it in: torch only. Its compat adapters may know the frameworks, the trainer never."""
    assert offenders({"luffy", "vllm"}, "kernels/") == []
    assert offenders({"transformers"}, "kernels/", allowed=("kernels/luffy_kernels/compat/",)) == []


def test_vllm_is_imported_only_by_the_rollout_code():
    allowed = ("luffy/rollout/",)
    assert offenders({"vllm"}, "luffy/", allowed) == []


def test_triton_is_imported_only_by_the_device_kernels():
    assert offenders({"triton"}, "luffy/") == []
    assert offenders({"triton"}, "kernels/", allowed=("kernels/luffy_kernels/_triton/",)) == []


def test_loggers_are_imported_only_by_their_own_files():
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        assert offenders({name}, "luffy/", (f"luffy/loggers/{name}.py",)) == []


def test_nothing_imports_tests_or_bench_or_scripts():
    assert offenders({"tests", "bench", "scripts"}, "kernels/") == []
    assert offenders({"tests", "bench", "scripts"}, "luffy/") == []


def test_nothing_can_be_taken_for_the_package_called_kernels():
    """transformers imports names from a module `kernels` if one looks installed: ours must never look like it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [p for p in SOURCES if p.name == "kernels.py"] == []
    assert [p for p in SOURCES if p.name == "__init__.py" and p.parent.name == "kernels"] == []


def test_sources_are_ascii():
    mixed = [str(p.relative_to(ROOT)) for p in SOURCES if not p.read_bytes().isascii()]
    assert mixed == []


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("luffy_kernels", ("transformers", "vllm", "triton", "luffy")),
        ("luffy.config", ("torch", "transformers", "vllm", "luffy_kernels")),
        ("luffy.embedded", ("torch", "transformers", "vllm", "gguf")),
    ],
)
def test_importing_stays_light(module: str, banned: tuple[str, ...]):
    """In a fresh process, as other tests have imported everything. torch itself may load triton: only more counts."""
    code = f"""
import sys
if {module == "luffy_kernels"}:
    import torch
before = set(sys.modules)
import {module}
print([name for name in {banned!r} if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
