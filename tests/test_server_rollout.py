"""Rollouts from real vLLM servers: the same answers as in the trainer's process, with the weights that were asked for,
whatever happens to the servers meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from test_train import arguments, records, without_times
from test_weight_sync import SEQUENCES, trainer_logp
from tiny import ROOT, luffy, make_model, make_policy, sample

from luffy import distributed, optim
from luffy.config import MeshConfig, ModelConfig, OptimConfig, RolloutConfig
from luffy.errors import UserError
from luffy.load import empty_lm, load_weights
from luffy.model import Policy, shard
from luffy.rollout.asking import ABORT_S, Aborted, Asking, Counts
from luffy.rollout.client import Client, Cut, Unreachable
from luffy.rollout.engine import Request
from luffy.rollout.explain import explain
from luffy.rollout.fleet import Fleet
from luffy.rollout.serve import arguments as serve_arguments
from luffy.rollout.servers import Servers, warn_if_open
from luffy.rollout.transport import version_folder, write_version
from luffy.rollout.vllm_engine import VllmEngine
from luffy.shards import fill
from luffy.weights import hf_weights, weights_of

SIZES = {"vocabulary": 259, "hidden size": 64, "blocks": 2}
PROMPTS = [tuple(5 + (7 * i + j) % 200 for j in range(9 + i)) for i in range(6)]


def options(**changes) -> RolloutConfig:
    given = {"engine": "server", "kv_cache_gib": 0.25, "max_sequences": 16, "probe_s": 6.0, "server_wait_s": 120.0}
    return RolloutConfig(**given | changes)


def connect(path: str, folder: Path, config: RolloutConfig, **changes) -> Servers:
    given = {"dtype": "float32", "eos_token_id": 2, "sizes": SIZES, "max_model_len": 256}
    return Servers(path, config, **given | changes, folder=folder, world=distributed.start(MeshConfig()))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_model(tmp_path_factory.mktemp("m") / "model"))


@pytest.fixture(scope="module")
def servers(model, tmp_path_factory):
    with connect(model, tmp_path_factory.mktemp("run"), options(servers=2)) as engine:
        yield engine


@pytest.fixture(scope="module")
def policy(model):
    return make_policy(model)


def move(policy: Policy) -> None:
    """One update that matters."""
    optimizer = optim.make_optimizer(policy, OptimConfig(lr=0.02))
    for param in policy.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()


def gap(policy: Policy, scores: list[list[float]]) -> float:
    return max((trainer_logp(policy, s) - torch.tensor(x)).abs().max().item() for s, x in zip(SEQUENCES, scores))  # noqa: B905


def ask(engine, prompts=PROMPTS, each: int = 3, tokens: int = 12):
    seeds = list(range(100, 100 + len(prompts)))
    return sample(engine, prompts, [each] * len(prompts), temperature=1.0, max_tokens=tokens, seeds=seeds)


def wait_for(what, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def running(client) -> float:
    """Requests that a server decodes, by its own count."""
    text = client._http.get("/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running{"))


def healthy(engine: Servers) -> bool:
    fleet = engine.fleet
    try:
        return not fleet._starting and all(s.alive and s.client.version() == fleet.known for s in fleet.own)
    except Unreachable:
        return False


def assert_whole(engine: Servers, answers, each: int, tokens: int) -> None:
    """Nothing lost, nothing twice, all of it by the weights that were asked for."""
    for found in answers:
        assert len(found) == each
        for completion in found:
            assert len(completion.token_ids) == len(completion.logp)
            assert len(completion.token_ids) == tokens or completion.finished
            assert [span.version for span in completion.versions] == [engine.version]
            assert completion.versions[0].end == len(completion.token_ids)


def test_servers_answer_as_an_engine_in_this_process_does(model, servers):
    found = ask(servers)
    assert_whole(servers, found, 3, 12)
    config = RolloutConfig(kv_cache_gib=0.25, max_sequences=16)
    with VllmEngine(model, config, dtype="float32", eos_token_id=2, max_model_len=256) as engine:
        want, scores = ask(engine), engine.score(SEQUENCES)
    distributed.start(MeshConfig())  # the engine took the process group with it
    for ours, theirs in zip(found, want, strict=True):
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-4, rtol=0)
            assert a.finished == b.finished
    for a, b in zip(servers.score(SEQUENCES), scores, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0)
    assert sample(servers, [], [], temperature=1.0, max_tokens=3, seeds=[]) == []


def test_a_sync_gives_every_server_the_new_weights(policy, servers):
    prompt = tuple(5 + i % 90 for i in range(150))  # longer than a block of the prefix cache
    ask(servers, [prompt] * 8, each=1, tokens=1)  # both servers know it
    move(policy)
    assert gap(policy, servers.score(SEQUENCES)) > 0.05
    for version in (1, 2):
        sent = servers.sync(policy, torch.float32, version)
        assert sent == len(list(hf_weights(policy)))
    for client in servers.clients:
        assert client.version() == 2
        assert gap(policy, [client.score(s, "2") for s in SEQUENCES]) < 1e-3
    answers = ask(servers, [prompt] * 8, each=2)
    assert_whole(servers, answers, 2, 12)
    for found in answers:
        for completion in found:
            want = trainer_logp(policy, prompt + completion.token_ids)[len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(completion.logp), want, atol=1e-3, rtol=0)
    assert [path.name for path in (servers.folder / "weights").iterdir()] == ["version-000002"]


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_generates_costs_nothing(servers):
    servers.metrics()
    found = []
    prompts = PROMPTS * 10
    asking = threading.Thread(target=lambda: found.extend(ask(servers, prompts, each=2, tokens=200)))
    asking.start()
    time.sleep(1.0)
    assert asking.is_alive()
    os.kill(servers.fleet.own[0].pid, signal.SIGKILL)
    asking.join(timeout=200)
    assert_whole(servers, found, 2, 200)
    wait_for(lambda: healthy(servers))
    counts = servers.metrics()
    assert counts["rollout/server_restarts"] == 1
    assert counts["rollout/asked_again"] >= 1
    assert servers.metrics()["rollout/server_restarts"] == 0  # counted once
    assert_whole(servers, ask(servers), 3, 12)


@pytest.mark.slow
def test_a_server_that_is_killed_before_an_update_comes_back_with_the_new_weights(policy, servers):
    servers.metrics()
    move(policy)
    os.kill(servers.fleet.own[1].pid, signal.SIGKILL)
    began = time.monotonic()
    servers.sync(policy, torch.float32, 3)
    assert time.monotonic() - began < 10  # nobody waits for it to start
    assert servers.metrics()["rollout/updates_missed"] == 1
    wait_for(lambda: healthy(servers))
    for client in servers.clients:
        assert gap(policy, [client.score(s, "3") for s in SEQUENCES]) < 1e-3


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_loads_comes_back_with_the_new_weights(policy, servers):
    servers.metrics()
    move(policy)
    version, killed = servers.version + 1, servers.fleet.own[0].pid
    os.kill(killed, signal.SIGSTOP)  # it has been told to load, and does not get on
    syncing = threading.Thread(target=servers.sync, args=(policy, torch.float32, version))
    syncing.start()
    wait_for(lambda: servers.clients[0] in servers.fleet._loading, 20)
    os.kill(killed, signal.SIGKILL)
    syncing.join(timeout=60)
    assert not syncing.is_alive()
    assert servers.metrics()["rollout/updates_missed"] == 1
    assert servers.clients[1].version() == version
    wait_for(lambda: healthy(servers))
    for client in servers.clients:
        assert gap(policy, [client.score(s, str(version)) for s in SEQUENCES]) < 1e-3


def test_answers_under_way_go_on_with_new_weights_and_say_so(policy, servers):
    """Each token's log-prob is that of the weights that sampled it."""
    before, found = servers.version, []
    prompt = PROMPTS[3]
    asking = threading.Thread(target=lambda: found.extend(ask(servers, [prompt] * 24, each=2, tokens=240)))
    asking.start()
    time.sleep(0.7)
    assert asking.is_alive()
    kept = {name: tensor.clone() for name, tensor in hf_weights(policy)}
    move(policy)
    servers.sync(policy, torch.float32, before + 1)
    asking.join(timeout=200)
    answers = [completion for answers in found for completion in answers]
    assert len(answers) == 48
    both = [a for a in answers if len(a.versions) == 2]
    assert both
    old = shard(
        Policy(empty_lm(servers.fleet.model, ModelConfig()), 1.0), distributed.start(MeshConfig()).params, torch.float32
    )
    load_weights(old, servers.fleet.model, torch.device("cpu"))
    with torch.no_grad():
        for name, tensor in weights_of(old).items():
            fill(tensor, kept[name])
    for answer in both:
        first, second = answer.versions
        assert (first.version, second.version) == (before, before + 1)
        assert (first.begin, first.end, second.end) == (0, second.begin, len(answer.token_ids))
        want = trainer_logp(old, prompt + answer.token_ids)[len(prompt) - 1 :][: first.end]
        torch.testing.assert_close(torch.tensor(answer.logp[: first.end]), want, atol=1e-3, rtol=0)


