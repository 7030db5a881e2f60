"""The `luffy` command: which commands there are, and how each of them ends.

Heavy imports happen inside the commands, so `--help` and a mistyped key answer at once. Training with many ranks
(docs/multi-node.md) ends with the code of the rank that failed first.
"""

import argparse
import os
import sys

from luffy.errors import UserError

EXIT_CODES = {
    0: "done; or stopped by SIGTERM, where training has saved the steps that it had done",
    1: "data check or doctor found something wrong; or a bug of ours, with a traceback",
    2: "something to mend, said in one sentence on stderr",
    130: "interrupted by Ctrl-C; training has saved the steps that it had done, unless it was pressed twice",
    141: "whoever read stdout, such as head, closed it before the end",
}
EXAMPLES = (
    "luffy doctor",
    "luffy train quickstart --dry-run",
    "luffy train quickstart",
    "luffy report runs/quickstart",
)


def main(argv: list[str] | None = None) -> int:
    try:
        try:
            return _answer(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what does not go out here would fail after the last handler
    except OSError as error:
        lost = None if error.filename else _lost_stdout()  # one that names a file is of that file
        if lost is None:
            raise
        if isinstance(lost, BrokenPipeError):
            return 141
        print(
            f"luffy: stdout cannot be written ({lost.strerror}); free some space, or write elsewhere", file=sys.stderr
        )
        return 2


def _answer(argv: list[str] | None) -> int:
    try:
        # imported here, for Ctrl-C comes while the commands are imported too
        from luffy.commands.train import spell_out_resume

        argv = spell_out_resume(sys.argv[1:] if argv is None else argv)
        parser = build_parser()
        args, rest = parser.parse_known_args(argv)
        if rest and not args.keys:
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")  # parse_args would say how luffy is used
        if getattr(args, "quiet", False):
            from luffy.console import be_quiet

            be_quiet()
        return args.run(args, rest) if args.keys else args.run(args)
    except UserError as error:
        from luffy.failure import say_failure

        say_failure(error)
        return 2
    except KeyboardInterrupt as stopped:
        from luffy.rank import exit_code, speaks

        if speaks():
            print(f"luffy: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return exit_code(stopped)


def _lost_stdout() -> OSError | None:
    """Why stdout takes nothing more, where it does not; what it still holds is then thrown away.

    An unbuffered stdout has forgotten what it lost, so a line is tried: where it goes through, a traceback follows.
    """
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def build_parser() -> argparse.ArgumentParser:
    """Of all commands. What is parsed has `run`, the function, and `keys`: whether it takes `--section.key VALUE`."""
    from luffy.commands.arguments import Help, examples_text
    from luffy.commands.completion import add_completion
    from luffy.commands.data import add_data
    from luffy.commands.doctor import add_doctor
    from luffy.commands.generate import add_generate
    from luffy.commands.grade import add_grade
    from luffy.commands.plan import add_plan
    from luffy.commands.recipes import add_recipes
    from luffy.commands.train import add_train
    from luffy.evaluation.command import add_eval
    from luffy.reporting.command import add_report

    codes = [f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()]
    parser = argparse.ArgumentParser(
        prog="luffy",
        description="Train reasoning models under off-policy guidance.",
        epilog="\n".join([examples_text(EXAMPLES), "", "exit codes:", *codes, "", "docs/cli.md has the rest."]),
        formatter_class=Help,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and end")
    parser.set_defaults(keys=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_train, add_plan, add_eval, add_generate, add_grade, add_report, add_recipes, add_data, add_doctor):
        add(commands)
    add_completion(commands)
    return parser


class Version(argparse.Action):
    """Looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from luffy.versions import installed

        print(f"luffy-rl {installed('luffy-rl') or 'of a source tree that is not installed'}")
        parser.exit()
