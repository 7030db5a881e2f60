"""Fused linear-head operators for reinforcement learning of language models: exact log-probs and policy losses without
ever storing [tokens, vocabulary] logits. Needs torch alone."""

from ._library import status
from .cross_entropy import linear_cross_entropy
from .head import LinearHead
from .logprobs import LogProbs, linear_logprobs
from .policy_loss import PolicyLoss, linear_policy_loss
from .token_loss import TokenLosses, token_loss
from .token_losses import (
    TokenLoss,
    behaviour_ratio,
    cispo,
    custom,
    log_prob,
    masked_weight,
    nll,
    policy_gradient,
    power,
    prob_plus_log,
    reinforce,
    sapo,
    shaped,
    shaped_relative,
    truncated_weight,
)

__all__ = [
    "LinearHead",
    "LogProbs",
    "PolicyLoss",
    "TokenLoss",
    "TokenLosses",
    "behaviour_ratio",
    "cispo",
    "custom",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_policy_loss",
    "log_prob",
    "masked_weight",
    "nll",
    "policy_gradient",
    "power",
    "prob_plus_log",
    "reinforce",
    "sapo",
    "shaped",
    "shaped_relative",
    "status",
    "token_loss",
    "truncated_weight",
]
