"""`luffy completion SHELL`: a script that completes commands, options, keys of the configuration and names of recipes.

shtab writes it from the parsers, so that Tab costs no start of Python.
"""

import argparse
from collections.abc import Iterator
from typing import Any, get_args

from luffy.commands.arguments import RECIPE, add_command

SHELLS = ("bash", "zsh", "fish")
SET_UP = """\
set-up:
  bash  luffy completion bash > ~/.local/share/bash-completion/completions/luffy
  zsh   luffy completion zsh > ~/.zfunc/_luffy    # fpath=(~/.zfunc $fpath) before compinit in ~/.zshrc
  fish  luffy completion fish > ~/.config/fish/completions/luffy.fish
again after an upgrade, which may bring other options"""


def add_completion(commands: Any) -> None:
    parser = add_command(
        commands,
        "completion",
        run_completion,
        help="print a script that completes commands, options, keys and recipes in a shell",
        examples=(
            "luffy completion bash > ~/.local/share/bash-completion/completions/luffy",
            "luffy completion fish > ~/.config/fish/completions/luffy.fish",
        ),
        more=SET_UP,
    )
    parser.add_argument("shell", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")


def run_completion(args: argparse.Namespace) -> int:
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    import shtab

    from luffy.cli import build_parser

    root = build_parser()
    for parser in parsers(root):
        if parser.get_default("keys"):
            _add_keys(parser)
        for action in parser._actions:
            _say_what_completes(action)
    return shtab.complete(root, shell)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands, and of theirs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    """Every key that some objective has, as an option."""
    from luffy.config import config_of, flat_keys
    from luffy.objectives import KNOWN

    fields = {key: field for name in KNOWN for key, field in flat_keys(config_of(name)).items()}
    for key, field in fields.items():
        values = list(KNOWN) if key == "objective.name" else list(_values(field.annotation))
        kinds = {"path": "SOURCE", "validation": "SOURCE", "grader": "GRADER"}
        metavar = kinds.get(key.rpartition(".")[2], "VALUE")
        said = " ".join((field.description or "").split()).replace("%", "%%")
        parser.add_argument(f"--{key}", choices=values or None, metavar=metavar, help=said.partition(". ")[0])


def _values(annotation: Any) -> Iterator[str]:
    """Those that can be listed, of a type that has some."""
    if annotation is bool:
        yield from ("true", "false")
    for inner in get_args(annotation):
        if isinstance(inner, str):
            yield inner
        else:
            yield from _values(inner)


def _say_what_completes(action: Any) -> None:
    """By what its help calls it."""
    import shtab

    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar == RECIPE:
        action.complete = _recipes()
    elif metavar in ("DIR", "RUN", "MODEL"):
        action.complete = shtab.DIRECTORY
    elif metavar.startswith("FILE") or metavar == "SOURCE":
        action.complete = shtab.FILE
    elif metavar == "[auto]":
        action.nargs = "?"
    elif names := _listed(action.dest, metavar):
        action.choices = names  # of parsers that only write the script: others are taken too


def _listed(dest: str, metavar: str) -> list[str]:
    """Names that an error would list."""
    from luffy.evaluation.benchmarks import NAMES, SUITES
    from luffy.machines import MACHINES
    from luffy.rewards import GRADERS

    if dest == "suite":
        return list(dict.fromkeys((*SUITES, *NAMES)))
    return {"GRADER": [*GRADERS], "KIND": [*MACHINES, "cpu"], "WHICH": ["newest", "best"]}.get(metavar, [])


def _recipes() -> dict[str, Any]:
    """For each shell a function that gives names of recipes and TOML files, and how it is called."""
    from luffy.config_file import recipe_names

    names = " ".join(recipe_names())
    bash = f"""\
_luffy_recipe_or_file() {{
  compgen -W "{names}" -- "$1"
  compgen -f -X '!*.toml' -- "$1"
  compgen -d -- "$1"
}}"""
    zsh = f"""\
_luffy_recipe_or_file() {{
  _alternative 'recipes:recipe:({names})' 'files:file:_files -g "*.toml"'
}}"""
    fish = f"""\
function _luffy_recipe_or_file
  printf '%s\\n' {names}
  __fish_complete_suffix .toml
end"""
    return {
        "bash": "_luffy_recipe_or_file",
        "zsh": "_luffy_recipe_or_file",
        "fish": "(_luffy_recipe_or_file)",
        "preamble": {"bash": bash, "zsh": zsh, "fish": fish},
    }
