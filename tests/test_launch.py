"""The launcher with ranks that loop as the trainer does (rank_loop.py): what ends them, who is told, what is left."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import LOOP, ROOT, end, job, no_leftovers, orphans, pids, running, steps, wait_for, watched  # noqa: F401

from luffy.cli import build_parser, main
from luffy.config_file import recipe_names
from luffy.errors import UserError
from luffy.launch import Launch, add_options, parse, stopped_notes
from luffy.rollout.server import free_port


def test_a_rank_that_is_killed_takes_the_others_down(tmp_path):
    process = job(tmp_path, 3, 1000)
    wait_for(lambda: len(steps(tmp_path)) > 1)
    began = time.monotonic()
    os.kill(pids(tmp_path)[1], signal.SIGKILL)
    err = end(process)
    assert time.monotonic() - began < 15
    assert process.returncode == 128 + signal.SIGKILL
    assert err == "luffy: rank 1 was killed by SIGKILL (the system does that when memory runs out)\n"
    assert orphans(tmp_path) == []
    assert not (tmp_path / "saved").exists()


def test_an_exception_ends_all_with_its_own_words(tmp_path):
    process = job(tmp_path, 2, 9, "bug:1:2")
    err = end(process).splitlines()
    assert process.returncode == 1
    assert err[0] == "Traceback (most recent call last):"
    assert sum("Traceback" in line for line in err) == 1
    assert err[-1] == "luffy: rank 1: IndexError: the fourth of three"
    assert not any("ChildFailedError" in line for line in err)


def test_bad_input_is_one_sentence_and_not_tried_again(tmp_path):
    process = job(tmp_path, 2, 9, "user:1:2", max_restarts=3)
    assert end(process) == "luffy: rank 1: data: rows.parquet has no column prompt\n"
    assert process.returncode == 2
    assert steps(tmp_path) == [1]


def test_a_restart_goes_on(tmp_path):
    process = job(tmp_path, 2, 4, "bug:1:3", max_restarts=1)
    err = end(process)
    assert process.returncode == 0, err
    assert err.splitlines()[-1] == "luffy: rank 1: IndexError: the fourth of three; starting all ranks again"
    assert steps(tmp_path) == [1, 2, 1, 2, 3, 4]
    assert (tmp_path / "saved").read_text() == "4"


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    process = job(tmp_path, 2, 1000, stopped_exit=75)
    wait_for(lambda: steps(tmp_path))
    (tmp_path / "slow").touch()  # longer than torch's agent would need to lose patience, were it asked
    process.send_signal(signal.SIGTERM)
    assert end(process) == ""
    assert process.returncode == 75
    assert int((tmp_path / "saved").read_text()) == steps(tmp_path)[-1]


def test_ctrl_c_saves_and_a_second_one_does_not_wait(tmp_path):
    process = job(tmp_path / "first", 2, 1000, max_restarts=2)
    wait_for(lambda: steps(tmp_path / "first"))
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    end(process)
    assert process.returncode == 130
    assert int((tmp_path / "first" / "saved").read_text()) == steps(tmp_path / "first")[-1]

    process = job(tmp_path / "second", 2, 1000, "child:0:1", "sleep:1:2")
    wait_for(lambda: steps(tmp_path / "second"))
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    end(process)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert orphans(tmp_path) == []
    assert not (tmp_path / "second" / "saved").exists()


def test_a_job_of_one_node_listens_on_loopback_only_and_does_not_outlive_its_launcher(tmp_path):
    process = job(tmp_path, 2, 1000)
    wait_for(lambda: steps(tmp_path))
    addresses = {local for pid in (process.pid, *pids(tmp_path)) for local in listening(pid)}
    assert addresses
    loopback = ("0100007F:", "00000000000000000000000001000000:")
    assert all(address.startswith(loopback) for address in addresses), addresses
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(running, pids(tmp_path))), 10)
    assert orphans(tmp_path) == []


def test_two_nodes_meet_fail_restart_and_stop_together(tmp_path):
    """The second start of ranks meets in the same store as the first: what was said there must not be heard again."""
    options = {"nodes": (2, 2), "endpoint": f"127.0.0.1:{free_port()}", "max_restarts": 1}
    nodes = [job(tmp_path, 1, 1000, "bug:1:2", node_rank=rank, **options) for rank in range(2)]
    wait_for(lambda: len(steps(tmp_path)) > 2)  # step 1, then those of the second start
    nodes[0].send_signal(signal.SIGTERM)
    said = [end(node).splitlines() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for lines in said:  # each node says whose fault it was, wherever that rank ran
        assert lines[-1] == "luffy: rank 1: IndexError: the fourth of three; starting all ranks again"
    assert steps(tmp_path, 0)[:3] == [1, 1, 2]
    assert int((tmp_path / "saved").read_text()) == steps(tmp_path, 1)[-1]


def test_torchrun_itself(tmp_path):
    """No launcher of ours: every sentence is said by a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, LOOP, str(tmp_path), "9", "user:1:2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert done.stderr.count("luffy: rank 1: data: rows.parquet has no column prompt\n") == 1


