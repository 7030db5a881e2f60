"""Shared by every test: one seed, no network, and Triton's interpreter where there is no GPU to compile for."""

import contextlib
import os
import shutil
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before the first @triton.jit
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# vLLM imports it late, and that fails once any test has looked for pip's spec. A machine that only checks the kernels
# may lack it.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny `model`, for the commands of one file of tests."""
    from tiny import make_model

    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "model")
    return folder


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, for what pages do."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
        chromium = driver.chromium.launch(executable_path=found[0], args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """A page from a file, without a network: (its tab, what it said on the console or threw, what it asked for)."""

    contexts = []

    def open_page(page: Path, width: int, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme)
        tab, said, asked = context.new_page(), [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        contexts.append(context)
        tab.goto(page.as_uri())
        return tab, said, asked

    yield open_page
    for context in contexts:
        context.close()
