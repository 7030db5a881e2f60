"""Heads whose vocabulary is spread over two ranks, by Megatron's, NeMo RL's and SkyRL's signatures:

python examples/megatron_head.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from luffy_kernels.compat.megatron import ChunkedDistributedHiddenStatesToLogprobs, linear_cross_entropy
from luffy_kernels.compat.skyrl import FusedLinearChunkedDistributedLogprob

RANKS, S, B, H, V = 2, 32, 2, 64, 8_000


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # hidden and labels are the same on all ranks
    hidden, labels = torch.randn(S, B, H), torch.randint(0, V, (B, S))
    weight = (torch.randn(V, H) * 0.05).chunk(RANKS)[rank].clone().requires_grad_()  # [V / ranks, H]
    mine = hidden.chunk(RANKS)[rank].clone().requires_grad_()  # [S / ranks, B, H], as with sequence parallelism
    shard = (rank * V // RANKS, (rank + 1) * V // RANKS, 1024, dist.group.WORLD)

    loss = linear_cross_entropy(mine, weight, labels.T, dist.group.WORLD, sequence_parallel=True)
    nemo = ChunkedDistributedHiddenStatesToLogprobs.apply(mine, labels, weight, *shard)
    skyrl = FusedLinearChunkedDistributedLogprob.apply(hidden.transpose(0, 1), weight, labels, *shard)
    (loss - nemo.mean() - skyrl.mean()).backward()
    if rank == 0:
        print(
            f"Megatron {loss:.4f}, NeMo RL {-nemo.mean():.4f}, SkyRL {-skyrl.mean():.4f}; dW {tuple(weight.grad.shape)}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        mp.spawn(main, (file.name + ".store",), nprocs=RANKS)
