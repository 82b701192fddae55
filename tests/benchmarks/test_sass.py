"""Counting a loop's instructions, on machine code written for it; and what the committed table holds."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("triton")

from benchmarks.kernels import sass
from dalle_kernels import Causal, Column, TokenLayout

# A loop with a mask that some ways skip, a wait that comes back from behind the exit, and a copy loop before it.
CODE = """
		Function : kernel
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 BRA 0x10 ;
        /*0030*/                   LDSM.16.M88.4 R8, [R20] ;
        /*0040*/              @!P2 BRA 0xf0 ;
        /*0050*/                   HMMA.16816.F32.BF16 R24, R8, R12, R24 ;
        /*0060*/               @P0 BRA 0x90 ;
        /*0070*/                   LOP3.LUT R5, R5, R6, RZ, 0xc0, !PT ;
        /*0080*/                   FSEL R24, R24, -INF , P3 ;
        /*0090*/                   MUFU.EX2 R24, R24 ;
        /*00a0*/                   SHFL.BFLY PT, R7, R24, 0x1, 0x1f ;
        /*00b0*/                   STS.128 [R9], R24 ;
        /*00c0*/                   NOP ;
        /*00d0*/               @P4 BRA 0x30 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R3 ;
        /*0100*/              @!P2 BRA 0xf0 ;
        /*0110*/                   BRA 0x50 ;
"""


def test_the_loop_and_its_ways() -> None:
    (code,) = sass.read(CODE).values()
    assert len(code) == 18
    (loop,) = sass.hot_loops(code)
    names = [instruction.name.partition(".")[0] for instruction in loop.full]
    assert names == ["LDSM", "BRA", "HMMA", "BRA", "MUFU", "SHFL", "STS", "BRA"]
    assert [instruction.name.partition(".")[0] for instruction in loop.masked] == [
        *names[:4],
        "LOP3",
        "FSEL",
        *names[4:],
    ]


def test_a_loop_of_two_rounds_in_a_step() -> None:
    (code,) = sass.read("""
		Function : kernel
        /*0000*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA 0x30 ;
        /*0020*/                   LOP3.LUT R5, R5, R6, RZ, 0xc0, !PT ;
        /*0030*/                   HMMA.16816.F32.BF16 R24, R8, R12, R24 ;
        /*0040*/               @P0 BRA 0x60 ;
        /*0050*/                   FSEL R24, R24, RZ , P3 ;
        /*0060*/               @P1 BRA 0x30 ;
        /*0070*/               @P2 BRA 0x0 ;
