"""NATTEN's functions and modules: against dense attention in float64 under the masks that tests/patterns derive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dalle_kernels import Neighborhood
from dalle_kernels.integrations import natten

FUNCTIONS: dict[int, Callable[..., Any]] = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
MODULES = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D, 3: natten.NeighborhoodAttention3D}
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((23,), {"kernel_size": 5}),
    ((23,), {"kernel_size": (6,), "stride": 2, "dilation": 3, "is_causal": True}),
    ((7, 10), {"kernel_size": 3}),
    ((7, 10), {"kernel_size": (3, 4), "stride": (2, 3), "dilation": (2, 1), "is_causal": (False, True)}),
    (
        (4, 5, 6),
        {"kernel_size": (2, 3, 3), "stride": (1, 2, 1), "dilation": (1, 1, 2), "is_causal": (True, False, False)},
    ),
]


def mask_of(shape: tuple[int, ...], masks: dict[str, Any]) -> torch.Tensor:
    renamed = {"kernel_size": "window", "is_causal": "causal"}
    return Neighborhood(shape, **{renamed.get(name, name): value for name, value in masks.items()}).mask()


def exact(
    shape: tuple[int, ...],
    masks: dict[str, Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    more: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, heads last, and its log-sum-exp by the dense mask; `more` are keys and values that all queries see."""
    axes = len(shape)
    visible = mask_of(shape, masks)
    flat = [tensor.flatten(1, axes).transpose(1, 2) for tensor in (q, k, v)]
    if more:
        extra = [tensor.transpose(1, 2) for tensor in more]
        flat[1:] = [torch.cat(pair, 2) for pair in zip(flat[1:], extra, strict=True)]
        visible = torch.cat([visible, torch.ones(len(visible), extra[0].shape[2], dtype=torch.bool)], 1)
    scores = (flat[0] @ flat[1].mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
    out = scores.softmax(-1) @ flat[2]
    return out.transpose(1, 2).unflatten(1, shape), scores.logsumexp(-1).transpose(1, 2).unflatten(1, shape)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(("shape", "masks"), CASES, ids=str)
@pytest.mark.parametrize("context", [0, 9])
def test_functions(shape: tuple[int, ...], masks: dict[str, Any], context: int) -> None:
    torch.manual_seed(0)
    sizes = [(2, *shape, 3, 16)] * 3 + [(2, context, 3, 16)] * (2 if context else 0)
    wide = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes]
    truth = exact(shape, masks, *wide[:3], more=tuple(wide[3:]))
    grads = [torch.randn_like(result) for result in truth]
    narrow = [tensor.detach().float().requires_grad_() for tensor in wide]
    more = dict(zip(("additional_keys", "additional_values"), narrow[3:], strict=False))
    got = FUNCTIONS[len(shape)](*narrow[:3], **masks, **more, return_lse=True)
    for result, wanted in zip(got, truth, strict=True):
        close(result, wanted)
    ours = torch.autograd.grad(got, narrow, [grad.float() for grad in grads])
    for result, wanted in zip(ours, torch.autograd.grad(truth, wide, grads), strict=True):
        close(result, wanted)


def test_grouped_heads_and_wider_values() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 7, 4, 16), torch.randn(2, 6, 7, 2, 16), torch.randn(2, 6, 7, 2, 24)
    more = torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 24)
    got = natten.na2d(q, k, v, 3, additional_keys=more[0], additional_values=more[1])
    repeated = [tensor.double().repeat_interleave(2, -2) for tensor in (k, v, *more)]
    close(got, exact((6, 7), {"kernel_size": 3}, q.double(), *repeated[:2], more=tuple(repeated[2:]))[0])  # type: ignore[arg-type]


def test_defaults_given_as_none_are_natten_s() -> None:
    q, k, v = torch.randn(3, 1, 6, 7, 2, 16)
    plain = natten.na2d(q, k, v, 3)
    assert torch.equal(natten.na2d(q, k, v, kernel_size=[3, 3], stride=None, dilation=None, is_causal=None), plain)  # type: ignore[arg-type]
    close(natten.na2d(q, k, v, 3, scale=0.25), plain)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "masks"), CASES, ids=str)
