"""Tables of README and docs, and the plot of docs/cpu-kernels.md, from the files of bench/results.

    python -m bench.report            write them
    python -m bench.report --print    print the tables, write nothing

    ops-*.jsonl            python -m bench.ops --standard    README.md, docs/cpu-kernels.md
    step-*.json            python -m bench.step              docs/cpu-kernels.md
    longcontext-*.json     python -m bench.longcontext       docs/distributed.md
    plan-*.json            python -m bench.plan              docs/planning.md

Nothing here measures. Rows in which a peer wins are shown like all others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import roofline, schedule
from bench.machine import RESULTS, ROOT, Record
from bench.ops import SHARES, TOKENS, VOCABULARIES
from bench.peers import LOGP, POLICY

README, DOC = ROOT / "README.md", ROOT / "docs" / "cpu-kernels.md"
PLOT = ROOT / "docs" / "cpu-kernels.png"
MAIN = (("smollm2-135m", 2048), ("qwen2.5-0.5b", 1024))
LABELS = {
    "ours": "**ours**",
    "gemm_x3": "three bare `torch.mm`",
    "tiles_x3": "three products by tiles, no softmax",
    "naive": "eager, fp32 softmax",
    "naive_bf16": "eager, bf16 softmax",
    "naive_wide": "eager, fp32 logits",
    "naive_compiled": "eager under `torch.compile`",
    "liger_grpo": "Liger `LigerFusedLinearGRPOLoss`",
    "trl_logp": "TRL chunked log-prob + its loss",
    "torch_lce": "`F.linear_cross_entropy` + the loss",
    "cce": "cut-cross-entropy",
    "gemm_x1": "one bare `torch.mm`",
    "tiles_x1": "one product by tiles",
    "liger_flce": "Liger FLCE",
    "gemm_x4": "four bare `torch.mm`",
    "ours_ignored": "**ours**, 75 % of the rows ignored",
    "ours_zero": "**ours**, 75 % of the sequences at advantage 0",
}
PLAIN = {"dtype": "bf16", "active": 1.0, "zero": 0.0, "frozen": False, "kept": True}


class Results:
    """One file of `bench.ops`: the machine, and records by case."""

    def __init__(self, path: Path) -> None:
        first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
        self.machine: Record = first["machine"]
        self.records: list[Record] = rest

    def of(self, shape: str, tokens: int, mode: str = POLICY, **case: Any) -> dict[str, Record]:
        wanted = PLAIN | {"shape": shape, "tokens": tokens, "mode": mode} | case
        found: dict[str, Record] = {}
        for r in self.records:
            if all(r[key] == value for key, value in wanted.items()):
                found[r["impl"]] = found.get(r["impl"], {}) | r  # time and memory may come from two measurements
        return found


def ops_table(results: Results) -> Iterator[str]:
    cases = [results.of(*shape) for shape in MAIN]
    logp = [results.of(*shape, mode=LOGP) for shape in MAIN]
    names = sorted(
        {impl for case in cases for impl, r in case.items() if "ms" in r and impl not in SHARES},
        key=lambda impl: cases[0].get(impl, {}).get("ms", float("inf")),
    )
    titles = []
    for shape, tokens in MAIN:
        hidden, vocabulary = roofline.shape_of("shape", shape)
        titles += [f"{shape}: {tokens:,} x {hidden} x {vocabulary:,}, ms", "/ ours", "extra MiB"]
    yield "| policy loss, forward + backward | " + " | ".join(titles) + " | log-prob error |"
    yield "|---|" + "---:|" * (len(titles) + 1)
    for impl in names:
        cells = []
        for case in cases:
            r = case.get(impl, {})
            cells += [_number(r.get("ms"), "{:,.0f}"), _ratio(case, impl), _number(r.get("extra_mib"), "{:,.0f}")]
        errors = [case[impl]["logp_error"] for case in logp if "logp_error" in case.get(impl, {})]
        yield f"| {LABELS[impl]} | {' | '.join(cells)} | {f'{max(errors):.0e}' if errors else ''} |"
    absent = {impl: r["why"] for case in cases for impl, r in case.items() if "why" in r}
    m = results.machine
    yield ""
    yield (
        f"{m['cpu']} ({', '.join(m['isa'])}), {m['threads']} threads, torch {m['torch']}, bfloat16; medians of"
        " interleaved calls, freed memory kept. Extra MiB: beyond inputs and gradients, a fresh process each. Error:"
        " largest of 64 log-probs against float64, in nats."
        + "".join(f" {LABELS[impl]}: {why}" for impl, why in absent.items())
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _ratio(case: dict[str, Record], impl: str) -> str:
    mine, other = case.get("ours", {}).get("ms"), case.get(impl, {}).get("ms")
    return "" if mine is None or other is None else f"{other / mine:.2f}"


def ratios(results: Results) -> Iterator[str]:
    """What ours is compared by, for both shapes; a missing measurement leaves a dash."""

    def ms(name: str, impl: str, **case: Any) -> Callable[[tuple[str, int]], float]:
        return lambda shape: float(results.of(*shape, **case)[impl][name])

    def over(top: Callable, bottom: Callable) -> Callable[[tuple[str, int]], float]:
        return lambda shape: top(shape) / bottom(shape)

    ours, fp32 = ms("ms", "ours"), ms("ms", "ours", dtype="fp32")
    small = MAIN[0][0]
    lines = {
        "policy loss, ours / three bare `torch.mm`": over(ours, ms("ms", "gemm_x3")),
        "ours / three products by tiles, no softmax": over(ours, ms("ms", "tiles_x3")),
        "eager (fp32 softmax) / ours": over(ms("ms", "naive"), ours),
        "Liger GRPO / ours": over(ms("ms", "liger_grpo"), ours),
        "TRL chunked log-prob and loss / ours": over(ms("ms", "trl_logp"), ours),
        "float32: eager / ours": over(ms("ms", "naive", dtype="fp32"), fp32),
        "75 % of the rows ignored / none": over(ms("ms", "ours_ignored"), ours),
        "75 % of the rows at advantage 0 / none": over(ms("ms", "ours_zero"), ours),
        "log-probs without gradients, ours / one bare `torch.mm`": over(
            ms("ms", "ours", mode=LOGP), ms("ms", "gemm_x1", mode=LOGP)
        ),
        "extra memory, ours / eager": over(ms("extra_mib", "ours"), ms("extra_mib", "naive")),
        "largest log-prob error against float64, ours": ms("logp_error", "ours", mode=LOGP),
        "log-prob error, ours / eager with fp32 logits": over(
            ms("logp_error", "ours", mode=LOGP), ms("logp_error", "naive_wide", mode=LOGP)
        ),
    }
    fresh: dict[str, tuple[str, str, dict[str, str]]] = {
        "policy loss, ours / three bare `torch.mm`": ("ours", "gemm_x3", {}),
        "ours / three products by tiles, no softmax": ("ours", "tiles_x3", {}),
        "eager (fp32 softmax) / ours": ("naive", "ours", {}),
        "Liger GRPO / ours": ("liger_grpo", "ours", {}),
        "TRL chunked log-prob and loss / ours": ("trl_logp", "ours", {}),
        "log-probs without gradients, ours / one bare `torch.mm`": ("ours", "gemm_x1", {"mode": LOGP}),
    }
    for label, (top, bottom, case) in fresh.items():
        both = (ms("ms", impl, **case, kept=False) for impl in (top, bottom))
        lines[f"fresh memory: {label}"] = over(*both)
    yield "| | " + " | ".join(f"{shape}, {tokens:,} tokens" for shape, tokens in MAIN) + " |"
    yield "|---|---:|---:|"
    for label, value in lines.items():
        yield f"| {label} | {' | '.join(_try(value, shape) for shape in MAIN)} |"
    grown = [results.of(small, tokens).get("ours", {}).get("extra_mib") for tokens in (2048, TOKENS[-1])]
    if all(grown):
        yield f"| extra memory, {TOKENS[-1]:,} tokens / 2,048 | {grown[1] / grown[0]:.2f} | |"


def everything(results: Results) -> Iterator[str]:
    """Every measurement, and every contender that was not timed with its reason."""
    yield "| case | | ms | 20-80 % | / ours | error | dh, dW |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for r in results.records:
        case = results.of(*(r[key] for key in ("shape", "tokens", "mode")), **{key: r[key] for key in PLAIN})
        parts = [r["shape"], f"{r['tokens']:,}", r["mode"], r["dtype"]]
        parts += [f"{r['active']:.0%} active"] * (r["active"] < 1) + [f"{r['zero']:.0%} at advantage 0"] * (
            r["zero"] > 0
        )
        parts += ["frozen head"] * r["frozen"] + ["fresh memory"] * (not r["kept"])
        label = f"| {', '.join(parts)} | {LABELS[r['impl']]} |"
        if "why" in r:
            yield f"{label} {r['why']} | | | | |"
            continue
        error = _number(r.get("logp_error", r.get("loss_error")), "{:.0e}")
        if "ms" not in r:
            yield f"{label} {_number(r['extra_mib'], '{:,.0f} MiB alone')} | | | | |"
            continue
        spread = f"{r['p20_ms']:,.0f}-{r['p80_ms']:,.0f}"
        grads = _number(r.get("grad_error"), "{:.0e}")
        yield f"{label} {r['ms']:,.0f} | {spread} | {_ratio(case, r['impl'])} | {error} | {grads} |"


def _try(value: Callable[[tuple[str, int]], float], shape: tuple[str, int]) -> str:
    try:
        found = value(shape)
    except (KeyError, TypeError):  # not measured
        return "-"
    return f"{found:.1e}" if found < 0.01 else f"{found:.2f}"


def plot(results: Results, path: Path) -> None:
    """Time against vocabulary, memory against tokens, time against error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    shown = ("ours", "gemm_x3", "naive", "liger_grpo", "trl_logp")
    style = {"ours": {"color": "#c1272d", "linewidth": 2.5, "zorder": 5}, "gemm_x3": {"color": "#888888", "ls": "--"}}
    style["naive_compiled"] = {"color": "#8c564b"}
    label = {impl: LABELS[impl].replace("**", "").replace("`", "") for impl in LABELS}
    for impl in shown:
        kept = [r for r in results.records if r["impl"] == impl and r["mode"] == POLICY and "why" not in r]
        line = sorted(
            (roofline.shape_of("shape", r["shape"])[1], r["ms"]) for r in kept if r["shape"].startswith("576x")
        )
        if line:
            axes[0].plot(*zip(*line, strict=True), marker="o", ms=4, label=label[impl], **style.get(impl, {}))
        line = sorted(
            (r["tokens"], r["extra_mib"])
            for r in kept
            if r["shape"] == MAIN[0][0] and r.get("extra_mib") and all(r[k] == v for k, v in PLAIN.items())
        )
        if line:
            axes[1].plot(*zip(*line, strict=True), marker="o", ms=4, label=label[impl], **style.get(impl, {}))
    for impl, r in results.of(*MAIN[0], mode=LOGP).items():
        if "logp_error" in r:
            name = label[impl].removesuffix(" + its loss").removesuffix(" + the loss")
            axes[2].scatter(
                r["ms"], r["logp_error"], s=60, color=style.get(impl, {}).get("color"), zorder=3, label=name
            )
    axes[0].set(xlabel="vocabulary", ylabel="ms", title="policy loss, forward + backward (512 tokens, H 576)")
    axes[1].set(xlabel="tokens", ylabel="MiB", title=f"memory beyond inputs and gradients ({MAIN[0][0]})")
    axes[2].set(xlabel="ms", ylabel="largest error, nats", title=f"log-probs without gradients ({MAIN[0][0]})")
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    axes[0].set_xticks(VOCABULARIES)
    axes[1].set_xticks([512, 2048, 8192, 16384])
    axes[2].set_xticks([300, 500, 1000, 1500])
    figure.suptitle(f"{results.machine['cpu']}, {results.machine['threads']} threads, bfloat16", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def step_table(path: Path) -> Iterator[str]:
    result = json.loads(path.read_text())
    yield "| one update of the quickstart | s | response tokens/s | / ours |"
    yield "|---|---:|---:|---:|"
    ours = result["variants"]["ours"]["s"]
    for row in result["variants"].values():
        pace = result["response_tokens"] / row["s"]
        yield f"| {row['label']} | {row['s']:.2f} | {pace:.0f} | {row['s'] / ours:.2f} |"
    yield ""
    yield result["note"]


def longcontext_table(path: Path) -> Iterator[str]:
    result = json.loads(path.read_text())
    names = list(result["mib"])
    yield "MiB beyond the model, its gradients and optimizer, one sequence a micro-batch:"
    yield ""
    yield f"| tokens | {' | '.join(names)} |"
    yield "|---:|" + "---:|" * len(names)
    for at, length in enumerate(result["lengths"]):
        cells = [f"{values[at]:,.0f}" if at < len(values) else "" for values in result["mib"].values()]
        yield f"| {length:,} | {' | '.join(cells)} |"
    lines = [result["lines"].get(name) for name in names]
    slopes = [_number(line and line["bytes_per_token"] / 1024, "{:.2f}") for line in lines]
    fits = [_number(line and line["r2"], "{:.4f}") for line in lines]
    yield f"| KiB a token | {' | '.join(slopes)} |"
    yield f"| R^2 of the line | {' | '.join(fits)} |"
    yield ""
    yield (
        f"{result['machine']['cpu']}, 2 blocks of width 64, 50,000 vocabulary entries (`python -m bench.longcontext`);"
        " eager: until it would take 0.8 of the machine's memory. Lines through the four longest lengths. Head is the"
        " update less the body, a difference of two peaks: its chunk and dW, which do not grow."
    )


def plan_table(path: Path) -> Iterator[str]:
    result = json.loads(path.read_text())
    yield "| case | planned, GiB | measured, GiB | off by | planned peak |"
    yield "|---|---:|---:|---:|---|"
    for row in result["results"]:
        planned, measured = (f"{row[key] / 2**30:.2f}" for key in ("planned", "measured"))
        yield f"| {row['case']} | {planned} | {measured} | {row['error']:+.1%} | {row['moment']} |"
    yield ""
    about = f"{result['machine']['cpu']}, {result['machine']['threads']} threads, torch {result['machine']['torch']}"
    yield f"{about}; three updates each. By part: `{path.relative_to(ROOT)}`."


def put(path: Path, marker: str, text: str) -> None:
    """Replaces what stands between the markers of a file."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, rest = path.read_text().split(begin, 1)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    args = parser.parse_args(argv)
    files = list(RESULTS.glob("ops-*.jsonl"))
    if not files:
        parser.error(f"no ops-*.jsonl in {RESULTS}: run `python -m bench.ops --standard` first")
    every = sorted(map(Results, files), key=lambda results: results.machine["date"])  # README shows the newest
    texts = {
        (README, "ops"): "\n".join(ops_table(every[-1])),
        (DOC, "ratios"): "\n\n".join("\n".join([f"{r.machine['cpu']}:", "", *ratios(r)]) for r in every),
    }
    texts[DOC, "all"] = "\n\n".join("\n".join(everything(r)) for r in every)
    threads = [1, 2, 8, 16, 32, 64, 128]
    texts[DOC, "schedule"] = "\n".join(["```", *schedule.table(1024, schedule.SHAPES, threads), "```"])
    steps = sorted(RESULTS.glob("step-*.json"))
    if steps:
        texts[DOC, "step"] = "\n\n".join("\n".join(step_table(path)) for path in steps)
    long = sorted(RESULTS.glob("longcontext-*.json"))
    if long:
        texts[ROOT / "docs" / "distributed.md", "longcontext"] = "\n\n".join(
            "\n".join(longcontext_table(p)) for p in long
        )
    if plans := sorted(RESULTS.glob("plan-*.json")):
        texts[ROOT / "docs" / "planning.md", "plan"] = "\n\n".join("\n".join(plan_table(p)) for p in plans)
    for (path, marker), text in texts.items():
        print(f"\n{path.name}: {marker}\n{text}")
        if not args.print:
            put(path, marker, text)
    if not args.print:
        plot(every[-1], PLOT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
