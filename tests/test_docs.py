"""README and docs: code runs, commands are ones, links lead somewhere, and the site's pages need no network."""

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import json
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import doc_preludes
import luffy_kernels
import pytest
from doc_blocks import PAGES, ROOT, Block, blocks, commands, every, inline_commands, is_synopsis, words

from luffy import cli
from luffy.commands.train import spell_out_resume
from luffy.config import flat_keys
from luffy.config_file import load_stages
from luffy.objectives import KNOWN, options_of

LANGUAGES = {"python", "bash", "toml", "json", "math", "text", "indented"}
MISTAKEN = re.compile(r"^(import|from|def|class|with) |^[A-Z]\w+\.\w+\(", re.MULTILINE)
"""Python, where text is expected."""
RUN = {"recipes", "plan", "doctor"}
"""Commands of luffy that answer within seconds, whatever they are asked."""


def block_id(block: Block) -> str:
    return block.where


# ---------------------------------------------------------------- every block is known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_slips_through(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: a fence must name one of {sorted(LANGUAGES)}"
        if block.what in ("prelude", "needs", "not run"):
            assert block.language == "python", f"{block.where}: only Python can have `{block.what}`"
        if block.language == "indented" and not block.is_commands:
            assert not MISTAKEN.search(block.text), f"{block.where}: code wants a fence that names its language"
    marked = sum(block.what != "" for block in blocks(page))
    assert len(re.findall(r"<!-- (?:prelude|needs|file|not run):", page.read_text())) == marked, "a comment is astray"


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize("block", every("python"), ids=block_id)
def test_python_runs(block: Block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = compile(block.text, block.where, "exec")
    if block.what == "not run":
        return
    if block.what == "needs":
        lacking = importlib.util.find_spec(block.value.replace("-", "_")) is None
        sentence = pytest.raises(ImportError, match=f"luffy_kernels.compat: {block.value}.* is not installed")
        with sentence if lacking else contextlib.nullcontext():
            exec(code, {})
        return
    prelude = getattr(doc_preludes, block.value) if block.what == "prelude" else contextlib.nullcontext
    with prelude() as given:
        exec(code, {"__name__": "block"} | (given or {}))


def test_what_is_not_run_is_known():
    """A reason is no way out for what could run."""
    assert {block.page.name for block in every("python") if block.what == "not run"} == {"evaluation.md"}


# ---------------------------------------------------------------- commands


class Parsed(Exception):
    pass


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what commands of the docs name: recipes, and the files of the page."""

    def at(page: Path) -> Path:
        for block in blocks(page):
            if block.what == "file":
                (tmp_path / block.value).write_text(block.text)
        (tmp_path / "my.toml").write_text('[model]\nname = "Qwen/Qwen2.5-1.5B"\n')
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return at


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of what another test has imported
@pytest.mark.parametrize("block", [b for b in every("bash", "indented") if b.is_commands], ids=block_id)
def test_commands_are_ones(block: Block, place, monkeypatch, capsys):
    place(block.page)
    for command in commands(block):
        check_command(command, monkeypatch)


@pytest.mark.parametrize(("where", "command"), inline_commands())
def test_commands_in_the_text_are_ones(where, command):
    check_synopsis(command.split())


def check_command(command: str, monkeypatch) -> None:
    given = words(re.sub(r"\bRECIPE\|FILE\.toml|\bRECIPE\b", "quickstart", command))
    name = given[0].split("/")[-1]
    if is_synopsis(command):
        check_synopsis(re.split(r"[\s\[\]|]+", command))
    elif name == "luffy":
        check_luffy(given[1:])
    elif name.startswith("python"):
        check_python(given[1:], monkeypatch)
    elif given[0].startswith(("scripts/", ".ci/")):
        check_script(given)
    elif name == "torchrun":
        check_luffy(given[given.index("luffy") + 1 :])
    elif name == "sbatch":
        check_script(given[1:])
    elif name == "pip":
        check_pip(given)
    else:
        raise AssertionError(f"nothing here can check {command!r}; name its language text, or teach this test")


def check_luffy(argv: list[str]) -> None:
    if argv == ["--version"]:
        return
    argv = spell_out_resume(argv)
    args, rest = cli.build_parser().parse_known_args(argv)
    if args.command in ("train", "plan"):
        load_stages(args.source, rest)
    else:
        cli.build_parser().parse_args(argv)
    if args.command in RUN:
        assert cli.main(argv) == 0


def check_synopsis(given: list[str]) -> None:
    """`given` shows what there is: the command must exist and have every option named."""
    parser: argparse.ArgumentParser = cli.build_parser()
    if given[0].startswith("scripts/"):
        check_script(given)
        return
    assert given[0].split("/")[-1] == "luffy", given
    for word in given[1:]:
        action = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if action is None or not re.fullmatch("[a-z]+", word):
            break
        assert word in action.choices, f"luffy has no {word}"
        parser = action.choices[word]
    known = set(parser._option_string_actions)
    if given[1] in ("train", "plan"):
        options = {f"objective.{key}" for name in KNOWN for key in options_of(name).model_fields}
        known |= {f"--{key}" for key in {*flat_keys(), *options}} | {"--section.key", "--objective.OPTION"}
    for word in given:
        if word.startswith("--") and not word.startswith("--first."):
            assert word.split("=")[0] in known, f"luffy {given[1]} has no {word}"


def check_python(given: list[str], monkeypatch) -> None:
    if given[0] == "-c":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(given[1], "-c", "exec"), {})
    elif given[:2] == ["-m", "luffy"]:
        check_luffy(given[2:])
    elif given[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in given[2:] if word.endswith(".py"))
    elif given[:2] == ["-m", "timeit"]:
        compile("\n".join(given[3:]), "timeit", "exec")
    elif given[:2] == ["-m", "mkdocs"]:
        assert given[2] in ("build", "serve")
    elif given[:2] == ["-m", "luffy.rollout.serve"]:
        pass  # vLLM's own options; tests/test_server_rollout.py starts it with them
    elif given[:2] == ["-m", "luffy.problems"] and "--out" not in given:
        from luffy.problems.__main__ import main

        assert main(given[2:]) in (0, None)
    else:
        parse_only(given, monkeypatch)


def parse_only(given: list[str], monkeypatch) -> None:
    """Start a module or script, and stop it when its own parser has taken what it was given."""

    def parse(self, args=None, namespace=None):
        found, extra = argparse.ArgumentParser.parse_known_args(self, args, namespace)
        assert not extra, f"{given} has no {extra}"
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", ["", *given[2 if given[0] == "-m" else 1 :]])
        patch.syspath_prepend(str(ROOT))
        module = given[0] == "-m"
        run, what = (runpy.run_module, given[1]) if module else (runpy.run_path, str(ROOT / given[0]))
        with pytest.raises(Parsed):
            run(what, run_name="__main__")


def check_script(given: list[str]) -> None:
    path = ROOT / given[0]
    assert path.is_file(), given[0]
    if path.name == "quickstart.sh":
        check_luffy(["train", "quickstart", *(word for word in given[1:] if word != "--help")])
    elif path.name != "test.sh":  # whose options are pytest's
        text = path.read_text()
        options = [word for word in given[1:] if word.startswith("--")]
        assert all(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) for word in options), given


def check_pip(given: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, extras in re.findall(r"(\S*luffy-rl|\.)\[([\w,-]+)\]", " ".join(given)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys(), name


# ---------------------------------------------------------------- what pages show of the code


def test_an_objective_and_a_grader_of_ones_own(place, monkeypatch):
    """What docs/objectives.md and docs/architecture.md show is found where they say."""
    from luffy.objectives import find
    from luffy.rewards.graders import find_grader

    folder = place(ROOT / "docs/objectives.md")
    place(ROOT / "docs/architecture.md")
    monkeypatch.syspath_prepend(str(folder))
    assert find("mine:Brief").Options().halves_after == 512.0
    lenient = find_grader("mine_too:lenient")
    assert [lenient(said, "4") for said in ("\\boxed{4}", "\\boxed{5}", "4")] == [1.0, 0.5, 0.0]
    for name in ("mine", "mine_too"):  # other tests have modules of these names
        del sys.modules[name]


def test_files_that_are_named_are_there():
    others = ("kernels/__init__.py", "docs/algo/rollout_corr.md")  # one that must not be, and verl's
    named = re.compile(r"`((?:luffy|kernels|tests|bench|scripts|docs|examples)/[\w./-]+)`")
    for page in PAGES:
        for name in named.findall(page.read_text(encoding="utf-8")):
            made_up = "NAME" in name or "FILE" in name or name in others
            assert made_up or (ROOT / name).exists(), f"{page.name}: {name}"


def test_plans_of_the_recipes_are_as_they_are_now():
    from bench.recipe_plans import table

    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert "\n".join(table()) == page.split("<!-- plans -->\n")[1].split("\n<!-- /plans -->")[0]


def test_figures_of_shaping_are_of_the_formula():
    """The numbers of docs/concepts.md's table, too."""
    import numpy as np
    from luffy_kernels import power, shaped

    from bench.concepts import GAMMAS, of_token, with_signal

    p = np.array([0.001, 0.01, 0.1, 0.5, 1.0])
    for gamma in GAMMAS:
        np.testing.assert_allclose(of_token(shaped(gamma), p), (p / (p + gamma), gamma * p / (p + gamma) ** 2))
    page = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    rows = [[float(cell) for cell in row.split("|")[1:-1]] for row in re.findall(r"(?m)^\| [\d.]+ \|.*$", page)]
    plain, bent = of_token(power(1.0, "prob"), p)[1], of_token(shaped(0.1), p)[1]
    np.testing.assert_allclose(rows, np.stack([p, plain, bent, plain * (1 - p), bent * (1 - p)], 1), atol=5.1e-4)
    assert round(100 * with_signal(np.array(0.01), 8, False)) == 8


# ---------------------------------------------------------------- other blocks


@pytest.mark.parametrize("block", every("toml"), ids=block_id)
def test_toml_is_a_recipe(block: Block, tmp_path):
    (tmp_path / "block.toml").write_text(block.text)
    load_stages(str(tmp_path / "block.toml"), [])


@pytest.mark.parametrize("block", every("json"), ids=block_id)
def test_json_rows_are_problems(block: Block, tmp_path):
    from luffy.data import load_problems

    left, rows = block.text.strip(), 0
    while left:
        row, end = json.JSONDecoder().raw_decode(left)
        left, rows = left[end:].strip(), rows + 1
        path = tmp_path / f"{rows}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        assert len(load_problems(str(path))) == 1
    assert rows


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"(?ms)^ {0,3}```.*?^ {0,3}```$", "", page.read_text(encoding="utf-8"))
    titles = re.findall(r"(?m)^#{1,6} (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"(?ms)^ {0,3}```.*?^ {0,3}```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    for to in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", to):
            assert to.startswith("https://"), to
            continue
        path, _, anchor = to.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name} links to {to}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {to}, which has no such heading"


