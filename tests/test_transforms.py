"""torch.func, forward-mode derivatives, wanted gradients, other devices and new numbers, for every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from dalle_kernels import (
    Causal,
    MaskPattern,
    Row,
    TokenLayout,
    decode_attention,
    explain,
    gumbel_lookup,
    gumbel_projection_lookup,
    logit_laplace_nll,
    sample_tokens,
    sparse_attention,
    vq_lookup,
)
from dalle_kernels.backends import cases as cases_of_backends
from dalle_kernels.backends.cases import all_cases
from dalle_kernels.nn import SparseSelfAttention

PATTERN = Row(TokenLayout(3, (2, 3)))
SEED = torch.tensor(5)


class Case(NamedTuple):
    """A function of tensors whose results are all differentiable to all of them."""

    function: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def attention(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    padding = torch.zeros(2, PATTERN.length, dtype=torch.bool)
    padding[0, 1] = padding[1, 7] = True
    return sparse_attention(*tensors, PATTERN, 0.4, padding[: tensors[0].shape[0]], return_lse=True)


def capped(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return sparse_attention(*tensors, PATTERN, return_lse=True, softcap=0.7)


def gumbel(hard: bool, noise: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    def lookup(logits: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
        latents, _, kl = gumbel_lookup(logits, codebook, 0.7, hard, noise, SEED)
        return latents, kl

    return lookup


def projection(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    features, weight, bias, codebook = tensors
    made = gumbel_projection_lookup(features, weight, bias, codebook, 0.7, seed=SEED, distribution=True)
    return made[0], made[2], made[3]


def nearest(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return vq_lookup(features, codebook)[::2]


def likelihood(mu: torch.Tensor, log_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (logit_laplace_nll(torch.linspace(0.1, 0.9, 12, dtype=mu.dtype).view(3, 4), mu, log_b),)


def cases() -> dict[str, Case]:
    torch.manual_seed(4)
    q, k, v = randn(3, 2, 2, PATTERN.length, 4)
    return {
        "attention": Case(attention, (q, k, v)),
        "attention under a soft cap": Case(capped, (q, k, v)),
        "gumbel": Case(gumbel(False, True), (randn(5, 9), randn(9, 4))),
        "gumbel hard": Case(gumbel(True, True), (randn(5, 9), randn(9, 4))),
        "gumbel argmax": Case(gumbel(True, False), (randn(5, 9), randn(9, 4))),
        "projection": Case(projection, (randn(5, 6), randn(9, 6), randn(9), randn(9, 4))),
        "vq": Case(nearest, (randn(5, 4), randn(9, 4))),
        "likelihood": Case(likelihood, (randn(3, 4), randn(3, 4))),
    }


NAMES = list(cases())


@pytest.mark.parametrize("name", NAMES)
def test_forward_derivatives_are_those_of_the_backward(name: str) -> None:
    """For any tangents and cotangents, the same number comes out of both."""
    function, inputs = cases()[name]
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    outputs, forward = jvp(function, inputs, tangents)
    for output, plain in zip(outputs, function(*inputs), strict=True):
        torch.testing.assert_close(output, plain)
    cotangents = tuple(torch.randn_like(output) for output in outputs)
    backward = vjp(function, *inputs)[1](cotangents)
    one = sum((a * b).sum() for a, b in zip(forward, cotangents, strict=True))
    other = sum((a * b).sum() for a, b in zip(backward, tangents, strict=True))
    torch.testing.assert_close(one, other)
    assert one != 0


@pytest.mark.parametrize("name", NAMES)
def test_one_tangent_alone(name: str) -> None:
    function, inputs = cases()[name]
    for place, tensor in enumerate(inputs):
        tangent = torch.randn_like(tensor)
        zeros = [torch.zeros_like(other) for other in inputs]
        zeros[place] = tangent
        with forward_ad.dual_level():
            duals = list(inputs)
            duals[place] = forward_ad.make_dual(tensor, tangent)
            got = [forward_ad.unpack_dual(output).tangent for output in function(*duals)]
        for one, other in zip(got, jvp(function, inputs, tuple(zeros))[1], strict=True):
            torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other)


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_gradients(name: str) -> None:
    function, inputs = cases()[name]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return sum(output.sin().sum() for output in function(*tensors))  # type: ignore[return-value]

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    want = torch.autograd.grad(loss(*leaves), leaves)
    places = tuple(range(len(inputs)))
    for one, other in zip(grad(loss, places)(*inputs), want, strict=True):
        torch.testing.assert_close(one, other)
    for make in (jacrev, jacfwd):
        for one, other in zip(make(loss, places)(*inputs), want, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_sample(name: str) -> None:
    """Each sample's are those that it has alone, its noise included."""
    function, inputs = cases()[name]
    samples = tuple(torch.stack([tensor, tensor.flip(0)]) for tensor in inputs)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return sum(output.sin().sum() for output in function(*tensors))  # type: ignore[return-value]

    got = vmap(grad(loss, tuple(range(len(inputs)))))(*samples)
    for sample in range(2):
        leaves = [tensor[sample].clone().requires_grad_() for tensor in samples]
        want = torch.autograd.grad(loss(*leaves), leaves)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one[sample], other)


