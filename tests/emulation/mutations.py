"""Makes the CUDA kernels wrong on purpose, one line at a time, and reports which mistakes the tests let pass.

    python -m tests.emulation.mutations                      # all, about an hour; exit status 1 if one survives
    python -m tests.emulation.mutations --match padding      # those whose file or meaning holds this
    python -m tests.emulation.mutations --write              # and puts them into benchmarks/notes/cuda-mutations.md

Each is tried on a copy of the sources in a temporary folder: the emulation is built from it, and the tests of its room
run until one fails.
"""

# ruff: noqa: E501  (what a line of a kernel becomes stands in one line)

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "notes" / "cuda-mutations.md"

ATTENTION = ("tests/cuda/test_attention.py", "tests/cuda/test_nan.py")
DECODE = ("tests/cuda/test_decode.py", "tests/cuda/test_nan.py")
SAMPLING = ("tests/cuda/test_sampling.py",)


class Mutation(NamedTuple):
    """`old`, which stands once in csrc/`file`, becomes `new`."""

    file: str
    meaning: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file: str, tests: tuple[str, ...], *entries: tuple[str, str, str]) -> Iterator[Mutation]:
    for meaning, old, new in entries:
        yield Mutation(file, meaning, old, new, tests)


MUTATIONS: tuple[Mutation, ...] = (
    *_of(
        "attention/tiles.cuh",
        ATTENTION,
        ("walk: no barrier before a tile is used", "    __syncthreads();  // the tile is whole, and nobody reads the slot", "    // the slot"),
        ("walk: one copy group too few waited for", "copy_async_wait<kAhead - 1>()", "copy_async_wait<kAhead>()"),
        ("walk: one step too few loaded in front", "load_ahead(index + kAhead)", "load_ahead(index + kAhead - 1)"),
        ("walk: loads past the part's last step", "if (index < last_step_) {", "if (index <= last_step_) {"),
        ("walk: no group where nothing is loaded", "    copy_async_commit();  // one group a step", "    if (index < last_step_) copy_async_commit();  //"),
        ("walk: the first step's tile is not loaded", "for (int step = first_step; step <", "for (int step = first_step + 1; step <"),
        ("copy: a row past the end", "const bool valid = position < walk.length;", "const bool valid = position <= walk.length;"),
        ("copy: the last 16 bytes of rows left out", "i < kColumns * kPieces; i += kThreads", "i < kColumns * kPieces - 1; i += kThreads"),
        ("copy: the second tile of the first one's rows", "second.row(token)", "first.row(token)"),
        ("scores: rows of a matrix in another order", "tile + (lane / 16 * 8 + lane % 8) * kBytes + lane / 8 % 2 * 16", "tile + (lane / 8 % 2 * 8 + lane % 8) * kBytes + lane / 16 * 16"),
        ("values: two words of operand A exchanged", "weights[part][2 * k + i / 2] + i % 2 * 2", "weights[part][2 * k + i / 2] + (1 - i % 2) * 2"),
        ("scores: the second part's are the first's", "mma<T>(sums[part][2 * n], a[part][k], b[0], b[1]);", "mma<T>(sums[part][2 * n], a[0][k], b[0], b[1]);"),
        ("values: the second part's weights are the first's", "mma<T>(sums[part][2 * n + 1], a[part], b[2], b[3]);", "mma<T>(sums[part][2 * n + 1], a[0], b[2], b[3]);"),
        ("mask: row g + 8 reads row g + 4", "own(load(mask + 8), place.c)", "own(load(mask + 4), place.c)"),
        ("mask: the second part reads the first's rows", "* kRowTile + place.row(part, kParts)", "* kRowTile + place.row(0, kParts)"),
        ("mask: rows g + 8 see what rows g do", "<< (4 * part + 2)", "<< (4 * part)"),
        ("mask: a lane's columns are those beside", "return word >> 2 * c & 0x03030303u;", "return word >> 2 * (c ^ 1) & 0x03030303u;"),
        ("mask: every second column", "bits >> (8 * (first + n) + 4 * part + i) & 1", "bits >> (8 * (first + n) + 4 * part + (i & 2)) & 1"),
        ("mask: the second piece of a step as the first", "bits >> (8 * (first + n)", "bits >> (8 * (0 * first + n)"),
        ("mask: a lane that sees nothing speaks for its warp", "return __any_sync(0xffffffffu, bits != 0);", "return bits != 0;"),
        ("mask: a warp skips what only its second part sees", "return __any_sync(0xffffffffu, bits != 0);", "return __any_sync(0xffffffffu, (bits & 0x0f0f0f0fu) != 0);"),
        ("mask: a warp skips what only rows g + 8 see", "return __any_sync(0xffffffffu, bits != 0);", "return __any_sync(0xffffffffu, (bits & 0x33333333u) != 0);"),
        ("padding: of the first sample", "      padding += static_cast<int64_t>(place.batch) * walk.length;\n", ""),
        ("padding: of other columns", "step.tile * kColumns + place.lane", "step.tile * kColumns + (place.lane ^ 1)"),
        ("padding: of tokens past the end", "position < walk.length ? load(walk.order + position) : -1;\n      padding", "load(walk.order + position);\n      padding"),
        ("padding: rows g + 8 stay", "      kept |= kept << 2;\n", "      kept |= 0x0c0c0c0cu;\n"),
        ("padding: the second part stays", "bits &= kept | kept << 4;", "bits &= kept | 0xf0f0f0f0u;"),
        ("rows: g + 8 is g + 4", "const int own = position + 8 * half;", "const int own = position + 4 * half;"),
        ("rows: those of the second part are the first's", "(warp * parts + part) * 16 + g", "warp * parts * 16 + g"),
    ),
    *_of(
        "attention/forward_kernel.cuh",
        ATTENTION,
        ("padding forgotten where a tile is full", "const bool masked = step.mask != 0 || p.padding != nullptr;", "const bool masked = step.mask != 0;"),
        ("values read where keys lie", "multiply<T>(acc, score, keys + kTileBytes<kWidth>, place.lane)", "multiply<T>(acc, score, keys, place.lane)"),
        ("another slot", "slots + step.slot * kSlot<kWidth>;\n      float score", "slots + (step.slot ^ 1) * kSlot<kWidth>;\n      float score"),
        ("a negative scale taken for a positive one", "p.scale < 0.0f ? 0x80008000u : 0u", "0u"),
        ("a scale of 0", "fmaxf(fabsf(p.scale) * kLog2E, 1e-30f)", "fabsf(p.scale) * kLog2E"),
    ),
    *_of(
        "attention/softmax.cuh",
        ATTENTION,
        ("sums of the second row not rescaled", "        acc[n][2 * half + 1] *= old;\n", ""),
        ("weights not rescaled", "      l[half] *= old;\n", ""),
        ("a lane's own maximum", "largest_of_quad(largest[half]) * slope", "largest[half] * slope"),
        ("a lane raises its maximum alone", "if (__any_sync(0xffffffffu, grown)) {", "if (grown) {"),
        ("the maximum follows rows g alone", "largest[0] * slope - m[0] > kSlack || largest[1] * slope - m[1] > kSlack;", "largest[0] * slope - m[0] > kSlack;"),
        ("the maximum may fall", "fmaxf(m[half], largest_of_quad(largest[half]) * slope)", "largest_of_quad(largest[half]) * slope"),
        ("a lane's own sum of weights", "      l[half] = sum_of_quad(l[half]);\n", ""),
        ("no maximum", "largest[i / 2] = fmaxf(largest[i / 2], score[n][i]);", "largest[i / 2] = 0.0f;"),
        ("log-sum-exp of the head before", "store(p.lse + row * p.walk.length + token[half], lse);", "store(p.lse + (row > 0 ? row - 1 : row) * p.walk.length + token[half], lse);"),
        ("NaN taken for a row that sees nothing", "const bool some = l[half] != 0.0f;", "const bool some = l[half] > 0.0f;"),
    ),
    *_of(
        "attention/statistics.cuh",
        ATTENTION,
        ("positions past the end not written", "if (part == 0 && position < p.padded) {", "if (part == 0 && position < length) {"),
        ("half of a row's lanes added up", "distance < kRowLanes; distance *= 2", "distance < kRowLanes / 2; distance *= 2"),
        ("gradient of the log-sum-exp by position", "load(p.grad_lse + query)", "load(p.grad_lse + static_cast<int64_t>(blockIdx.x) * length + position)"),
        ("delta where the log-sum-exp lies", "delta[half] = own < p.padded ? load(from + p.padded) : 0.0f;", "delta[half] = own < p.padded ? load(from) : 0.0f;"),
    ),
    *_of(
        "attention/backward_kernel.cuh",
        ATTENTION,
        ("dq: delta of the first row", "weight[part][n][i] *= dp[part][n][i] - delta[part][i / 2];", "weight[part][n][i] *= dp[part][n][i] - delta[part][0];"),
        ("dq: the log-sum-exp of the first part", "weight[part][n][i] * to_base_2 - lse[part][i / 2]", "weight[part][n][i] * to_base_2 - lse[0][i / 2]"),
        ("dq: padding forgotten", "const bool masked = step.mask != 0 || p.padding != nullptr;", "const bool masked = step.mask != 0;"),
        ("dq: values read where keys lie", "multiply_transposed<T>(dp, grad, keys + kTileBytes<kWidth>, place.lane)", "multiply_transposed<T>(dp, grad, keys, place.lane)"),
        ("dk, dv: statistics of the first tile", "from + tile * kColumns + 4 * piece", "from + 4 * piece"),
        ("dk, dv: half of the statistics", "if (threadIdx.x < 2 * kColumns / 4) {", "if (threadIdx.x < kColumns / 4) {"),
        ("dk, dv: the log-sum-exp of the column beside", "weight[part][n][i] * to_base_2 - (i % 2 == 0 ? base.x : base.y)", "weight[part][n][i] * to_base_2 - (i % 2 != 0 ? base.x : base.y)"),
        ("dk, dv: the second piece's statistics are the first's", "(slot + 2 * kTileBytes<kWidth>) + first;", "(slot + 2 * kTileBytes<kWidth>);"),
        ("dk, dv: the second piece's queries are the first's", "slot + first * kPitch<kWidth>;", "slot + 0 * first * kPitch<kWidth>;"),
        ("dk, dv: masks of the first piece", "visible.hide(weight[part], part, 0.0f, first / 8);", "visible.hide(weight[part], part, 0.0f);"),
        ("dk, dv: padded keys take part", "if (p.padding != nullptr) {", "if (false) {"),
        ("dk, dv: rows g + 8 of padded keys stay", "clear_row(dv[part], half);", "clear_row(dv[part], 0);"),
        ("dk without the scale", "const float scaled[2] = {p.scale, p.scale};", "const float scaled[2] = {1.0f, 1.0f};"),
        ("dk, dv: fewer bytes of shared memory", "kKeySlot<kWidth>, p, stream", "kSlot<kWidth>, p, stream"),
    ),
    *_of(
        "decode/decode.cu",
        DECODE,
        ("the first listed slot skipped", "load(p.slots + list + (t - prefix))", "load(p.slots + list + (t - prefix) + 1)"),
        ("the new key read from its slot", "load(reinterpret_cast<const uint4*>(own ? k : keys", "load(reinterpret_cast<const uint4*>(false ? k : keys"),
        ("the new value read from its slot", "load(reinterpret_cast<const uint4*>(own ? v : values", "load(reinterpret_cast<const uint4*>(false ? v : values"),
        ("keys past the end weigh as much as zeros", "score[u] = first + u * kGroups + group < end ? sum : kMinusInfinity;", "score[u] = sum;"),
        ("no barrier before the warps' states are read", "  __syncthreads();\n  float all_m", "  float all_m"),
        ("splits leave the rest out", "(visible + p.splits - 1) / p.splits;", "visible / p.splits;"),
        ("splits added without their weights", "first += factor * sums.x;", "first += sums.x;"),
        ("groups of a warp not merged", "for (int distance = kLanes; distance < 32; distance *= 2) {", "for (int distance = kLanes; distance < 16; distance *= 2) {"),
        ("sums of a group not rescaled", "      acc[i] *= old;\n", ""),
        ("the cache is not written", "if (split == 0 && group == 0 && active) {", "if (split == 1 && group == 0 && active) {"),
        ("nothing seen yet weighs NaN", "return m == kMinusInfinity ? 0.0f : exp2_fast(m - larger);", "return exp2_fast(m - larger);"),
    ),
    *_of(
        "sampling/sample.cu",
        SAMPLING,
        ("no barrier before the counts", "    store(&shared->weights[bin], Weight{0});\n  }\n  __syncthreads();\n", "    store(&shared->weights[bin], Weight{0});\n  }\n"),
        ("no barrier after the counts", "    }\n  }\n  __syncthreads();\n  if (threadIdx.x < 32) {", "    }\n  }\n  if (threadIdx.x < 32) {"),
        ("keys of other prefixes counted", "const bool inside = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);", "const bool inside = true;"),
        ("top-k stops a key early", "count_above < top_k && count_above + keys >= top_k", "count_above < top_k && count_above + keys > top_k"),
        ("-0 below 0", "__float_as_uint(score + 0.0f)", "__float_as_uint(score)"),
        ("the last of equal scores", "if (noisy > best || (noisy == best && candidate < token)) {", "if (noisy > best || (noisy == best && candidate > token)) {"),
        ("NaN of ruled-out tokens keeps its key", "      value = fmaxf(value, -kInfinity);  // NaN", "      // NaN"),
        ("tokens past the vocabulary", "if (candidate >= vocabulary) {", "if (candidate > vocabulary) {"),
        ("a warp's own largest", "for (int warp = 0; warp < kThreads / 32; ++warp) {", "for (int warp = 0; warp < 1; ++warp) {"),
        ("noise of another stream", "const Noise draw(p.seed, 1);", "const Noise draw(p.seed, 0);"),
    ),
    *_of(
        "cuda/fragments.cuh",
        ATTENTION,
        ("a quad half transposed", "distance <= 2; distance *= 2) {\n    const bool high", "distance <= 1; distance *= 2) {\n    const bool high"),
        ("rows g and g + 8 exchanged as they are read", "(first + i) % 2 * 2 + half] = words[i]", "(first + i) % 2 * 2 + 1 - half] = words[i]"),
        ("the factor of row g for row g + 8", "sum[2 * half + 1] * factor[half]", "sum[2 * half + 1] * factor[0]"),
        ("half of a quad's maximum", "  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));", "  return value;"),
    ),
    *_of(
        "cuda/philox.cuh",
        SAMPLING,
        ("nine rounds", "round < 10", "round < 9"),
        ("every batch from row 0 on", "first_row(static_cast<uint64_t>(load(seed + 1)))", "first_row(0)"),
        ("rows from 2^32 on as those before", "c2 = static_cast<uint32_t>(noise_row >> 32)", "c2 = 0"),
    ),
)  # fmt: skip


