"""What of sampling only GPUs can show. scripts/gpu_check.sh runs it; without a GPU, or without vLLM, it is skipped."""

import pytest
import torch
from test_server_rollout import ask, assert_whole, connect, gap, move, options
from test_weight_sync import SEQUENCES
from tiny import make_model, make_policy

from luffy.config import RolloutConfig
from luffy.rollout.engine import Request, generate
from luffy.rollout.vllm_engine import FORGOTTEN, VllmEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    pytest.importorskip("vllm")
    return str(make_model(tmp_path_factory.mktemp("m") / "model"))


@pytest.fixture(scope="module")
def policy(model):
    return make_policy(model)


def test_an_engine_that_slept_samples_with_the_weights_of_the_sync(model, policy):
    config = RolloutConfig(sleep=True, memory_fraction=0.2)
    with VllmEngine(model, config, dtype="float32", eos_token_id=2, max_model_len=256) as engine:
        asleep = torch.cuda.mem_get_info()[0]
        for version in (1, 2):
            assert engine.version == FORGOTTEN
            move(policy)
            engine.sync(policy, torch.float32, version)
            with engine.awake():
                assert torch.cuda.mem_get_info()[0] < asleep - 2**28
                assert gap(policy, engine.score(SEQUENCES)) < 1e-2
            engine.sync(policy, torch.float32, version)
            with engine.awake():
                [answers] = generate(engine, [Request(SEQUENCES[0], 2, 8, 3)], 1.0)
            assert len(answers) == 2


@TWO
def test_weights_are_broadcast_over_nccl(model, policy, tmp_path):
    config = options(transport="broadcast", devices=["1"], probe_s=60.0, kv_cache_gib=1.0)
    with connect(model, tmp_path, config) as servers:
        for version in (1, 2):
            move(policy)
            servers.sync(policy, torch.float32, version)
            assert gap(policy, servers.score(SEQUENCES)) < 1e-2
        assert servers.metrics()["rollout/broadcasts_failed"] == 0
        assert_whole(servers, ask(servers), 3, 12)


@TWO
def test_two_gpus_share_a_servers_model(model, policy, tmp_path):
    config = options(tensor_parallel=2, devices=["0,1"], probe_s=60.0, kv_cache_gib=1.0)
    with connect(model, tmp_path, config) as servers:
        servers.sync(policy, torch.float32, 1)
        assert gap(policy, servers.score(SEQUENCES)) < 1e-2
