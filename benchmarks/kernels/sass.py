"""What the hot loops of the GPU kernels cost, counted from their machine code: `python -m benchmarks sass`.

For each loop that multiplies matrices: warp instructions by pipe for a unit of 64 x 64 pairs (queries by keys, rows by
codes), and what the unit costs a multiprocessor at the least, in cycles, by each thing that it could wait for:

    issue     warp instructions / 4 schedulers
    tensor    multiply-adds / what the tensor cores take a clock
    mufu      special functions / 16 a clock (exp2, log2, reciprocals)
    shared    bytes to and from shared memory / 128 a clock, matrix instructions that read it included

A loop may hold branches, such as what masks a tile: its cheapest way round that makes all products is "full", its
dearest "masked". Triton has two loops instead. Times the units of a pattern that is a time, and the largest of the four
is the least that the kernel can take; benchmarks/notes/sass.md says what this cannot show.

    python -m benchmarks sass --write                        # ours, and FlexAttention
    python -m benchmarks sass --write --flash flash_attn_3/_C.so       # and FlashAttention 3, from xformers' wheel

Needs Triton, and for the CUDA kernels nvcc or a built library (`--library`); no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton

from benchmarks.kernels import aot, aot_attention
from benchmarks.kernels.cuda_build import build_cuda
from dalle_kernels.backends import launch
from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import Causal, Column, Convolution, Pattern, Row
from dalle_kernels.patterns.schedule import Schedule, schedule_for

RESULTS = Path(__file__).parents[1] / "results" / "sass.json"
ARCHITECTURES = (80, 90, 100, 120)
UNIT = 64 * 64  # pairs
LAYOUT = TokenLayout(text_length=256, grid=(32, 32))
PATTERNS: dict[str, Pattern] = {
    "row": Row(LAYOUT),
    "column": Column(LAYOUT),
    "convolution": Convolution(LAYOUT, kernel_size=11),
    "causal": Causal(LAYOUT),
}
HEADS = 8 * 62  # of the case whose time is given: the paper's, in a batch of 8


class Machine(NamedTuple):
    """A GPU of an architecture, by its maker; benchmarks/notes/sass.md, "Rates", says where each number stands."""

    name: str
    multiprocessors: int
    gigahertz: float  # boost, while tensor cores work
    multiply_adds: int  # bf16 with fp32 sums, dense, a clock and multiprocessor
    shared: int  # bytes a multiprocessor
    warps: int
    by_warp: float = 1.0  # the share of `multiply_adds` that a warp's own instructions (mma.sync) reach


MACHINES = {
    80: Machine("A100", 108, 1.41, 1024, 164 * 1024, 64),
    90: Machine("H100, H200", 132, 1.83, 2048, 228 * 1024, 64, by_warp=0.629),
    100: Machine("B200", 148, 1.85, 4096, 228 * 1024, 64),
    120: Machine("RTX 5090", 170, 2.41, 256, 100 * 1024, 48),
}


# --- Machine code -----------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers
    operands: str
    predicate: str  # what it runs under; "@!PT": never, though it is issued


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);", re.MULTILINE)


def read(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each function that `cuobjdump -sass` lists."""
    functions: dict[str, list[Instruction]] = {}
    for part in re.split(r"^\s+Function : ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        functions[name.strip()] = [
            Instruction(int(address, 16), code, operands, predicate.strip())
            for address, predicate, code, operands in _LINE.findall(body)
        ]
    return functions


