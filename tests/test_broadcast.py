"""Weights straight into real servers' memory, over gloo here and NCCL where there are GPUs: the right ones, a layer at
a time, and what becomes of them when a server dies half-way."""

import os
import signal
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_server_rollout import ask, assert_whole, connect, gap, healthy, move, options, wait_for
from test_weight_sync import SEQUENCES
from tiny import make_model, make_policy

from luffy import weights
from luffy.errors import UserError
from luffy.rollout import broadcast
from luffy.rollout.broadcast import Broadcast, Failed
from luffy.rollout.client import Unreachable
from luffy.rollout.transport import layers
from luffy.weights import described, hf_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_model(tmp_path_factory.mktemp("m") / "model"))


@pytest.fixture(scope="module")
def servers(model, tmp_path_factory):
    with connect(
        model, tmp_path_factory.mktemp("run"), options(servers=2, transport="broadcast", probe_s=30.0)
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def policy(model):
    return make_policy(model)


def everywhere(policy, servers) -> float:
    return max(gap(policy, [c.score(s, str(servers.version)) for s in SEQUENCES]) for c in servers.clients)


def test_every_server_gets_the_new_weights_without_a_file(policy, servers):
    for version in (1, 2):
        move(policy)
        assert everywhere(policy, servers) > 0.05
        assert servers.sync(policy, torch.float32, version) == len(list(hf_weights(policy)))
        assert everywhere(policy, servers) < 1e-3
        assert [client.version() for client in servers.clients] == [version] * 2
    assert not (servers.folder / "weights").exists()
    assert len({client.group() for client in servers.clients}) == 1
    assert_whole(servers, ask(servers), 3, 12)
    assert servers.metrics()["rollout/broadcasts_failed"] == 0


@pytest.mark.slow
def test_a_server_that_dies_in_a_broadcast_costs_one_version_as_files(policy, servers, monkeypatch, capsys):
    version = servers.version + 1
    taken = 0

    def counted(policy, dtype=None):
        nonlocal taken
        for named in hf_weights(policy, dtype):
            taken += 1
            yield named

    sending = servers._broadcast._put_all

    def dies(stream):
        def until(stream):
            for number, named in enumerate(stream):
                if number == 3:  # q and k of the first layer are on their way, v is not
                    time.sleep(1.0)
                    os.kill(servers.fleet.own[0].pid, signal.SIGKILL)
                yield named

        sending(until(stream))

    monkeypatch.setattr("luffy.rollout.servers.hf_weights", counted)
    monkeypatch.setattr(servers._broadcast, "_put_all", dies)
    move(policy)
    servers.sync(policy, torch.float32, version)
    assert taken == 2 * len(list(hf_weights(policy)))  # a rank that only gathers would not have waited
    monkeypatch.undo()
    assert servers.metrics()["rollout/broadcasts_failed"] == 1
    assert "weights could not be broadcast" in capsys.readouterr().err
    assert gap(policy, [servers.clients[1].score(s, "left") for s in SEQUENCES]) < 1e-3  # all of them, q to v
    assert_whole(servers, ask(servers), 3, 12)  # whoever is left answers, by the new weights
    wait_for(lambda: healthy(servers))
    assert everywhere(policy, servers) < 1e-3
    move(policy)
    servers.sync(policy, torch.float32, version + 1)  # with a new group
    assert servers.metrics()["rollout/broadcasts_failed"] == 0
    assert everywhere(policy, servers) < 1e-3


@pytest.mark.slow
def test_whoever_was_started_again_is_asked_nothing_before_the_next_version(policy, servers):
    move(policy)
    servers.sync(policy, torch.float32, servers.version + 1)
    os.kill(servers.fleet.own[1].pid, signal.SIGKILL)
    wait_for(lambda: servers.metrics()["rollout/server_restarts"] == 1)
    wait_for(lambda: servers.fleet.own[1].client.ready())
    assert_whole(servers, ask(servers), 3, 12)  # all of it by the newest weights
    with pytest.raises(AssertionError):
        assert everywhere(policy, servers) < 1e-3
    servers.sync(policy, torch.float32, servers.version + 1)
    assert everywhere(policy, servers) < 1e-3


class Deaf:
    """A server at the boundary: what it is told, and what it may refuse."""

    def __init__(self, workers: int, refuses: str = "") -> None:
        self.size, self.refuses, self.told, self.name = workers, refuses, {}, None

    def workers(self):
        return self.size

    def group(self):
        return self.name

    def __getattr__(self, what):
        if what not in ("join", "pause", "start_update", "receive", "finish_update", "resume", "set_version"):
            raise AttributeError(what)

        def call(*given):
            if what == self.refuses:
                raise Unreachable(f"no {what}")
            self.told[what] = given[0] if given else None
            if what == "join":
                self.name = given[0]["name"]
            return []

        return call


def fake(clients, monkeypatch, size: list) -> Broadcast:
    sending = Broadcast(clients, torch.device("cpu"), "127.0.0.1", silence_s=1.0, timeout_s=2.0)
    group = SimpleNamespace(broadcast=lambda tensor, root: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(sending, "_join", lambda listening, port, count: size.append(count) or group)
    monkeypatch.setattr(broadcast.Client, "pause", lambda c: c.told.setdefault("pause"))
    return sending


def patched(monkeypatch):
    """The methods that are called through the class reach the fakes."""
    for name in ("pause", "start_update", "resume"):
        monkeypatch.setattr(broadcast.Client, name, lambda client, name=name: getattr(client, name)())


def test_ranks_of_servers_follow_each_other(policy, monkeypatch):
    clients, sizes = [Deaf(2), Deaf(1), Deaf(4)], []
    sending = fake(clients, monkeypatch, sizes)
    patched(monkeypatch)
    names = described(policy, torch.bfloat16)
    for _ in range(2):
        sending.send(hf_weights(policy, torch.bfloat16), names, 3)
    assert sizes == [8]  # joined once
    assert [client.told["join"]["rank_offset"] for client in clients] == [1, 3, 4]
    assert {client.told["join"]["world_size"] for client in clients} == {8}
    told = clients[0].told["receive"]
    sent = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in hf_weights(policy, torch.bfloat16)]
    assert [(n, f"torch.{t}", s) for n, t, s in zip(*told.values(), strict=True)] == sent
    assert clients[2].told["finish_update"] == 3


@pytest.mark.parametrize("refuses", ["join", "receive"])
def test_a_server_that_refuses_ends_the_broadcast_and_not_the_gathering(policy, monkeypatch, refuses):
    clients = [Deaf(1), Deaf(1, refuses)]
    sending = fake(clients, monkeypatch, [])
    patched(monkeypatch)
    stream = hf_weights(policy, torch.float32)
    with pytest.raises(Failed, match=f"no {refuses}"):
        sending.send(stream, described(policy, torch.float32), 3)
    assert next(stream, None) is None
    for client in clients:  # nobody goes on with a part of the weights under the name of a version
        assert client.told["set_version"] == -1
        assert "resume" not in client.told


def test_an_error_without_words_is_one_too(policy, monkeypatch):
    sending = fake([Deaf(1)], monkeypatch, [])
    patched(monkeypatch)

    def ends(weights):
        raise EOFError

    monkeypatch.setattr(sending, "_put", ends)
    with pytest.raises(Failed, match="EOFError"):
        sending.send(hf_weights(policy, torch.float32), described(policy, torch.float32), 3)


def test_an_address_of_another_machine_is_refused(policy):
    sending = Broadcast([Deaf(1)], torch.device("cpu"), "192.0.2.1", silence_s=1.0, timeout_s=2.0)
    stream = hf_weights(policy, torch.float32)
    with pytest.raises(UserError, match=r"rollout.address: 192.0.2.1 is no address of this machine"):
        sending.send(stream, described(policy, torch.float32), 3)
    assert next(stream, None) is None  # the other ranks were not left waiting


def test_a_collective_that_never_ends_is_given_up(policy, monkeypatch):
    sending = fake([Deaf(1)], monkeypatch, [])
    patched(monkeypatch)
    monkeypatch.setattr(sending, "_put", lambda weights: torch.multiprocessing.Event().wait(30))
    with pytest.raises(UserError, match="a broadcast of weights hangs.*rollout.transport = files"):
        sending.send(hf_weights(policy, torch.float32), described(policy, torch.float32), 3)


def test_a_source_holds_no_more_than_two_layers_and_the_largest_tensor(policy, monkeypatch):
    alive, peak = 0, 0
    gather = weights.full

    def counted(tensor):
        nonlocal alive, peak
        whole = gather(tensor).clone()  # what ranks gather is memory of its own
        size = whole.nbytes
        alive += size
        peak = max(peak, alive)

        def gone():
            nonlocal alive
            alive -= size

        weakref.finalize(whole, gone)
        return whole

    monkeypatch.setattr(weights, "full", counted)
    sizes = {name: tensor.nbytes for name, tensor in hf_weights(policy, torch.bfloat16)}
    peak = alive = 0
    for layer in layers(hf_weights(policy, torch.bfloat16)):
        for _ in layer:
            pass
    del layer, _
    blocks = [sum(size for name, size in sizes.items() if f"layers.{n}." in name) for n in range(2)]
    assert 0 < peak <= max(sizes.values()) + 2 * max(blocks)
    assert peak < sum(sizes.values())
    assert alive == 0
