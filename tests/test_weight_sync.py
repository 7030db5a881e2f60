"""After a sync vLLM computes with the trainer's new weights: parity of log-probs on fixed tokens, in fp32."""

import pytest
import torch
from tiny import make_model, make_policy, sample
from torch.distributed.fsdp import FSDPModule

from luffy import optim
from luffy.attention import Layout, Segment
from luffy.config import OptimConfig, RolloutConfig
from luffy.model import Policy
from luffy.packing import MicroBatch
from luffy.rollout.vllm_engine import VllmEngine
from luffy.weights import hf_weights

SEQUENCES = [tuple(range(5, 40)), tuple(range(60, 100, 2)), (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)]


def trainer_logp(policy: Policy, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-prob of every token but the first."""
    size = len(ids) - 1
    micro = MicroBatch(
        token_ids=torch.tensor(ids[:-1]),
        positions=torch.arange(size),
        layout=Layout([Segment(0, 1, [(1, size)])], size),
        source=torch.arange(size),
        targets=torch.tensor(ids[1:]),
        advantages=torch.ones(size),
        loss_id=torch.zeros(size, dtype=torch.int64),
        is_trace=torch.zeros(size, dtype=torch.bool),
        token_weight=torch.ones(size),
        sampler_logp=torch.zeros(size),
    )
    with torch.no_grad():
        logp = policy(micro)
    for module in policy.modules():  # FSDP reshards after a backward, and there is none: parameters() would be copies
        if isinstance(module, FSDPModule):
            module.reshard()
    return logp


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = str(make_model(tmp_path_factory.mktemp("m") / "model"))
    policy = make_policy(path)
    engine = VllmEngine(path, RolloutConfig(kv_cache_gib=0.25), dtype="float32", eos_token_id=2, max_model_len=256)
    yield policy, engine
    engine.close()


def gap(policy: Policy, engine: VllmEngine) -> float:
    scored = engine.score(SEQUENCES)
    return max(
        (trainer_logp(policy, s) - torch.tensor(t)).abs().max().item() for s, t in zip(SEQUENCES, scored, strict=True)
    )


def test_sync_moves_the_engine_from_the_old_weights_to_the_new(parts):
    policy, engine = parts
    assert gap(policy, engine) < 1e-3
    old = [torch.tensor(x) for x in engine.score(SEQUENCES)]
    optimizer = optim.make_optimizer(policy, OptimConfig(lr=0.02))
    for param in policy.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    stale = gap(policy, engine)
    assert stale > 0.05  # the update matters, and nothing reached the engine by itself
    sent = engine.sync(policy, torch.float32, version=7)
    assert engine.version == 7
    assert sent == len(list(hf_weights(policy)))
    fresh = gap(policy, engine)
    moved = max((torch.tensor(a) - b).abs().max().item() for a, b in zip(engine.score(SEQUENCES), old, strict=True))
    assert fresh < 1e-3
    assert moved > 10 * fresh


def test_generation_uses_the_new_weights_too(parts):
    policy, engine = parts
    prompt = tuple(5 + i % 90 for i in range(150))  # longer than a block of the prefix cache, which must be emptied
    sample(engine, [prompt], [1], temperature=1.0, max_tokens=1, seeds=[3])
    optimizer = optim.make_optimizer(policy, OptimConfig(lr=0.02))
    for param in policy.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    engine.sync(policy, torch.float32, version=8)
    [[answer]] = sample(engine, [prompt], [1], temperature=1.0, max_tokens=8, seeds=[3])
    want = trainer_logp(policy, prompt + answer.token_ids)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(answer.logp), want, atol=1e-3, rtol=0)
    [[again]] = sample(engine, [prompt], [1], temperature=1.0, max_tokens=8, seeds=[3])
    assert again == answer  # a pure function of weights, prompt and seed


def test_an_answer_ends_at_the_token_it_is_told_to_end_at(parts, monkeypatch):
    """Base models' tokenizers name another EOS than their chat template closes a turn with."""
    _, engine = parts
    ask = {"temperature": 1.0, "max_tokens": 8, "seeds": [5]}
    [[whole]] = sample(engine, [SEQUENCES[0]], [1], **ask)
    last = next(i for i, token in enumerate(whole.token_ids) if i and token not in whole.token_ids[:i])
    monkeypatch.setattr(engine, "eos_token_id", whole.token_ids[last])
    [[cut]] = sample(engine, [SEQUENCES[0]], [1], **ask)
    assert cut.token_ids == whole.token_ids[: last + 1]
    assert cut.finished
    assert not whole.finished
