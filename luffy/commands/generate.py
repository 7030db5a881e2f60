"""`luffy generate`: a question as its answer is sampled, or the questions of a file."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from luffy.commands.arguments import add_command, add_json, add_quiet, add_sampling, opening_options
from luffy.errors import UserError
from luffy.wording import counted


def add_generate(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        run_generate,
        help="answer a question, or those of a file",
        description="Answer QUESTION as it is sampled, or every line of a file: {prompt: text or chat turns, ...}; "
        "what comes out has the line's fields and `response`, a line for each answer, as `luffy grade` takes it.",
        examples=(
            'luffy generate "What is 4+9+2+7?" --model runs/quickstart',
            "luffy generate - --temperature 0 < question.txt",
            "luffy generate --file questions.jsonl --out answers.jsonl --n 4 --model runs/quickstart --checkpoint best",
            'luffy generate "What is 2+2?" --n 3 --json',
        ),
    )
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="-: from standard input")
    parser.add_argument("--file", metavar="FILE.jsonl", help="questions in place of QUESTION; --out says where to")
    parser.add_argument("--out", metavar="FILE", help="whole or not at all; the same command goes on where it was")
    add_sampling(parser)
    add_quiet(parser)
    add_json(parser)


def check_generate(args: argparse.Namespace) -> None:
    """Raises UserError where options do not go together."""
    if (args.question is None) == (args.file is None):
        raise UserError("generate: give a QUESTION, or --file with --out")
    if (args.file is None) != (args.out is None):
        raise UserError("generate: --file and --out go together")
    if args.file and Path(args.file).resolve() == Path(args.out).resolve():
        raise UserError("generate: --out must be another file than --file, whose questions it would replace")
    if args.n > 1 and not args.temperature:
        raise UserError("generate: --n above 1 at --temperature 0, which is greedy, would be the same answer again")


def run_generate(args: argparse.Namespace) -> int:
    from luffy.process import prepare_libraries

    check_generate(args)
    prepare_libraries()
    return run_file(args) if args.file else run_question(args)


def run_question(args: argparse.Namespace) -> int:
    from luffy.console import print_json
    from luffy.generate import Model
    from luffy.opening import open_model

    question = sys.stdin.read() if args.question == "-" else args.question
    if not question.strip():
        whence = "standard input" if args.question == "-" else "QUESTION"
        raise UserError(f"generate: expected a question, got an empty {whence}; give a text, or --file with --out")
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens, "seed": args.seed}
    opened = open_model(args.model, **opening_options(args))
    context = len(opened.template.encode_prompt([{"role": "user", "content": question}])) + args.max_tokens
    with Model(opened, context=context) as model:
        if args.n > 1 or args.json:
            [texts] = model.answers([question], n=args.n, **sampling)
        if args.json:
            print_json({"model": args.model, "question": question, "answers": texts})
            return 0
        if args.n > 1:
            print("\n---\n".join(texts))
            return 0
        for piece in model.stream(question, **sampling):
            print(piece, end="", flush=True)
        print()
    return 0


def run_file(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from luffy.console import print_json
    from luffy.evaluation.answers import Sampling, Store, sample
    from luffy.evaluation.progress import QuestionProgress
    from luffy.evaluation.questions import Question
    from luffy.files import new_file
    from luffy.opening import open_model, start_engine

    out = Path(args.out)
    rows = read_questions(Path(args.file))  # first: a model may take a while
    opened = open_model(args.model, **opening_options(args))

    from luffy.load import identity  # imports torch

    questions = [
        Question(str(number), "", tuple(opened.template.encode_prompt(turns)), "", args.n) for number, turns, _ in rows
    ]
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    about = {"model": args.model, "weights": identity(opened.path)} | asdict(sampling)
    partial = out.with_name(f"{out.name}.partial")
    with Store(partial, about) as store:
        if left := sum(question not in store for question in questions):
            context = max(len(question.prompt_ids) for question in questions) + args.max_tokens
            with start_engine(opened, context) as engine, QuestionProgress("answers", len(questions), left) as progress:
                try:
                    sample(engine, opened.template, questions, sampling, store, lambda *_: progress.add(None))
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(
                        f"stopped; {partial} has the answers so far, the same command goes on"
                    ) from None
        with new_file(out) as temporary, temporary.open("w") as file:
            for question, (_, _, row) in zip(questions, rows, strict=True):
                for at, given in enumerate(store[question]):
                    marks = {"sample": at, "response": given.text, "tokens": given.tokens, "finished": given.finished}
                    file.write(json.dumps(row | marks) + "\n")
    with suppress(FileNotFoundError):
        partial.unlink()
    if args.json:
        print_json({"out": str(out), "questions": len(questions), "answers": len(questions) * args.n})
    else:
        print(f"{counted(len(questions), 'question')}, {counted(len(questions) * args.n, 'answer')}: {out}")
    return 0


def read_questions(path: Path) -> list[tuple[int, Sequence[Mapping[str, str]], dict[str, Any]]]:
    """(line number, turns, the line) of a file. Raises UserError where a line has no prompt, with its number."""
    from luffy.data import DataError
    from luffy.data.columns import asked, conversation, encodable
    from luffy.data.json_lines import json_lines
    from luffy.files import reading

    found: list[tuple[int, Sequence[Mapping[str, str]], dict[str, Any]]] = []
    try:
        with reading(path, "generate"):
            for number, where, row in json_lines(path):
                if "prompt" not in row:
                    had = ", ".join(row) or "none"
                    raise DataError(f"{where}: no field `prompt`; the line has {had}: add it, or rename one")
                turns = (asked if isinstance(row["prompt"], str) else conversation)(row, "prompt", where)
                encodable("".join(turn["content"] for turn in turns), where)
                found.append((number, turns, row))
    except DataError as error:
        raise UserError(f"generate: {error}") from error
    if not found:
        raise UserError(f"generate: {path} has no lines")
    return found
