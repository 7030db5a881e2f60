"""Liger's Triton kernels for norms, rotations and gated MLPs of a model's blocks, in place of transformers' own code.

The numbers change by rounding alone (`tests/test_body_kernels.py`). The loss stays ours: of Liger's patches those of
the head are left out. For the rotation Liger patches transformers' module of the model family, for the whole process.
"""

import os

import torch
from transformers import PreTrainedModel

from luffy.errors import UserError


def use_liger(lm: PreTrainedModel) -> None:
    """Patch `lm` in place.

    Raises:
        UserError: Liger is not installed, there is no GPU for it, or it does not know the model's family.
    """
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError('model.body_kernels: "liger" needs a GPU; leave it "torch"')
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(
            "model.body_kernels: liger-kernel is not installed; install the `liger` extra of luffy-rl, or leave it "
            '"torch"'
        ) from error
    family = lm.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f'model.body_kernels: Liger has no kernels for {family} models; leave it "torch"')
    body = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
    _apply_liger_kernel_to_instance(lm, **body, cross_entropy=False, fused_linear_cross_entropy=False)
