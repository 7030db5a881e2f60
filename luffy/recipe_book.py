"""`luffy recipes`: which there are, one spelled out, and what tells two apart."""

import argparse
from collections.abc import Iterator
from typing import Any


def add_recipes(commands: Any) -> None:
    parser = commands.add_parser(
        "recipes",
        help="list recipes, show one with every key, or what differs between two",
        description="A recipe or TOML file as `luffy train` understands it: defaults filled in, so that what is shown "
        "can be saved and trained again.",
    )
    whats = parser.add_subparsers(dest="what", metavar="list|show|diff")
    whats.add_parser("list", help="their names, and what each trains (the default)")
    show = whats.add_parser("show", help="every key of one, as TOML")
    show.add_argument("source", metavar="RECIPE|FILE.toml")
    diff = whats.add_parser("diff", help="the keys in which two differ")
    diff.add_argument("sources", nargs=2, metavar="RECIPE|FILE.toml")


def run_recipes(args: argparse.Namespace) -> int:
    if args.what == "show":
        import tomli_w

        print(tomli_w.dumps(spelled_out(args.source)), end="")
    elif args.what == "diff":
        _print_table(["", *args.sources], list(differing(*args.sources)))
    else:
        from luffy.config import recipe_names

        _print_table(["recipe", "objective", "model", "problems"], [_described(name) for name in recipe_names()])
    return 0


def spelled_out(source: str) -> dict[str, Any]:
    """Every key of a recipe that has a value; of one in two stages the first under `first`. Raises UserError."""
    from luffy.config import load_stages

    *first, last = (stage.model_dump(mode="json", exclude_none=True) for stage in load_stages(source))
    for stage in first:
        del stage["name"]  # it is the other's
        last["first"] = stage
    return last


def differing(one: str, other: str) -> Iterator[tuple[str, str, str]]:
    """(key, its value in one, in the other); a key that only one has is "-" in the other."""
    ours, theirs = (dict(_flat(spelled_out(source))) for source in (one, other))
    for key in sorted(ours.keys() | theirs.keys()):
        values = [_shown(flat[key]) if key in flat else "-" for flat in (ours, theirs)]
        if values[0] != values[1]:
            yield key, values[0], values[1]


def _described(name: str) -> tuple[str, str, str, str]:
    from luffy.config import load_config

    config = load_config(name)
    return name, config.objective.name, config.model.name, config.data.path or "generated"


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _shown(value: Any, most: int = 48) -> str:
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _print_table(head: list[str], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[at]) for row in [tuple(head), *rows]) for at in range(len(head))]
    for row in [tuple(head), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
