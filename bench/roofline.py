"""What the LM-head losses should cost on GPUs, ours and other projects': computed from a model, measured nowhere.

    python -m bench.roofline                                    llama3-8b, 8,192 tokens, every mode and implementation
    python -m bench.roofline --shapes all --tokens 1024 65536 --modes policy --gpus H100
    python -m bench.roofline --json                             the same as JSON
    python -m bench.roofline --measured results.json            measured beside computed, SLOW where 1.5 times over

    time = sum over kernels of max(flop / (fraction peak), bytes / (fraction bandwidth))

A kernel's arithmetic overlaps its own traffic, and two kernels never overlap. A GEMM is 2 N H V flop ("1 G") of bf16
operands, or of fp32 ones at the fp32 rate; it reads its operands and writes its result once per tile of the logits, so
that every block of rows reads W and accumulates dW again. The rest is bandwidth. `bench.peers` has the counts.

Left out: launches, synchronisation, scalars per token, and that small tiles and GEMMs not of the vendor's library run
below the fraction. So a time is a floor under the assumptions and not a forecast, for other projects as for ours.
tests/test_roofline.py holds it against times that projects published (liger#1339, liger#1356, liger#1370, trl#7244).

FILE of --measured is what a check on a GPU writes: {"device": "NVIDIA H100 80GB HBM3", "results": [RESULT, ...]} with
RESULT = {"impl": "ours", "shape": "llama3-8b", "tokens": 8192, "mode": "policy", "ms": 40.1}. "shape" may be "HxV", or
"H" and "V" stand for it; "head" ("train", "frozen"), "active" (1) and "peak_mib" (the peak of a call beside hidden and
weight, gradients included) may be added. Other keys, such as "op", are not looked at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers import ALGORITHMS, CE, ENTROPY, LOGP, MODES, Algorithm, Work, find

SHAPES = {
    "llama3-8b": (4096, 128256),
    "llama2-7b": (4096, 32000),
    "smollm2-135m": (576, 49152),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen2.5-14b": (5120, 152064),
    "qwen2.5-72b": (8192, 152064),
    "qwen3-0.6b": (1024, 151936),
    "qwen3.5-h2048": (2048, 248320),
    "gemma2-2b": (2304, 256000),
    "gemma-262k": (2304, 262144),
    "deepseek-v3": (7168, 129280),
    "liger": (4096, 131072),
}
HEADS = ("train", "frozen")
SLOW = 1.5


class Gpu(NamedTuple):
    """Dense peaks in TFLOP/s, TB/s and GB from the vendor's data sheet, and the fraction of a GEMM's peak we assume."""

    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: float
    fraction: float
    device: str  # pattern of the name that the driver reports


# 0.708 of H100 is 700 TFLOP/s, as the best published head kernels (liger#1370: 698-718); H200 has the same cores.
# 0.656 of B200 is liger#1339's 1,475 TFLOP/s. No published head kernel backs MI300X's: it is a guess.
GPUS = {
    "H100": Gpu(989, 495, 67, 3.35, 80, 0.708, r"\bH100\b(?!.*(PCIe|NVL))"),  # NVIDIA H100 data sheet, SXM5
    "H200": Gpu(989, 495, 67, 4.8, 141, 0.708, r"\bH200\b(?!.*NVL)"),  # NVIDIA H200 data sheet, SXM
    "B200": Gpu(2250, 1125, 75, 8.0, 180, 0.656, r"\bB200\b"),  # NVIDIA DGX B200 data sheet, an eighth
    "MI300X": Gpu(1307, 654, 163, 5.3, 192, 0.5, r"\bMI300X\b"),  # AMD Instinct MI300X data sheet
}
BANDWIDTH = 0.9  # of the peak: what streaming kernels reach


class Kernel(NamedTuple):
    """Launches that are alike; flop and bytes of one."""

    name: str
    launches: int
    flop: float
    bytes: float
    fp32: bool = False

    def seconds(self, gpu: Gpu, tf32: bool) -> float:
        peak = gpu.bf16 if not self.fp32 else gpu.tf32 if tf32 else gpu.fp32
        return self.launches * max(self.flop / (gpu.fraction * peak), self.bytes / (BANDWIDTH * gpu.bandwidth)) / 1e12


class Cost(NamedTuple):
    """Of one call. Bytes: `extra` at the peak beside operands and gradients, `gradients` in the operands' dtype."""

    kernels: list[Kernel]
    extra: float
    gradients: float

    def ms(self, gpu: Gpu, tf32: bool = False) -> float:
        return 1e3 * sum(kernel.seconds(gpu, tf32) for kernel in self.kernels)

    def gemms(self, work: Work) -> float:
        return sum(k.launches * k.flop for k in self.kernels) / one_gemm(work)

    def traffic(self, gemm: bool) -> float:
        """Bytes of all GEMMs, or of everything beside them."""
        return sum(k.launches * k.bytes for k in self.kernels if (k.flop > 0) == gemm)

    def fits(self, work: Work, gpu: Gpu) -> bool:
        operands = 2 * work.hidden * (work.tokens + work.vocabulary)
        return self.extra + self.gradients + operands <= 1e9 * gpu.memory