def test_what_nobody_wants_any_more_is_let_go_of(servers):
    ended = []

    def asks():
        try:
            ask(servers, PROMPTS * 9, each=4, tokens=240)
        except Aborted:
            ended.append(True)

    asking = threading.Thread(target=asks)
    asking.start()
    wait_for(lambda: sum(map(running, servers.clients)) > 0, 20)  # and more is on its way
    servers.abort()
    asking.join(timeout=10)
    assert ended
    wait_for(lambda: sum(map(running, servers.clients)) == 0, 5)
    assert_whole(servers, ask(servers), 3, 12)


def test_what_is_stopped_gives_back_what_it_has(policy, servers):
    """In little time, and with the log-probs of what was sampled."""
    requests = [Request(prompt, 2, tokens, 7) for prompt, tokens in zip(PROMPTS[:4], (4, 240, 240, 240), strict=True)]
    generation = servers.begin(requests, 1.0)
    done = {index for index, _ in generation.take(60)}
    assert 0 in done  # another that ended early by itself may come with it
    time.sleep(0.2)
    began = time.monotonic()
    left = generation.stop()
    assert time.monotonic() - began < 5
    assert sorted(left) == sorted({0, 1, 2, 3} - done)
    wait_for(lambda: sum(map(running, servers.clients)) == 0, 5)  # its own count lags behind
    assert all(len(answers) in (0, 2) for answers in left.values())
    cut = [(index, answer) for index, answers in left.items() for answer in answers]
    begun = [(index, answer) for index, answer in cut if answer.token_ids]  # others still waited for their turn
    assert begun
    for index, answer in begun:
        assert len(answer.token_ids) < 240
        want = trainer_logp(policy, PROMPTS[index] + answer.token_ids)[len(PROMPTS[index]) - 1 :]
        torch.testing.assert_close(torch.tensor(answer.logp), want, atol=1e-3, rtol=0)
        assert answer.versions[-1].end == len(answer.token_ids)


