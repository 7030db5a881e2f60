"""Liger's fused losses by this package's operators: same constructors, same order of arguments, same results.

    from luffy_kernels.compat.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearCrossEntropyLoss

GRPO with ratios by token runs in one sweep (`linear_policy_loss`, three GEMMs). Log-probs come from `linear_logprobs`,
and the loss from the installed Liger, where a gradient needs a whole sequence's log-probs (`vespo`,
`importance_sampling_level="sequence"`) or goes through the KL's weight (`use_bias_correction_kl`), and where a bound
on the ratio is 1 or less (CISPO's, `delta`) or an epsilon 0.

Different on purpose: `luspo` leaves padding out of the loss, where Liger 0.8 lets it in. Not here: class weights, token
scaling, z-loss as a result, accuracies and predictions of the cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import token_losses
from ..cross_entropy import linear_cross_entropy
from ..logprobs import linear_logprobs
from ..policy_loss import PolicyLoss, linear_policy_loss

IGNORED = -100
BY_SEQUENCE = ("grpo", "sapo")
BY_TOKEN = ("dapo", "cispo")
ONE_SWEEP = (*BY_SEQUENCE, *BY_TOKEN, "bnpo", "dr_grpo", "luspo")


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Liger's, weight first."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        """Liger's options, in its order. accum_dtype is taken and means nothing: sums are in fp32.

        Raises:
            ValueError: an option that is not computed here: weights by class (ce_weight [V]) or token, accuracies,
                predictions, the z-loss as a result.
        """
        super().__init__()
        given = {"ce_weight": ce_weight, "return_z_loss": return_z_loss, "use_token_scaling": use_token_scaling}
        given |= {"return_token_accuracy": return_token_accuracy, "return_predicted_tokens": return_predicted_tokens}
        for name, value in given.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"LigerFusedLinearCrossEntropyLoss: {name} is not computed here; use Liger's own class"
                )
        self.ignore_index, self.reduction, self.softcap = ignore_index, reduction, softcap
        self.lse_square_scale, self.label_smoothing = lse_square_scale, label_smoothing

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """Nats, fp32: a scalar, or [N] where nothing is reduced. lin_weight: [V, H] float. _input: [N, H] float.
        target: [N] integer. bias: [V] float.

        Raises:
            ValueError: what `luffy_kernels.linear_cross_entropy` raises, unknown reductions among it.
        """
        return linear_cross_entropy(
            _input,
            lin_weight,
            target.long(),
            bias=bias,
            reduction=self.reduction,  # type: ignore[arg-type]
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
            softcap=self.softcap,
        )


class LigerFusedLinearGRPOLoss(nn.Module):
    """Liger's GRPO and its relatives (`loss_type`)."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        """Liger's options, in its order. compiled and chunk_size are taken and mean nothing.

        Raises:
            ValueError: an unknown loss_type, "dr_grpo" without max_completion_length, a delta that is not positive.
        """
        super().__init__()
        if loss_type not in (*ONE_SWEEP, "vespo"):
            raise ValueError(f"LigerFusedLinearGRPOLoss: loss_type must be Liger's, got {loss_type!r}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("LigerFusedLinearGRPOLoss: loss_type 'dr_grpo' needs max_completion_length")
        if delta is not None and delta <= 0:
            raise ValueError(f"LigerFusedLinearGRPOLoss: delta must be positive, got {delta}")
        self.beta, self.use_ref_model, self.temperature = beta, use_ref_model, temperature
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.options: dict[str, Any] = {
            "epsilon_low": epsilon_low,
            "epsilon_high": epsilon_high,
            "importance_sampling_level": importance_sampling_level,
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
            "delta": delta,
            "use_bias_correction_kl": use_bias_correction_kl,
            "vespo_k_pos": vespo_k_pos,
            "vespo_lambda_pos": vespo_lambda_pos,
            "vespo_k_neg": vespo_k_neg,
            "vespo_lambda_neg": vespo_lambda_neg,
        }
        by_sequence = loss_type == "vespo" or importance_sampling_level != "token"
        low = (loss_type == "cispo" and epsilon_high <= 1) or (delta is not None and delta <= 1)
        unclipped = loss_type != "sapo" and not (epsilon_low > 0 and epsilon_high > 0)
        self.one_sweep = not (by_sequence or low or unclipped or (use_bias_correction_kl and beta))

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (mean KL in nats where beta is not 0, share of clipped tokens)).

        Args:
            _input: [B, T, H] float. lin_weight: [V, H] float. selected_token_ids: [B, T] integer. attention_mask:
                [B, T], 0 or 1. advantages: [B]. bias: [V].
            ref_per_token_logps, old_per_token_logps: [B, T] nats; without old ones ratios are 1.
            ref_input, ref_weight, ref_bias: of the reference model, in place of its log-probs.
            vllm_is_ratio: [B, T] or [B, 1]. num_items_in_batch: normaliser of dapo, cispo and vespo.

        Raises:
            ValueError: a KL term without the reference's log-probs or its hidden states and weight, and what
                `luffy_kernels.linear_policy_loss` raises.
            ImportError: the loss is one that Liger itself must compute (see the module), and Liger is not installed.
        """
        targets = selected_token_ids.long().masked_fill(attention_mask == 0, IGNORED)
        head: dict[str, Any] = {"bias": bias, "temperature": self.temperature}
        ref = ref_per_token_logps if self.use_ref_model and self.beta else None
        if ref is None and self.use_ref_model and self.beta:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "LigerFusedLinearGRPOLoss: beta and use_ref_model ask for a KL term; give ref_per_token_logps, or "
                    "ref_input and ref_weight"
                )
            with torch.no_grad():
                ref = linear_logprobs(ref_input, ref_weight, targets, **head | {"bias": ref_bias}).logp
        if not self.one_sweep:
            logp = linear_logprobs(_input, lin_weight, targets, **head).logp
            given = (ref, old_per_token_logps, vllm_is_ratio, num_items_in_batch)
            return self._by_liger(logp, attention_mask, advantages, *given)
        mask = attention_mask.to(torch.float32)
        weight, normalizer = self._shares(mask, num_items_in_batch)
        importance = weight if vllm_is_ratio is None else weight * vllm_is_ratio
        found = linear_policy_loss(
            _input,
            lin_weight,
            targets,
            advantages=advantages.unsqueeze(1),
            losses=self._losses(),
            old_logp="current" if old_per_token_logps is None else old_per_token_logps,
            ref_logp=ref,
            token_weight=importance,
            kl_coef=self.beta * weight if self.beta and ref is not None else 0.0,
            kl_type="k3",
            normalizer=normalizer,
            **head,
        )
        return found.loss, self._metrics(found, mask, advantages.unsqueeze(1))

    def _losses(self) -> token_losses.TokenLoss:
        low, high, delta = (self.options[name] for name in ("epsilon_low", "epsilon_high", "delta"))
        if self.loss_type == "cispo":
            return token_losses.cispo(high - 1)  # Liger's is the bound itself
        if self.loss_type == "sapo":
            return token_losses.sapo(self.options["sapo_temperature_pos"], self.options["sapo_temperature_neg"])
        if delta is None:
            return token_losses.policy_gradient(low, high)
        # two-sided (INTELLECT-2): min(min(r, delta) A, clip(r) A)
        return token_losses.policy_gradient(low, min(high, delta - 1), max(delta, 1 + high))

    def _shares(self, mask: Tensor, num_items_in_batch: float | None) -> tuple[Tensor, float | Tensor]:
        """(weight of a token, what the sum is divided by)"""
        sequences, length = mask.shape
        tokens = mask.sum(1, keepdim=True)
        if self.loss_type in BY_SEQUENCE:
            return (1 / tokens.clamp(min=1)).expand_as(mask), sequences
        if self.loss_type == "luspo":
            return tokens.expand_as(mask), sequences * length
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return torch.ones_like(mask), sequences * self.max_completion_length
        if self.loss_type in BY_TOKEN:
            return torch.ones_like(mask), _per_rank(tokens.sum(), num_items_in_batch)
        return torch.ones_like(mask), tokens.sum().clamp(min=1)

    def _metrics(self, found: PolicyLoss, mask: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
        low, high = self.options["epsilon_low"], self.options["epsilon_high"]
        clipped = torch.zeros_like(mask, dtype=torch.bool)
        if self.loss_type == "cispo":
            clipped = (found.ratio > high) & (advantages > 0)
        elif self.loss_type != "sapo":
            clipped = ((found.ratio < 1 - low) & (advantages < 0)) | ((found.ratio > 1 + high) & (advantages > 0))
        tokens = mask.sum().clamp(min=1)
        share = (clipped * mask).sum() / tokens
        return ((found.kl * mask).sum() / tokens, share) if self.beta else (share,)

    def _by_liger(
        self,
        logp: Tensor,
        mask: Tensor,
        advantages: Tensor,
        ref: Tensor | None,
        old: Tensor | None,
        vllm_is_ratio: Tensor | None,
        num_items_in_batch: float | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

        loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logp,
            mask,
            advantages,
            mask,
            ref_per_token_logps=ref,
            old_per_token_logps=old,
            beta=self.beta,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )
        return loss, tuple(metric.detach() for metric in metrics)


def _per_rank(tokens: Tensor, of_all: float | Tensor | None) -> Tensor:
    """What a rank divides by, so that the mean over ranks is of all their tokens. of_all: known already."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if of_all is not None:
        tokens = torch.as_tensor(of_all, dtype=torch.float32, device=tokens.device)
    elif ranks > 1:
        tokens = tokens.clone()
        dist.all_reduce(tokens)
    return (tokens / ranks).clamp(min=1)
