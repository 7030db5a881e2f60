"""The end of a broadcast of weights in a server's worker: vLLM's own NCCL engine, told to say what it was not given,
and the same over gloo where there is no GPU. `luffy.rollout.worker` registers both; written for vLLM 0.32.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from luffy.rollout.worker import Coverage


@dataclass(kw_only=True)
class GroupInfo(NCCLWeightTransferInitInfo):
    name: str
    """Of the group, by which a trainer knows that a worker is still in it."""
    timeout_s: float


class NcclReceiver(NCCLWeightTransferEngine):
    init_info_cls = GroupInfo  # type: ignore[assignment]  # generic in what it is narrowed to here
    name: str | None = None

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        assert isinstance(init_info, GroupInfo)
        self._join(init_info)
        self.name = init_info.name

    def _join(self, info: GroupInfo) -> None:
        super().init_transfer_engine(info)

    def start_weight_update(self) -> None:
        self.coverage = Coverage(self.model)
        super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self._update(update_info)
        except BaseException:
            # vLLM takes no `finish` after this, and a layer that is half loaded would spoil the next load of it
            with suppress(Exception):
                self.finish_weight_update()
            raise

    def _update(self, update_info: dict[str, Any]) -> None:
        super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.missing = self.coverage.close()

    def shutdown(self) -> None:
        self.name = None
        super().shutdown()


class GlooReceiver(NcclReceiver):
    def _join(self, info: GroupInfo) -> None:
        parallel = self.parallel_config
        self._group: Any = stateless_init_torch_distributed_process_group(
            str(info.master_address),
            int(info.master_port or 0),
            info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank,
            info.world_size,
            "gloo",
            timeout=timedelta(seconds=info.timeout_s),
        )

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self._group.broadcast(tensor, 0).wait()
            self.model.load_weights([(name, tensor)])  # type: ignore[operator]

    def _update(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # nothing to wait for: gloo has done

    def shutdown(self) -> None:
        self.name = self._group = None