""").values()
    (loop,) = sass.hot_loops(code, rounds=2)
    full, masked = ([instruction.name.partition(".")[0] for instruction in way] for way in loop)
    assert full == ["LDG", "BRA", *["HMMA", "BRA", "BRA"], "BRA", *["HMMA", "BRA", "BRA"]]
    assert masked == ["LDG", "BRA", "LOP3", *["HMMA", "BRA", "FSEL", "BRA"], "BRA", *["HMMA", "BRA", "FSEL", "BRA"]]


def test_what_a_unit_costs() -> None:
    # One warp's m16n8k16: 2048 multiply-adds. A unit of one product over width 16 has 64 * 64 * 16: 32 times as many.
    kernel = sass.Kernel("kernel", CODE, products=1, width=16)
    row = sass.row_of(kernel, 90)
    masked = row["masked"]
    assert masked["cycles"]["issue"] == 10 * 32 / 4
    assert masked["cycles"]["tensor"] == round(64 * 64 * 16 / 2048 / 0.629, 1)  # mma.sync, not wgmma
    assert masked["cycles"]["mufu"] == 32 * 2
    assert masked["cycles"]["shared"] == 32 * (512 + 128 + 512) / 128
    assert masked["instructions"] == {
        "tensor": 32, "mufu": 32, "shared": 96, "global": 0, "local": 0, "branch": 96, "uniform": 0, "arithmetic": 64
    }  # fmt: skip
    assert row["full"] == masked  # a kernel without a schedule: the dearest way alone


@pytest.mark.parametrize(
    ("name", "pipe"),
    [
        ("HGMMA.64x64x16.F32.BF16", "tensor"),
        ("UTCHMMA", "tensor"),
        ("MUFU.EX2", "mufu"),
        ("LDSM.16.M88.4", "shared"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("LDG.E", "global"),
        ("STL.64", "local"),
        ("BAR.SYNC.DEFER_BLOCKING", "branch"),
        ("UIADD3", "uniform"),
        ("LDC.64", "uniform"),
        ("FFMA", "arithmetic"),
        ("F2FP.BF16.F32.PACK_AB", "arithmetic"),
        ("LEA.HI", "arithmetic"),
    ],
)
def test_pipes(name: str, pipe: str) -> None:
    assert sass.pipe(name) == pipe


def test_products_and_bytes_of_a_warpgroup() -> None:
    registers = sass.Instruction(0, "HGMMA.64x128x16.F32.BF16", "R56, R88, gdesc[UR4].tnspB, R56", "")
    both = registers._replace(operands="R24, gdesc[UR28], RZ, !UPT, gsb0 ")
    assert sass.multiply_adds(registers) == 64 * 128 * 16 // 4  # a warp's share
    assert sass.shared_bytes(registers) == 128 * 16 * 2 // 4
    assert sass.shared_bytes(both) == (128 + 64) * 16 * 2 // 4
    assert sass.multiply_adds(registers._replace(name="UTCHMMA")) == 0


def test_what_never_runs_is_issued_and_moves_nothing() -> None:
    (code,) = sass.read(
        "\n\t\tFunction : kernel\n /*0000*/ @!PT LDS RZ, [RZ] ;\n"
        " /*0010*/ @P0 LDS R4, [R5] ;\n /*0020*/ LDS R4, [R5] ;\n"
    ).values()
    assert [sass.pipe(instruction.name) for instruction in code] == ["shared"] * 3
    assert [sass.shared_bytes(instruction) for instruction in code] == [0, 128, 128]


def test_units_of_patterns() -> None:
    layout = TokenLayout(64, (8, 8))
    assert sass.units_of(Causal(layout), (64, 64), 0) == (1, 2)
    assert sass.blocks_of(Causal(layout), (64, 64)) == (1, 2)
    assert sass.blocks_of(Causal(layout), (128, 128)) == (0, 4)
    full, masked = sass.units_of(Column(layout), (64, 64), 16)
    assert (full, masked) == (1, 2)
    assert sass.units_of(Causal(layout), (32, 128), 0, by_key=True) == (0, 4)
    assert sass.units_of(Causal(layout), (32, 128), 32, by_key=True) == (0, 2.5)
    assert sass.units_of(Causal(layout), (32, 32), 0) == (1.5, 1)
    assert sass.units_of(Causal(layout), (32, 32), 0, at_once=2) == (1, 1.5)


def test_the_committed_table_has_every_kernel_and_architecture() -> None:
    table = sass.recorded()
    assert set(table) == {f"sm_{arch}" for arch in sass.ARCHITECTURES}
    for arch, rows in table.items():
        for backend in ("Triton", "CUDA", "FlexAttention"):
            assert any(name.startswith(backend) for name in rows), (arch, backend)
        for name, row in rows.items():
            assert row["full"]["cycles"]["issue"] > 0, (arch, name)
            assert row["full"]["cycles"]["issue"] <= row["masked"]["cycles"]["issue"], (arch, name)
    assert "FlashAttention 3 forward" in table["sm_90"]
    page = sass.NOTES.read_text()
    assert all(line in page for arch, rows in table.items() for line in sass.lines_of(arch, rows))


def test_auto_takes_cuda_where_its_floors_speak_for_it() -> None:
    rows = sass.recorded()["sm_80"]
    for width, pattern in product(sass.WIDTHS[80], sass.PATTERNS):  # dalle_kernels.attention.cuda.leads
        ours, theirs = (sass.floors(rows, width, pattern)[backend] for backend in ("CUDA", "Triton"))
        assert ours[0] < theirs[0], (width, pattern)
        assert 1.15 * sum(ours) < sum(theirs), (width, pattern)
