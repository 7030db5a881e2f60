"""The reference policy: the model that a run begins with, frozen, in the compute type.

Its log-probs are at the rollouts' temperature, as the policy's are. No checkpoint holds it: a run that is resumed reads
`model.name` again.
"""

from typing import ClassVar

from transformers import PreTrainedModel

from luffy.dtypes import dtype_of
from luffy.model import Policy
from luffy.networks.base import Network


class Reference(Network):
    name: ClassVar = "reference"

    @property
    def on_cpu(self) -> bool:
        return self.config.model.reference_on_cpu

    def build(self, lm: PreTrainedModel) -> Policy:
        for parameter in lm.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype_of(self.config.model.dtype))
        return super().build(lm)
