"""What the documentation site has beside docs/: pages made of other files, and links out of docs/ that work there.

README.md, CONTRIBUTING.md and others are pages under names of their own, the catalogue of objectives and the table of
keys are written from the code, and any other file of the repository that a page links to is copied to source/.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "licence.md",
    "CITATION.cff": "citation.md",
}
"""File of the repository -> page."""
FENCED = {"LICENSE": ("Licence", "text"), "CITATION.cff": ("Citation", "yaml")}
"""Those that are no Markdown: title and language."""
_CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|\]\((?P<to>[^)\s]+)\)", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")  # anchors as GitHub makes them
    fence = {"name": "math", "class": "math", "format": mathml}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        if name in FENCED:
            title, language = FENCED[name]
            text = f"# {title}\n\n```{language}\n{text}```\n"
        files.append(File.generated(config, page, content=_moved(text, name)))
    files.append(File.generated(config, "catalogue.md", content=catalogue()))
    files.append(File.generated(config, "keys.md", content=keys()))
    for source in sorted(_linked(files)):
        # a page shows its text, whatever its suffix is
        files.append(File.generated(config, _place(source), content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    return _moved(markdown, f"docs/{page.file.src_uri}") if page.file.generated_by is None else markdown


def mathml(source: str, *_: Any, **__: Any) -> str:
    """A fence of the language `math`: LaTeX, drawn by the browser without a script."""
    from luffy.evaluation.mathml import formula

    drawn = formula(source, block=True)
    if not drawn:
        raise ValueError(f"math that cannot be read: {source}")
    return f'<div class="math">{drawn}</div>'


def catalogue() -> str:
    """Every objective: what its file says, and its options with their defaults."""
    from importlib import import_module

    from luffy.objectives import KNOWN, find

    modules: dict[str, list[str]] = {}
    for name, where in KNOWN.items():
        modules.setdefault(where.partition(":")[0], []).append(name)
    lines = ["# Catalogue of objectives", "", "Written from `luffy/objectives/`, a file for each.", ""]
    for module, names in modules.items():
        lines += [f"## {', '.join(names)}", "", (import_module(module).__doc__ or "").strip(), ""]
        for name in names:
            whose = f"Options of `{name}`" if len(names) > 1 else "Options"
            lines += [f"{whose}, with `objective.` before them:", ""]
            options = {key: field for key, field in find(name).Options.model_fields.items() if key != "name"}
            lines += [*_table(options), ""]
    return "\n".join(lines)


def keys() -> str:
    """Every key of a recipe with its default and meaning."""
    from luffy.config import flat_keys

    sections: dict[str, dict[str, Any]] = {}
    for key, field in flat_keys().items():
        sections.setdefault(key.partition(".")[0] if "." in key else "", {})[key] = field
    lines = ["# Every key", "", "Of a recipe, and after `--` of a command; written from `luffy/config.py`.", ""]
    for section, fields in sections.items():
        lines += [f"## {section or 'At the top'}", "", *_table(fields), ""]
    return "\n".join(lines)


def _table(fields: dict[str, Any]) -> Iterator[str]:
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for name, field in fields.items():
        default = "" if field.is_required() else _default(field.get_default(call_default_factory=True))
        yield f"| `{name}` | {default} | {_cell(field.description or '')} |"


def _default(value: object) -> str:
    said = "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    return f"`{said}`" if said else ""


def _cell(text: str) -> str:
    """A text as a cell, where a bar outside code would be the next one."""
    return re.sub(r"`[^`]*`|\|", lambda found: found[0] if found[0] != "|" else "\\|", " ".join(text.split()))


def _moved(text: str, origin: str) -> str:
    """The text of a file of the repository, with its links as the site has them."""
    page = PAGES.get(origin, origin.removeprefix("docs/"))

    def there(target: str) -> str:
        place = _place(target)
        return posixpath.relpath(place, posixpath.dirname(page) or ".")

    return _each_link(text, origin, there)


def _linked(files: Files) -> set[str]:
    """Files of the repository that pages link to and that are no pages."""
    found: set[str] = set()
    origins = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by)]

    def note(target: str) -> str:
        if target not in PAGES and not target.startswith("docs/") and (ROOT / target).is_file():
            found.add(target)
        return target

    for origin in origins:
        if origin not in FENCED:
            _each_link((ROOT / origin).read_text(encoding="utf-8"), origin, note)
    return found


def _place(target: str) -> str:
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}.txt"


def _each_link(text: str, origin: str, change: Callable[[str], str]) -> str:
    def one(found: re.Match[str]) -> str:
        to = found["to"]
        if to is None or to.startswith("#") or re.match(r"[a-z]+:", to):
            return found[0]
        path, mark, anchor = to.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        return f"]({change(target)}{mark}{anchor})"

    return _CODE_OR_LINK.sub(one, text)
