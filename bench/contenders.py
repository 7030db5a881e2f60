"""What `bench.gpu_check` and `bench.ops` time: ours, plain torch, bare GEMMs, and each peer by its own import and call.

`names(mode)` lists them, `load(impl, mode)` imports one and gives a function of a `Problem`: log-probs [N] in mode
`logp`, (log-probs, entropy) in `logp_entropy`, and a scalar to differentiate in `ce` and `policy`. Names are those of
`bench.peers`; `naive_bf16`, `naive_wide`, `naive_compiled` and `gemm_x1` to `gemm_x4` have no row there. A peer without
a policy loss gets one from its log-probs. What is absent or fails raises, and `why` puts it in a line of the report:
never a silent gap.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from luffy_kernels import linear_cross_entropy, linear_logprobs, linear_policy_loss, policy_gradient
from torch import Tensor
from torch.nn import functional

from bench.peers import CE, ENTROPY, LOGP, POLICY

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
SLICE = 8192


class Problem(NamedTuple):
    """N tokens in sequences of equal length; log-probs of the policy that sampled them; an advantage per sequence."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    old_logp: Tensor  # [N]
    advantages: Tensor  # [sequences]
    upstream: Tensor  # [2, N] gradients of log-prob and entropy
    logp: Tensor  # [N] fp32, to compare with
    active: Tensor | None = None  # [N] bool: rows that count; None: all. A peer without a mask computes the others too

    @property
    def per_token(self) -> Tensor:
        return self.advantages.repeat_interleave(len(self.targets) // len(self.advantages))

    @property
    def labels(self) -> Tensor:
        """Targets, -100 where a row does not count."""
        return self.targets if self.active is None else self.targets.where(self.active, -100)

    def mean(self, per_token: Tensor) -> Tensor:
        """Over the rows that count."""
        if self.active is None:
            return per_token.mean()
        return per_token.where(self.active, 0).sum() / self.active.sum()


Call = Callable[[Problem], Any]
LogProbs = Callable[[Problem], tuple[Tensor, Tensor | None]]  # the entropy None where it is not computed


def make_problem(
    hidden: int,
    vocabulary: int,
    tokens: int,
    device: str,
    sequence: int = 2048,
    *,
    dtype: torch.dtype = torch.bfloat16,
    active: float = 1.0,
    zero: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Logits of deviation 2; ratios to the old policy on both sides of the clips.

    active: share of rows that count. zero: share of sequences whose advantage is 0, as those of a group whose answers
    are all right or all wrong.
    """
    rng = torch.Generator(device).manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=rng, device=device).to(dtype)
    w = torch.randn(vocabulary, hidden, generator=rng, device=device).mul_(2 * hidden**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=rng, device=device)
    sequences = tokens // sequence if tokens % sequence == 0 else 1
    advantages = torch.randn(sequences, generator=rng, device=device)
    advantages[: round(zero * sequences)] = 0
    upstream = torch.randn(2, tokens, generator=rng, device=device) / tokens
    logp = exact_logp(h, w, targets, torch.float32)
    # Half of them beyond a clip, none near one: rounded log-probs would clip other tokens, which is not what is timed.
    away = torch.tensor([-0.5, -0.1, 0.1, 0.5], device=device)
    old_logp = logp + away[torch.randint(4, (tokens,), generator=rng, device=device)]
    counts = None if active == 1 else torch.rand(tokens, generator=rng, device=device) < active
    return Problem(h.requires_grad_(), w.requires_grad_(), targets, old_logp, advantages, upstream, logp, counts)


@torch.no_grad()
def exact_logp(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probs by plain products in this dtype, a slice of the vocabulary at a time."""
    h = hidden.to(dtype)
    parts = [torch.logsumexp(h @ part.to(dtype).T, -1) for part in weight.split(SLICE)]
    return (h * weight[targets].to(dtype)).sum(-1) - torch.stack(parts).logsumexp(0)


def surrogate(logp: Tensor, p: Problem) -> Tensor:
    """PPO's clipped loss, the mean over tokens."""
    ratio, a = (logp - p.old_logp).exp(), p.per_token
    return p.mean(torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)))


def exact_loss(p: Problem, mode: str) -> float:
    return float(surrogate(p.logp, p) if mode == POLICY else -p.mean(p.logp))


def from_logprobs(fn: LogProbs, mode: str) -> Call:
    """The call of a mode by an implementation of log-probs and entropy."""
    return {
        LOGP: lambda p: fn(p)[0],
        ENTROPY: fn,
        CE: lambda p: -p.mean(fn(p)[0]),
        POLICY: lambda p: surrogate(fn(p)[0], p),
    }[mode]


def ours(mode: str) -> Call:
    def policy(p: Problem) -> Tensor:
        count = float(len(p.targets) if p.active is None else p.active.sum())
        options = {"losses": policy_gradient(CLIP_LOW, CLIP_HIGH), "normalizer": count}
        given = {"advantages": p.per_token, "old_logp": p.old_logp}
        return linear_policy_loss(p.hidden, p.weight, p.labels, **options, **given).loss

    return {
        LOGP: lambda p: linear_logprobs(p.hidden, p.weight, p.labels).logp,
        ENTROPY: lambda p: linear_logprobs(p.hidden, p.weight, p.labels, return_entropy=True)[:2],
        CE: lambda p: linear_cross_entropy(p.hidden, p.weight, p.labels),
        POLICY: policy,
    }[mode]


def naive(mode: str) -> Call:
    def logprobs(p: Problem) -> tuple[Tensor, Tensor | None]:
        log_p = functional.linear(p.hidden, p.weight).float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if mode == ENTROPY else None
        return log_p.gather(-1, p.targets[:, None])[:, 0], entropy

    return from_logprobs(logprobs, mode)


