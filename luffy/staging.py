"""The state of a moment, copied to host memory, and its way to files through torch.distributed.checkpoint (DCP).

Planner, writer and reader are DCP's. Its `async_save` is not used: what follows the shards (joining the weights,
manifest, rename) belongs into the same background, with the same process group, and has no place there. It would also
copy plain tensors on every rank and keep all copies until the last file is written.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from luffy.consolidate import assign_files
from luffy.load import dcp_errors


@dataclass(slots=True)
class Staged:
    """This rank's part of a tensor, copied to host memory, and where it belongs in the whole."""

    item: WriteItem
    tensor: Tensor
    nbytes: int
    """Of the whole tensor."""

    @classmethod
    def copy_of(cls, name: str, tensor: Tensor) -> "Staged":
        if isinstance(tensor, DTensor):
            (item,) = tensor.__create_write_items__(name, tensor)
            local = tensor.to_local()
        else:  # the same on every rank; DCP has one of them write it
            zeros = torch.Size([0] * tensor.dim())
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=zeros, sizes=tensor.size()),
                properties=TensorProperties.create_from_tensor(tensor),
                size=tensor.size(),
            )
            item = WriteItem(index=MetadataIndex(name, zeros), type=WriteItemType.TENSOR, tensor_data=data)
            local = tensor
        return cls(item, local.detach().to("cpu", copy=True).contiguous(), tensor.numel() * tensor.element_size())


class StagedPlanner(dcp.DefaultSavePlanner):
    """DCP's plan (replicas are written once, spread over the ranks that hold them) for copies instead of tensors."""

    def create_local_plan(self) -> SavePlan:
        # a rank beyond the rows of a small tensor has nothing of it to write
        self.plan = SavePlan([staged.item for staged in self.state_dict.values() if staged.tensor.numel()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


def save_shards(tensors: dict[str, Staged], folder: Path, file_bytes: int, group: dist.ProcessGroup) -> dict[str, int]:
    """Every rank of `group` writes its shards into safetensors files of its own; the copies are let go of.

    Returns the number, from 1, of the file that a tensor went to, the same on every rank; all its files of one number
    together hold about `file_bytes`, or one tensor.

    Raises:
        UserError: on every rank, if the disk or mount failed on one.
    """
    files = assign_files({name: staged.nbytes for name, staged in tensors.items()}, file_bytes)
    with dcp_errors("checkpoint: it is not written, earlier ones are as they were (make room, then --resume)"):
        dcp.save(
            tensors,
            storage_writer=dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True),
            planner=StagedPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    tensors.clear()
    return files