class Outcome(NamedTuple):
    """What became of a mutation: the first test that failed, or None where all passed."""

    mutation: Mutation
    caught: str | None


@contextmanager
def workshop(chosen: Iterable[Mutation]) -> Iterator[Path]:
    """A folder with a copy of what the emulation is built of and of the tests, where those of `chosen` pass.

    Raises:
        RuntimeError: a test of the kernels as they are fails, and would catch whatever comes.
    """
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder)
        for name in ("csrc", "tests", "dalle_kernels"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "_cuda.so"))
        shutil.copy(ROOT / "pyproject.toml", root)
        whole = _test(root, (test for mutation in chosen for test in mutation.tests))
        if whole.returncode:
            raise RuntimeError(f"tests fail before anything is made wrong: {whole.stdout}{whole.stderr}")
        yield root


_BUILD_AND_TEST = """
import sys, pytest
from tests.emulation.build import build
build()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not gpu", *sys.argv[1:]]))
"""


def _test(root: Path, tests: Iterable[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Builds the emulation in a workshop, and runs tests; what does not compile names none that failed."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", _BUILD_AND_TEST, *options, *dict.fromkeys(tests)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)


def attempt(root: Path, mutation: Mutation) -> Outcome:
    """Builds and tests `mutation` in a workshop, which it leaves as it was.

    Raises:
        RuntimeError: it does not compile, or tests cannot be run.
    """
    source, objects = root / "csrc" / mutation.file, root / "build" / "emulation"
    kept, original = root / "build" / "kept", source.read_text()
    shutil.copytree(objects, kept)
    try:
        source.write_text(mutate(original, mutation))
        done = _test(root, mutation.tests, "-x")
    except subprocess.TimeoutExpired:
        return Outcome(mutation, "the tests do not end")
    finally:
        source.write_text(original)
        shutil.rmtree(objects)
        kept.rename(objects)
    if done.returncode == 0:
        return Outcome(mutation, None)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py::\S+)", done.stdout, re.MULTILINE)
    if failed is None and done.returncode > 0:
        raise RuntimeError(f"{mutation.file}, {mutation.meaning}: {done.stdout}{done.stderr}")
    return Outcome(mutation, failed.group(1) if failed else f"the tests end by signal {-done.returncode}")


