"""The CPU benchmarks: what they refuse, what they write, and what the report makes of it. No timing is asserted."""

import json
import subprocess
import sys

import pytest
import torch
from luffy_kernels import _native

from bench import contenders, ops, report, schedule
from bench.peers import CE, LOGP, POLICY
from luffy.dtypes import multiplies_bfloat16

SHAPE = "16x96"
CASE = ops.Case(SHAPE, ops.SEQUENCE)


def run(tmp_path, *arguments):
    out = tmp_path / "out.jsonl"
    assert (
        ops.main(["--shapes", SHAPE, "--tokens", str(ops.SEQUENCE), "--no-memory", "--out", str(out), *arguments]) == 0
    )
    first, *records = [json.loads(line) for line in out.read_text().splitlines()]
    return first["machine"], records


@pytest.mark.parametrize("mode", [LOGP, CE, POLICY])
@pytest.mark.parametrize("shares", [{}, {"active": 0.5}, {"zero": 1.0}, {"frozen": True}])
def test_contenders_compute_the_same(mode, shares):
    """Whatever rows are left out: else a peer's time would be that of another problem."""
    case = ops.Case(SHAPE, 2 * ops.SEQUENCE, mode, "fp32", **shares)
    p = case.problem()
    exact = [] if mode == LOGP else ops.exact_gradients(p, mode)
    if mode == POLICY and shares == {"zero": 1.0}:
        assert not any(g.any() for g in exact)
        return
    for impl in ("ours", "naive", "torch_lce"):
        found = ops.check(impl, ops.load(impl, mode), p, mode, exact)
        assert max(found.values()) < 1e-4


def test_lines_name_the_machine_and_hold_what_the_report_reads(tmp_path):
    machine, records = run(tmp_path, "--impl", "ours", "naive", "gemm_x3", "--active", "1", "0.5")
    assert machine["threads"] == torch.get_num_threads()
    assert {"cpu", "isa", "torch"} <= machine.keys()
    wanted = [(impl, active) for impl in ("gemm_x3", "naive", "ours") for active in (0.5, 1.0)]
    assert sorted((r["impl"], r["active"]) for r in records) == wanted
    for r in records:
        assert r["p20_ms"] <= r["ms"] <= r["p80_ms"]
        assert ("grad_error" in r) == (r["impl"] != "gemm_x3")


def test_ours_on_other_shares_takes_turns_with_ours(tmp_path):
    _, records = run(tmp_path, "--impl", "ours", *ops.SHARES, "--tokens", str(4 * ops.SEQUENCE))
    assert [r["impl"] for r in records] == ["ours", *ops.SHARES]
    assert all(r["grad_error"] <= ops.OURS_GATE["grad_error"] and r["active"] == 1 for r in records)
    for impl, share in ops.SHARES.items():
        assert ops.project(impl) == "ours"
        p = ops.replace(ops.Case(SHAPE, 4 * ops.SEQUENCE), **share).problem()
        assert (p.advantages == 0).sum() == 4 * share.get("zero", 0)


def test_where_every_advantage_is_0_nothing_is_refused(tmp_path):
    _, records = run(tmp_path, "--impl", "ours", "naive", "--zero", "1")
    assert all("ms" in r for r in records)


def test_who_fails_the_gate_is_not_timed(tmp_path, monkeypatch):
    def wrong(mode):
        return lambda p: 1.3 * contenders.naive(mode)(p)

    monkeypatch.setitem(contenders.CONTENDERS, "naive", ((POLICY,), wrong))
    _, records = run(tmp_path, "--impl", "ours", "naive")
    refused = {r["impl"]: r for r in records}["naive"]
    assert "ms" not in refused
    assert "not timed: its" in refused["why"]


def test_a_gradient_that_is_not_a_number_fails_the_gate():
    p = CASE.problem()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden, weight)
            return contenders.exact_logp(hidden, weight, p.targets, torch.float32)

        @staticmethod
        def backward(ctx, grad):
            hidden, weight = ctx.saved_tensors
            return torch.zeros_like(hidden), torch.full_like(weight, torch.nan)

    call = contenders.from_logprobs(lambda p: (Broken.apply(p.hidden, p.weight), None), CE)
    exact = [torch.full_like(x, 1e-9, dtype=torch.float32) for x in (p.hidden, p.weight)]
    with pytest.raises(ValueError, match="grad error is nan"):
        ops.check("naive", call, p, CE, exact)


def test_what_is_not_installed_is_listed(tmp_path, monkeypatch):
    def missing(mode):
        raise contenders.NotInstalledError("liger_kernel is not installed")

    monkeypatch.setitem(contenders.CONTENDERS, "liger_grpo", ((POLICY,), missing))
    _, records = run(tmp_path, "--impl", "ours", "liger_grpo")
    assert {"impl": "liger_grpo", "why": "not installed"}.items() <= next(r for r in records if "why" in r).items()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's /proc")
