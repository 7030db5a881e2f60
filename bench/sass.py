"""What compiled device code says about itself: registers, spills, shared memory, access widths, matrix instructions.

NVIDIA code is read from SASS through the disassembler that Triton carries, AMD code from its assembly text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# KiB of shared memory that one program may take. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability", maximum per thread block; 1 KiB more of each is the system's. AMD: LDS of a compute unit, CDNA 3
# and CDNA 4 instruction set architecture guides.
SHARED_KIB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}
MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA|v_mfma)")


class Facts(NamedTuple):
    registers: int  # per thread
    spills: int  # bytes of stack per thread; NVIDIA counts any stack, for these kernels need none
    shared: int  # bytes per program
    load: int  # widest access to global memory of one thread, bytes; 0 where there is none
    store: int
    matrix: str  # the matrix instruction, "-" where there is none
    ordered: bool  # see `ordered`


def inspect(kernel: Any) -> Facts:
    """Facts of what triton.compile returned."""
    if "cubin" in kernel.asm:
        usage, text = _disassemble(kernel.asm["cubin"])
        return read_sass(text, usage, kernel.metadata.shared)
    return read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    from triton import knobs  # late: these facts can be read where Triton is not

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, text = (
            subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, text


def read_sass(text: str, usage: str, shared: int) -> Facts:
    code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    loads = [_bytes_of_sass(x) for x in code if re.match(r"(LDG|LDGSTS|UTMALDG)\b", x)]
    stores = [_bytes_of_sass(x) for x in code if re.match(r"(STG|UTMASTG)\b", x)]
    return Facts(
        registers=_number(r"REG:(\d+)", usage),
        spills=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        shared=shared,
        load=max(loads, default=0),
        store=max(stores, default=0),
        matrix=_matrix(text),
        ordered=ordered(_kinds(code, {"L": r"LDG\S*\.(?:128|256)", "B": r"BAR\.", "S": r"STG\S*\.(?:64|128|256)"})),
    )


def read_amdgcn(text: str, shared: int) -> Facts:
    code = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    # A release fence at work-group scope needs no s_waitcnt vmcnt(0): the waves of a group share one L1, which serves
    # them in order, unless the group is split over compute units (LLVM's AMDGPU memory model, gfx90a and later).
    split = _number(r"\.amdhsa_tg_split (\d+)", text) != 0
    steps = _kinds(
        code, {"L": r"(global|buffer)_load_dwordx4", "B": r"s_barrier", "S": r"(global|buffer)_store_dwordx"}
    )
    return Facts(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=_number(r"\.private_segment_fixed_size: (\d+)", text)
        + 4 * (_number(r"\.vgpr_spill_count: (\d+)", text) + _number(r"\.sgpr_spill_count: (\d+)", text)),
        shared=shared,
        load=max(map(_bytes_of_amdgcn, (x for x in code if re.match(r"(global|buffer)_load", x))), default=0),
        store=max(map(_bytes_of_amdgcn, (x for x in code if re.match(r"(global|buffer)_store", x))), default=0),
        matrix=_matrix(text),
        ordered=ordered(steps) and not split,
    )


def ordered(steps: str) -> bool:
    """Whether all loads of a block of dz come before its barrier and all stores after it.

    steps: L wide loads, B barriers and S wide stores in the order of the code. The last barrier is `write_gradient`'s
    own; since the one before it there may have been stores of the block before, where the loop is unrolled.
    """
    return re.search(r"(^|B)S*L+BS+$", steps) is not None


def _kinds(code: list[str], patterns: dict[str, str]) -> str:
    return "".join(kind for x in code for kind, pattern in patterns.items() if re.match(pattern, x))


def _bytes_of_sass(instruction: str) -> int:
    if instruction.startswith("UTMA"):
        return 16  # a bulk copy: the unit moves whole lines
    if width := re.search(r"\.(64|128|256)\b", instruction.replace("LTC128B", "")):
        return int(width[1]) // 8
    return {"8": 1, "16": 2}.get(m[1], 4) if (m := re.search(r"\.[US](8|16)\b", instruction)) else 4


def _bytes_of_amdgcn(instruction: str) -> int:
    if m := re.search(r"dwordx(\d)", instruction):
        return 4 * int(m[1])
    return 4 if "dword" in instruction else 2 if "short" in instruction else 1


def _matrix(text: str) -> str:
    found = MATRIX.search(text)
    return found[1] if found else "-"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
