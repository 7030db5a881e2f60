"""The roofline: numbers derived by hand, what each algorithm may skip, published times, and the command itself."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import roofline
from bench.peers import ALGORITHMS, MODES, Algorithm, Work, find
from bench.roofline import GPUS, Cost, cost, main

ROOT = Path(__file__).resolve().parent.parent
H, V, N = 4096, 128256, 8192  # llama3-8b
H100 = GPUS["H100"]
# (name, TFLOP of a GEMM, ms of 1, 3 and 4 GEMMs) for 8,192 tokens at 700 TFLOP/s, worked out apart from this code.
BARE = [
    ("llama2-7b", 2.15, 3.1, 9.2, 12.3),
    ("llama3-8b", 8.61, 12.3, 36.9, 49.2),
    ("qwen2.5-7b", 8.93, 12.8, 38.3, 51.0),
    ("qwen3-0.6b", 2.55, 3.6, 10.9, 14.6),
    ("gemma2-2b", 9.66, 13.8, 41.4, 55.2),
    ("qwen3.5-h2048", 8.33, 11.9, 35.7, 47.6),
    ("deepseek-v3", 15.18, 21.7, 65.1, 86.8),
]
# Times in ms that projects published, as (implementation, mode, H x V, tokens, ms) by device.
PUBLISHED = {
    "NVIDIA H100 80GB HBM3": [
        ("liger_flsce", "logp", "4096x131072", 8192, 12.25),  # liger#1370, as the next seven
        ("liger_flsce", "ce", "4096x131072", 8192, 50.39),
        ("liger_flsce", "ce", "4096x131072", 16384, 104.8),
        ("liger_flsce", "ce", "4096x131072", 32768, 211.0),
        ("verl_torch", "policy", "4096x131072", 8192, 128.8),
        ("verl_torch", "policy", "4096x131072", 32768, 508.0),
        ("verl_torch", "logp_entropy", "4096x131072", 8192, 165.6),
        ("verl_torch", "logp_entropy", "4096x131072", 32768, 656.0),
        ("naive", "ce", "4096x151936", 8192, 59.0),  # trl#7244, as the next
        ("trl_chunked_nll", "ce", "4096x151936", 8192, 167.0),
    ],
    "NVIDIA H200": [  # liger#1356
        *(("liger_flce_cute", "ce", "4096x128256", n, ms) for n, ms in [(1024, 4.78), (4096, 16.7), (16384, 73.7)]),
        *(("quack", "ce", "4096x128256", n, ms) for n, ms in [(1024, 4.11), (4096, 16.8), (16384, 73.7)]),
    ],
    "NVIDIA B200": [  # liger#1339
        ("liger_flce_cute", "ce", "4096x128256", 8192, 17.5),
        ("quack", "ce", "4096x128256", 8192, 17.3),
    ],
}


def algorithm(impl: str, mode: str) -> Algorithm:
    found = find(impl, mode)
    assert found is not None
    return found


def costs(impl: str, mode: str, tokens: int = N, frozen: bool = False, active: float = 1.0) -> Cost:
    return cost(algorithm(impl, mode), Work(H, V, tokens, mode, frozen, active))


def gemms(impl: str, mode: str, frozen: bool = False, active: float = 1.0) -> float:
    return costs(impl, mode, frozen=frozen, active=active).gemms(Work(H, V, N, mode))


def written(tmp_path: Path, content: object) -> str:
    path = tmp_path / "measured.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(("name", "tflop", "one", "three", "four"), BARE)
def test_bare_gemms_take_what_2nhv_says(name, tflop, one, three, four):
    hidden, vocabulary = roofline.SHAPES[name]
    assert 2 * N * hidden * vocabulary / 1e12 == pytest.approx(tflop, abs=0.006)
    for mode, count, ms in (("logp", 1, one), ("ce", 3, three), ("policy", 3, three), ("logp_entropy", 4, four)):
        c = cost(algorithm("ours", mode), Work(hidden, vocabulary, N, mode))
        alone = 1e3 * sum(kernel._replace(bytes=0).seconds(H100, tf32=False) for kernel in c.kernels)
        assert alone == pytest.approx(ms, abs=0.1)
        assert alone == pytest.approx(count * 2 * N * hidden * vocabulary / 700e9, rel=0.002)
        assert c.ms(H100) > alone or mode == "logp"


def test_counts_of_gemms():
    assert (gemms("ours", "logp"), gemms("ours", "logp_entropy")) == (pytest.approx(1), pytest.approx(4))
    assert (gemms("ours", "ce"), gemms("ours", "policy")) == (pytest.approx(3), pytest.approx(3))
    assert gemms("naive", "policy") == gemms("quack", "ce") == pytest.approx(3)
    for impl in ("liger_grpo", "liger_flce", "liger_flsce", "cce", "verl_triton", "verl_torch", "trl_logp", "prime_rl"):
        assert gemms(impl, "policy") == pytest.approx(4), impl


def test_half_the_rows_cut_exactly_the_backward_gemms():
    assert gemms("ours", "policy", active=0.5) == pytest.approx(1 + 2 / 2)
    assert gemms("ours", "logp_entropy", active=0.5) == pytest.approx(1 + 3 / 2)
    assert gemms("ours", "policy", frozen=True, active=0.25) == pytest.approx(1 + 1 / 4)
    whole, half = ({k.name: k.launches * k.flop for k in costs("ours", "policy", active=a).kernels} for a in (1, 0.5))
    assert {name: half[name] / whole[name] for name in whole if whole[name]} == {"logits": 1, "dx": 0.5, "dw": 0.5}


def test_ignored_rows_enter_no_gemm_of_those_that_drop_them():
    assert gemms("ours", "ce", active=0.5) == pytest.approx(1.5)
    assert gemms("cce", "ce", active=0.5) == pytest.approx(2)
    assert gemms("quack", "ce", active=0.5) == pytest.approx(3)


def test_only_ours_profits_from_rows_without_a_coefficient():
    quicker = {
        a.impl
        for a, mode in itertools.product(ALGORITHMS, ("logp_entropy", "policy"))
        if mode in a.modes and costs(a.impl, mode, active=0.5).ms(H100) < costs(a.impl, mode).ms(H100)
    }
    assert quicker == {"ours"}


def test_a_frozen_head_saves_one_gemm_where_it_is_skipped():
    for impl in ("ours", "naive", "cce"):
        assert gemms(impl, "policy", frozen=True) == pytest.approx(gemms(impl, "policy") - 1)
        assert costs(impl, "policy", frozen=True).gradients == 2 * N * H
    assert gemms("liger_grpo", "policy", frozen=True) == pytest.approx(4)


def test_dw_is_read_and_written_once_per_chunk():
    (dw,) = (kernel for kernel in costs("ours", "policy").kernels if kernel.name == "dw")
    assert dw.launches == 4  # 1 GiB holds 2,093 rows of fp32 logits
    assert dw.bytes == pytest.approx(8 * V * H + 2 * 2048 * V + 2 * 2048 * H)
    (logits,) = (kernel for kernel in costs("ours", "policy").kernels if kernel.name == "logits")
    assert logits.bytes == pytest.approx(2 * V * H + 2 * 2048 * H + 4 * 2048 * V)
    once = sum(k.launches * k.bytes for k in costs("ours", "logp_entropy").kernels if k.name == "dw")
    assert once == pytest.approx(2 * V * H + 2 * N * V + 2 * 2 * N * H)  # two vocabulary slices, hidden read for each


def test_row_kernels_of_ours_move_ten_bytes_per_logit():
    passes = sum(k.launches * k.bytes for k in costs("ours", "ce").kernels if k.name.endswith("ward passes"))
    assert passes == pytest.approx((4 + 4 + 2) * N * V)


def test_a_bandwidth_bound_kernel_takes_its_bytes():
    kernel = roofline.Kernel("pass", 2, 0, 3.35e12 * 0.9)
    assert kernel.seconds(H100, tf32=False) == pytest.approx(2)


def test_fp32_gemms_are_slower_than_ours():
    for impl in ("liger_grpo", "nemo_rl"):
        c = costs(impl, "policy")
        assert c.ms(H100) > 2 * (2 * N * H * V) / (67e9 * 0.708) > 5 * costs("ours", "policy").ms(H100)
        assert costs("ours", "policy").ms(H100) < c.ms(H100, tf32=True) < c.ms(H100) / 2
    assert costs("fla", "ce").ms(H100) > costs("ours", "ce").ms(H100)


def test_every_cost_is_positive_and_grows_with_the_tokens():
    for a in ALGORITHMS:
        for mode, gpu in itertools.product(a.modes, GPUS.values()):
            per_n = [costs(a.impl, mode, tokens) for tokens in (1, 1024, 4096, 8192, 16384, 65536)]
            for less, more in itertools.pairwise(per_n):
                assert 0 < less.traffic(gemm=True) < more.traffic(gemm=True), (a.impl, mode)
                assert 0 <= less.traffic(gemm=False) <= more.traffic(gemm=False), (a.impl, mode)
                assert 0 < less.ms(gpu) < more.ms(gpu), (a.impl, mode)
            assert all(kernel.bytes >= 0 and kernel.flop >= 0 for c in per_n for kernel in c.kernels)
            assert per_n[0].extra >= 0


def test_memory():
    assert costs("ours", "policy").extra == 4 * 2048 * V + 4 * V * H  # a chunk of logits, dW in fp32
    assert costs("ours", "policy", frozen=True).extra == 4 * 2048 * V
    assert costs("ours", "logp").extra < 8 << 20
    assert costs("naive", "policy").extra == 14 * N * V
    assert not costs("naive", "policy", 65536).fits(Work(H, V, 65536, "policy"), H100)
    assert costs("ours", "policy", 65536).fits(Work(H, V, 65536, "policy"), H100)


def test_no_two_rows_claim_the_same_mode_of_an_implementation():
    claims = [(a.impl, mode) for a in ALGORITHMS for mode in a.modes]
    assert len(claims) == len(set(claims))
    assert {mode for _, mode in claims} == set(MODES)
    assert {gpu for a in ALGORITHMS for gpu in a.gpus} == set(GPUS)
    assert {word for a in ALGORITHMS for word in f"{a.skips} {a.fp32}".split()} == {"dw", "dx", "ignored", "zero"}


@pytest.mark.parametrize("device", PUBLISHED)
def test_published_times_are_near_the_computed_ones(device, tmp_path, capsys):
    keys = ("impl", "mode", "shape", "tokens", "ms")
    results = [dict(zip(keys, values, strict=True)) for values in PUBLISHED[device]]
    main(["--measured", written(tmp_path, {"device": device, "results": results})])
    out = capsys.readouterr().out
    assert "SLOW " not in out.split("ratio      ")[1]
    assert "FAST " not in out.split("ratio      ")[1]
    assert out.count(" ok ") == len(results)


def test_measured_flags_what_is_slow_and_passes_what_is_not(tmp_path, capsys):
    good = {"op": "linear_policy_loss", "impl": "ours", "shape": "llama3-8b", "tokens": N, "mode": "policy", "ms": 45.0}
    slow = good | {"ms": 70.0, "peak_mib": 5100.5}
    absurd = {"impl": "ours", "H": H, "V": V, "tokens": N, "mode": "policy", "ms": 9.0, "head": "frozen", "active": 0.5}
    main(["--measured", written(tmp_path, {"device": "NVIDIA H100 80GB HBM3", "results": [good, slow, absurd]})])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("computed") for line in lines)
    assert [flag for line in lines[-3:] for flag in ("ok", "SLOW", "FAST") if f" {flag} " in line] == [
        "ok",
        "SLOW",
        "FAST",
    ]
    assert "45.00" in lines[-3]
    assert f"{costs('ours', 'policy').ms(H100):.2f}" in lines[-3]
    assert f"{45.0 / costs('ours', 'policy').ms(H100):.2f}" in lines[-3]
    assert "5100" in lines[-2] or "5101" in lines[-2]
    assert f"{(4 * 2048 * V + 4 * V * H + 2 * V * H + 2 * N * H) / 2**20:.0f}" in lines[-2]
    assert f"{costs('ours', 'policy', frozen=True, active=0.5).ms(H100):.2f}" in lines[-1]


GOOD = {"impl": "ours", "shape": "llama3-8b", "tokens": 8, "mode": "ce", "ms": 1.0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "must be a JSON file"),
        ([GOOD], "must be an object"),
        ({"results": [GOOD]}, "device must be the name of a GPU, got None"),
        ({"device": "NVIDIA A100-SXM4-80GB", "results": [GOOD]}, "one of H100, H200, B200, MI300X (or --gpus NAME"),
        ({"device": "NVIDIA GH200 480GB", "results": [GOOD]}, "got 'NVIDIA GH200 480GB'"),
        ({"device": "NVIDIA H100 PCIe", "results": [GOOD]}, "got 'NVIDIA H100 PCIe'"),
        ({"device": "NVIDIA H100 80GB HBM3"}, "results must be a list"),
        ({"device": "NVIDIA H100 80GB HBM3", "results": []}, "results must be a list"),
        *(
            ({"device": "NVIDIA H100 80GB HBM3", "results": [GOOD, result]}, f"results[1]{said}")
            for result, said in [
                (7, " must be an object"),
                (GOOD | {"impl": "apex"}, ": impl must be one of ours, naive, "),
                (GOOD | {"impl": ["ours"]}, ": impl must be one of"),
                (GOOD | {"impl": "quack", "mode": "policy"}, ": mode must be one of ce for quack, got 'policy'"),
                (GOOD | {"shape": "gpt2"}, ": shape must be HxV or one of llama3-8b, "),
                (GOOD | {"shape": [1, 2]}, ": shape must be HxV"),
                ({k: v for k, v in GOOD.items() if k != "shape"}, ": shape must be HxV"),
                (GOOD | {"tokens": 0}, ": tokens must be a positive integer, got 0"),
                (GOOD | {"ms": "3"}, ": ms must be a positive number, got '3'"),
                (GOOD | {"ms": float("nan")}, ": ms must be a positive number, got nan"),
                (GOOD | {"peak_mib": -1}, ": peak_mib must be a positive number"),
                (GOOD | {"head": "tied"}, ": head must be one of train, frozen, got 'tied'"),
                (GOOD | {"active": 2}, ": active must be in (0, 1], got 2"),
            ]
        ),
        ({"device": "AMD Instinct MI300X", "results": [GOOD | {"impl": "quack"}]}, "must be one that runs on MI300X"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(content, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--measured", written(tmp_path, content)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_device_outside_the_table_can_be_compared_with_one_in_it(tmp_path, capsys):
    path = written(tmp_path, {"device": "NVIDIA L4", "results": [GOOD]})
    main(["--measured", path, "--gpus", "H200"])
    assert "for H200, beside what was measured on NVIDIA L4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--measured", path, "--gpus", "H200", "H100"])
    assert "--gpus must be one GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shapes", "gpt2"], "--shapes must be HxV or one of"),
        (["--tokens", "0"], "--tokens must be positive, got [0]"),
        (["--active", "0"], "--active must be in (0, 1]"),
        (["--measured", "no/such/file"], "no/such/file must be a JSON file"),
        (["--gpus", "A100"], "'MI300X'"),
    ],
)
def test_wrong_options_are_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_prints_a_table_of_which_every_line_is_marked():
    options = ["--shapes", "all", "--tokens", "8192", "65536"]
    command = [sys.executable, "-m", "bench.roofline", *options]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "computed  and not measured: no GPU was used."
    assert all(line == "" or line.startswith("computed  ") for line in lines)
    assert max(map(len, lines)) <= 140
    assert all(any(line.startswith(f"computed  {name} (H ") for line in lines) for name in roofline.SHAPES)
    assert any("oom" in line for line in lines if "naive" in line)
    assert not any("oom" in line for line in lines if line.startswith("computed  ours"))


def test_the_table_shows_each_variant_that_an_implementation_tells_apart(capsys):
    main(["--modes", "policy", "--gpus", "H100"])
    lines = [line.split()[1:4] for line in capsys.readouterr().out.splitlines() if line]
    rows = [line for line in lines if line[0] in ("ours", "naive", "verl_triton", "verl_torch")]
    assert rows == [
        *(["ours", head, active] for head in ("train", "frozen") for active in ("1", "0.5", "0.25")),
        *(["naive", head, "any"] for head in ("train", "frozen")),
        *([impl, "any", "any"] for impl in ("verl_triton", "verl_torch")),
    ]


def test_json_holds_what_the_table_shows(capsys):
    options = ["--modes", "ce", "--heads", "train", "--active", "1"]
    main([*options, "--json"])
    content = json.loads(capsys.readouterr().out)
    assert "not measured" in content["source"]
    assert all("not measured" in record["source"] for record in content["results"])
    main(options)
    shown = {line.split()[1]: line.split()[4:12] for line in capsys.readouterr().out.splitlines()[8:]}
    assert set(shown) == {record["impl"] for record in content["results"]}
    for record in content["results"]:
        assert record["ms"].keys() == GPUS.keys()
        times = ["-" if ms is None else f"{ms:.1f}" for ms in record["ms"].values()]
        assert shown[record["impl"]] == [
            f"{record['gemms']:.2f}",
            f"{record['gemm_gb']:.1f}",
            f"{record['other_gb']:.1f}",
            f"{record['extra_mib']:.0f}",
            *times,
        ]
