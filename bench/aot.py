"""Every Triton kernel compiled for every architecture and row of the tuning table, on a machine without a GPU.

    python -m bench.aot                                   everything
    python -m bench.aot --quick                           what CI runs: one variant of each kernel, every architecture
    python -m bench.aot --arch sm_90 gfx942 --kernel grad_kernel --json facts.json

Prints registers, spills, shared memory, the widest access to global memory and the matrix instruction of each, and
exits with 1 where one spills much, does not fit, loads narrowly or leaves the matrix units idle. Compiled, never run:
this says what the hardware would execute, not how fast or whether the result is right.

The arguments are specialised as Triton's launcher would: aligned pointers, padded widths and strides are multiples of
16, columns are contiguous (stride 1). Whatever has no entry in ARGUMENTS or FLAGS below fails, so that a new argument
of a kernel cannot be forgotten here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import sass

KERNELS = {  # module under luffy_kernels._triton and the kernel's name in the tuning table
    "policy_rows_kernel": ("rows", "rows"),
    "stats_rows_kernel": ("rows", "rows"),
    "grad_rows_kernel": ("rows", "rows"),
    "tiles_kernel": ("logprobs", "logprobs"),
    "merge_kernel": ("logprobs", "merge"),
    "grad_kernel": ("logprobs", "logprobs_backward"),
    "scaled_kernel": ("scaled", "scaled"),
}
GEMMS = ("tiles_kernel", "grad_kernel")
BYTES = {  # of global memory per logit and the least possible; o = bytes of an operand, the GEMM around it apart
    "policy_rows_kernel": ("4 + 4 + o", "4 + 4 + o: statistics before gradient, a row does not fit on chip"),
    "stats_rows_kernel": ("4", "4"),
    "grad_rows_kernel": ("4 + o", "4 + o"),
    "tiles_kernel": ("12 / (SPLIT BLOCK_N) + o H (1 / BLOCK_M + 1 / BLOCK_N) before caches", "o H (1 / V + 1 / N)"),
    "merge_kernel": ("12 / (SPLIT BLOCK_N)", "12 / (SPLIT BLOCK_N)"),
    "grad_kernel": ("o + o H (1 / BLOCK_M + 1 / BLOCK_N) before caches", "o + o H (1 / V + 1 / N)"),
    "scaled_kernel": ("(4 + o) H / N", "(4 + o) H / N"),
}

POINTERS = {
    "*fp32": "logits bias temperature table advantages old_logp ref_logp token_weight entropy_coef kl_coef out_loss"
    " out_logp out_entropy out_ratio out_kl out peak on_target offset slope uniform partial found coefficients"
    " wide factor",
    "*i64": "rows targets loss_id",
    "*i8": "out_clipped",
    "*operand": "dz hidden weight narrow",
}
SCALARS = {
    "fp32": "scale softcap",
    "i32": "count vocabulary vocab_start kl_type splits first last",
    "i32 x16": "size stride dz_stride padded width hidden_row weight_row dz_row",
    "i32 = 1": "hidden_column weight_column",
}
ARGUMENTS = {name: kind for kinds in (POINTERS, SCALARS) for kind, names in kinds.items() for name in names.split()}
FLAGS = {  # constexpr switch -> the pointer that is None without it
    "BIAS": "bias",
    "SOFTCAP": None,
    "OLD": "old_logp",
    "REF": "ref_logp",
    "WEIGHT": "token_weight",
    "ENTROPY": "entropy_coef",
    "KL": "kl_coef",
    "UNIFORM": "uniform",
    "AVERAGE": None,
    "BACKWARD": None,
}
# "buffers", AMD only: everything, and pointers known to span less than 2 GiB, as the launcher says of most tensors.
VARIANTS = {"plain": False, "everything": True, "buffers": True}
OPERANDS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
OPTIONS = ("num_warps", "num_stages")
SPILLS = 16  # bytes per thread that may be set aside: four registers of 255, once a tile and not once a step
DESCRIBED = {"hidden": "BLOCK_M", "weight": "BLOCK_N"}  # what a descriptor may stand for, and rows of its block


class Case(NamedTuple):
    kernel: str
    variant: str
    operand: str
    arch: str
    bucket: str
    config: dict[str, int]
    odd: bool = False  # strides and pointers that are multiples of nothing: what a misaligned caller would get

    def __str__(self) -> str:
        config = " ".join(f"{k.removeprefix('num_').removeprefix('BLOCK_')}={v}" for k, v in self.config.items())
        return f"{self.kernel:19}{self.variant:11}{self.operand:5}{self.arch:7}{config}"


def cases(kernels: list[str], archs: list[str], quick: bool) -> Iterator[Case]:
    from luffy_kernels._triton import scaled, tuning

    merges = {("merge", arch, ""): {"BLOCK": tuning.MERGE_BLOCK} for arch in archs}
    products = {("scaled", arch, ""): {"BLOCK": scaled.BLOCK, "num_warps": 8} for arch in archs}
    for kernel in kernels:
        for (name, arch, bucket), config in (tuning.TABLE | merges | products).items():
            if name != KERNELS[kernel][1] or arch not in archs:
                continue
            for operand in operands(kernel, bucket):
                for variant in variants(kernel, operand, arch, quick):
                    for fetch in ways(config):
                        yield Case(kernel, variant, operand, arch, bucket, config | fetch)


def ways(config: dict[str, int]) -> tuple[dict[str, int], ...]:
    """What a row has descriptors for is read by pointer where a weight lies unfit for them."""
    return ({"TMA": True}, {"TMA": False}) if config.get("TMA") else ({},)


def operands(kernel: str, bucket: str) -> tuple[str, ...]:
    """dz of the row kernels may have any dtype; a GEMM's bucket says how many bits an operand has."""
    if kernel in GEMMS:
        return ("fp32",) if bucket.startswith("32") else ("bf16", "fp16")
    return ("bf16", "fp32") if kernel in ("policy_rows_kernel", "grad_rows_kernel") else ("bf16",)


