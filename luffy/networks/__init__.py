"""Networks beside the policy, loaded where the objective asks for them and nowhere else.

    reference        the model that the run begins with, frozen: what a KL term holds the policy to
    value            V of every prefix of an answer: PPO's
    implicit_reward  an LM whose log-probs, less the reference's, are the rewards of tokens: PRIME's

Each is sharded as the policy is. `judge` has them say a number of every token of a step's rows, before the objective
assigns anything; `learn` lets those that are trained learn from an update's micro-batches.
"""

from typing import TYPE_CHECKING

from luffy.networks.base import Network
from luffy.networks.implicit_reward import ImplicitReward
from luffy.networks.reference import Reference
from luffy.networks.value import Value

if TYPE_CHECKING:
    from luffy.config import Config
    from luffy.distributed import World

KINDS: dict[str, type[Network]] = {kind.name: kind for kind in (Reference, Value, ImplicitReward)}


def make_networks(config: "Config", path: str, world: "World") -> list[Network]:
    """Those of the objective, with the weights at `path`. Collective over all ranks."""
    return [KINDS[name](config, path, world) for name in config.objective.networks]


__all__ = ["KINDS", "Network", "make_networks"]