def test_modules(shape: tuple[int, ...], masks: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = MODULES[len(shape)](32, 2, **masks)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    }
    x = torch.randn(2, *shape, 32)
    query, key, value = module.double().qkv(x.double()).reshape(2, *shape, 3, 2, 16).unbind(-3)
    wanted = module.proj(exact(shape, masks, query, key, value)[0].reshape(2, *shape, 32))
    close(module.float()(x), wanted)
    assert "qkv.bias" not in MODULES[len(shape)](32, 2, 2, qkv_bias=False).state_dict()


def test_a_module_trains_compiled() -> None:
    torch.manual_seed(0)
    module = natten.NeighborhoodAttention2D(32, 2, 3)
    x = torch.randn(1, 6, 7, 32)
    eager = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(module.parameters())), eager, strict=True
    ):
        close(got, wanted)


@pytest.mark.parametrize(
    ("arguments", "named", "said"),
    [
        ({}, {"backend": "cutlass-fna"}, "backend: it steers NATTEN's own kernels"),
        ({}, {"q_tile_shape": (8, 8)}, "q_tile_shape"),
        ({"query": torch.zeros(1, 6, 2, 16)}, {}, "query: got"),
        ({"key": torch.zeros(1, 6, 8, 2, 16)}, {}, "key: got shape"),
        ({}, {"kernel_size": 7}, "window: got 7"),
        ({}, {"kernel_size": 3, "stride": 4}, "stride: got 4"),
        ({}, {"additional_keys": torch.zeros(1, 4, 2, 16)}, "wanted both or neither"),
        (
            {},
            {"additional_keys": torch.zeros(2, 4, 2, 16), "additional_values": torch.zeros(2, 4, 2, 16)},
            "additional_keys: got shape",
        ),
    ],
    ids=str,
)
def test_what_is_refused(arguments: dict[str, torch.Tensor], named: dict[str, Any], said: str) -> None:
    tensors = {name: torch.zeros(1, 6, 7, 2, 16) for name in ("query", "key", "value")} | arguments
    with pytest.raises((TypeError, ValueError), match=said):
        natten.na2d(**tensors, **({"kernel_size": 3} | named))
    with pytest.raises(ValueError, match="num_heads: got 3"):
        natten.NeighborhoodAttention1D(32, 3, 5)
    with pytest.raises(ValueError, match="x: got shape"):
        natten.NeighborhoodAttention1D(32, 2, 5)(torch.zeros(1, 4, 4, 32))


def test_arguments_are_named_where_they_are_wrong() -> None:
    q, context = torch.randn(1, 6, 7, 2, 8), torch.randn(1, 5, 2, 8)
    assert torch.equal(natten.na2d(q, q, q, np.int64(3)), natten.na2d(q, q, q, 3))
    for wrong in (None, 3.0):
        with pytest.raises(ValueError, match=f"kernel_size: got {wrong}, wanted one value, or one for each axis"):
            natten.na2d(q, q, q, wrong)
    for keys, values, error, message in (
        ([1], context, TypeError, "additional_keys: got list, wanted a torch.Tensor"),
        (
            context,
            context.double(),
            TypeError,
            "additional_values: got torch.float64, wanted torch.float32 as query has",
        ),
        (context[:, :, :0], context, ValueError, r"additional_keys: got shape \(1, 5, 0, 8\)"),
        (context, torch.randn(1, 5, 2, 9), ValueError, "additional_values: got head_dim 9, wanted 8 as value has"),
    ):
        with pytest.raises(error, match=message):
            natten.na2d(q, q, q, 3, additional_keys=keys, additional_values=values)
    with torch.autocast("cpu", torch.bfloat16):  # which makes them alike
        natten.na2d(q, q, q, 3, additional_keys=context.bfloat16(), additional_values=context)
    empty = natten.na2d(q[:0], q[:0, ..., :1, :], torch.randn(0, 6, 7, 1, 12), 3)  # fewer heads, wider values
    assert empty.shape == (0, 6, 7, 2, 12)