@pytest.mark.slow
def test_a_server_that_is_killed_while_idle_comes_back(policy, servers):
    servers.metrics()
    os.kill(servers.fleet.own[0].pid, signal.SIGKILL)
    wait_for(lambda: servers.fleet._starting, 10)
    wait_for(lambda: healthy(servers))
    assert servers.metrics()["rollout/server_restarts"] == 1
    for client in servers.clients:
        assert gap(policy, [client.score(s, "idle") for s in SEQUENCES]) < 1e-3


@pytest.mark.slow
def test_a_server_of_others_that_hangs_is_asked_nothing_and_comes_back(model, servers, policy, tmp_path):
    urls = [client.url for client in servers.clients]
    keys = {client.url: server.key for client, server in zip(servers.clients, servers.fleet.own, strict=True)}
    stopped = servers.fleet.own[0].pid
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LUFFY_API_KEY", "one for both")
        patched.setattr("luffy.rollout.servers.Client", lambda url, key, n: Client(url, keys[url], n))
        patched.setattr(servers.fleet, "_answers", lambda client: True)  # its owner does not look
        with connect(model, tmp_path, options(urls=urls, probe_s=2.0)) as other:
            assert other.version == -1  # whoever started them may have left other weights
            other.sync(policy, torch.float32, servers.version)
            os.kill(stopped, signal.SIGSTOP)
            try:
                answers = ask(other, PROMPTS * 3)
                assert_whole(other, answers, 3, 12)
                assert other.metrics()["rollout/asked_again"] >= 1
                assert [client.away for client in other.clients] == [True, False]
            finally:
                os.kill(stopped, signal.SIGCONT)
            wait_for(lambda: not other.clients[0].away, 20)
            assert_whole(other, ask(other), 3, 12)