def test_vmap_over_one_argument() -> None:
    torch.manual_seed(8)
    logits, codebook = torch.randn(4, 3, 9), torch.randn(9, 4)
    got = vmap(lambda table: gumbel_lookup(table, codebook, 0.9, seed=SEED)[0])(logits)
    want = torch.stack([gumbel_lookup(table, codebook, 0.9, seed=SEED)[0] for table in logits])
    assert torch.equal(got, want)
    assert torch.equal(vmap(lambda row: sample_tokens(row, seed=SEED))(logits)[2], sample_tokens(logits[2], seed=SEED))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_errors_in_every_order(name: str) -> None:
    function, inputs = cases()[name]

    def loss(tensor: torch.Tensor) -> torch.Tensor:
        return sum(output.sin().sum() for output in function(tensor, *inputs[1:]))  # type: ignore[return-value]

    twice = grad(lambda tensor: grad(loss)(tensor).square().sum())
    for second in (hessian(loss), twice, jacfwd(grad(loss)), jacrev(jacrev(loss))):
        with pytest.raises(RuntimeError, match="second derivative"):
            second(inputs[0])


@pytest.mark.parametrize("name", NAMES)
def test_only_wanted_gradients_are_made(name: str) -> None:
    function, inputs = cases()[name]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    want = torch.autograd.grad(sum(output.sum() for output in function(*leaves)), leaves)  # type: ignore[arg-type]
    for place, tensor in enumerate(inputs):
        some = list(inputs)
        some[place] = tensor.clone().requires_grad_()
        (got,) = torch.autograd.grad(sum(output.sum() for output in function(*some)), some[place])  # type: ignore[arg-type]
        torch.testing.assert_close(got, want[place])


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name: str) -> None:
    function, inputs = cases()[name]
    if name.startswith("attention"):
        outputs = sparse_attention(*(tensor.to("meta") for tensor in inputs), PATTERN, return_lse=True)
    elif name == "likelihood":
        outputs = (logit_laplace_nll(*(tensor.to("meta") for tensor in (inputs[0], *inputs))),)
    elif name == "vq":
        outputs = vq_lookup(*(tensor.to("meta") for tensor in inputs))[::2]
    elif name == "projection":
        outputs = function(*(tensor.to("meta") for tensor in inputs))
    else:
        outputs = gumbel_lookup(*(tensor.to("meta") for tensor in inputs), 0.7)[::2]
    for output, plain in zip(outputs, function(*inputs), strict=True):
        assert output.device.type == "meta"
        assert output.shape == plain.shape
        assert output.dtype == plain.dtype


@pytest.mark.parametrize("key", ["MPS", "XPU", "HPU", "PrivateUse1", "CPU", "CUDA"])
def test_every_device_has_a_kernel(key: str) -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dalle_kernels::")]
    assert len(names) >= 12
    for name in names:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), name


