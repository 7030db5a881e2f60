"""What only GPUs do, as far as it goes without one: the order in which an engine sleeps and wakes, moments that make
room, ranks that share a model."""

import torch
from test_sampling import Scripted
from torch import nn

from luffy import optim
from luffy.config import OptimConfig
from luffy.rollout.engine import Request
from luffy.rollout.peers import Peers, Share
from luffy.rollout.vllm_engine import FORGOTTEN, VllmEngine


class Recorded:
    """In the place of vLLM's LLM."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def wake_up(self, tags):
        self.told.append(("wake", *tags))

    def sleep(self, level):
        self.told.append(("sleep", level))

    def collective_rpc(self, method, args):
        self.told.append("load")
        return [[]]

    def reset_prefix_cache(self):
        self.told.append("reset")


def sleeping() -> VllmEngine:
    engine = object.__new__(VllmEngine)
    engine.llm, engine.version, engine._sleeps = Recorded(), 3, True
    engine._sleep()
    return engine


def test_weights_wake_for_a_sync_and_the_cache_for_sampling():
    engine = sleeping()
    assert engine.version == FORGOTTEN
    for version in (4, 5):
        engine.llm.told.clear()
        engine.sync(None, torch.float32, version)
        assert engine.version == version
        with engine.awake():
            engine.llm.told.append("sample")
        assert engine.llm.told == [("wake", "weights"), "load", "reset", ("wake", "kv_cache"), "sample", ("sleep", 2)]
        assert engine.version == FORGOTTEN  # the next step cannot take them for the policy's


def test_an_error_while_sampling_leaves_the_engine_asleep():
    engine = sleeping()
    try:
        with engine.awake():
            raise KeyError
    except KeyError:
        pass
    assert engine.llm.told[-1] == ("sleep", 2)


def test_moments_make_room_and_come_back():
    torch.manual_seed(0)
    model, other = nn.Linear(7, 5), nn.Linear(7, 5)
    other.load_state_dict(model.state_dict())
    optimizers = [optim.make_optimizer(m, OptimConfig(lr=0.1)) for m in (model, other)]
    for step in range(3):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            m(torch.ones(2, 7) * step).square().sum().backward()
            if optimizer is optimizers[1]:
                with optim.parked(optimizer, host="none"):  # as if it were not there already
                    held = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
                    assert all(v.untyped_storage().nbytes() == 0 for v in held)
                    assert len(held) == (4 if step else 0)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_peers_step_through_everybodys_requests_and_keep_their_own(monkeypatch):
    requests = {rank: [Request((n + 1, rank, 1), 1, 8, 0) for n in range(2 + rank)] for rank in range(2)}
    monkeypatch.setattr("torch.distributed.new_subgroups", lambda size: ("group", []))
    monkeypatch.setattr(
        "torch.distributed.all_gather_object",
        lambda parts, mine, group: parts.__setitem__(slice(None), requests.values()),
    )
    orders = []
    for rank in range(2):
        monkeypatch.setattr("torch.distributed.get_rank", lambda group, rank=rank: rank)
        engine = Scripted()
        share = Peers(2).share(requests[rank], lambda given, engine=engine: engine.begin(given, 1.0))
        assert isinstance(share, Share)
        assert share.waiting == 5
        found = share.take(0.0)
        assert [index for index, _ in found] == list(range(2 + rank))
        assert [len(answers[0].token_ids) for _, answers in found] == [n + 1 for n in range(2 + rank)]
        assert share.waiting == 0
        assert share.stop() == {}
        orders.append(engine.asked)
    assert orders[0] == orders[1]
