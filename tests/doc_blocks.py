"""The code blocks of README and docs, and what a page's hidden comments say about them.

A comment on the line before a block, which no rendering shows:

    <!-- prelude: NAME -->     Python that runs in what `doc_preludes.NAME` gives
    <!-- needs: PACKAGE -->    Python that runs where the package is, and elsewhere ends in a sentence that names it
    <!-- file: NAME -->        a file that the page's other blocks and commands find beside them
    <!-- not run: REASON -->   Python that is only compiled

Fences name their language: python, bash, toml, json, math, or text for what is no code. An indented block is commands
where its first line begins with one, and text elsewhere.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")]
    + list((ROOT / "docs").rglob("*.md"))
)
COMMENT = re.compile(r"<!-- (?P<what>prelude|needs|file|not run): (?P<value>.+?) -->")
COMMANDS = ("luffy", "python", "pip", "torchrun", "sbatch", "make", "mkdocs")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    """Of its first line, from 1."""
    language: str
    text: str
    what: str = ""
    value: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_commands(self) -> bool:
        return self.language == "bash" or (self.language == "indented" and is_command(self.text.split("\n", 1)[0]))


def is_command(line: str) -> bool:
    words = line.split()
    first = next((word for word in words if not re.match(r"[A-Z_]+=", word)), "")
    return first.split("/")[-1] in COMMANDS or first.startswith(("scripts/", ".ci/", ".venv/bin/"))


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").split("\n")
    at = 0
    while at < len(lines):
        if fence := re.match(r" {0,3}```(.*)$", lines[at]):
            end = next(n for n in range(at + 1, len(lines)) if re.match(r" {0,3}```\s*$", lines[n]))
            yield _block(page, lines, at, at + 1, end, fence[1].strip())
            at = end + 1
        elif lines[at].startswith("    ") and not lines[at - 1].strip():
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield _block(page, lines, at, at, end, "indented")
            at = end
        else:
            at += 1


def _block(page: Path, lines: list[str], opened: int, begin: int, end: int, language: str) -> Block:
    before = next((lines[n] for n in range(opened - 1, -1, -1) if lines[n].strip()), "")
    said = COMMENT.fullmatch(before.strip())
    text = "\n".join(lines[begin:end]).rstrip()
    if language == "indented":
        indent = min(len(line) - len(line.lstrip()) for line in text.split("\n") if line.strip())
        text = "\n".join(line[indent:] for line in text.split("\n"))
    return Block(page, begin + 1, language, text, said["what"] if said else "", said["value"] if said else "")


def every(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def commands(block: Block) -> Iterator[str]:
    """One after the other, each on one line and without its comment."""
    command = ""
    for line in block.text.split("\n"):
        bare = _uncommented(line)
        goes_on = command.endswith("\\") or (command and line.startswith(" "))
        if goes_on:
            command = f"{command.rstrip(chr(92)).rstrip()} {bare.strip()}"
        else:
            if command:
                yield command
            command = bare
    if command:
        yield command


def _uncommented(line: str) -> str:
    """Without what follows a # outside quotes."""
    return re.sub(r"""^((?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)#)*?)(?:(?:^|(?<=\s))#.*)?$""", r"\1", line).rstrip()


def is_synopsis(command: str) -> bool:
    """Whether it shows what may be given, with brackets and bars, instead of giving it."""
    return bool(re.search(r"\[|\||(?<!=)\.\.\.", re.sub(r"""'[^']*'|"[^"]*\"""", "", command)))


def words(command: str) -> list[str]:
    """Of a command, without variables before it and a file that it writes to."""
    found = shlex.split(command.partition(" > ")[0])
    while found and re.match(r"[A-Z_]+=", found[0]):
        found = found[1:]
    return found


def inline_commands() -> list[tuple[str, str]]:
    """(where, command) of every `luffy ...` in running text."""
    found = []
    for page in PAGES:
        text = re.sub(r"(?ms)^ {0,3}```.*?^ {0,3}```$", "", page.read_text(encoding="utf-8"))
        found += [(str(page.relative_to(ROOT)), one) for one in re.findall(r"`(luffy [a-z][^`]*)`", text)]
    return found