def mutate(text: str, mutation: Mutation) -> str:
    """`text` with the mutation in it.

    Raises:
        ValueError: the kernels have changed, and it no longer applies.
    """
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(
            f"{mutation.file}, {mutation.meaning}: {mutation.old!r} stands there {count} times, wanted once"
        )
    return text.replace(mutation.old, mutation.new)


_ROW = re.compile(r"\| `(.+?)` \| (.+) \| (?:`(.+)`|\*\*nothing\*\*) \|")


def recorded() -> dict[tuple[str, str], str | None]:
    """The committed page: (file, meaning) -> the test that failed, or None."""
    rows = map(_ROW.fullmatch, TABLE.read_text().splitlines())
    return {(row[1], row[2]): row[3] for row in rows if row}


def table(caught: Mapping[tuple[str, str], str | None]) -> str:
    """Outcomes, by file and meaning, as a page for benchmarks/notes; those of mutations that are gone are left out."""
    made = [entry for entry in MUTATIONS if (entry.file, entry.meaning) in caught]
    number = sum(caught[entry.file, entry.meaning] is not None for entry in made)
    lines = [
        "# Mistakes made on purpose in the CUDA kernels, and the tests that noticed",
        "",
        f"`python -m tests.emulation.mutations --write` writes this page. Of its {len(MUTATIONS)} mistakes {len(made)} were",
        f"made for it, and {number} of these were caught. The test is the first that failed; a kernel that breaks a rule of",
        "the machine (a race, an address, a deadlock) fails it too.",
        "",
        "| source | mistake | caught by |",
        "|---|---|---|",
    ]
    for mutation in made:
        first = caught[mutation.file, mutation.meaning]
        lines.append(f"| `{mutation.file}` | {mutation.meaning} | {f'`{first}`' if first else '**nothing**'} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--match", default="", help="only mutations whose file or meaning holds this")
    parser.add_argument("--write", action="store_true", help="put the outcomes into the committed table")
    options = parser.parse_args(arguments)
    chosen = [entry for entry in MUTATIONS if options.match in f"{entry.file} {entry.meaning}"]
    outcomes = []
    with workshop(chosen) as root:
        for number, mutation in enumerate(chosen, 1):
            outcomes.append(attempt(root, mutation))
            said = outcomes[-1].caught or "SURVIVES"
            print(f"{number}/{len(chosen)} {mutation.file}: {mutation.meaning}: {said}", flush=True)
    if options.write:
        made = {(mutation.file, mutation.meaning): caught for mutation, caught in outcomes}
        TABLE.write_text(table(recorded() | made))
    return int(any(outcome.caught is None for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