def test_memory_is_that_of_one_step():
    """Eager holds several [N, V] tensors; ours a chunk's exponentials."""
    case = ops.Case("16x40000", 4 * ops.SEQUENCE, POLICY)
    logits = 4 * case.tokens * 40000 / 2**20
    assert ops.peak_memory(case, "naive") > 1.5 * logits
    # of three processes the least: an allocator's pieces come on top, a MiB or two, and never off
    [alone] = zip(*(ops.measure(case, ["ours"], ops.MEMORY, threads=1) for _ in range(3)), strict=True)
    assert alone[0].keys() == {"impl", "extra_mib"}
    # without bfloat16 units the weight is widened, and so is its gradient
    widened = 0.0 if multiplies_bfloat16() else 2 * 4 * 40000 * 16 / 2**20
    assert min(measured["extra_mib"] for measured in alone) < 1.0 * logits + widened


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "100"], "--tokens must be a multiple of 128"),
        (["--active", "0"], "--active must be in (0, 1]"),
        (["--impl", "oures"], "--impl must be of"),
        (["--shapes", "llama9"], "--shapes must be HxV or one of"),
        (["--tokens", "256", "--zero", "0.75"], "--zero must be of whole sequences of 128 tokens"),
        (["--standard", "--impl", "ours"], "--standard must be without"),
    ],
)
def test_wrong_arguments_are_named(arguments, text, capsys):
    with pytest.raises(SystemExit) as stop:
        ops.main(arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def records(**changes):
    made = [{"machine": {"cpu": "A CPU", "isa": ["avx2"], "threads": 2, "torch": "2.13"}}]
    for shape, tokens in report.MAIN:
        for mode in (POLICY, LOGP):
            for impl, ms in {"ours": 100.0, "naive": 90.0, "gemm_x3": 80.0, "gemm_x1": 30.0}.items():
                row = {"shape": shape, "tokens": tokens, "mode": mode, "impl": impl, "ms": ms, "logp_error": 1e-6}
                made.append(report.PLAIN | row | {"extra_mib": 10.0, "p20_ms": 80.0, "p80_ms": 95.0} | changes)
    absent = {"shape": "16x96", "tokens": 128, "mode": POLICY, "impl": "trl_logp", "why": "not installed"}
    made.append(report.PLAIN | absent)
    return made


def test_the_table_shows_rows_where_a_peer_wins_and_what_is_missing(tmp_path):
    path = tmp_path / "ops.jsonl"
    path.write_text("\n".join(map(json.dumps, records())))
    results = report.Results(path)
    table = "\n".join(report.ops_table(results))
    assert "| eager, fp32 softmax | 90 | 0.90 | 10 |" in table
    assert "A CPU (avx2), 2 threads" in table
    ratios = "\n".join(report.ratios(results))
    assert "| eager (fp32 softmax) / ours | 0.90 | 0.90 |" in ratios
    assert "| Liger GRPO / ours | - | - |" in ratios
    every = "\n".join(report.everything(results))
    assert f"| {report.MAIN[0][0]}, 2,048, policy, bf16 | eager, fp32 softmax | 90 | 80-95 | 0.90 |" in every
    assert "| TRL chunked log-prob + its loss | not installed |" in every


def test_markers_are_replaced_and_the_rest_kept(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- ops -->\nold\n<!-- /ops -->\nafter\n")
    report.put(path, "ops", "new")
    assert path.read_text() == "before\n<!-- ops -->\nnew\n<!-- /ops -->\nafter\n"


@pytest.mark.skipif(_native.error is not None, reason="the compiled library is not built")
def test_the_plan_covers_a_chunk_and_keeps_many_cores_busy():
    for width, vocabulary in ((576, 49152), (4096, 128256), (66, 1003)):
        for threads in (1, 2, 64):
            first, *rest = list(schedule.regions(1024, width, vocabulary, threads))
            logit = 2 * width / schedule.RATE + schedule.LOGIT
            assert sum(first) == pytest.approx(1024 * vocabulary * logit)
            products = 2 * 2 * 1024 * vocabulary * width / schedule.RATE
            assert sum(map(sum, rest)) >= products
    assert schedule.makespan([1.0] * 4, 2) == 2
    assert schedule.makespan([3.0, 1.0, 1.0, 1.0], 2) == 3
    for shape in ("smollm2-135m", "llama3-8b"):
        hidden, vocabulary = schedule.roofline.shape_of("shape", shape)
        assert schedule.efficiency(1024, hidden, vocabulary, 2) > 0.95
        assert schedule.efficiency(1024, hidden, vocabulary, 64) > 0.7


@pytest.mark.slow
def test_micro_benchmarks_are_not_collected_by_default():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ops.ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "test_cpp_rows" in done.stdout
    assert "bench_kernels" not in done.stdout
