"""What leaves this repository: the wheel, and the layout that Hugging Face's `kernels` loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "luffy_kernels"


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=environment)


def layout(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "hub_layout.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


BESIDE = """
import os
from pathlib import Path
import luffy_kernels, torch
from kernels import get_kernel, get_local_kernel

ours = get_local_kernel(Path("hub"))
assert ours is not luffy_kernels and str(Path("hub").resolve()) in ours.__file__, ours.__file__
assert "does not load" not in ours.status() and "cpp     triton" in ours.status()
torch.manual_seed(0)
hidden, weight, targets = torch.randn(5, 16), torch.randn(70, 16), torch.randint(0, 70, (5,))
for backend in ("torch", "triton"):
    leaves = [[x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2)]
    found = [m.linear_logprobs(*own, targets, backend=backend) for m, own in zip((ours, luffy_kernels), leaves)]
    assert torch.equal(found[0].logp, found[1].logp)
    grads = [torch.autograd.grad(one.logp.sum(), own) for one, own in zip(found, leaves)]
    assert all(map(torch.equal, *grads))
op = getattr(torch.ops, ours.__name__).logprobs_torch
assert op is not torch.ops.luffy_kernels.logprobs_torch
again = get_kernel("somebody/luffy-kernels", version=1)
assert again.linear_logprobs(hidden, weight, targets).logp.shape == (5,)
print("loaded", ours.__name__)
"""


def test_the_kernels_load_from_a_folder_beside_the_package(tmp_path):
    pytest.importorskip("kernels", reason="needs Hugging Face's kernels")
    done = layout(str(tmp_path / "hub"), "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    again = layout(str(tmp_path / "hub"), "--license", "apache-2.0", "--version", "2")  # replaces what there is
    assert again.returncode == 0, again.stderr
    done = python(BESIDE, tmp_path, LOCAL_KERNELS=f"somebody/luffy-kernels={tmp_path / 'hub'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded _luffy_kernels_cpu_" in done.stdout
    made = json.loads((tmp_path / "hub/build/torch-cuda/metadata.json").read_text())
    assert (made["version"], made["backend"], made["name"]) == (2, {"type": "cuda"}, "luffy-kernels")
    assert sorted(p.name for p in (tmp_path / "hub").iterdir()) == ["build", "build.toml", "torch-ext"]


def test_the_layout_is_one_that_the_builder_reads(tmp_path):
    rust = pytest.importorskip("kernels._rust", reason="needs Hugging Face's kernels")
    assert layout(str(tmp_path), "--license", "mit").returncode == 0
    rust.Build.open(tmp_path)  # raises ValueError for what it does not know
    sources = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")}
    for folder in ("torch-ext/luffy_kernels", "build/torch-cpu", "build/torch-cuda", "build/torch-rocm"):
        assert {p.relative_to(tmp_path / folder) for p in (tmp_path / folder).rglob("*.py")} == sources


def test_a_layout_replaces_no_sources():
    done = layout(str(ROOT), "--license", "mit")
    assert done.returncode == 2
    assert "holds the sources" in done.stderr
    assert "--license" in layout("somewhere").stderr


def test_a_layout_replaces_nobodys_build(tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "mine.txt").write_text("x")
    done = layout(str(tmp_path), "--license", "mit")
    assert done.returncode == 2
    assert "none of these kernels'" in done.stderr
    assert (tmp_path / "build" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("stamp", "says"), [("2.1.0", "built for torch 2.1.0 and this is 2."), (None, "does not load")]
)
def test_a_library_for_another_torch_says_what_to_do(stamp, says, tmp_path):
    """And the operators run in torch meanwhile."""
    shutil.copytree(
        PACKAGE, tmp_path / "luffy_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.torch")
    )
    (tmp_path / "luffy_kernels" / "_C.so").write_bytes(b"no library")
    if stamp:
        (tmp_path / "luffy_kernels" / "_C.torch").write_text(f"{stamp}\n")
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        "sys.path.insert(0, '.'); import luffy_kernels, torch; print(luffy_kernels.__file__, luffy_kernels.status())\n"
        "found = luffy_kernels.linear_logprobs(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))\n"
        "assert torch.allclose(found.logp, torch.tensor(0.25).log())"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(tmp_path) in done.stdout
    assert says in done.stdout
    assert "pip install --no-build-isolation" in done.stdout
    assert "linear_logprobs       torch" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_wheel_in_an_empty_environment(tmp_path):
    """Builds it, and runs the kernels' tests against it: some six minutes, and torch once more from the index."""
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "wheel.sh", tmp_path / "dist", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [wheel] = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith("luffy_rl-")
    assert "py3-none-manylinux_2_" in wheel.name
    assert list((tmp_path / "dist").glob("luffy_rl-*.tar.gz"))
    assert " passed" in done.stdout