def one_gemm(work: Work) -> int:
    return 2 * work.tokens * work.hidden * work.vocabulary


def cost(a: Algorithm, work: Work) -> Cost:
    """Kernels and memory of one call: a forward sweep over the tiles and, but for `logp`, a backward sweep."""
    h, fused = work.hidden, a.logits == 0
    valid = work.tokens * (work.active if work.mode == CE and "ignored" in a.skips else 1.0)
    live = work.tokens * work.active if "zero" in a.skips else valid
    tiles, r, c = (1, valid, work.vocabulary) if fused else _tiles(a, work, valid)
    kernels = [
        Kernel("logits", tiles, 2 * r * c * h, 2 * h * (r + c) + a.logits * r * c),
        Kernel("forward passes", tiles, 0, a.forward * r * c),
    ]
    if work.mode == LOGP:
        return Cost(kernels, a.held * r * c, 0)
    tiles, r, c = _tiles(a, work, live)
    if a.recompute is not None:
        kernels.append(Kernel("logits again", tiles, 2 * r * c * h, 2 * h * (r + c) + a.recompute * r * c))
    kernels.append(Kernel("backward passes", tiles, 0, a.backward * r * c))
    computes_dw = not (work.frozen and "dw" in a.skips)
    for name, add, operand, result in [("dx", a.dx, c * h, r * h), ("dw", a.dw, r * h, c * h)][: 1 + computes_dw]:
        wide = name in a.fp32
        moved = (4 if wide else a.dz) * r * c + (4 if wide else 2) * operand + add.gemm * result
        kernels.append(Kernel(name, tiles, 2 * r * c * h, moved, wide))
        kernels.append(Kernel(f"{name} passes", tiles, 0, add.after * result))
    vh, nh = work.vocabulary * h * computes_dw, work.tokens * h
    kernels.append(Kernel("finish", 1, 0, a.finish[0] * vh + a.finish[1] * nh))
    return Cost(kernels, a.extra(r * c, vh, nh), 2 * (nh + work.vocabulary * h * (not work.frozen)))


def _tiles(a: Algorithm, work: Work, rows: float) -> tuple[int, float, float]:
    """Number of tiles, and the rows and columns of one; equal ones, which a last short tile barely changes."""
    down, across = math.ceil(rows / a.rows(work)), math.ceil(work.vocabulary / a.columns(work))
    return down * across, rows / down, work.vocabulary / across


