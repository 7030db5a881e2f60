"""The operators behind other frameworks' own names: one thin file each, nothing of which is imported before you do.

    from luffy_kernels.compat import trl
    trl.apply()      # replaces functions of the installed package, if it is a version that this was written for
    trl.undo()       # puts the very same objects back

    trl             TRL's trainers with a fused head (GRPO, RLOO, SFT, DPO, KTO)  apply, undo
    verl            `linear_cross_entropy`, `FusedLinearForPPO`                   apply, undo
    liger           `LigerFusedLinearGRPOLoss`, `LigerFusedLinearCrossEntropyLoss`, by import
    skyrl           the fused head of its Megatron workers                       apply, undo
    prime_rl        its output linear, a temperature for each token              apply, undo
    megatron        Megatron's and NeMo RL's vocabulary-parallel heads, by import
    openrlhf        an actor whose model computes no logits                       apply, undo
    transformers    `model(..., labels=...)` without logits, log-probs of tokens  patch, unpatch

docs/compat/ has a page on each.
"""