def variants(kernel: str, operand: str, arch: str, quick: bool) -> tuple[str, ...]:
    if kernel in ("merge_kernel", "scaled_kernel"):
        return ("plain",)
    if quick:
        return ("everything",) if operand == "bf16" else ()
    return ("plain", "everything", "buffers") if arch.startswith("gfx") else ("plain", "everything")


def signature(fn: Any, case: Case) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """(types, constants, attributes) of a kernel's arguments, as the launcher would specialise them."""
    import triton.language as tl

    given = {k: v for k, v in case.config.items() if k not in OPTIONS}
    given |= {"OPERAND": getattr(tl, OPERANDS[case.operand]), "WHOLE": case.variant == "plain"}
    given |= dict.fromkeys(FLAGS, VARIANTS[case.variant])
    given |= {pointer: None for flag, pointer in FLAGS.items() if pointer and not given[flag]}
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(fn.params):
        name = parameter.name
        if parameter.is_constexpr or (name in given and given[name] is None):
            types[name], constants[i,] = "constexpr", given[name]
            continue
        kind, _, special = ARGUMENTS[name].replace("operand", case.operand).partition(" ")
        if special == "= 1" and not case.odd:
            types[name], constants[i,] = "constexpr", 1
            continue
        if name in DESCRIBED and given.get("TMA"):
            types[name] = f"tensordesc<{case.operand}[{given[DESCRIBED[name]]}, {given['BLOCK_K']}]>"
            continue
        types[name] = kind
        if not case.odd and (kind.startswith("*") or special == "x16"):
            attributes[i,] = [["tt.divisibility", 16]]
        if kind.startswith("*") and case.variant == "buffers":
            attributes[i,] = [*attributes.get((i,), []), ["tt.pointer_range", 32]]
    return types, constants, attributes


