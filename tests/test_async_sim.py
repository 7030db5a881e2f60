"""The model of trainer and servers against what can be worked out by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest
from tiny import ROOT

from bench import async_sim
from bench.async_sim import computed, log_normal
from bench.pipeline import Rates, Simulation
from luffy.shapes import KNOWN

RATES = Rates(decode=0.01, sequence=0.0, prompt=0.0, update=5.0, token=0.0, sync=0.5, verify=0.25, slots=1000)


def simulate(rates=RATES, length=100, steps=20, **given):
    options = {"servers": 1, "ahead": 0, "prompts": 4, "rows": 2} | given
    lengths = length if callable(length) else lambda rng: length
    simulation = Simulation(rates, lengths, **options)
    return simulation, simulation.run(steps)


def test_in_turn_a_step_is_the_sum_of_its_parts():
    _, found = simulate()
    assert found.seconds == pytest.approx(0.5 + 100 * 0.01 + 0.25 + 5.0)
    assert found.trainer == pytest.approx(5.0 / 6.75)
    assert found.staleness == 0


@pytest.mark.parametrize("ahead", [1, 2])
def test_ahead_a_step_is_the_longer_of_the_two(ahead):
    _, found = simulate(ahead=ahead)
    assert found.seconds == pytest.approx(5.0)
    assert found.trainer == pytest.approx(1.0)
    assert ahead - 0.2 < found.staleness <= ahead  # all but the first steps
    _, found = simulate(length=900, ahead=ahead)  # 9 s of decoding, half a second of pause, a quarter of verdicts
    assert found.seconds == pytest.approx(9.75)
    assert found.trainer == pytest.approx(5.0 / 9.75)
    assert found.servers == pytest.approx(9.0 / 9.75, rel=0.03)


def test_sequences_slow_each_other_down_and_servers_share_them():
    rates = replace(RATES, sequence=0.001)  # 8 sequences: 18 ms a token
    _, one = simulate(rates)
    _, two = simulate(rates, servers=2)
    assert one.seconds == pytest.approx(5.75 + 100 * 0.018)
    assert two.seconds == pytest.approx(5.75 + 100 * 0.014)
    _, waves = simulate(replace(RATES, slots=4))  # two prompts at a time
    assert waves.seconds == pytest.approx(5.75 + 2 * 1.0)
    _, prompts = simulate(replace(RATES, prompt=0.1))
    assert prompts.seconds == pytest.approx(5.75 + 1.0 + 4 * 0.1)
    _, tokens = simulate(replace(RATES, token=0.001))
    assert tokens.seconds == pytest.approx(6.75 + 8 * 100 * 0.001)


def test_what_is_cut_off_is_carried_on_and_nothing_is_lost():
    lengths = log_normal(100, 1.0, 2000)
    _, plain = simulate(length=lengths, prompts=16, rows=4)
    simulation, found = simulate(length=lengths, prompts=16, rows=4, oversample=1.5)
    assert found.seconds < 0.97 * plain.seconds
    assert found.staleness > 0
    for groups in simulation._batches.values():
        assert len(groups) == 16
    trained = [id(group) for groups in simulation._batches.values() for group in groups]
    assert len(trained) == len(set(trained))
    rates = replace(RATES, verify=0.0)
    simulation, _ = simulate(rates, length=lengths, prompts=16, rows=4, oversample=1.5)
    # every token of a trained group was sampled once, whatever it was cut into
    drawn = {}
    fresh = Simulation._fresh
    again = Simulation(rates, lengths, servers=1, ahead=0, prompts=16, rows=4, oversample=1.5)
    with pytest.MonkeyPatch.context() as patched:

        def noted(self):
            group = fresh(self)
            drawn[id(group)] = group, sum(group.left)
            return group

        patched.setattr(Simulation, "_fresh", noted)
        again.run(20)
    for groups in again._batches.values():
        for group in groups:
            assert sum(group.tokens.values()) == pytest.approx(drawn[id(group)][1])


def test_rates_of_gpus_are_those_of_their_data_sheets():
    rates = computed(KNOWN["qwen2.5-7b"], "h100", trainers=4, parallel=1, prompt=200, mean=3000, slots=256)
    assert rates.decode == pytest.approx(2 * 7.6e9 / (0.6 * 3.35e12), rel=0.02)
    assert rates.update == pytest.approx(28 * 7.6e9 / 4 / (0.6 * 3.35e12), rel=0.02)
    twice = computed(KNOWN["qwen2.5-7b"], "h100", trainers=8, parallel=2, prompt=200, mean=3000, slots=256)
    assert twice.decode == pytest.approx(rates.decode / 2)
    assert twice.token == pytest.approx(rates.token / 2)


def test_the_command_plans_and_draws(tmp_path):
    out = tmp_path / "plan.png"
    command = [sys.executable, "-m", "bench.async_sim", "--gpus", "8", "--prompts", "32", "--ahead", "0", "1"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[1].startswith("qwen2.5-7b, 8 x h100: 32 prompts x 8 answers")
    seconds = [float(line.split()[3]) for line in lines[3:5]]
    assert seconds[1] < seconds[0]
    assert out.read_bytes()[:4] == b"\x89PNG"
    done = subprocess.run([*command, "--model", "qwen2.5-72b"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "nothing fits: 73e9 parameters need more GPUs of h100" in done.stdout
    assert async_sim.STEPS >= 8
