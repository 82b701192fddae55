"""Which suites are worth timing on a GPU, by what the doctor found there.

    python -m dalle_kernels.doctor --no-speed --json found.json
    python -m benchmarks fit found.json      # prints their names in one line

A suite is fit where each operation that it times has a GPU backend all of whose answers were right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NEEDS = {
    "attention": ("sparse_attention",),
    "neighborhood": ("sparse_attention",),
    "decode": ("decode_attention",),
    "codebook": ("gumbel_lookup", "vq_lookup"),
    "quantizers": ("vq_lookup", "code_statistics"),
    "sampling": ("sample_tokens",),
    "training": ("sparse_attention", "gumbel_lookup", "logit_laplace_nll"),
    "generation": ("decode_attention", "sample_tokens"),
    "pixels": ("sparse_attention", "decode_attention", "sample_tokens"),
    "integrations": ("sparse_attention", "decode_attention"),
}


def right_operations(findings: Iterable[Mapping[str, Any]]) -> set[str]:
    """The operations with a GPU backend that answered, and never wrongly."""
    answered: dict[tuple[str, str], bool] = {}
    for seen in findings:
        if seen["device"].startswith("cuda") and seen["backend"] in ("triton", "cuda") and seen["status"] != "refused":
            key = seen["operation"], seen["backend"]
            answered[key] = answered.get(key, True) and seen["status"] == "right"
    return {operation for (operation, _), right in answered.items() if right}


def fit(findings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The suites that are worth timing, in the order of NEEDS."""
    right = right_operations(findings)
    return [suite for suite, operations in NEEDS.items() if right.issuperset(operations)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fit", description=__doc__.split("\n", 1)[0])
    parser.add_argument("found", type=Path, help="what `python -m dalle_kernels.doctor --json` wrote")
    print(*fit(json.loads(parser.parse_args(arguments).found.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