def test_lines_are_short():
    """Of running text: rows of tables cannot be broken; code, and what a command wrote between comments, stay so."""
    for page in PAGES:
        text = re.sub(r"(?s)<!-- (\w+) -->\n.*?<!-- /\1 -->", lambda m: "\n" * m[0].count("\n"), page.read_text())
        for at, line in enumerate(text.split("\n"), 1):
            assert len(line) <= 140 or line.startswith(("|", "<!--", "    ")), f"{page.name}:{at}: {len(line)}"


# ---------------------------------------------------------------- troubleshooting


@functools.cache
def sentences() -> list[str]:
    """Every text of the code but documentation, what is filled in as `...`."""
    found = []
    for package in ("luffy", "kernels/luffy_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if id(node) in documents:
                    continue
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_of_troubleshooting_are_the_codes():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"(?m)^### `(.+)`$", page)
    assert len(messages) >= 40
    assert len(set(messages)) == len(messages)
    for message in messages:
        pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip()]
        assert len(re.findall(r"[A-Za-z]{2,}", message)) >= 3, f"{message!r} could be any message"
        wanted = re.compile(".*?".join(pieces), re.DOTALL)
        assert any(wanted.search(text) for text in sentences()), f"no text of the code reads {message!r}"


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs the `docs` extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_is_built_and_asks_no_other_host(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//", text), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_catalogue_has_every_objective(site):
    text = (site / "catalogue.html").read_text(encoding="utf-8")
    for name in KNOWN:
        assert re.search(rf"<h2[^>]*>[^<]*\b{name}\b", text), name
        for option in options_of(name).model_fields.keys() - {"name"}:
            assert f"<code>{option}</code>" in text


def test_reference_has_every_operator(site):
    text = (site / "api/kernels.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'<h\d id="luffy_kernels[\w.]*?\.?(\w+)" class="doc', text))
    assert set(luffy_kernels.__all__) <= shown


def test_pages_in_a_browser_fetch_from_here_alone(site, browser):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context(viewport={"width": 390, "height": 844})
    tab = context.new_page()
    here, asked, said = f"http://127.0.0.1:{server.server_port}", [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    try:
        for name in ("index", "concepts", "catalogue", "api/kernels", "cpu-kernels", "compat/index"):
            tab.goto(f"{here}/{name}.html", wait_until="networkidle")
            wider = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider <= 0, f"{name} is {wider} px wider than a telephone"
        tab.goto(f"{here}/concepts.html")
        assert tab.locator("math").count() >= 3
        assert not [url for url in asked if not url.startswith((here, "data:", "blob:"))]
        assert not said
    finally:
        context.close()
        server.shutdown()
        server.server_close()