def naive_wide(mode: str) -> Call:
    """Operands widened before the product: logits that are never rounded to 16 bits."""

    def logprobs(p: Problem) -> tuple[Tensor, Tensor | None]:
        log_p = functional.linear(p.hidden.float(), p.weight.float()).log_softmax(-1)
        return log_p.gather(-1, p.targets[:, None])[:, 0], None

    return from_logprobs(logprobs, mode)


def naive_narrow(mode: str) -> Call:
    """As `naive`, with the softmax in the operands' dtype: half the memory, log-probs off by its rounding."""

    def logprobs(p: Problem) -> tuple[Tensor, Tensor | None]:
        log_p = functional.linear(p.hidden, p.weight).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).float() if mode == ENTROPY else None
        return log_p.gather(-1, p.targets[:, None])[:, 0].float(), entropy

    return from_logprobs(logprobs, mode)


def gemm(count: int) -> Callable[[str], Call]:
    """Products of the shapes that logits, dX and dW have, and that a second pass over the logits has."""

    def call(p: Problem) -> None:
        h, w = p.hidden.detach(), p.weight.detach()
        for _ in range(max(1, count - 2)):
            z = h @ w.T
        if count > 2:
            torch.mm(z, w), torch.mm(z.T, h)

    return lambda mode: call


def liger_grpo(mode: str) -> Call:
    loss = attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH, loss_type="bnpo"
    )

    def call(p: Problem) -> Tensor:
        shape = len(p.advantages), -1
        targets = p.targets.view(shape)
        mask = torch.ones_like(targets) if p.active is None else p.active.view(shape).long()
        arguments = p.hidden.view(*shape, p.hidden.shape[1]), p.weight, targets, mask, p.advantages
        return loss(*arguments, old_per_token_logps=p.old_logp.view(shape))[0]

    return call


def liger_flce(mode: str) -> Call:
    loss = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda p: loss(p.weight, p.hidden, p.labels)


def cce(mode: str) -> Call:
    fn = attribute("cut_cross_entropy", "linear_cross_entropy")
    presets = "bias" in inspect.signature(fn).parameters  # releases before the presets filter unless told not to
    exact = {"impl": "cce_exact"} if presets else {"impl": "cce", "filter_eps": None}

    def losses(p: Problem, reduction: str) -> Tensor:
        options = {"impl": "torch_compile"} if p.hidden.device.type == "cpu" else exact  # its kernels need a device
        return fn(p.hidden, p.weight, p.labels, reduction=reduction, **options)

    if mode == CE:
        return lambda p: losses(p, "mean")
    return from_logprobs(lambda p: (-losses(p, "none").float(), None), mode)


def verl_triton(mode: str) -> Call:
    fn = attribute("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return from_logprobs(lambda p: fn(p.hidden, p.weight, p.targets, 1.0, "none"), mode)


def quack(mode: str) -> Call:
    fn = attribute("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda p: fn(p.hidden, p.weight, p.targets)


def trl_logp(mode: str) -> Call:
    try:
        function = attribute("trl.kernels", "ChunkedLogProbFunction")
    except ImportError:  # releases that kept it private
        function = attribute("trl.trainer.utils", "_ChunkedLogProbFunction")
    parameters = inspect.signature(function.forward).parameters
    bias = [None] if "bias" in parameters else []
    rest: list[Any] = [None, 1.0, ("entropy",) if mode == ENTROPY else ()] if "outputs" in parameters else []

    def logprobs(p: Problem) -> tuple[Tensor, Tensor | None]:
        return function.apply(p.hidden, p.weight, *bias, p.targets, 1.0, SLICE, *rest)[:2]

    return from_logprobs(logprobs, mode)


def torch_lce(mode: str) -> Call:
    fn, options = functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    if mode == CE:
        return lambda p: fn(p.hidden, p.weight, p.labels, options=options)
    none = {"reduction": "none", "options": options}
    return from_logprobs(lambda p: (-fn(p.hidden, p.weight, p.targets, **none).float(), None), mode)


ALL = (LOGP, ENTROPY, CE, POLICY)
SCALARS = (LOGP, CE, POLICY)
# In the order of interest: what a time budget cuts off is the end.
CONTENDERS: dict[str, tuple[tuple[str, ...], Callable[[str], Call]]] = {
    "ours": (ALL, ours),
    "gemm_x1": ((LOGP,), gemm(1)),
    "gemm_x3": ((CE, POLICY), gemm(3)),
    "gemm_x4": ((ENTROPY,), gemm(4)),
    "naive": (ALL, naive),
    "naive_bf16": ((LOGP, POLICY), naive_narrow),
    "naive_wide": ((LOGP,), naive_wide),
    "liger_grpo": ((POLICY,), liger_grpo),
    "liger_flce": ((CE,), liger_flce),
    "cce": (SCALARS, cce),
    "verl_triton": (ALL, verl_triton),
    "quack": ((CE,), quack),
    "trl_logp": (ALL, trl_logp),
    "torch_lce": (SCALARS, torch_lce),
    "naive_compiled": (ALL, lambda mode: torch.compile(naive(mode), dynamic=False)),
}


def names(mode: str) -> list[str]:
    return [impl for impl, (modes, _) in CONTENDERS.items() if mode in modes]


def load(impl: str, mode: str) -> Call:
    return CONTENDERS[impl][1](mode)


class NotInstalledError(ImportError):
    """The package is not there; one that is there and does not import raises what it raises."""


def attribute(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            raise NotInstalledError(f"{error.name} is not installed") from None
        raise


def why(error: BaseException) -> str:
    """One line for the report."""
    if isinstance(error, NotInstalledError):
        return "not installed"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]
