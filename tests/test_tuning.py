"""The tuning table and the search for its rows, with an injected timer: no device needed."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from luffy_kernels._triton import search, tuning

CPU = torch.device("cpu")
TINY = ((16, 64, 16, 4, 1), (32, 32, 16, 4, 1))


@pytest.fixture
def table(monkeypatch):
    """A copy of the table that a search may write to, and tiny sizes."""
    copy = dict(tuning.TABLE)
    monkeypatch.setattr(tuning, "TABLE", copy)
    monkeypatch.setattr(search, "ROWS", dict.fromkeys(search.ROWS, 20))
    monkeypatch.setattr(search, "VOCABULARY", 100)
    monkeypatch.setattr(search, "BLOCKS", ((32, 4), (64, 4)))
    monkeypatch.setattr(search, "TILES", dict.fromkeys(search.TILES, TINY))
    return copy


def parsed(line):
    """A printed row, read in the table's own syntax."""
    return eval(f"{{{line}}}", {"row": tuning.row, "tile": tuning.tile})


def timer(times):
    """Runs what it is given, and says that it took the next of these times."""
    waiting = iter(times)

    def measure(launch):
        launch()
        return next(waiting, 9.0)

    return measure


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["rows", "logprobs", "logprobs_backward"])
def test_every_architecture_has_a_row(arch, kernel):
    for operand in (torch.bfloat16, torch.float16, torch.float32):
        buckets = ("V131072",) if kernel == "rows" else tuning.tile_buckets(operand, 4096)
        assert tuning.lookup(kernel, arch, *buckets)["num_warps"] in (4, 8, 16)


def test_unknown_architectures_take_their_nearest_relative():
    near = {(7, 5): "sm_86", (8, 0): "sm_80", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90"}
    near |= {(10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120", (13, 0): "sm_120"}
    assert {x: tuning.nvidia_arch(*x) for x in near} == near
    assert tuning.amd_arch("gfx942:sramecc+:xnack-") == "gfx942"
    assert tuning.amd_arch("gfx950:sramecc+:xnack-") == "gfx950"
    assert tuning.amd_arch("gfx90a") == "gfx942"
    assert tuning.arch(CPU) == "interpreter"


def test_a_row_of_a_bucket_comes_before_the_general_one(table):
    table["logprobs", "sm_90", "16 H4096"] = tuning.tile(64, 64, 64, 4, 2, split=8)
    buckets = tuning.tile_buckets(torch.bfloat16, 4000)
    assert buckets == ("16 H4096", "16")
    assert tuning.lookup("logprobs", "sm_90", *buckets)["BLOCK_M"] == 64
    assert tuning.lookup("logprobs", "sm_90", "16 H2048", "16")["BLOCK_M"] != 64


def test_blocks_do_not_exceed_a_small_vocabulary():
    assert tuning.row_config("rows", CPU, 48)["BLOCK"] == 64
    assert tuning.row_config("rows", CPU, 4096)["BLOCK"] == 128


@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["logprobs", "logprobs_backward"])
def test_a_search_keeps_and_prints_the_fastest_tile(table, capsys, kernel, operand):
    fastest = search.tile(kernel, CPU, operand, 48, timer([3.0, 2.0, 1.0, 1.5]))
    key = (kernel, "interpreter", f"{8 * operand.itemsize} H64")
    assert table[key] == fastest == tuning.tile_config(kernel, CPU, operand, 48)
    assert fastest == (tuning.tile(*TINY[0], split=16) if kernel == "logprobs" else tuning.tile(*TINY[1]))
    assert parsed(capsys.readouterr().err) == {key: fastest}


def test_a_search_keeps_and_prints_the_fastest_row(table, capsys):
    fastest = search.row("rows", CPU, 96, timer([3.0, 2.0, 1.0]))
    assert fastest == tuning.row(64, 4) == table["rows", "interpreter", "V128"]
    assert parsed(capsys.readouterr().err) == {("rows", "interpreter", "V128"): fastest}


def test_a_candidate_that_does_not_run_is_skipped(capsys):
    def launch(config):
        if config["BLOCK"] == 1:
            raise RuntimeError("out of resources")
        return lambda: None

    assert search.best(iter([tuning.row(1, 4), tuning.row(2, 4)]), launch, lambda _: 1.0) == tuning.row(2, 4)
    assert "does not run: out of resources" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no candidate"):
        search.best(iter([tuning.row(1, 4)]), launch, lambda _: 1.0)


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_the_variable_decides_and_the_interpreter_never_searches(table, monkeypatch, value):
    monkeypatch.delenv("LUFFY_KERNELS_TUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("LUFFY_KERNELS_TUNE", value)
    asked = []
    monkeypatch.setattr(search, "row", lambda *x: asked.append(x))
    monkeypatch.setattr(search, "tile", lambda *x: asked.append(x))
    tuning.row_config("rows", CPU, 96)
    tuning.tile_config("logprobs", CPU, torch.bfloat16, 48)
    assert asked == []
    monkeypatch.setattr(tuning, "arch", lambda device: "sm_90")
    tuning.row_config("rows", CPU, 96)
    tuning.tile_config("logprobs", CPU, torch.bfloat16, 48)
    assert len(asked) == (2 if value == "1" else 0)
    table["rows", "sm_90", "V128"] = tuning.row(64, 4)  # has its own row: nothing to search
    tuning.row_config("rows", CPU, 96)
    assert len(asked) == (2 if value == "1" else 0)


def test_a_line_of_the_source_reads_back_as_it_prints():
    source = Path(tuning.__file__).read_text(encoding="utf-8").splitlines()
    for key, config in tuning.TABLE.items():
        line = search.table_line(key, config)
        assert line in source
        assert parsed(line) == {key: config}