# By the first part of an instruction's name; what is in none of them is arithmetic.
_PIPES = {
    "tensor": r"[HIQO]G?MMA|UTC\w*MMA",
    "mufu": r"MUFU",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|SHFL|LDTM|STTM",
    "global": r"LDG|STG|LD|ST|LDGSTS|ATOMG?|RED|UTMALDG|UTMASTG|UBLKCP|UTMAPF|CCTL|UTMACCTL|UTMACMDFLUSH",
    "local": r"LDL|STL",
    "branch": r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|WARPSYNC|BAR|SYNCS|DEPBAR|LDGDEPBAR|NOP|YIELD|NANOSLEEP"
    r"|MEMBAR|FENCE|ERRBAR|WARPGROUP|UTCBAR|ELECT|ARRIVES|USETMAXREG|VOTE|CREDUX|ACQBULK|PREEXIT",
    "uniform": r"U[A-Z0-9]+|R2UR|S2UR|S2R|CS2R|LDC|LDCU|R2P",
}
PIPES = (*_PIPES, "arithmetic")


def pipe(name: str) -> str:
    """Which pipe takes an instruction; "uniform" is whatever is done once a warp."""
    first = name.partition(".")[0]
    return next((kind for kind, known in _PIPES.items() if re.fullmatch(known, first)), "arithmetic")


def multiply_adds(instruction: Instruction) -> int:
    """Those of one warp; a warpgroup's instruction is four warps' (wgmma: each issues it). 0 where the shape is not in
    the instruction, as in tcgen05's."""
    if match := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", instruction.name):
        m, n, k = map(int, match.groups())
        return m * n * k // 4
    if match := re.match(r"[HI]MMA\.168(8|16|32)\b", instruction.name):  # 16 x 8 x the last
        return 16 * 8 * int(match[1])
    return 0


