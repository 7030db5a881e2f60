"""What is public says what it takes and gives: shapes, units, errors, and the paper that a formula comes from.

Public is what a package names in `__all__`, or else what a module defines without an underscore, methods of its classes
included. The rules read the source next to the docstring, so that neither can change without the other.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import luffy_kernels
import pytest
from luffy_kernels import TokenLoss, _checks, compat, token_losses

from luffy import networks, objectives, rewards


def within(package: Any) -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [f"{package.__name__}.{name}" for name in names if not name.startswith("_")]


KERNELS = ["luffy_kernels", "luffy_kernels.reference", "luffy_kernels.testing", *within(compat)]
TRAINER = {
    "luffy": "advantages correction errors generate groups prompts sequence teacher token_advantages",
    "luffy.data": "load problem",
    "luffy.rollout": "engine",
}
"""Modules that keep these rules, by package, where not all of a package do."""
MODULES = [
    *KERNELS,
    *within(objectives),
    *within(rewards),
    *within(networks),
    *(f"{package}.{name}" for package, names in TRAINER.items() for name in names.split()),
]
API = Path(__file__).resolve().parents[1] / "docs/api/luffy.md"
SHAPE = re.compile(r"\[[^\]\n]*\]|0-d|[Ss]calar")
ELSEWHERE = re.compile(r"\b(?:[Aa]s|see)(?: in)? `([\w.]+)`")
"""A docstring that sends the reader on to another one."""

NO_SOURCE = {"nll": "the definition of maximum likelihood", "custom": "the caller's own formula"}
"""Functions of `token_losses` whose formula is from no paper, and why."""
NEVER_RAISES = {
    "luffy_kernels.reinforce": "gives the helper no number of its caller's that it refuses",
    "luffy_kernels.status": "asks its helper only about backends that there are",
}


class Public(NamedTuple):
    name: str
    thing: Any
    owner: type | None = None
    """The class that defines a method."""

    @property
    def doc(self) -> str:
        """Of a constructor the class's too, as one reads them together; of what a base class explains, that."""
        attribute = getattr(self.owner, self.thing.__name__, None)
        own = inspect.getdoc(attribute if isinstance(attribute, property) else self.thing) or ""
        if self.owner is not None and self.thing.__name__ == "__init__":
            return f"{inspect.getdoc(self.owner) or ''}\n{own if self.thing.__doc__ else ''}".strip()
        return own


def exported(module: Any) -> Iterator[tuple[str, Any]]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        thing = getattr(module, name)
        own = hasattr(module, "__all__") or getattr(thing, "__module__", "") == module.__name__
        if own and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield name, thing
        elif inspect.ismethod(thing):  # `apply` and `undo` of an adapter
            yield name, thing.__func__


def public(module: str) -> Iterator[Public]:
    for name, thing in exported(importlib.import_module(module)):
        yield Public(f"{module}.{name}", thing)
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                said = not method.startswith("_") or method == "__init__"
                if said and inspect.isfunction(function) and not synthetic(function, module):
                    yield Public(f"{module}.{name}.{method}", function, thing)


def synthetic(function: Any, module: str) -> bool:
    """Made by a decorator (a dataclass's `__init__`), and in no source; or by a base class (a protocol's)."""
    return function.__code__.co_filename.startswith("<") or function.__module__ == "typing" != module


EVERY = [item for module in MODULES for item in public(module)]
FUNCTIONS = [item for item in EVERY if inspect.isfunction(item.thing)]


def rows(items: list[Public]) -> Any:
    return pytest.mark.parametrize("item", items, ids=lambda item: item.name)


@cache
def tree(function: Any) -> ast.FunctionDef:
    [found] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(found, ast.FunctionDef)
    return found