@pytest.mark.slow
def test_a_server_that_hangs_is_replaced(servers):
    servers.metrics()
    hanging = servers.fleet.own[0].pid
    os.kill(hanging, signal.SIGSTOP)
    assert_whole(servers, ask(servers, PROMPTS * 2), 3, 12)
    wait_for(lambda: servers.fleet.own[0].pid != hanging)
    wait_for(lambda: healthy(servers))
    assert servers.metrics()["rollout/server_restarts"] == 1


def test_a_prompt_that_is_refused_is_skipped_and_counted(servers, capsys):
    servers.metrics()
    answers = ask(servers, [PROMPTS[0], tuple([5] * 300), PROMPTS[1]])
    assert [len(found) for found in answers] == [3, 0, 3]
    assert servers.metrics()["rollout/refused"] == 1
    assert "1 prompt was refused and is skipped" in capsys.readouterr().err


def test_servers_of_others_are_checked_before_they_are_trusted(model, servers, policy, tmp_path):
    key, url = servers.fleet.own[0].key, servers.clients[0].url
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LUFFY_API_KEY", key)
        with connect(model, tmp_path, options(urls=[url]), version=servers.version) as other:
            assert other.version == -1  # whoever started it may have left other weights in it
            other.sync(policy, torch.float32, servers.version)
            assert_whole(other, ask(other, each=1), 1, 12)
        for what, size in (("vocabulary", 300), ("hidden size", 128), ("blocks", 3)):
            with pytest.raises(
                UserError, match=f"its {what} is {SIZES[what]}, and the trainer's {size}; start it with"
            ):
                connect(model, tmp_path, options(urls=[url]), sizes=SIZES | {what: size})
        with pytest.MonkeyPatch.context() as other:
            other.setattr("luffy.versions.of_rollouts", lambda: {"vLLM": "0.33.0"})
            with pytest.raises(UserError, match=r"runs vLLM \d[\d.]*, and the trainer 0.33.0; install the same"):
                connect(model, tmp_path, options(urls=[url]))
        with pytest.raises(
            UserError, match=r"takes sequences of 256 tokens, and this run needs 999; .*--max-model-len 999"
        ):
            connect(model, tmp_path, options(urls=[url]), max_model_len=999)
        with pytest.raises(
            UserError, match=r"no server answers at http://127.0.0.1:1 .*; start it, or mend rollout.urls \(--urls\)"
        ):
            connect(model, tmp_path, options(urls=["http://127.0.0.1:1"]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LUFFY_API_KEY", "not the key")
        with connect(model, tmp_path, options(urls=[url]), version=servers.version) as other:
            assert ask(other, each=1) == [[]] * len(PROMPTS)  # refused, and counted
            assert other.metrics()["rollout/refused"] == len(PROMPTS)


@pytest.mark.slow
def test_what_keeps_a_server_from_starting_is_said(model, tmp_path):
    words = r"server 0 did not start: no memory is left for a KV cache; raise rollout.kv_cache_gib, .*see "
    with pytest.raises(UserError, match=words):
        connect(model, tmp_path, options(kv_cache_gib=1e-5))


CHILD = """
import sys, time
from pathlib import Path
import test_server_rollout as t
engine = t.connect(sys.argv[1], Path(sys.argv[2]), t.options())
print(engine.fleet.own[0].pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_servers_do_not_outlive_a_trainer_that_is_killed(model, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", CHILD, model, str(tmp_path)]
    trainer = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    session = int(next(line for line in trainer.stdout if line.strip().isdecimal()))
    assert len(in_session(session)) >= 2  # the server and its engine
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not in_session(session), 20)


def in_session(session: int) -> list[int]:
    """Processes of a session that are not dead yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_keys_stay_out_of_logs_and_commands(servers):
    key = servers.fleet.own[0].key
    assert key not in servers.fleet.own[0].log.read_text()
    assert key not in Path(f"/proc/{servers.fleet.own[0].pid}/cmdline").read_text()
    assert serve_arguments(["--model", "m"])[:2] == ["--host", "127.0.0.1"]
    assert "127.0.0.1" not in serve_arguments(["--model", "m", "--host", "10.0.0.7"])


class Quick:
    """A server at the boundary, which takes no time."""

    away = False

    def __init__(self) -> None:
        self.asked = 0


@pytest.mark.parametrize(("tasks", "servers"), [(8, 2), (32, 4), (64, 4)])
def test_servers_share_what_is_less_than_they_could_take(tasks, servers):
    clients = [Quick() for _ in range(servers)]

    def answer(client, task, name):
        client.asked += 1
        time.sleep(0.05)
        return [task]

    counts = Counts("rollout/asked_again")
    asking = Asking(range(tasks), answer, clients, at_once=32, trouble=lambda silence: None, counts=counts).start()
    found = {}
    while asking.waiting:
        found.update(asking.take(5))
    assert found == {task: [task] for task in range(tasks)}
    assert all(abs(client.asked - tasks / servers) <= tasks / servers / 2 for client in clients)


def test_what_is_let_go_of_while_it_begins_begins_no_more():
    """Threads take their time to start: whoever lets go knows of a generation before its first request."""
    asked = []
    engine = Servers.__new__(Servers)
    engine.version, engine._active, engine._beginning = 0, WeakSet(), threading.Lock()
    engine.config, engine.world, engine.clients = options(), SimpleNamespace(rank=0), [Quick()]

    class Slow(Asking):
        def start(self):
            engine.abort()  # as another thread would, now
            return super().start()

    def answer(client, task, name):
        asked.append(task)
        return [task]

    engine._ask = lambda tasks, ask, at_once: Slow(
        tasks, answer, engine.clients, at_once=2, trouble=lambda silence: None, counts=Counts()
    )
    generation = engine.begin([Request((1, 2), 1, 4, 7)] * 4, 1.0)
    with pytest.raises(Aborted):
        generation.take(1)
    assert asked == []


def test_one_that_hangs_keeps_letting_go_from_nobody():
    """Neither the others, nor longer than it may take."""
    freed = threading.Event()

    class Hangs(Quick):
        def abort(self, names, timeout):
            time.sleep(timeout)
            raise Unreachable

    class Obeys(Quick):
        def abort(self, names, timeout):
            freed.set()

    def answer(client, task, name):
        assert freed.wait(60) or isinstance(client, Hangs)
        if isinstance(client, Hangs):
            time.sleep(60)
        raise Cut([])

    clients = [Hangs(), Obeys()]
    asking = Asking([0, 1], answer, clients, at_once=1, trouble=lambda silence: None, counts=Counts()).start()
    time.sleep(0.3)
    began = time.monotonic()
    asking.abort()
    assert freed.is_set()
    assert time.monotonic() - began < ABORT_S + 2


def test_a_request_on_its_way_when_all_is_let_go_of_is_cut_off_once_it_is_there():
    """The server knows nothing of it at first, and it would be decoded to its end for nobody."""
    there, cut = threading.Event(), threading.Event()

    class Slow(Quick):
        def abort(self, names, timeout):
            if there.is_set():
                cut.set()

    def answer(client, task, name):
        threading.Timer(0.7, there.set).start()
        assert cut.wait(30)
        raise Cut([])

    asking = Asking([0], answer, [Slow()], at_once=1, trouble=lambda silence: None, counts=Counts()).start()
    time.sleep(0.2)
    asking.abort()
    assert cut.is_set()


def test_weights_that_a_server_is_being_started_with_stay(tmp_path):
    fleet = Fleet([], [Quick()], RolloutConfig(), Counts(), model="base", version=0, leads=True)
    fleet._bring_up_to_date = lambda client: None
    folders = [version_folder(tmp_path / "weights", version) for version in (1, 2, 3)]
    for version, folder in enumerate(folders, start=1):
        folder.mkdir(parents=True)
        fleet.hand_out(folder, version)
        if version == 1:
            fleet._starting_with[0] = str(folder)
        if version == 2:
            assert folders[0].exists()
            fleet._starting_with.clear()
    assert [folder.exists() for folder in folders] == [False, False, True]


def test_a_key_that_is_missing_is_said_for_other_machines_alone(capsys):
    warn_if_open("http://127.0.0.1:8001", None)
    warn_if_open("http://localhost:8001", None)
    warn_if_open("http://10.0.0.7:8001", "a key")
    assert capsys.readouterr().err == ""
    warn_if_open("http://10.0.0.7:8001", None)
    assert "http://10.0.0.7:8001 is on another machine and LUFFY_API_KEY is not set" in capsys.readouterr().err


VLLM_SAYS = (
    "To serve at least one request with the model's max seq len (9216), (1.26 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (0.5 GiB). Based on the available memory, the estimated maximum length is "
    "3650. Try increasing `gpu_memory_utilization` when initializing the engine."
)


def test_reasons_are_given_in_the_words_of_our_settings():
    said = explain(f"Traceback\nValueError: {VLLM_SAYS}\nRuntimeError: Engine core initialization failed.")
    assert said.startswith("one sequence of 9216 tokens needs 1.26 GiB of KV cache and there are 0.5, so 0.76 GiB are")
    assert "raise rollout.kv_cache_gib to 1.26 or more" in said
    assert "rollout.memory_fraction" in explain("ValueError: No available memory for the cache blocks. Try increasing")
    assert explain("(EngineCore pid=7) OSError: no such model\nRuntimeError: Engine core initialization failed.") == (
        "OSError: no such model"
    )
    assert explain("") == "no word"
    by_pydantic = "pydantic_core.ValidationError: 1 validation error for ParallelConfig\n"
    by_pydantic += "  Value error, World size (8) is larger. [type=value_error, input_value=1]\n"
    by_pydantic += "    For further information visit https://x"
    assert explain(by_pydantic) == "ValueError: World size (8) is larger."


def test_weights_are_written_a_block_at_a_time(policy, tmp_path):
    held = []

    def stream():
        for name, tensor in hf_weights(policy):
            held.append(len(list(tmp_path.rglob("*.safetensors"))))
            yield name, tensor

    folder = version_folder(tmp_path, 5)
    count = write_version(folder, stream(), policy.lm.config, write=True)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) == 2 + 2  # embedding, two blocks, norm
    assert held[-1] == 2  # when the last tensor was asked for, only the block before it was not on the disk yet
    assert count == len(held)
    again = shard(
        Policy(empty_lm(str(folder), ModelConfig()), 1.0), distributed.start(MeshConfig()).params, torch.float32
    )
    load_weights(again, str(folder), torch.device("cpu"))  # a model folder like any other
    for (name, one), other in zip(hf_weights(policy), dict(hf_weights(again)).values(), strict=True):
        assert torch.equal(one, other), name
    other = version_folder(tmp_path / "elsewhere", 5)
    assert write_version(other, stream(), policy.lm.config, write=False) == count  # another rank takes part
    assert not other.exists()


@pytest.mark.slow
def test_a_run_of_two_ranks_with_servers_is_a_run_without(tmp_path):
    model = make_model(tmp_path / "model")
    found = {}
    for engine, more in (("colocated", {}), ("server", {"rollout__servers": 2, "mesh__sequence": 2})):
        run = tmp_path / engine
        ranks = ["--nproc-per-node", "2"] if engine == "server" else []
        given = {"rollout__engine": engine, "train__steps": 3} | more
        done = luffy(*arguments(run, model, *ranks, **given), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = without_times(records(run))
        if engine == "server":
            assert not list(run.glob("weights/*"))
            assert sorted(path.name for path in (run / "servers").iterdir()) == ["server-0.log", "server-1.log"]
    for ours, theirs in zip(found["server"], found["colocated"], strict=True):
        for key, value in theirs.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (key, ours["step"])


def served(folder: Path) -> list[int]:
    """Servers that run for this folder's runs."""
    found = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in found if "-m luffy.rollout.serve " in line and str(folder) in line]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_whose_server_is_killed_loses_no_prompt_and_takes_none_twice(tmp_path):
    """The same prompts, each with its seed and as many answers, in a run that nobody disturbs."""
    model = make_model(tmp_path / "model")
    given = {"rollout__record": "true", "rollout__engine": "server", "rollout__servers": 2, "train__steps": 4}
    given |= {"rollout__max_tokens": 120, "eval__every": 0, "checkpoint__every": 0}

    def sampled(name: str) -> list[tuple]:
        lines = (tmp_path / name / "rollouts" / "rank-0.jsonl").read_text().splitlines()
        made = [json.loads(line) for line in lines]
        return sorted((tuple(m["prompt"]), m["seed"], len(m["answers"])) for m in made)

    for name, disturbed in (("left alone", False), ("disturbed", True)):
        command = [sys.executable, "-m", "luffy", *arguments(tmp_path / name, model, **given)]
        with (tmp_path / f"{name}.log").open("w") as log:
            run = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        if disturbed:
            wait_for((tmp_path / name / "rollouts" / "rank-0.jsonl").exists, 200)
            os.kill(served(tmp_path)[0], signal.SIGKILL)
            assert not (tmp_path / name / "result.json").exists()
        assert run.wait(timeout=240) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    assert sampled("disturbed") == sampled("left alone")
    assert len(records(tmp_path / "disturbed")) == 4