def listening(pid: int) -> set[str]:
    """Local addresses, in the kernel's hexadecimal, that a process listens on."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(entry)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1])
    return found


@pytest.mark.slow  # two launchers on one host: a minute where they do not meet
def test_slurm_script_starts_a_launcher_on_each_node_and_requeues_what_was_stopped(tmp_path):
    """The script, the parser and the launcher are the real ones; srun, scontrol and the ranks' work are stand-ins."""
    (tmp_path / "job").mkdir()
    tools = {
        "scontrol": f'[ "$1" = show ] && printf "127.0.0.1\\n127.0.0.1\\n" || echo "$@" >>{tmp_path}/scontrol.log',
        "srun": 'set -e; SLURM_NODEID=1 "$@" & one=$!; SLURM_NODEID=0 "$@" & two=$!; wait $one; wait $two',
        "python": f'shift 2; exec {sys.executable} {tmp_path}/train.py "$@"',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").write_text(f"""
import sys
from luffy.cli import build_parser
from luffy.launch import parse, start
args, rest = build_parser().parse_known_args(sys.argv[1:])
assert args.source == "quickstart" and args.resume == "auto" and rest == ["--optim.lr", "1"], (args, rest)
sys.exit(start(parse(args), [{LOOP!r}, {str(tmp_path / "job")!r}, "1000"]))
""")
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "LUFFY_RANKS": "1",
        "LUFFY_PORT": str(free_port()),
    }
    command = [str(ROOT / "scripts" / "slurm.sh"), "quickstart", "--optim.lr", "1"]
    process = watched(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, process_group=0))
    wait_for(lambda: steps(tmp_path / "job"))
    os.kill(pids(tmp_path / "job")[1], signal.SIGTERM)  # one rank alone: both nodes stop
    err = end(process)
    assert process.returncode == 0, err
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert steps(tmp_path / "job", 0) == steps(tmp_path / "job", 1)
    assert int((tmp_path / "job" / "saved").read_text()) == steps(tmp_path / "job")[-1]


def test_the_job_set_starts_the_same_job_on_every_pod():
    yaml = pytest.importorskip("yaml")
    job_set = yaml.safe_load((ROOT / "scripts" / "kubernetes.yaml").read_text())
    name, (group,) = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {"NODE_RANK": "1", "POD_IP": "10.0.0.7"}
    assert {entry["name"] for entry in container["env"]} == environment.keys()
    words = [*container["command"], *container["args"]]
    for key, value in environment.items():
        words = [word.replace(f"$({key})", value) for word in words]
    assert words[:3] == ["python", "-m", "luffy"]
    args, rest = build_parser().parse_known_args(words[3:])
    assert rest == []
    assert args.source in recipe_names()
    launch = parse(args)
    assert launch.nodes == (spec["parallelism"], spec["completions"])
    assert launch.ranks_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (launch.node_rank, launch.local_addr) == (1, "10.0.0.7")
    assert launch.endpoint == f"{name}-{group['name']}-0-0.{name}:29400"  # JobSet's name of the first pod
    rules = spec["podFailurePolicy"]["rules"]
    ignored = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "Ignore" and "onExitCodes" in rule]
    assert ignored == [[launch.stopped_exit]]


@pytest.mark.parametrize("resume", [[], ["--resume"], ["--resume", "auto"], ["--resume=auto"]])
def test_what_the_ranks_are_started_with(tmp_path, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr("luffy.launch.start", lambda launch, command: started.append((launch, command)) or 7)
    words = ["train", *resume, "quickstart", "--nproc-per-node", "2", "--run-dir", "here", "--optim.lr", "1e-5"]
    assert main(words) == 7
    [(launch, command)] = started
    assert launch == Launch(ranks_per_node=2)
    expected = ["-m", "luffy", "train", "quickstart", "--run-dir=here", "--resume", "--optim.lr", "1e-5"]
    assert command == expected
    assert main(["train", "quickstart", "--nproc-per-node", "2", "--optim.lrr", "1"]) == 2
    assert len(started) == 1  # what is wrong is known before any rank is started


def test_a_folder_with_a_run_is_not_continued_unasked(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.toml").write_text('name = "other"\n')
    monkeypatch.setattr("luffy.launch.start", lambda *_: pytest.fail("started"))
    assert main(["train", "quickstart", "--nproc-per-node", "2", "--run-dir", str(tmp_path)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def options(*arguments: str) -> Launch:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parse(parser.parse_args(arguments))


def test_only_the_notes_of_the_last_start_count(tmp_path):
    assert stopped_notes(tmp_path) == set()
    for attempt, code in ((2, ""), (9, "130"), (10, "0")):
        folder = tmp_path / "job_x" / f"attempt_{attempt}" / "1"
        folder.mkdir(parents=True)
        if code:
            (folder / "stopped").write_text(code)
    assert stopped_notes(tmp_path) == {"0"}
    (folder / "stopped").unlink()
    assert stopped_notes(tmp_path) == set()


def test_options():
    assert not options().wanted
    several = options("--nproc-per-node", "2", "--nnodes", "1:4", "--rdzv-endpoint", "a:1", "--max-restarts", "3")
    assert (several.ranks_per_node, several.nodes, several.max_restarts) == (2, (1, 4), 3)
    assert options("--nproc-per-node=2").nodes == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc-per-node", "0"], "--nproc-per-node must be a positive number"),
        (["--max-restarts", "1"], "--max-restarts needs --nproc-per-node"),
        (["--nproc-per-node", "1", "--nnodes", "2"], "--rdzv-endpoint"),
        (["--nproc-per-node", "1", "--nnodes", "4:2"], "--nnodes must be"),
        (["--nproc-per-node", "1", "--stopped-exit", "300"], "between 0 and 255"),
    ],
)
def test_options_that_make_no_job(arguments, words):
    with pytest.raises(UserError, match=words):
        options(*arguments)


def test_a_rank_of_torchrun_launches_nothing(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="give it to torchrun"):
        options("--nproc-per-node", "2")
