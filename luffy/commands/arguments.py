"""What commands share: a parser with examples, types of values, and options that mean the same everywhere."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from luffy.opening import ANSWER_TOKENS, STYLES, TEMPLATES

EMBEDDED = "embedded:smollm2-135m-instruct"
RECIPE = "RECIPE|FILE.toml"
"""What completes with names of recipes and TOML files."""


class Help(argparse.HelpFormatter):
    """Wraps a text of one line, and leaves the lines of others as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "\n".join(indent + line for line in text.splitlines())


def examples_text(examples: Sequence[str]) -> str:
    return "\n".join(["examples:", *(f"  {example}" for example in examples)])


def add_command(
    commands: Any,
    name: str,
    run: Callable[..., int] | None,
    *,
    help: str,
    examples: Sequence[str],
    description: str | None = None,
    more: str = "",
    **options: Any,
) -> argparse.ArgumentParser:
    """A subparser. run: takes the arguments, returns the exit code; None: a command of commands. examples: commands
    that the parser accepts, which end its help; more: what follows them. options: of `add_parser`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog="\n\n".join(filter(None, [examples_text(examples), more])),
        formatter_class=Help,
        **options,
    )
    if run is not None:
        parser.set_defaults(run=run, parser=parser)
    return parser


def add_source(parser: argparse.ArgumentParser, dest: str = "source", **options: Any) -> None:
    parser.add_argument(dest, metavar=RECIPE, help="name of a recipe (luffy recipes), or a file like one", **options)


def add_json(parser: Any, **options: Any) -> None:
    said = "print the result as JSON, and nothing else on stdout"
    parser.add_argument("--json", action="store_true", help=said, **options)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings: the result, and errors")


def add_problems(parser: argparse.ArgumentParser, what: str = "problems") -> None:
    """Which rows of a source."""
    parser.add_argument(
        "--split", metavar="NAME", help="of a folder, file or dataset id (default: the only one, or `train`)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help=f"only the first N {what}")


def add_seed(parser: argparse.ArgumentParser, of: str = "what is drawn") -> None:
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help=f"of {of} (default: %(default)s)")


def add_template(parser: argparse.ArgumentParser, default: str) -> None:
    choices = (*STYLES, *TEMPLATES)
    said = f"how prompts are written: {', '.join(choices)} (default: {default})"
    parser.add_argument("--template", choices=choices, metavar="T", help=said)


def add_grading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="processes that grade (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=above_zero, default=5.0, metavar="S", help="seconds of an answer (default: %(default)s)"
    )


def add_engine(parser: argparse.ArgumentParser, memory_fraction: float | None = None) -> None:
    """Of vLLM. memory_fraction: the default; None: the configuration's."""
    default = "as rollout.memory_fraction" if memory_fraction is None else "%(default)s"
    parser.add_argument(
        "--memory-fraction",
        type=fraction,
        default=memory_fraction,
        metavar="F",
        help=f"of the GPU's memory, for vLLM (default: {default})",
    )
    parser.add_argument(
        "--kv-cache-gib", type=above_zero, metavar="G", help="size of vLLM's KV cache, GiB (on a CPU: 1)"
    )


def add_sampling(parser: argparse.ArgumentParser, models: bool = False) -> None:
    """Of a model that is asked, or of several, and how."""
    what = "run folder, model folder or Hugging Face id" + (", or several" if models else "")
    several: dict[str, Any] = {"nargs": "+", "default": [EMBEDDED]} if models else {"default": EMBEDDED}
    parser.add_argument("--model", metavar="MODEL", help=f"{what} (default: {EMBEDDED})", **several)
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="of a run folder: newest, best or a step (default: %(default)s)",
    )
    add_template(parser, "the run's own, else the model's chat")
    parser.add_argument(
        "--n", type=positive, default=1, metavar="N", help="answers to each question (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=not_negative, default=0.6, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=share, default=1.0, metavar="P", help="share of probability sampled from (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=ANSWER_TOKENS,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    add_seed(parser)
    add_engine(parser)


def opening_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of what `add_sampling` has read, what `luffy.opening.open_model` takes."""
    return {name: getattr(args, name) for name in ("checkpoint", "template", "memory_fraction", "kv_cache_gib")}


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], expected: str) -> Any:
    """Of a command line. argparse would name our functions where `kind` raises ValueError."""
    try:
        value = kind(text)
    except ValueError:
        fitting = False
    else:
        fitting = fits(value)
    if not fitting:
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value


def above_zero(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def not_negative(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def port(text: str) -> int:
    return _number(text, int, lambda value: 1 <= value <= 65535, "a whole number from 1 to 65535")


def positive(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def whole(text: str) -> int:
    return _number(text, int, lambda _: True, "a whole number")
