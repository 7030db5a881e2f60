"""`luffy recipes`: which there are, one spelled out, and what tells two apart."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from luffy.commands.arguments import add_command, add_json, add_source
from luffy.recipe_book import differences, differing, spelled_out


def add_recipes(commands: Any) -> None:
    parser = add_command(
        commands,
        "recipes",
        run_list,
        help="list recipes, show one with every key, or what differs between two",
        description="A recipe or TOML file as `luffy train` understands it: defaults filled in, so that what is shown "
        "can be saved and trained again.",
        examples=(
            "luffy recipes",
            "luffy recipes show quickstart > mine.toml",
            "luffy recipes diff gsm8k-smoke quickstart",
        ),
    )
    add_json(parser)
    whats = parser.add_subparsers(dest="what", metavar="list|show|diff")
    listed = add_command(
        whats,
        "list",
        run_list,
        help="their names, and what each trains (the default)",
        examples=("luffy recipes list", "luffy recipes list --json"),
    )
    show = add_command(
        whats,
        "show",
        run_show,
        help="every key of one, as TOML",
        examples=("luffy recipes show quickstart > mine.toml", "luffy recipes show luffy-qwen2.5-math-7b --json"),
    )
    add_source(show)
    diff = add_command(
        whats,
        "diff",
        run_diff,
        help="the keys in which two differ",
        examples=(
            "luffy recipes diff gsm8k-smoke quickstart",
            "luffy recipes diff quickstart runs/quickstart/config.toml --json",
        ),
    )
    add_source(diff, "sources", nargs=2)
    for one in (listed, show, diff):
        add_json(one, default=argparse.SUPPRESS)  # what `luffy recipes --json` says stays


def run_list(args: argparse.Namespace) -> int:
    from luffy.config_file import recipe_names
    from luffy.console import print_json

    head, rows = ["recipe", "objective", "model", "problems"], [_described(name) for name in recipe_names()]
    if args.json:
        print_json([dict(zip(head, row, strict=True)) for row in rows])
    else:
        _print_table(head, rows)
    return 0


def run_show(args: argparse.Namespace) -> int:
    from luffy.console import print_json

    found = spelled_out(args.source)
    if args.json:
        print_json(found)
    else:
        print("\n".join(_toml(found, found.get("first", {}))))
    return 0


def run_diff(args: argparse.Namespace) -> int:
    from luffy.console import print_json

    if args.json:
        found = [{"key": key, "values": list(values)} for key, *values in differences(*map(spelled_out, args.sources))]
        print_json(found)
    elif rows := list(differing(*args.sources)):
        _print_table(["", *args.sources], rows)
    else:
        print(f"{args.sources[0]} and {args.sources[1]} are the same in every key")
    return 0


def _toml(values: dict[str, Any], first: dict[str, Any], above: str = "") -> Iterator[str]:
    """Lines. TOML has no null, so keys without a value are comments; so is a default that the first stage, which takes
    over what it does not say itself, is without."""
    import tomli_w

    for key, value in values.items():
        if value is None:
            yield f"# {key} is not set"
        elif not isinstance(value, dict):
            left_out = key in first and first[key] is None
            for line in tomli_w.dumps({key: value}).rstrip().splitlines():
                yield f"# {line}" if left_out else line
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ("", f"[{above}{key}]", *_toml(value, first.get(key) or {}, f"{above}{key}."))


def _described(name: str) -> tuple[str, str, str, str]:
    from luffy.config_file import load_config

    config = load_config(name)
    return name, config.objective.name, config.model.name, config.data.path or "generated"


def _print_table(head: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[at]) for row in [tuple(head), *rows]) for at in range(len(head))]
    for row in [tuple(head), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