def shared_bytes(instruction: Instruction) -> int:
    """What one warp's instruction moves to or from shared memory."""
    name, parts = instruction.name.partition(".")[0], instruction.name.split(".")
    if instruction.predicate == "@!PT":
        return 0
    if name in ("LDS", "STS", "LDGSTS"):
        return 32 * next((int(part) // 8 for part in parts if part in ("64", "128")), 4)
    if name in ("LDSM", "STSM"):
        return 128 * (int(parts[-1]) if parts[-1].isdigit() else 1)
    if name in ("SHFL", "ATOMS"):
        return 128
    if match := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", instruction.name):
        m, n, k = map(int, match.groups())
        both = instruction.operands.split(",")[1].strip().startswith("gdesc")  # else the first lies in registers
        return (n + m * both) * k * 2 // 4
    return 0


class Loop(NamedTuple):
    """A loop's instructions in its cheapest and its dearest way round."""

    full: list[Instruction]
    masked: list[Instruction]


def hot_loops(instructions: list[Instruction], rounds: int = 1) -> list[Loop]:
    """The innermost loops with matrix instructions, in the order of the code; with the loop around if `rounds` > 1."""
    place = {instruction.address: index for index, instruction in enumerate(instructions)}
    spans = []
    for index, instruction in enumerate(instructions):
        target = _target(instruction)
        if target is not None and target <= instruction.address and target in place:
            spans.append((place[target], index))
    tensor = [pipe(instruction.name) == "tensor" for instruction in instructions]
    ends = [instruction.name == "EXIT" and not instruction.predicate for instruction in instructions]
    # Code behind an exit is what waits go to when they have to, and they come back from there: no loop.
    hot = [(first, last) for first, last in spans if any(tensor[first:last]) and not any(ends[first:last])]
    # Of the ways back to one place the longest is the loop.
    longest = {first: max(last for start, last in hot if start == first) for first, _ in hot}
    found = sorted(longest.items())
    inner = [
        (first, last)
        for first, last in found
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in found)
    ]
    loops = []
    for first, last in inner:
        loop = _ways(instructions, first, last)
        if rounds > 1:
            _, start, stop = min((b - a, a, b) for a, b in found if a < first and last < b)
            around = _ways(instructions, start, stop)  # which passes through the inner loop once
            loop = Loop(*(whole + (rounds - 1) * way for whole, way in zip(around, loop, strict=True)))
        loops.append(loop)
    return loops


def _target(instruction: Instruction) -> int | None:
    if not re.match(r"BRA\b", instruction.name):
        return None
    match = re.search(r"0x([0-9a-f]+)", instruction.operands)
    return int(match[1], 16) if match else None


def _ways(instructions: list[Instruction], first: int, last: int) -> Loop:
    """The ways through a loop's body without going round anything inside it: of those with the most matrix instructions
    the one with the fewest instructions, and the one with the most."""
    place = {instruction.address: index for index, instruction in enumerate(instructions)}
    best: dict[int, dict[bool, tuple[int, int, tuple[int, ...]]]] = {}

    def follow(index: int) -> list[int]:
        instruction = instructions[index]
        target = _target(instruction)
        onward = [index + 1]
        if target is not None:
            to = place.get(target, -1)
            onward = (
                [index + 1] if instruction.predicate or "P" in instruction.operands.partition("0x")[0] else []
            ) + ([to] if index < to <= last else [])
        elif re.match(r"(EXIT|RET)\b", instruction.name) and not instruction.predicate:
            onward = []
        return [to for to in onward if first < to <= last]

    for index in range(last, first - 1, -1):
        tensor = pipe(instructions[index].name) == "tensor"
        best[index] = {}
        for dear in (False, True):
            ways = [best[to][dear] for to in follow(index) if dear in best[to]]
            if index == last:
                ways = [(0, 0, ())]
            if not ways:
                continue
            most = max(way[0] for way in ways)
            sizes = [way for way in ways if way[0] == most]
            way = (max if dear else min)(sizes, key=lambda way: way[1])
            best[index][dear] = (way[0] + tensor, way[1] + 1, (index, *way[2]))
    full, masked = (best[first].get(dear, (0, 0, ()))[2] for dear in (False, True))
    return Loop(
        *([instructions[index] for index in way if instructions[index].name != "NOP"] for way in (full, masked))
    )


# --- What a loop costs ------------------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """A kernel's machine code, and what is to be known beside it.

    Attributes:
        name: as tables have it.
        code: of `cuobjdump -sass`, the function's part.
        products: matrix products over a unit: by it the pairs of a way round follow from its multiply-adds.
        width: the head dimension, or the codebook's.
        pairs: pairs that a warp takes in a way round, where machine code does not say (tcgen05).
        tile: (queries, keys) that are visited whole, but for each `slab` queries of it that see nothing, or keys that
            nothing sees where lists are `by_key`.
        rounds: of the innermost loop in a step of the loop around it, which belongs to the step.
        at_once: full tiles that a step of the first loop takes; what is left of a list's the other loop takes.
        threads: of a block; registers and bytes of shared memory: of the compiled kernel, 0 where the host decides.
    """

    name: str
    code: str
    products: int
    width: int
    pairs: float = 0.0
    tile: tuple[int, int] | None = None
    slab: int = 0
    by_key: bool = False
    rounds: int = 1
    at_once: int = 1
    threads: int = 128
    registers: int = 0
    shared: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def count(way: list[Instruction], kernel: Kernel, arch: int, tiles: int = 1) -> dict[str, Any]:
    """Warp instructions by pipe for a unit, and its cycles by bound, of a way that takes so many tiles."""
    made = sum(multiply_adds(instruction) for instruction in way)
    products = kernel.products * kernel.width * UNIT
    units = made / products if made else tiles * kernel.pairs / UNIT
    if not units:
        raise ValueError(f"{kernel.name}: its matrix instructions do not say their shape, wanted `pairs`")
    counts = dict.fromkeys(PIPES, 0)
    for instruction in way:
        counts[pipe(instruction.name)] += 1
    machine = MACHINES[arch]
    share = machine.by_warp if any(re.match("[HI]MMA", instruction.name) for instruction in way) else 1.0
    cycles = {
        "issue": len(way) / units / 4,
        "tensor": products / machine.multiply_adds / share,
        "mufu": counts["mufu"] / units * 2,
        "shared": sum(map(shared_bytes, way)) / units / 128,
    }
    return {
        "instructions": {name: round(number / units, 1) for name, number in counts.items()},
        "cycles": {name: round(number, 1) for name, number in cycles.items()},
    }


def blocks(kernel: Kernel, arch: int) -> int:
    """Blocks a multiprocessor, by registers, threads and, where it is known, shared memory."""
    machine, warps = MACHINES[arch], kernel.threads // 32
    by_registers = 65536 // (-(-kernel.registers // 8) * 8 * 32 * warps) if kernel.registers else 32
    by_shared = machine.shared // (kernel.shared + 1024) if kernel.shared else 32
    return min(by_registers, by_shared, machine.warps // warps, 32)


def units_of(
    pattern: Pattern, tile: tuple[int, int], slab: int, at_once: int = 1, by_key: bool = False
) -> tuple[float, float]:
    """(full, masked) units of one head, in tiles of the schedule; of masked ones only the slabs that see something.

    Full tiles of a list beyond a multiple of `at_once` count as masked.
    """
    schedule: Schedule = schedule_for(pattern, tile)
    size = tile[0] * tile[1] / UNIT
    if by_key:
        lists = schedule.query_offsets, schedule.query_full_counts, schedule.query_mask_ids
        masks = schedule.masks_transposed
    else:
        lists, masks = (schedule.key_offsets, schedule.full_counts, schedule.mask_ids), schedule.masks
    starts, full_counts, mask_ids = (entries.numpy() for entries in lists)
    full = int((full_counts // at_once * at_once).sum())
    masked = float(full_counts.sum() - full) * size
    seen: dict[int, float] = {}
    for row, (start, stop) in enumerate(pairwise(starts)):
        for mask in mask_ids[start + full_counts[row] : stop].tolist():
            if mask not in seen:
                rows = masks[mask].numpy().any(-1)
                seen[mask] = float(rows.reshape(-1, slab or len(rows)).any(-1).mean())
            masked += seen[mask] * size
    return full * size, masked


def blocks_of(pattern: Pattern, tile: tuple[int, int]) -> tuple[float, float]:
    """The same for blocks of a dense mask, as FlexAttention has them."""
    mask = pattern.mask().numpy()
    padded = np.zeros([-(-size // step) * step for size, step in zip(mask.shape, tile, strict=True)], bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    cells = padded.reshape(padded.shape[0] // tile[0], tile[0], padded.shape[1] // tile[1], tile[1]).sum((1, 3))
    full = int((cells == tile[0] * tile[1]).sum())
    size = tile[0] * tile[1] / UNIT
    return full * size, int(((cells > 0) & (cells < tile[0] * tile[1])).sum()) * size


def row_of(kernel: Kernel, arch: int) -> dict[str, Any]:
    """The table's row of one kernel."""
    (code,) = read(kernel.code).values()
    loops = hot_loops(code, kernel.rounds)
    if not loops:
        raise ValueError(f"{kernel.name}: no loop with matrix instructions")
    machine = MACHINES[arch]
    tiles = [kernel.at_once, *[1] * (len(loops) - 1)]
    costs = [
        (count(loop.full, kernel, arch, taken), count(loop.masked, kernel, arch, taken))
        for loop, taken in zip(loops, tiles, strict=True)
    ]
    ways = {
        "full": min((full for full, _ in costs), key=lambda cost: cost["cycles"]["issue"]),
        "masked": max((masked for _, masked in costs), key=lambda cost: cost["cycles"]["issue"]),
    }
    if kernel.tile is None and "FlashAttention" not in kernel.name:  # lookups: with noise, as in training
        ways["full"] = ways["masked"]
    row: dict[str, Any] = {
        "registers": kernel.registers,
        "shared": kernel.shared,
        "blocks": blocks(kernel, arch),
        "loops": len(loops),
        **ways,
        **kernel.facts,
    }
    if kernel.tile is not None:
        row["microseconds"] = {}
        for name, pattern in PATTERNS.items():
            flex = "block" in kernel.facts
            units = units_of(pattern, kernel.tile, kernel.slab, kernel.at_once, kernel.by_key)
            full, masked = blocks_of(pattern, kernel.tile) if flex else units
            times = {
                bound: (full * ways["full"]["cycles"][bound] + masked * ways["masked"]["cycles"][bound])
                * HEADS
                / machine.multiprocessors
                / machine.gigahertz
                / 1e3
                for bound in ways["full"]["cycles"]
            }
            row["microseconds"][name] = {bound: round(time, 1) for bound, time in times.items()}
    return row


# --- Kernels ----------------------------------------------------------------------------------------------------------


def sass_of(cubin: bytes) -> str:
    """The machine code in a cubin, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return aot._tool("cuobjdump", "-sass", file.name)


def registers_of(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = aot._tool("cuobjdump", "-res-usage", file.name)
    return max(map(int, re.findall(r"REG:(\d+)", usage)))


def of_triton(name: str, compiled: Any, products: int, width: int, **facts: Any) -> Kernel:
    """A kernel that Triton compiled; `facts` are `Kernel`'s."""
    cubin, warps = compiled.asm["cubin"], compiled.metadata.num_warps
    facts["facts"] = {"compiler": f"Triton {triton.__version__}", **facts.get("facts", {})}
    return Kernel(
        name,
        sass_of(cubin),
        products,
        width,
        threads=32 * warps,
        registers=registers_of(cubin),
        shared=compiled.metadata.shared,
        **facts,
    )


ATTENTION = {  # function: name, products
    "attention_forward": ("Triton forward", 2),
    "attention_backward_keys": ("Triton backward, keys", 4),
    "attention_backward_queries": ("Triton backward, queries", 3),
}
GUMBEL = {  # of width 128
    "gumbel/16-bit/128": ("gumbel_forward_kernel", "Triton Gumbel forward", 1),
    "gumbel/16-bit/128/backward": ("gumbel_backward_kernel", "Triton Gumbel backward", 2),
}
# Head dimensions that are counted: where the choice between Triton and CUDA hangs on it, all that CUDA serves.
WIDTHS = {80: (16, 32, 64, 80, 96, 128)}
WIDTH = 64  # of all architectures, and of rows whose names tell none


def named(name: str, width: int) -> str:
    return name if width == WIDTH else f"{name}, D = {width}"


def triton_kernels(arch: int) -> Iterator[Kernel]:
    """Ours, in bfloat16 at the paper's sizes."""
    for width in WIDTHS.get(arch, (WIDTH,)):
        with aot.recording(arch) as compiled:
            aot_attention.attention(16, width)()
        for function, (name, products) in ATTENTION.items():
            kernel: Any = compiled[function]
            settings = launch.settings_for(function, arch, 16, width)
            tile = settings["query_tile"], settings["key_tile"]
            yield of_triton(
                named(name, width),
                kernel,
                products,
                max(16, triton.next_power_of_2(width)),  # what it multiplies
                tile=tile,
                at_once=settings.get("full_tiles_at_once", 1),
                pairs=tile[0] * tile[1] / kernel.metadata.num_warps,
            )
    for case, call in aot.all_cases(arch):
        if case in GUMBEL:
            function, name, products = GUMBEL[case]
            with aot.recording(arch) as compiled:
                call()
            kernel = compiled[function]
            settings = launch.settings_for(function.removesuffix("_kernel"), arch, 16, 128)
            pairs = settings["BLOCK_N"] * 4 * settings["BLOCK_Q"] / kernel.metadata.num_warps
            yield of_triton(name, kernel, products, 128, pairs=pairs)


def cuda_kernels(arch: int, library: Path) -> Iterator[Kernel]:
    """The CUDA kernels, as the library holds them for sm_80 and sm_90; for later GPUs its PTX, assembled as the driver
    would."""
    mark = {80: "sm_80", 90: "sm_90"}.get(arch)
    with tempfile.TemporaryDirectory() as folder:
        if mark is not None:
            text = aot._tool("cuobjdump", "-sass", "-arch", mark, str(library))
            usage = aot._tool("cuobjdump", "-res-usage", "-arch", mark, str(library))
        else:
            text, usage = _assembled(library, arch, Path(folder))
    registers = {name: int(number) for name, number in re.findall(r"Function (\w+):\s+REG:(\d+)", usage)}
    parts = {
        part.partition("\n")[0].strip(): "\n\tFunction : " + part
        for part in re.split(r"^\s+Function : ", text, flags=re.MULTILINE)[1:]
    }
    # name, the function's in its mangled one, products, tile
    known = [
        ("CUDA forward", "14forward_kernel", 2, (128, 32)),
        ("CUDA backward, keys", "10key_kernel", 4, (32, 128)),
        ("CUDA backward, queries", "12query_kernel", 3, (128, 32)),
    ]
    for (name, mangled, products, tile), width in product(known, WIDTHS.get(arch, (WIDTH,))):
        by_key = tile[1] > tile[0]
        rows = 32 if width <= 64 else 16  # of a warp
        for function, code in parts.items():
            if f"{mangled}I8Bfloat16Li{width}E" in function:
                yield Kernel(
                    named(name, width),
                    code,
                    products,
                    width,
                    tile=tile,
                    slab=rows,
                    by_key=by_key,
                    rounds=1 + by_key,
                    threads=32 * 128 // rows,
                    registers=registers.get(function, 0),
                )


def _assembled(library: Path, arch: int, folder: Path) -> tuple[str, str]:
    subprocess.run(
        [aot.TOOLS / "cuobjdump", "-xptx", "all", str(library.resolve())], cwd=folder, check=True, capture_output=True
    )
    text, usage = "", ""
    assembler = aot.TOOLS / ("ptxas-blackwell" if arch >= 100 and (aot.TOOLS / "ptxas-blackwell").exists() else "ptxas")
    for ptx in sorted(folder.glob("*.ptx")):
        source = ptx.read_text()
        if not re.search("8Bfloat16Li64E", source):
            continue
        cubin = ptx.with_suffix(".cubin")
        subprocess.run([assembler, f"-arch=sm_{arch}", "-O3", str(ptx), "-o", str(cubin)], check=True)
        text += aot._tool("cuobjdump", "-sass", str(cubin))
        usage += aot._tool("cuobjdump", "-res-usage", str(cubin))
    return text, usage


def flash_kernels(library: Path) -> Iterator[Kernel]:
    """FlashAttention 3's for sm_90a, bfloat16, width 64, without masks, from a library that holds them."""
    # CollectiveMainloopFwdSm90<stages, cluster, (rows, columns, width), width, element, sum, arch, causal, ...>
    false = r"(?:false, ){5}"
    wanted = {
        "FlashAttention 3 forward": (
            rf"MainloopFwdSm90<2, .{{1,60}}tuple<.{{3,12}}, .{{3,12}}, cute::C<64> >, 64, cutlass::bfloat16_t, float, "
            rf"cutlass::arch::Sm90, {false}",
            2,
        ),
        "FlashAttention 3 backward": (
            rf"MainloopBwdSm90<.{{1,80}}tuple<.{{3,14}}, .{{3,14}}, cute::C<64> >, cutlass::bfloat16_t, float, "
            rf"cutlass::arch::Sm90, {false}",
            5,
        ),
    }
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(
            [aot.TOOLS / "cuobjdump", "-xelf", "sm_90a", str(library.resolve())],
            cwd=name,
            check=True,
            capture_output=True,
        )
        for cubin in sorted(Path(name).glob("*.cubin")):
            symbols = sorted(set(re.findall(rb"_ZN7cutlass13device_kernel\w+", cubin.read_bytes())))
            for symbol in (each.decode() for each in symbols):
                if "bfloat16" not in symbol or "Sm90I" not in symbol:
                    continue
                readable = build_cuda.run(["c++filt", symbol])
                for kind, (pattern, products) in list(wanted.items()):
                    if re.search(pattern, readable):
                        del wanted[kind]
                        code = aot._tool("cuobjdump", "-sass", "-fun", symbol, str(cubin))
                        usage = aot._tool("cuobjdump", "-res-usage", "-fun", symbol, str(cubin))
                        used = int(re.findall(r"REG:(\d+)", usage)[0])
                        yield Kernel(kind, code, products, 64, threads=384, registers=used)
                if not wanted:
                    return


def flex_kernels(arch: int) -> Iterator[Kernel]:
    """FlexAttention's forward for the paper's row attention, as Inductor writes it."""
    from benchmarks.kernels import sass_flex

    for block in (128, 64):
        compiled, pairs = sass_flex.compile_forward(arch, MACHINES[arch].multiprocessors, block)
        name = f"FlexAttention forward, blocks of {block}"
        by_warp = pairs / compiled.metadata.num_warps
        yield of_triton(name, compiled, 2, 64, tile=(block, block), pairs=by_warp, facts={"block": block})


# --- The table --------------------------------------------------------------------------------------------------------


def survey(arch: int, library: Path | None, flash: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of one architecture by kernel."""
    sources: list[Callable[[], Iterable[Kernel]]] = [lambda: triton_kernels(arch), lambda: flex_kernels(arch)]
    if library is not None:
        sources.insert(1, lambda: cuda_kernels(arch, library))
    if flash is not None and arch == 90:
        sources.append(lambda: flash_kernels(flash))
    return {kernel.name: row_of(kernel, arch) for source in sources for kernel in source()}


def recorded() -> dict[str, Any]:
    """The committed table: "sm_90" -> kernel -> row."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(tables: dict[str, dict[str, Any]]) -> None:
    """Puts rows into the committed table; those of kernels that were not asked for stay."""
    everything = recorded()
    for arch, rows in tables.items():
        everything.setdefault(arch, {}).update(rows)
    blocks_ = []
    for arch, rows in sorted(everything.items(), key=lambda item: int(item[0][3:])):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
        blocks_.append(f' "{arch}": {{\n{lines}\n }}')
    temporary = RESULTS.with_suffix(f".{os.getpid()}")
    temporary.write_text("{\n" + ",\n".join(blocks_) + "\n}\n")
    os.replace(temporary, RESULTS)


def least(row: dict[str, Any], pattern: str) -> tuple[str, float]:
    """What bounds a kernel over a pattern, and the microseconds."""
    times = row["microseconds"][pattern]
    bound = max(times, key=times.__getitem__)
    return bound, times[bound]


def lines_of(arch: str, rows: dict[str, Any]) -> list[str]:
    """One architecture's table in Markdown."""
    machine = MACHINES[int(arch[3:])]
    lines = [
        f"### {arch}: {machine.name}",
        "",
        "| kernel | issue, full / masked | tensor | special | shared, full / masked | registers, blocks "
        "| row | column |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        if "D = " in name:
            continue
        full, masked = row["full"]["cycles"], row["masked"]["cycles"]

        def pair(bound: str, full: dict[str, float] = full, masked: dict[str, float] = masked) -> str:
            same = full[bound] == masked[bound]
            return f"{full[bound]:.0f}" if same else f"{full[bound]:.0f} / {masked[bound]:.0f}"

        times = ["", ""]
        if "microseconds" in row:
            found = [least(row, pattern) for pattern in ("row", "column")]
            times = [f"{time:.0f} us, {bound}" for bound, time in found]
        cells = [name, pair("issue"), pair("tensor"), pair("mufu"), pair("shared")]
        lines.append("| " + " | ".join([*cells, f"{row['registers']}, {row['blocks']}", *times]) + " |")
    if len(widths := WIDTHS.get(int(arch[3:]), ())) > 1:
        lines += [
            "",
            "The least microseconds over row attention, by head dimension:",
            "",
            "| D | CUDA forward | Triton forward | CUDA backward | Triton backward |",
            "|---|---|---|---|---|",
        ]
        for width in widths:
            times = [f"{time:.0f}" for backend in floors(rows, width).values() for time in backend]
            lines.append(f"| {width} | {times[0]} | {times[2]} | {times[1]} | {times[3]} |")
    return lines


def floors(rows: dict[str, dict[str, Any]], width: int, pattern: str = "row") -> dict[str, tuple[float, float]]:
    """Backend -> the least microseconds (forward, backward) over a pattern at a head dimension."""

    def of(name: str) -> float:
        return least(rows[named(name, width)], pattern)[1]

    return {
        backend: (of(f"{backend} forward"), of(f"{backend} backward, keys") + of(f"{backend} backward, queries"))
        for backend in ("CUDA", "Triton")
    }


def plot(everything: dict[str, Any], path: Path) -> None:
    """The four bounds of each attention kernel over the row pattern, an axis an architecture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dalle_kernels"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(everything), figsize=(5 * len(everything), 4.5), layout="constrained")
    for axis, (arch, rows) in zip(np.atleast_1d(axes), everything.items(), strict=True):
        timed = {
            name: row["microseconds"]["row"]
            for name, row in sorted(rows.items())
            if "microseconds" in row and "D = " not in name
        }
        for place, bound in enumerate(("issue", "tensor", "mufu", "shared")):
            heights = [times[bound] for times in timed.values()]
            axis.barh(np.arange(len(timed)) + 0.2 * place, heights, 0.2, label=bound)
        axis.set_yticks(np.arange(len(timed)) + 0.3, list(timed), fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("least microseconds, row attention, 8 x 62 heads of 64")
        axis.set_title(f"{arch}: {MACHINES[int(arch[3:])].name}")
    np.atleast_1d(axes)[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


NOTES = Path(__file__).parents[1] / "notes" / "sass.md"
PLOT = Path(__file__).parents[1] / "results" / "plots" / "sass.svg"
_START, _END = "<!-- sass:start -->", "<!-- sass:end -->"


def render() -> None:
    """Rewrites the tables of the page, and the plot, from the committed table."""
    everything = recorded()
    tables = "\n\n".join("\n".join(lines_of(arch, rows)) for arch, rows in everything.items())
    text = NOTES.read_text()
    before, _, rest = text.partition(_START)
    _, _, after = rest.partition(_END)
    temporary = NOTES.with_suffix(f".{os.getpid()}")
    temporary.write_text(f"{before}{_START}\n{tables}\n{_END}{after}")
    os.replace(temporary, NOTES)
    plot(everything, PLOT)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sass", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument(
        "--library", type=Path, help="the CUDA kernels; built where this is not given and nvcc is there"
    )
    parser.add_argument("--flash", type=Path, help="flash_attn_3/_C.so of an xformers wheel")
    parser.add_argument("--write", action="store_true", help="update the committed table, its page and its plot")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    library = options.library
    if library is None and build_cuda.find_nvcc():
        library = Path(__file__).parents[2] / "build" / "cuda" / "_cuda.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        build_cuda.build(library)
    if options.json:
        print(json.dumps(survey(options.arch[0], library, options.flash)))
        return 0
    tables = {}
    for arch in options.arch:
        command = [sys.executable, "-m", "benchmarks.kernels.sass", "--json", "--arch", str(arch)]
        command += [] if library is None else ["--library", str(library)]
        command += [] if options.flash is None else ["--flash", str(options.flash)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        tables[f"sm_{arch}"] = json.loads(done.stdout.splitlines()[-1])
        print("\n".join(lines_of(f"sm_{arch}", tables[f"sm_{arch}"])), flush=True)
        if options.write:
            record(tables)
            render()
    return 0


if __name__ == "__main__":
    sys.exit(main())
