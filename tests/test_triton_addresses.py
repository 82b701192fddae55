"""Triton kernels find elements that lie 2^31 elements and more from the first of their tensor.

Each tensor in turn is a view of storage that is only touched where its rows lie, so it takes addresses and no memory.
The same numbers close together give the same bits.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dalle_kernels import KVCache, Row, TokenLayout
from dalle_kernels.attention import contract as attention_contract
from dalle_kernels.attention import triton as triton_backend
from dalle_kernels.attention.triton_forward import far
from dalle_kernels.codebook.gumbel import contract as gumbel_contract
from dalle_kernels.codebook.gumbel import triton as triton_gumbel
from dalle_kernels.codebook.projection import contract as projection_contract
from dalle_kernels.codebook.projection import triton as triton_projection
from dalle_kernels.codebook.vq import contract as vq_contract
from dalle_kernels.codebook.vq import triton as triton_vq
from dalle_kernels.decode import contract as decode_contract
from dalle_kernels.decode import triton as decode_kernel
from dalle_kernels.sampling import triton as sampling_kernel
from dalle_kernels.sampling.contract import Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERN = Row(TokenLayout(20, (3, 6)))


def far_apart(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """The same elements with the last along `dimension` at least 2^31 elements from the first."""
    return spread(tensor, dimension, (2**31 // (tensor.shape[dimension] - 1) // 16 + 1) * 16)


def spread(tensor: torch.Tensor, dimension: int, step: int) -> torch.Tensor:
    """The same elements with neighbours along `dimension` `step` elements apart."""
    strides = list(tensor.stride())
    strides[dimension] = step
    size = 1 + sum((count - 1) * stride for count, stride in zip(tensor.shape, strides, strict=True))
    apart = torch.empty(size, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, strides)
    return apart.copy_(tensor)


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).half()


def assert_same(got: object, wanted: object) -> None:
    for one, other in zip(got, wanted, strict=True):  # type: ignore[call-overload]
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def attend(q, k, v, grad):  # type: ignore[no-untyped-def]
    """Results and gradients of attention over PATTERN."""
    out, lse = triton_backend.forward(attention_contract.Inputs(q, k, v, None, 0.25, PATTERN))
    gradients = triton_backend.backward(
        attention_contract.Grads(grad, None),
        attention_contract.Kept(q, k, v, out, lse, None, 0.25, PATTERN),
        attention_contract.Needs(True, True, True),
    )
    return out, lse, *gradients


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_attention(dimension: int) -> None:
    torch.manual_seed(0)
    near = [halves(2, 2, PATTERN.length, 16) for _ in range(4)]
    assert far(far_apart(near[0], dimension)) == (dimension == 2)
    assert_same(attend(*(far_apart(tensor, dimension) for tensor in near)), attend(*near))


def test_attention_of_the_farthest_rows_that_32_bits_reach() -> None:
    torch.manual_seed(0)
    near = [halves(1, 1, PATTERN.length, 16) for _ in range(4)]
    step = (2**31 - 16) // (PATTERN.length - 1)
    assert not far(spread(near[0], 2, step))
    assert far(spread(near[0], 2, step + 1))
    assert_same(attend(*(spread(tensor, 2, step) for tensor in near)), attend(*near))


@pytest.mark.parametrize("dimension", [0, 1])
def test_attention_padding_and_gradient_of_the_log_sum_exp(dimension: int) -> None:
    torch.manual_seed(1)
    q, k, v, grad = (halves(2, 2, PATTERN.length, 16) for _ in range(4))
    padding = torch.rand(2, PATTERN.length, device=DEVICE) < 0.2
    grad_lse = torch.randn(2, 2, PATTERN.length, device=DEVICE)

    def run(padding, grad_lse):  # type: ignore[no-untyped-def]
        out, lse = triton_backend.forward(attention_contract.Inputs(q, k, v, padding, 0.25, PATTERN))
        return (
            out,
            lse,
            *triton_backend.backward(
                attention_contract.Grads(grad, grad_lse),
                attention_contract.Kept(q, k, v, out, lse, padding, 0.25, PATTERN),
                attention_contract.Needs(True, True, True),
            ),
        )

    far = far_apart(padding, dimension), far_apart(grad_lse, 2 * dimension)
    assert_same(run(*far), run(padding, grad_lse))


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_decoding(dimension: int) -> None:
    torch.manual_seed(2)
    cache = KVCache(PATTERN, 2, 2, 16, dtype=torch.float16, device=DEVICE)
    cache.keys.normal_()
    cache.values.normal_()
    q, k, v = (halves(2, 2, 1, 16) for _ in range(3))
    position = torch.tensor(PATTERN.length - 1, device=DEVICE)
    results = []
    for place in (far_apart, lambda tensor, _: tensor.clone()):
        keys, values = place(cache.keys, dimension), place(cache.values, dimension)
        out = decode_kernel.forward(decode_contract.Inputs(q, k, v, keys, values, position, PATTERN, 0.25)).out
        results.append((out, keys, values))
    assert_same(*results)


def test_gumbel() -> None:
    torch.manual_seed(3)
    logits, codebook, tau, seed = halves(3, 40), halves(40, 16), torch.ones((), device=DEVICE), (1, 0)
    results = []
    for table in (far_apart(logits, 0), logits):
        settings = table, codebook, tau, False, True, *seed
        outputs = triton_gumbel.forward(gumbel_contract.Inputs(*settings))
        gradients = triton_gumbel.backward(
            gumbel_contract.Grads(outputs[0], outputs[2]),
            gumbel_contract.Kept(*settings, *outputs),
            gumbel_contract.Needs(True, True),
        )
        results.append((*outputs, *gradients))
    assert_same(*results)


def test_projection() -> None:
    torch.manual_seed(4)
    features, weight, codebook = halves(3, 16), halves(40, 16), halves(40, 16)
    results = []
    for table in (far_apart(features, 0), features):
        tensors = table, weight, None, codebook
        settings = torch.ones((), device=DEVICE), False, True, 1, 0
        outputs = triton_projection.forward(projection_contract.Inputs(*tensors, *settings, True, False))
        gradients = triton_projection.backward(
            projection_contract.Grads(outputs.latents, outputs.kl, outputs.distribution),
            projection_contract.Kept(*tensors, *settings, True, False, *outputs),
            projection_contract.Needs(True, True, True, True),
        )
        results.append((*outputs, *gradients))
    assert_same(*results)


def test_vq() -> None:
    torch.manual_seed(5)
    features, codebook, grad = halves(3, 16), halves(40, 16), torch.ones(3, device=DEVICE)
    results = []
    for table in (far_apart(features, 0), features):
        inputs = vq_contract.Inputs(table[None], codebook[None], len(codebook), "euclidean", 1, None, None, None)
        nearest, distances, indices = triton_vq.forward(inputs)
        results.append(
            (
                indices,
                distances,
                *triton_vq.backward(
                    vq_contract.Grads(grad[None, :, None]),
                    vq_contract.Kept(table[None], nearest, indices, len(codebook)),
                    vq_contract.Needs(True, True),
                ),
            )
        )
    assert_same(*results)


def test_sampling() -> None:
    torch.manual_seed(6)
    logits, base, seed = halves(3, 50), halves(3, 50), (1, 0)

    def draw(logits, base):  # type: ignore[no-untyped-def]
        return sampling_kernel.forward(Inputs(logits, base, 2.0, 0.9, 10, 0.9, *seed)).tokens

    assert torch.equal(draw(far_apart(logits, 0), far_apart(base, 0)), draw(logits, base))
