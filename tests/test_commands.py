"""Every command: its help has examples that it takes, its options mean the same everywhere, docs and shells know it."""

import argparse
import inspect
import logging
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT, luffy

from luffy.cli import EXIT_CODES, build_parser, main
from luffy.commands.completion import parsers, script
from luffy.commands.train import spell_out_resume
from luffy.config import flat_keys
from luffy.config_file import load_stages, recipe_names
from luffy.evaluation.benchmarks import NAMES as BENCHMARKS
from luffy.evaluation.benchmarks import SUITES
from luffy.generate import Model
from luffy.machines import MACHINES
from luffy.objectives import KNOWN
from luffy.rewards import GRADERS
from luffy.versions import installed

NAMES = [parser.prog for parser in parsers(build_parser())]
"""`luffy`, `luffy train`, ... `luffy data check`."""
SAME = {"--seed", "--json", "--quiet", "--workers", "--template", "--split", "--temperature", "--kv-cache-gib"}
"""Options whose name says all; what others are of, their help says."""


def parser_of(name: str) -> argparse.ArgumentParser:
    return next(parser for parser in parsers(build_parser()) if parser.prog == name)


def examples_of(name: str) -> list[str]:
    _, _, rest = (parser_of(name).epilog or "").partition("examples:\n")
    return [line.strip() for line in rest.partition("\n\n")[0].splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_that_the_command_takes(name):
    examples = examples_of(name)
    assert 2 <= len(examples) <= 4
    assert "examples:\n  luffy" in parser_of(name).format_help()
    for example in examples:
        words = shlex.split(example.replace(" > ", " #").replace(" < ", " #"), comments=True)
        assert example.startswith(name), example
        args, rest = build_parser().parse_known_args(spell_out_resume(words[1:]))
        assert not rest or args.keys, example
        if args.keys and args.source in recipe_names():
            load_stages(args.source, rest)


def test_an_option_means_the_same_everywhere():
    found: dict[str, set[tuple[object, ...]]] = {}
    for parser in parsers(build_parser()):
        for action in parser._actions:
            for option in action.option_strings:
                found.setdefault(option, set()).add((str(action.metavar), type(action).__name__))
    for option in SAME:
        assert len(found[option]) == 1, (option, found[option])
    for option, kinds in found.items():
        # both are in the documents: a page of an evaluation, and what goes into a bug report
        assert len({kind for _, kind in kinds}) == 1 or option == "--report", (option, kinds)
        assert re.fullmatch(r"-h|--[a-z0-9]+(-[a-z0-9]+)*", option), option


def test_every_option_says_what_it_is():
    for parser in parsers(build_parser()):
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (parser.prog, action.dest)


def test_help_is_quick(tmp_path):
    """Less than half a second of its own time: what else runs on the machine must not fail it."""
    command = [sys.executable, "-m", "luffy", "--help"]
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert sorted(spent)[2] < 0.5, spent
    for code, meaning in EXIT_CODES.items():
        assert f"  {code:<4} {meaning}" in done.stdout


IMPORTS = """
import sys
there = set(sys.modules)
from luffy.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("imported", *{name.partition(".")[0] for name in sys.modules.keys() - there} - set(sys.stdlib_module_names))
"""


def imported(*args, cwd):
    """Packages that a command imports in a new interpreter, and what it says on stderr."""
    done = subprocess.run([sys.executable, "-c", IMPORTS, *args], cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:]), done.stderr


def test_help_needs_the_standard_library_alone(tmp_path):
    assert imported("--help", cwd=tmp_path) == ({"luffy"}, "")


@pytest.mark.parametrize(
    "words",
    [
        "recipes",
        "train quickstrt",
        "train quickstart --optim.lrr 1",
        "generate x --model ./none",
        "generate --file none.jsonl --out out.jsonl",
        "eval --suite quick --model ./none",
        "grade none.jsonl --grader boxed",
        "report none",
        "data check none.parquet",
    ],
)
def test_a_mistake_costs_no_import_of_torch(tmp_path, words):
    packages, said = imported(*words.split(), cwd=tmp_path)
    assert not packages & {"torch", "transformers", "vllm"}
    assert said.startswith("luffy: ") or words == "recipes"


def test_libraries_are_quiet_whether_they_are_imported_before_or_after(tmp_path):
    prepare = "from luffy.process import prepare_libraries; prepare_libraries()"
    look = (
        "import logging, transformers; from transformers.utils.logging import is_progress_bar_enabled as bars;"
        "print(bars(), *(logging.getLogger(name).getEffectiveLevel() for name in ('transformers', 'huggingface_hub')))"
    )
    told = {"TRANSFORMERS_VERBOSITY": "info", "HF_HUB_VERBOSITY": "info", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    bare = {name: value for name, value in os.environ.items() if name not in told}
    quiet, loud = f"False {logging.ERROR} {logging.ERROR}\n", f"True {logging.INFO} {logging.INFO}\n"
    for env, said in ((bare, quiet), (bare | told, loud)):
        for code in (f"{prepare}; {look}", f"import transformers; {prepare}; {look}"):
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
            assert done.stdout == said, code


INTERRUPTED = """
import os, signal, sys
from importlib.abc import MetaPathFinder
class CtrlC(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "luffy.commands.plan":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
from luffy.cli import main
sys.exit(main(["recipes"]))
"""


def test_ctrl_c_while_commands_are_imported():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "luffy: interrupted\n")