def predict(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per implementation and variant; variants that an implementation does not tell apart come once."""
    for (name, (h, v)), tokens, mode in itertools.product(args.shapes, args.tokens, args.modes):
        for a in (a for a in ALGORITHMS if mode in a.modes):
            heads = args.heads if mode != LOGP and "dw" in a.skips else ["any"]
            shares = args.active if mode != LOGP and ("ignored" if mode == CE else "zero") in a.skips else ["any"]
            for head, share in itertools.product(heads, shares):
                work = Work(h, v, tokens, mode, head == "frozen", 1.0 if share == "any" else share)
                about = {"shape": name, "H": h, "V": v, "tokens": tokens, "mode": mode, "impl": a.impl}
                yield about | {"head": head, "active": share} | _record(a, work, args)


def _record(a: Algorithm, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    c = cost(a, work)
    rate = "TF32" if args.tf32 else "fp32"
    wide = f"{rate} {a.fp32}" if a.fp32 and work.mode != LOGP else ""
    return {
        "gemms": c.gemms(work),
        "gemm_gb": c.traffic(gemm=True) / 1e9,
        "other_gb": c.traffic(gemm=False) / 1e9,
        "extra_mib": c.extra / 2**20,
        "ms": {name: c.ms(GPUS[name], args.tf32) if name in a.gpus else None for name in args.gpus},
        "too_large_for": [name for name in args.gpus if not c.fits(work, GPUS[name])],
        "note": "; ".join(filter(None, [wide, a.lacks if work.mode == ENTROPY else ""])),
        "source": "computed, not measured",
    }


def table(args: argparse.Namespace) -> Iterator[str]:
    gpus = {name: GPUS[name] for name in args.gpus}
    rates = (f"{name} {g.fraction * g.bf16:.0f} and {BANDWIDTH * g.bandwidth:.2f}" for name, g in gpus.items())
    yield "and not measured: no GPU was used."
    yield "assumed TFLOP/s of bf16 and TB/s: " + ", ".join(rates)
    yield "GEMMs: in units of 2 N H V flop. GB: memory traffic. extra: at the peak, beside operands and gradients."
    yield "active: share of rows with a gradient (ce: not ignored). any: no difference. -: does not run. oom: no room."
    columns = "implementation    head active GEMMs GEMM GB other GB extra MiB "
    columns += " ".join(f"{gpu + ' ms':>8s}" for gpu in gpus) + "  note"
    for key, records in itertools.groupby(predict(args), itemgetter("shape", "H", "V", "tokens", "mode")):
        name, h, v, n, mode = key
        flop = one_gemm(Work(h, v, n, mode))
        floor = ", ".join(f"{gpu} {flop / (1e9 * g.fraction * g.bf16):.1f} ms" for gpu, g in gpus.items())
        yield ""
        yield f"{name} (H {h}, V {v}), N {n}, {mode}: {MODES[mode]}"
        yield f"one GEMM is {flop / 1e12:.2f} TFLOP: {floor}"
        yield columns
        yield from map(_line, records)


def _line(r: dict[str, Any]) -> str:
    active = r["active"] if r["active"] == "any" else f"{r['active']:g}"
    cells = {gpu: "-" if ms is None else f"{ms:.1f}" for gpu, ms in r["ms"].items()}
    cells |= {gpu: "oom" for gpu in r["too_large_for"] if cells[gpu] != "-"}
    times = " ".join(f"{cell:>{max(8, len(gpu) + 3)}s}" for gpu, cell in cells.items())
    line = f"{r['impl']:15s} {r['head']:>6s} {active:>6s} {r['gemms']:5.2f} {r['gemm_gb']:7.1f} {r['other_gb']:8.1f}"
    return f"{line} {r['extra_mib']:9.0f} {times}  {r['note']}".rstrip()


class InputError(ValueError):
    """What was given is not what was expected."""


def expect(holds: bool, what: str, expected: str, given: object) -> None:
    if not holds:
        raise InputError(f"{what} must be {expected}, got {repr(given):.80}")


def compare(path: Path, gpus: list[str] | None, tf32: bool) -> Iterator[str]:
    """Each measured result of the file beside its computed time."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a JSON file, got {error}") from None
    expect(isinstance(content, dict), f"{path}", 'an object {"device": ..., "results": [...]}', content)
    device, results = content.get("device"), content.get("results")
    expect(isinstance(device, str), f"{path}: device", "the name of a GPU", device)
    expect(isinstance(results, list) and results != [], f"{path}: results", "a list of measurements", results)
    if gpus is None:
        gpus = [name for name, gpu in GPUS.items() if re.search(gpu.device, device)]
        known = f"one of {', '.join(GPUS)} (or --gpus NAME, to compare with that)"
        expect(gpus != [], f"{path}: device", known, device)
    expect(len(gpus) == 1, "--gpus", "one GPU with --measured", gpus)
    rows = [_beside(f"{path}: results[{i}]", result, gpus[0], tf32) for i, result in enumerate(results)]
    yield f"for {gpus[0]}, beside what was measured on {device}"
    yield f"ratio: measured / computed; SLOW above {SLOW}, FAST below 1 / {SLOW}. MiB: peak beside hidden and weight."
    head = "implementation         shape  tokens         mode   head active measured ms computed ms ratio      "
    yield head + "measured MiB computed MiB"
    yield from rows


