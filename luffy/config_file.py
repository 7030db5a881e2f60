"""From a recipe or a TOML file, with `--section.key value` overrides on top, to the configuration of each stage.

Unknown keys are errors that name the nearest valid one. Like `luffy.config`, this imports no torch.
"""

import copy
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from luffy.config import Config, config_of, flat_keys
from luffy.errors import UserError
from luffy.wording import nearest


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(p.name.removesuffix(".toml") for p in _recipes().iterdir() if p.name.endswith(".toml"))


def load_config(source: str, overrides: list[str] | None = None) -> Config:
    """The configuration of a recipe name or TOML file, with `--section.key value` overrides on top.

    Raises:
        UserError: no such recipe or file, not TOML, an unknown key (the nearest valid one is named), a bad value.
    """
    return load_stages(source, overrides)[-1]


def load_stages(source: str, overrides: list[str] | None = None) -> list[Config]:
    """The configuration of each stage of a recipe: one, or with a table [first] two.

    The first stage is the second with the keys of [first] in place of its own, then `--first.section.key` overrides;
    other overrides are of both stages, where [first] does not say otherwise.

    Raises:
        UserError: as `load_config`; or [first] has no objective, a name or a [first], or a stage replays rollouts.
    """
    values, overrides = _read_toml(source), overrides or []
    first = values.pop("first", None)
    of_last, of_first = _by_stage(overrides)
    last_values = _overridden(values, of_last, source)
    last = _validated(last_values)
    if first is None and not of_first:
        return [last]
    first = {} if first is None else first
    if not isinstance(first, dict):
        raise UserError(f"config: first in {source} must be a table [first], got {first!r}")
    try:
        return [_first_stage(last, last_values, first, of_first, source), last]
    except UserError as error:
        raise UserError(str(error).replace("config:", "config: of the first stage,", 1)) from None


def _first_stage(
    last: Config, last_values: dict[str, Any], table: dict[str, Any], overrides: list[str], source: str
) -> Config:
    for key in ("name", "first"):
        if key in table or any(arg.startswith((f"--{key}.", f"--{key}=")) or arg == f"--{key}" for arg in overrides):
            raise UserError(f"config: {key} cannot be set: it runs in the folder `first` of the run, and has no other")
    section = table.get("objective", {})
    named = (section.get("name") if isinstance(section, dict) else None) or _objective_named(overrides)
    if named is None:
        raise UserError("config: objective.name must be set, such as sft; else it would do what the second does")
    values = copy.deepcopy(last_values)
    model = _model_of(values, [f"--objective.name={named}"])
    _refuse_unknown(table, model, f"[first] of {source}")
    values = _merge(values, table)
    values["objective"] = values.get("objective", {}) | {"name": named}
    first = _validated(_overridden(values, overrides, source))
    first.name = f"{last.name}-first"
    if "replay" in (first.rollout.engine, last.rollout.engine):
        raise UserError('config: rollout.engine = "replay" cannot be: what was recorded is of one stage')
    return first


def _by_stage(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of all stages, and those of the first alone without their `first.`; values stay with their key."""
    found: tuple[list[str], list[str]] = ([], [])
    which = 0
    for arg in overrides:
        if arg.startswith("--"):
            which = arg.startswith("--first.")
        found[which].append(arg.replace("--first.", "--", 1) if which else arg)
    return found


def _overridden(values: dict[str, Any], overrides: list[str], source: str) -> dict[str, Any]:
    model = _model_of(values, overrides)
    _refuse_unknown(values, model, source)
    return _merge(values, _parse_overrides(overrides, model))


def _validated(values: dict[str, Any]) -> Config:
    try:
        return _model_of(values, [])(**values)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def _model_of(values: dict[str, Any], overrides: list[str]) -> type[Config]:
    """By the objective that is named last: of another one, the options of the recipe's do not count."""
    section = values.get("objective", {})
    named = _objective_named(overrides) or (section.get("name", "luffy") if isinstance(section, dict) else "luffy")
    try:
        model = config_of(named)
    except ValueError as error:
        raise UserError(f"config: {error}") from None
    if isinstance(section, dict) and named != section.get("name", "luffy"):
        _refuse_unknown({"objective": section}, config_of(section.get("name", "luffy")), "the recipe")
        kept = model.model_fields["objective"].annotation.model_fields  # type: ignore[union-attr]
        values["objective"] = {key: value for key, value in section.items() if key in kept and key != "name"}
    return model


def _objective_named(overrides: list[str]) -> str | None:
    named = None
    for at, arg in enumerate(overrides):
        key, _, value = arg.partition("=")
        if key == "--objective.name":
            named = value or (overrides[at + 1] if at + 1 < len(overrides) else named)
    return named


def _recipes():
    return resources.files("luffy") / "recipes"


def _read_toml(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UserError(f"config: no file {source}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"config: {source} is not valid TOML, which is UTF-8: {error}") from None
    elif source in recipe_names():
        text = (_recipes() / f"{source}.toml").read_text()
    else:
        raise UserError(f"config: no recipe named {source!r}{_nearest(source, recipe_names())}; a file ends in .toml")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config: {source} is not valid TOML: {error}") from None


def _refuse_unknown(values: dict[str, Any], model: type[BaseModel], source: str, prefix: str = "") -> None:
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            known = [prefix + name for name in model.model_fields]
            raise UserError(f"config: unknown key {prefix + key!r} in {source}{_nearest(prefix + key, known)}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if not isinstance(value, dict):
                raise UserError(f"config: {prefix + key} in {source} must be a table [{prefix + key}], got {value!r}")
            _refuse_unknown(value, field.annotation, source, f"{prefix}{key}.")


def _parse_overrides(args: list[str], model: type[Config]) -> dict[str, Any]:
    if not args:
        return {}
    known = list(flat_keys(model))
    for arg in args:
        key = arg.removeprefix("--").split("=")[0]
        if arg.startswith("--") and key not in known:
            raise UserError(f"config: unknown option --{key}{_nearest(key, known, '--')}")
    try:
        source: Any = CliSettingsSource(
            model, cli_parse_args=args, cli_exit_on_error=False, cli_prog_name="luffy train"
        )
        return source()
    except (SettingsError, ValidationError) as error:
        reason = str(error).split("\n")[0].removeprefix("error parsing CLI: ")
        raise UserError(f"config: {reason}") from None


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        # `families` is one value: naming families replaces those of the recipe
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "families"
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _nearest(key: str, known: list[str], dashes: str = "") -> str:
    close = nearest(key, known)
    return f"; did you mean {dashes}{close}?" if close else f" (known: {', '.join(known)})"


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"config: {where} {message[0].lower()}{message[1:]}, got {first['input']!r}" if where else f"config: {message}"
    )