def build(case: Case) -> sass.Facts | str:
    """Facts of the compiled kernel, or why it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(f"luffy_kernels._triton.{KERNELS[case.kernel][0]}"), case.kernel)
    target = (
        GPUTarget("hip", case.arch, 64) if case.arch.startswith("gfx") else GPUTarget("cuda", int(case.arch[3:]), 32)
    )
    options = {k: case.config[k] for k in OPTIONS if k in case.config}
    try:
        arguments = signature(fn, case)
    except KeyError as error:
        return f"argument {error} is neither in ARGUMENTS nor in FLAGS of bench.aot"
    try:
        return sass.inspect(triton.compile(ASTSource(fn, *arguments), target=target, options=options))
    except Exception as error:  # whatever the compiler raises is the answer for this row
        return f"does not compile: {str(error).strip().splitlines()[-1][:200]}"


def faults(case: Case, facts: sass.Facts) -> Iterator[str]:
    limit = sass.SHARED_KIB[case.arch] * 1024
    if facts.spills > SPILLS:
        yield f"spills {facts.spills} bytes per thread"
    if facts.shared > limit:
        yield f"takes {facts.shared} bytes of shared memory of {limit}"
    by_pointer = case.kernel not in GEMMS or not (case.operand == "fp32" or case.config["TMA"])
    if facts.load < 16 and case.kernel != "merge_kernel" and by_pointer:
        yield f"loads {facts.load} bytes at a time, not 16"
    if facts.store < 16 and writes_dz(case):
        yield f"stores dz {facts.store} bytes at a time, not 16"
    if not facts.ordered and writes_dz(case) and case.kernel not in GEMMS:
        yield "may write dz over logits before they are read"
    if facts.matrix == "-" and case.kernel in GEMMS and case.operand != "fp32":
        yield "multiplies without matrix instructions"


def writes_dz(case: Case) -> bool:
    return case.kernel in ("grad_rows_kernel", "grad_kernel") or (
        case.kernel == "policy_rows_kernel" and VARIANTS[case.variant]
    )


def report(case: Case, facts: sass.Facts | str) -> list[str]:
    """Prints the line of a case; what is wrong with it."""
    if isinstance(facts, str):
        return [f"{case}: {facts}"]
    shared = facts.shared / 1024
    print(
        f"{case!s:100}{facts.registers:4}{facts.spills:7}{shared:9.1f}{facts.load:5}{facts.store:6}  {facts.matrix}",
        flush=True,
    )
    return [f"{case}: {fault}" for fault in faults(case, facts)]


def run(todo: list[Case], workers: int = 2) -> tuple[list[dict[str, Any]], list[str]]:
    """Facts of every case and everything that is wrong with them."""
    rows, wrong = [], []
    print(f"{'kernel':19}{'variant':11}{'type':5}{'arch':7}{'config':58}regs spills   KiB  load store  matrix")
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for case, facts in zip(todo, pool.imap(build, todo), strict=True):
            wrong += report(case, facts)
            rows.append(case._asdict() | (facts._asdict() if isinstance(facts, sass.Facts) else {"error": facts}))
    return rows, wrong


def main(argv: list[str] | None = None) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # before the first @triton.jit, here and in the workers
    from luffy_kernels._triton import tuning

    parser = argparse.ArgumentParser(prog="bench.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=tuning.ARCHITECTURES, default=list(tuning.ARCHITECTURES))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--json", type=Path, help="write the facts to this file too")
    parser.add_argument("--quick", action="store_true", help="only bf16 with everything on, and not sm_89 (as sm_86)")
    given = parser.parse_args(argv)
    if given.quick:
        given.arch = [arch for arch in given.arch if arch != "sm_89"]
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)  # an empty one: what is reported was compiled now
        rows, wrong = run(list(cases(given.kernel, given.arch, given.quick)))
    print("\nbytes per logit" + "".join(f"\n  {k:19}{BYTES[k][0]:72}least: {BYTES[k][1]}" for k in given.kernel))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"\n{len(rows)} compiled, {len(wrong)} faults", *wrong, sep="\n", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