def _beside(where: str, result: Any, gpu: str, tf32: bool) -> str:
    a, work = _checked(where, result, gpu)
    ms, peak, computed = result["ms"], result.get("peak_mib"), cost(a, work)
    ratio = ms / computed.ms(GPUS[gpu], tf32)
    # Far below a floor is as wrong as far above it: the model, the kernel or the measurement left something out.
    flag = "SLOW" if ratio > SLOW else "FAST" if ratio < 1 / SLOW else "ok"
    shape = next((name for name, size in SHAPES.items() if size == work[:2]), f"{work.hidden}x{work.vocabulary}")
    line = f"{a.impl:15s} {shape:>12s} {work.tokens:7d} {work.mode:>12s} {HEADS[work.frozen]:>6s} {work.active:6g}"
    mib = f"{'-' if peak is None else f'{peak:.0f}':>12s} {(computed.extra + computed.gradients) / 2**20:12.0f}"
    return f"{line} {ms:11.2f} {ms / ratio:11.2f} {ratio:5.2f} {flag:4s} {mib}"


def _checked(where: str, result: Any, gpu: str) -> tuple[Algorithm, Work]:
    expect(isinstance(result, dict), where, 'an object {"impl": ..., "mode": ..., "ms": ...}', result)
    impl, mode, tokens, ms = (result.get(key) for key in ("impl", "mode", "tokens", "ms"))
    head, active, peak = result.get("head", "train"), result.get("active", 1), result.get("peak_mib", 1)
    known = list(dict.fromkeys(a.impl for a in ALGORITHMS))
    expect(impl in known, f"{where}: impl", f"one of {', '.join(known)}", impl)
    modes = [m for m in MODES if find(impl, m)]
    expect(mode in modes, f"{where}: mode", f"one of {', '.join(modes)} for {impl}", mode)
    expect(type(tokens) is int and tokens > 0, f"{where}: tokens", "a positive integer", tokens)
    expect(_positive(ms), f"{where}: ms", "a positive number", ms)
    expect(_positive(peak), f"{where}: peak_mib", "a positive number", peak)
    expect(head in HEADS, f"{where}: head", f"one of {', '.join(HEADS)}", head)
    expect(_positive(active) and active <= 1, f"{where}: active", "in (0, 1]", active)
    shape = shape_of(f"{where}: shape", result.get("shape", f"{result.get('H')}x{result.get('V')}"))
    a = find(impl, mode)
    assert a is not None, "the mode was checked"
    expect(gpu in a.gpus, f"{where}: impl", f"one that runs on {gpu}", impl)
    return a, Work(*shape, tokens, mode, head == "frozen", active)


def _positive(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf


def shape_of(what: str, name: object) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(name))
    expect(name in list(SHAPES) or found is not None, what, f"HxV or one of {', '.join(SHAPES)}", name)
    return (int(found[1]), int(found[2])) if found else SHAPES[str(name)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(flag: str, default: list[Any] | None, text: str, **options: Any) -> None:
        shown = "" if default is None else f" (default: {' '.join(map(str, default))})"
        parser.add_argument(flag, nargs="+", default=default, help=text + shown, **options)

    several("--shapes", ["llama3-8b"], f"all, HxV or of {', '.join(SHAPES)}", metavar="SHAPE")
    several("--tokens", [8192], "N of a call", type=int, metavar="N")
    several("--modes", list(MODES), "what is computed", choices=MODES, metavar="MODE")
    several("--heads", list(HEADS), "whether dW is wanted", choices=HEADS, metavar="HEAD")
    several("--active", [1.0, 0.5, 0.25], "shares of rows with a gradient", type=float, metavar="SHARE")
    which = f"of {', '.join(GPUS)} (default: all); with --measured, the one to compare with"
    several("--gpus", None, which, choices=GPUS, metavar="GPU")
    parser.add_argument("--tf32", action="store_true", help="fp32 GEMMs as TF32, which PyTorch does not do by default")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the records behind the table")
    output.add_argument("--measured", type=Path, metavar="FILE", help="compare these measurements with the model")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        names = SHAPES if "all" in args.shapes else args.shapes
        args.shapes = [(name, shape_of("--shapes", name)) for name in names]
        expect(min(args.tokens) > 0, "--tokens", "positive", args.tokens)
        expect(all(0 < share <= 1 for share in args.active), "--active", "in (0, 1]", args.active)
        lines = list(compare(args.measured, args.gpus, args.tf32)) if args.measured else []
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    args.gpus = args.gpus or list(GPUS)
    if args.json:
        content = {"source": "computed, not measured: no GPU was used", "results": list(predict(args))}
        print(json.dumps(content, indent=1))
        return
    # Every line says what it is, so that one pasted somewhere cannot be taken for a measurement.
    print("\n".join(f"computed  {line}" if line else "" for line in lines or table(args)))


if __name__ == "__main__":
    main()
