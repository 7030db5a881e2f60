"""Rollouts are drawn by one program and learned from by another: what to do about the difference.

    mu     probability of a token in the distribution that it was sampled from: the engine's kernels and types, its
           temperature, its weights of that moment, fresh or stale
    pi     the trainer's probability of the same token at the beginning of the step, at the same temperature
    ratio  pi / mu of a token;  g  the geometric mean of the ratios of a row's tokens

    kind            weight of a token
    truncate        min(ratio, high)                            truncated importance sampling
    mask            ratio where low <= ratio <= high, else 0    IcePop
    sequence_mask   1 where low <= g <= high, else 0            rejection of whole rows

The weight multiplies the policy loss, whose own ratio is of the current policy to pi. Tokens that nobody sampled have
weight 1. docs/correction.md has sources, defaults and decisions.

    N response tokens of a micro-batch, R rows of it
"""

import torch
import torch.distributed as dist
from luffy_kernels.token_losses import MAX_LOG_RATIO
from torch import Tensor

from luffy.config import CorrectionConfig
from luffy.packing import MicroBatch


def correct(micro: MicroBatch, config: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """Multiply the weights into `micro.token_weight`; `micro.old_logp` is pi's log-probs.

    Returns:
        ([N] log ratios, [N] weights), as `log_ratios` and `token_weights` have them. With `sequence_mask` collective
        over the ranks that share the micro-batch's tokens.
    """
    assert micro.old_logp is not None, "the pass at the beginning of the step comes first"
    log_ratio = log_ratios(micro.old_logp, micro.sampler_logp)
    weight = token_weights(log_ratio, config, micro.row, micro.num_rows, micro.layout.group)
    micro.token_weight = micro.token_weight * weight
    return log_ratio, weight


def log_ratios(logp: Tensor, sampler_logp: Tensor) -> Tensor:
    """log pi / mu, [N] float64, nats, within +-20; NaN where nobody sampled, and where the policy itself is NaN.

    Args:
        logp, sampler_logp: [N] float, nats. The latter is NaN where nobody sampled.
    """
    # beyond e^20 a ratio is a broken sampler, not information, and sums of its powers should stay finite
    return (logp.double() - sampler_logp.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_weights(
    log_ratio: Tensor,
    config: CorrectionConfig,
    row: Tensor | None = None,
    num_rows: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[N] float32: what the policy loss of each token is multiplied by; 1 where `log_ratio` is NaN, so that a policy
    that is NaN shows in the loss.

    Args:
        log_ratio: [N] float64, of `log_ratios`.
        row: [N] int64, each token's row, below `num_rows`; only `sequence_mask` needs it.
        group: ranks that share the tokens of the rows; None: this one has all of them.
    """
    low, high = config.bounds
    ratio = log_ratio.exp()
    if config.kind == "none":
        weight = torch.ones_like(ratio)
    elif config.kind == "truncate":
        weight = ratio.clamp(max=high)
    elif config.kind == "mask":
        weight = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    else:
        assert row is not None, "sequence_mask needs to know each token's row"
        mean = row_means(log_ratio, row, num_rows, group).exp()
        weight = ((mean >= low) & (mean <= high)).double()[row]
    return torch.where(log_ratio.isnan(), 1.0, weight).float()


def row_means(log_ratio: Tensor, row: Tensor, num_rows: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """[R] float64: mean log ratio over each row's sampled tokens, whichever rank of `group` holds them; NaN of a row
    without any. Arguments as in `token_weights`."""
    sampled = ~log_ratio.isnan()
    sums = log_ratio.new_zeros(2, num_rows)
    sums[0].index_add_(0, row, torch.where(sampled, log_ratio, 0.0))
    sums[1].index_add_(0, row, sampled.double())
    if group is not None and num_rows:
        dist.all_reduce(sums, group=group)
    return sums[0] / sums[1]