def raised(function: Any, seen: frozenset[str] = frozenset()) -> set[str]:
    """Names of the exceptions that a function raises itself, or that helpers of its own module or of `_checks` do."""
    found: set[str] = set()
    for node in ast.walk(tree(function)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            maker = function.__globals__.get(made)
            found.add(maker.__annotations__["return"].__name__ if inspect.isfunction(maker) else made)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in seen:
            helper = function.__globals__.get(node.func.id)
            if inspect.isfunction(helper) and helper.__module__ in (function.__module__, _checks.__name__):
                found |= raised(helper, seen | {node.func.id})
    only = ast.unparse(tree(function).body[-1]) == "raise NotImplementedError"
    return set() if only else found  # a subclass's duty, and nothing that a caller meets


def tensors(function: Any) -> list[str]:
    """Parameters that are annotated as tensors, and "return"."""
    return [name for name, kind in function.__annotations__.items() if "Tensor" in str(kind)]


@rows(EVERY)
def test_it_has_a_docstring(item: Public):
    assert len(item.doc.split()) >= 3 or SHAPE.search(item.doc), f"{item.name}: {item.doc!r}"


@rows([item for item in FUNCTIONS if tensors(item.thing)])
def test_tensors_are_named_with_shapes(item: Public):
    given = [name for name in tensors(item.thing) if name != "return"]
    told = ELSEWHERE.search(item.doc)
    assert told or SHAPE.search(item.doc), f"no shape: {item.doc}"
    silent = [name for name in given if not re.search(rf"\b{re.escape(name)}\b", item.doc)]
    assert told or not silent, f"{silent} in none of: {item.doc}"


@rows([item for item in FUNCTIONS if item.name.count(".") == 1 and "Args:" in item.doc])
def test_operators_explain_every_argument(item: Public):
    """Each in a row of its own: the reference makes a table of them."""
    told = item.doc.partition("Args:")[2].partition("\n\n")[0]
    rows = set(re.findall(r"^ {4}(\w+): ", told, re.MULTILINE))
    assert rows == set(inspect.signature(item.thing).parameters)


@rows([item for item in EVERY if inspect.isclass(item.thing) and hasattr(item.thing, "_fields")])
def test_results_have_shapes(item: Public):
    assert "[...]" in item.doc


@rows([item for item in FUNCTIONS if item.name not in NEVER_RAISES and raised(item.thing)])
def test_errors_are_listed(item: Public):
    listed = item.doc.partition("Raises:")[2]
    silent = sorted(name for name in raised(item.thing) if f"{name}:" not in listed)
    assert not silent, f"{silent} not under `Raises:` of: {item.doc}"


@rows([item for item in FUNCTIONS if re.search(r"[Ll]og-prob|[Ee]ntropy|log-likelihood", item.doc)])
def test_log_probs_have_a_unit(item: Public):
    assert "nats" in item.doc.lower() or ELSEWHERE.search(item.doc), item.doc


@rows([item for item in EVERY if item.name.startswith("luffy_kernels.") and ELSEWHERE.search(item.doc)])
def test_what_a_docstring_sends_to_exists(item: Public):
    names = {other.name.rpartition(".")[2] for other in EVERY}
    asked = {name.rpartition(".")[2] for name in ELSEWHERE.findall(item.doc)}
    assert asked <= names, sorted(asked - names)


def formulas() -> list[Public]:
    """The functions that make a row of the table, or a weight."""
    found = [Public(name, thing) for name, thing in exported(luffy_kernels) if inspect.isfunction(thing)]
    return [item for item in found if item.thing.__module__ == token_losses.__name__ and item.name not in NO_SOURCE]


@rows(formulas())
def test_formulas_have_a_source(item: Public):
    assert re.search(r"arXiv \d{4}\.\d{5}|et al\. \d{4}", " ".join(item.doc.split())), item.doc


def test_what_the_reference_shows_keeps_the_rules():
    shown = re.findall(r"^::: (\S+)$", API.read_text(), re.MULTILINE)
    assert len(shown) > 10
    assert {name for name in shown if name not in MODULES} <= {item.name for item in EVERY}


def test_the_rules_meet_something():
    """A rule that selects nothing would hold for ever."""
    assert {item.name for item in EVERY} >= {f"luffy_kernels.{name}" for name in luffy_kernels.__all__}
    assert {"ValueError"} == raised(token_losses.shaped) == raised(luffy_kernels.linear_logprobs)
    assert "hidden" in tensors(luffy_kernels.linear_logprobs)
    assert len(formulas()) >= 10
    assert len(EVERY) > len(FUNCTIONS) > 60
    assert not synthetic(TokenLoss.row, token_losses.__name__)
    assert synthetic(TokenLoss.__init__, token_losses.__name__)
