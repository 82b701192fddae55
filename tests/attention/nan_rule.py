"""What NaN may do in attention, put to every backend alike (DESIGN.md, "Semantics worth knowing").

One in q turns its query NaN and no other; one in k or v turns every query that sees it NaN. Nothing turns NaN in
another head, nor a log-sum-exp that does not see it. A decoding step reads what it sees and no more, so there queries
that do not see it stay what they are.
"""

from __future__ import annotations

import torch

from dalle_kernels import KVCache, decode_attention, sparse_attention
from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import Column

PATTERN = Column(TokenLayout(70, (9, 11)))  # full tiles and masked ones
TOKEN = 75  # an image token: the queries of its column see it
HEAD = 1
NAMES = ("q", "k", "v")


def _inputs(dtype: torch.dtype, poisoned: str | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(1, 2, PATTERN.length, 32, generator=generator).to(dtype) for _ in range(3)]
    if poisoned is not None:
        tensors[NAMES.index(poisoned)][0, HEAD, TOKEN, 5] = torch.nan
    return [tensor.requires_grad_() for tensor in tensors]


def _run(backend: str, dtype: torch.dtype, poisoned: str | None) -> dict[str, torch.Tensor]:
    inputs = _inputs(dtype, poisoned)
    out, lse = sparse_attention(*inputs, PATTERN, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(out.float().sum() + 0.1 * lse.sum(), inputs)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def check(backend: str, dtype: torch.dtype, poisoned: str) -> None:
    """Forward and backward with one NaN in `poisoned`."""
    clean, got = _run(backend, dtype, None), _run(backend, dtype, poisoned)
    mask = PATTERN.mask()
    own = torch.zeros(PATTERN.length, dtype=torch.bool)
    own[TOKEN] = True
    # Queries that NaN must reach, and keys whose gradients it must.
    queries = own if poisoned == "q" else mask[:, TOKEN]
    keys = mask[queries].any(0)
    for name, tensor in got.items():
        assert torch.equal(tensor[0, 1 - HEAD], clean[name][0, 1 - HEAD]), name
    assert got["out"][0, HEAD, queries].isnan().any(-1).all()
    assert got["dq"][0, HEAD, queries].isnan().any(-1).all()
    assert got["dk"][0, HEAD, keys].isnan().any(-1).all()
    if poisoned == "v":
        assert torch.equal(got["lse"], clean["lse"])
    else:
        assert torch.equal(got["lse"][0, HEAD].isnan(), queries)
        assert torch.equal(got["lse"][0, HEAD, ~queries], clean["lse"][0, HEAD, ~queries])
        assert got["dv"][0, HEAD, keys].isnan().any(-1).all()
    if poisoned == "q":
        for name in ("out", "dq"):
            assert torch.equal(got[name][0, HEAD, ~queries], clean[name][0, HEAD, ~queries]), name


@torch.no_grad()
def check_decoding(backend: str, dtype: torch.dtype, poisoned: str) -> None:
    """Steps around the NaN: exactly the queries that see it turn NaN, among them one that sees nothing else."""
    pattern = Column(TokenLayout(0, (4, 3)))  # a query sees its column, so the first of each itself alone
    token, results = 4, []
    for name in (None, poisoned):
        generator = torch.Generator().manual_seed(8)
        tensors = [torch.randn(1, 1, pattern.length, 32, generator=generator).to(dtype) for _ in range(3)]
        if name is not None:
            for place in (token, 0):
                tensors[NAMES.index(name)][0, 0, place, 5] = torch.nan
        cache = KVCache(pattern, 1, 1, 32, dtype=dtype)
        steps = [
            decode_attention(*(tensor[:, :, i : i + 1] for tensor in tensors), cache, i, backend=backend)
            for i in range(pattern.length)
        ]
        results.append(torch.cat(steps, 2)[0, 0])
    clean, got = results
    touched = torch.zeros(pattern.length, dtype=torch.bool)
    touched[[0, token]] = True
    if poisoned != "q":
        touched = pattern.mask()[:, [0, token]].any(1)
    assert torch.equal(got.isnan().any(-1), touched)
    assert torch.equal(got[~touched], clean[~touched])
