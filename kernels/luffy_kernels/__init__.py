"""Fused linear-head operators for reinforcement learning of language models: exact log-probs and policy losses without
ever storing [tokens, vocabulary] logits. Needs torch alone."""

from ._library import status
from .logprobs import LogProbs, linear_logprobs
from .policy_loss import PolicyLoss, linear_policy_loss
from .token_losses import TokenLoss, behaviour_ratio, nll, policy_gradient, shaped

__all__ = [
    "LogProbs",
    "PolicyLoss",
    "TokenLoss",
    "behaviour_ratio",
    "linear_logprobs",
    "linear_policy_loss",
    "nll",
    "policy_gradient",
    "shaped",
    "status",
]
