"""Objectives: which rows a group has, their advantages, and the token loss of each. One small file per objective.

`base.Objective` is what the loop asks; docs/objectives.md shows how to add one. A name that is none of those below is
looked for as MODULE:CLASS. Importing this imports no torch: a configuration is read without it.
"""

import os
import sys
from importlib import import_module

from luffy.objectives.base import Objective, Options, Terms
from luffy.wording import nearest

KNOWN = {
    "luffy": "luffy.objectives.luffy:Luffy",
    "grpo": "luffy.objectives.grpo:Grpo",
    "dr_grpo": "luffy.objectives.grpo:DrGrpo",
    "dapo": "luffy.objectives.dapo:Dapo",
    "cispo": "luffy.objectives.cispo:Cispo",
    "gspo": "luffy.objectives.gspo:Gspo",
    "ppo": "luffy.objectives.ppo:Ppo",
    "prime": "luffy.objectives.prime:Prime",
    "exgrpo": "luffy.objectives.exgrpo:ExGrpo",
    "rl_sft": "luffy.objectives.rl_sft:RlSft",
    "hpt": "luffy.objectives.hpt:Hpt",
    "chord": "luffy.objectives.chord:Chord",
    "srft": "luffy.objectives.srft:Srft",
    "prefix_rft": "luffy.objectives.prefix_rft:PrefixRft",
    "uft": "luffy.objectives.uft:Uft",
    "bread": "luffy.objectives.bread:Bread",
    "relift": "luffy.objectives.relift:Relift",
    "sort": "luffy.objectives.sort:Sort",
    "asymre": "luffy.objectives.asymre:Asymre",
    "topr": "luffy.objectives.topr:Topr",
    "oapl": "luffy.objectives.oapl:Oapl",
    "pessimistic": "luffy.objectives.pessimistic:Pessimistic",
    "sft": "luffy.objectives.sft:Sft",
}


def find(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        ValueError: there is none of this name.
    """
    where = KNOWN.get(name, name)
    if ":" not in where:
        close = nearest(name, KNOWN)
        known = f"did you mean {close}?" if close else f"known: {', '.join(KNOWN)}, or MODULE:CLASS"
        raise ValueError(f"objective.name must be one that is known, got {name!r}; {known}")
    module, _, attribute = where.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does; an installed command has its own folder there instead
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective.name {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"objective.name {name!r} is no luffy.objectives.Objective")
    return found


def options_of(name: str) -> type[Options]:
    """What the objective of this name may be told.

    Raises:
        ValueError: as `find`.
    """
    return find(name).Options


def make_objective(options: Options) -> Objective:
    """The objective that these options are of.

    Raises:
        ValueError: as `find`.
    """
    return find(options.name)(options)


__all__ = ["KNOWN", "Objective", "Options", "Terms", "find", "make_objective", "options_of"]