def test_the_version(tmp_path):
    done = luffy("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"luffy-rl {installed('luffy-rl')}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate hm --temperature abc", "--temperature: must be a number of at least 0, got 'abc'"),
        ("generate hm --temperature -1", "--temperature: must be a number of at least 0, got '-1'"),
        ("generate hm --top-p 1.5", "--top-p: must be a number above 0 and at most 1, got '1.5'"),
        ("generate hm --memory-fraction 1", "--memory-fraction: must be a number between 0 and 1, got '1'"),
        ("generate hm --seed 0.5", "--seed: must be a whole number, got '0.5'"),
        ("grade a.jsonl --grader boxed --workers x", "--workers: must be a whole number of at least 1, got 'x'"),
        ("grade a.jsonl --grader boxed --timeout nan", "--timeout: must be a number above 0, got 'nan'"),
        ("plan quickstart --gpus x", "--gpus: must be a whole number of at least 1, got 'x'"),
        ("plan quickstart --context x", "--context: must be a whole number, got 'x'"),
        ("train quickstart --nproc-per-node 1 --max-restarts x", "--max-restarts: must be a whole number, got 'x'"),
        ("report runs/a --port x", "--port: must be a whole number from 1 to 65535, got 'x'"),
    ],
)
def test_a_number_that_is_none(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: argument {said}\n")


def test_every_number_is_of_a_type_that_says_what_it_must_be():
    for parser in parsers(build_parser()):
        for action in parser._actions:
            assert action.type not in (int, float), (parser.prog, action.option_strings)


def test_an_answer_is_as_long_from_python_as_from_a_shell():
    shell = build_parser().parse_args(["generate", "hm"]).max_tokens
    for method in (Model.answers, Model.stream):
        assert inspect.signature(method).parameters["max_tokens"].default == shell


@pytest.mark.parametrize(
    ("words", "command"), [("doctor --quiet", "luffy doctor"), ("recipes list extra", "luffy recipes list")]
)
def test_what_a_command_does_not_know_shows_how_that_command_is_used(words, command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: {command} [-h]")
    assert said.endswith(f"{command}: error: unrecognized arguments: {words.split()[-1]}\n")


# --- docs ----------------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """Of docs/cli.md: command -> what is said of it."""
    parts = re.split(r"^#{2,3} `(luffy [^`]+)`$", (ROOT / "docs" / "cli.md").read_text(), flags=re.M)
    return {name: text.partition("\n## ")[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_page_has_every_command_and_no_other():
    assert sorted(sections()) == sorted(NAMES[1:])


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_page_names_options_that_exist(name):
    parser, keys = parser_of(name), {f"--{key}" for key in flat_keys()}
    known = {option for action in parser._actions for option in action.option_strings}
    text = sections()[name]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text))
    assert named <= known | (keys if parser.get_default("keys") else set())
    assert not known - {"-h", "--help"} or named


def test_the_page_has_every_exit_code():
    page = (ROOT / "docs" / "cli.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in page


def test_the_page_has_every_variable_that_documents_name():
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "scripts/setup.sh",
        ROOT / "scripts/quickstart.sh",
    ]
    named = {name for page in pages for name in re.findall(r"\b(?:LUFFY|VLLM)_[A-Z_]+\b", page.read_text())}
    assert {"LUFFY_CACHE", "VLLM_LOGGING_LEVEL"} <= named
    table = (ROOT / "docs" / "cli.md").read_text().partition("| variable | what |")[2].partition("\n\n")[0]
    assert not {name for name in named if f"`{name}`" not in table}


# --- completion ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """Completions of a command line, by bash itself."""
    folder = tmp_path_factory.mktemp("shell")
    text = luffy("completion", "bash", cwd=folder).stdout
    (folder / "luffy.bash").write_text(text)
    (folder / "mine.toml").write_text("")
    called = re.search(r"^complete .*-F (\w+) luffy$", text, flags=re.M)
    assert called
    code = (
        f'source luffy.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); {called[1]}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", code, "bash", "luffy", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.split()

    return complete


def test_bash_completes_commands_and_options(bash):
    assert set(bash("")) == {name.split()[1] for name in NAMES[1:] if name.count(" ") == 1}
    assert set(bash("data", "")) == {"check", "gym", "prepare", "score"}
    assert bash("data", "check", "--aga") == ["--against"]
    assert bash("train", "quickstart", "--resume", "--dry") == ["--dry-run"]


def test_bash_completes_recipes_keys_and_their_values(bash):
    assert set(bash("train", "")) == {*recipe_names(), "mine.toml"}
    assert bash("recipes", "diff", "quickstart", "gsm") == ["gsm8k-smoke"]
    assert bash("train", "quickstart", "--optim.l") == ["--optim.lr"]
    assert bash("train", "quickstart", "--objective.gae") == ["--objective.gae_lambda"]  # of ppo, not of luffy
    assert set(bash("train", "quickstart", "--objective.name", "")) == set(KNOWN)
    assert set(bash("plan", "quickstart", "--model.gradient_checkpointing", "")) == {"true", "false", "selective"}


def test_bash_completes_names_that_an_error_would_list(bash):
    assert set(bash("plan", "quickstart", "--gpu", "")) == {*MACHINES, "cpu"}
    assert set(bash("train", "quickstart", "--gpu", "a")) == {"a100", "a100-40gb"}
    for words in (["grade", "a.jsonl", "--grader"], ["eval", "--compare", "boxed"], ["train", "--reward.grader"]):
        assert set(bash(*words, "")) == set(GRADERS), words
    assert set(bash("eval", "--suite", "math", "")) == {*SUITES, *BENCHMARKS}
    assert bash("eval", "--checkpoint", "b") == ["best"]
    parser = build_parser()
    assert parser.parse_args(["grade", "a.jsonl", "--grader", "mine:grade"]).grader == "mine:grade"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_takes_its_script(shell, tmp_path):
    text = script(shell)
    for word in ("quickstart", "optim.lr", "srft", "prepare"):
        assert word in text
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(text)
    subprocess.run([found, "-n", str(tmp_path / "script")], check=True)