def test_a_layer_by_torch_func() -> None:
    layer = SparseSelfAttention(PATTERN, embed_dim=16, num_heads=2)
    x = torch.randn(1, PATTERN.length, 16)
    parameters = dict(layer.named_parameters())
    gradients = grad(lambda p: functional_call(layer, p, (x,)).sin().sum())(parameters)
    want = torch.autograd.grad(layer(x).sin().sum(), list(parameters.values()))
    for one, other in zip(gradients.values(), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_explain_names_what_is_no_tensor() -> None:
    for function, arguments, message in (
        (sparse_attention, ([1.0], None, None, PATTERN), "q: got list, wanted a torch.Tensor"),
        (gumbel_lookup, (None, None, 1.0), "got NoneType, wanted a torch.Tensor"),
        (logit_laplace_nll, (1, 2, 3), "pixels: got int, wanted a torch.Tensor"),
        (sample_tokens, ("logits",), "logits: got str, wanted a torch.Tensor"),
        (vq_lookup, (0, 0), "got int, wanted a torch.Tensor"),
        (decode_attention, (0, 0, 0, None, 0), "got"),
    ):
        with pytest.raises(TypeError, match=message):
            explain(function, *arguments)
    with pytest.raises(ValueError, match="function: got"):
        explain([], 1)  # type: ignore[arg-type]


def test_empty_heads_and_lists_for_masks() -> None:
    q = torch.zeros(1, 1, PATTERN.length, 0)
    with pytest.raises(ValueError, match=r"q: got shape \(1, 1, 9, 0\), wanted a head dimension D of at least 1"):
        sparse_attention(q, q, q, PATTERN)
    q = torch.zeros(1, 1, PATTERN.length, 8)
    with pytest.raises(TypeError, match=r"key_padding_mask: got list, wanted a torch\.Tensor"):
        sparse_attention(q, q, q, PATTERN, key_padding_mask=[[False] * PATTERN.length])  # type: ignore[call-overload]


def test_masks_under_a_device() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    want = MaskPattern(mask)
    with torch.device("meta"):
        assert MaskPattern(mask) == want
        assert MaskPattern(mask.numpy()) == want
    assert want.mask().equal(mask)


def test_the_likelihood_under_autocast() -> None:
    pixels = torch.rand(3, 4) * 0.8 + 0.1
    mu, log_b = torch.randn(2, 3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        nll = logit_laplace_nll(pixels, mu.bfloat16(), log_b)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, logit_laplace_nll(pixels, mu, log_b), rtol=0.05, atol=0.05)


def test_new_numbers_compile_no_anew() -> None:
    q = torch.randn(1, 1, PATTERN.length, 16)
    table, codes = torch.randn(3, 9), torch.randn(9, 4)
    compiled = 0

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    calls: tuple[Callable[[float], torch.Tensor], ...] = (
        lambda x: sparse_attention(q, q, q, PATTERN, x),
        lambda x: gumbel_lookup(table, codes, x, seed=SEED)[0],
        lambda x: sample_tokens(table, x, seed=SEED),
        lambda x: sample_tokens(table, 0.9, 5, 0.9, SEED, table.flip(0), x),
    )
    for call in calls:
        torch._dynamo.reset()
        compiled = 0
        traced = torch.compile(call, fullgraph=True, backend=count)
        for tenths in range(1, 12):
            torch.testing.assert_close(traced(tenths / 10 + 0.05), call(tenths / 10 + 0.05))
        assert compiled <= 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_forward_derivatives(backend: str) -> None:
    function, (mu, log_b) = cases()["likelihood"]

    def by_dual(x: torch.Tensor) -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x), log_b)[0]).tangent

    def by_jvp(x: torch.Tensor) -> torch.Tensor:
        return jvp(lambda y: function(y, log_b)[0], (x,), (x,))[1]

    want = by_jvp(mu)
    for way in (by_dual, by_jvp):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(way, fullgraph=True, backend=backend)(mu), want)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_serves_every_number_of_rows(name: str) -> None:
    """torch.compile(dynamic=True) makes symbols of the numbers in error messages too."""
    function, inputs = cases()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, other in zip(compiled(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_is_asked_of_devices_that_have_it() -> None:
    q = torch.empty(1, 1, PATTERN.length, 16, device="meta")
    assert sparse_attention(q, q, q, Causal(PATTERN.layout)).device.type == "meta"


AUTOCAST = [case for case in all_cases() if case.function is not logit_laplace_nll]  # which autocast widens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", AUTOCAST, ids=lambda case: case.name)
def test_autocast_casts_inputs_and_nothing_within(case: cases_of_backends.Case, dtype: torch.dtype) -> None:
    """Backends widen to float32 for a reason: with inputs of autocast's dtype, it changes no bit."""
    inputs = tuple(tensor.to(dtype) for tensor in case.inputs(case.width))
    outside = case.run(inputs, "reference")
    with torch.autocast("cpu", dtype):
        within = case.run(inputs, "reference")
    for one, other in zip(outside, within, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
