"""The Triton kernels of the codebook against float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

pytest.importorskip("triton")

from dalle_kernels import gumbel_lookup, gumbel_projection_lookup, vq_lookup
from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook import triton_tiles
from dalle_kernels.codebook.gumbel import contract as gumbel_contract
from dalle_kernels.codebook.gumbel import triton as triton_gumbel
from dalle_kernels.codebook.projection import contract as projection_contract
from dalle_kernels.codebook.projection import triton as triton_projection
from dalle_kernels.codebook.vq import triton as triton_vq
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise
from tests.codebook.test_projection import compare as compare_with_distribution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = {"soft": (False, True), "hard": (True, True), "evaluation": (True, False)}
NAMES = ("latents", "indices", "kl or distance", "gradient 0", "gradient 1", "gradient 2", "gradient 3")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN, or an index out of range."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
        tensor = new_empty(self, *size, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def plain_gumbel(logits, codebook, tau, hard, noise, seed):  # type: ignore[no-untyped-def]
    """gumbel_lookup as one would write it with autograd, rounding every step to the dtype of `logits`."""
    g = gumbel_noise(torch.tensor(seed, device=DEVICE), *logits.shape, GUMBEL_STREAM).to(logits.dtype)
    noisy = logits + g if noise else logits
    y, indices = (noisy / tau).softmax(-1), noisy.argmax(-1)
    if hard:
        y = F.one_hot(indices, y.shape[-1]).to(y.dtype) - y.detach() + y
    log_p = logits.log_softmax(-1)
    return y @ codebook, indices, (log_p.exp() * log_p).sum(-1) + math.log(logits.shape[-1])


def gradients(outputs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor], use: str) -> list[torch.Tensor]:
    """Of a random sum of the outputs: the first, the third or both."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(output.shape, generator=generator).to(DEVICE) for output in outputs]
    terms = {"latents": (0,), "kl": (2,), "both": (0, 2)}[use]
    # Rounded as the low precision has them, for all alike.
    total = sum((outputs[n].double() * weights[n].bfloat16().double()).sum() for n in terms)
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(found, inputs, strict=True)]


def compare(
    got: list[torch.Tensor], exact: list[torch.Tensor], plain: list[torch.Tensor], exponent: float = 8.0
) -> None:
    """At most twice the error of plain PyTorch in the same precision, plus rounding.

    That is of the result to its dtype, and of the fp32 arithmetic within: an exponential whose argument, at most
    `exponent` large, is rounded, is wrong by as much relative to itself.
    """
    for name, result, true, rounded in zip(NAMES, got, exact, plain, strict=False):
        if not result.is_floating_point():
            assert torch.equal(result, true), name
            continue
        result, true, rounded = result.detach(), true.detach(), rounded.detach()
        error = (result.double() - true).abs().max()
        rounding = torch.finfo(result.dtype).eps + exponent * torch.finfo(torch.float32).eps
        allowed = 2 * (rounded.double() - true).abs().max() + rounding * max(1.0, float(true.abs().max()))
        assert error <= allowed, f"{name}: error {error}, allowed {allowed}"


def exponent_of(logits: torch.Tensor, tau: Any, noise: bool, seed: int) -> float:
    """The largest argument, in powers of two, of the exponentials that a lookup takes."""
    g = gumbel_noise(torch.tensor(seed, device=DEVICE), *logits.shape, GUMBEL_STREAM) if noise else 0
    return float(((logits.detach() + g) / tau).abs().max()) * math.log2(math.e)


def check_gumbel(
    logits: torch.Tensor, codebook: torch.Tensor, tau: Any, mode: str, use: str = "both", seed: int = 7
) -> None:
    hard, noise = MODES[mode]

    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (logits, codebook)]
        if backend == "plain":
            outputs = plain_gumbel(*inputs, tau, hard, noise, seed)
        else:
            outputs = gumbel_lookup(*inputs, tau, hard, noise, seed, backend)
        return [*outputs, *gradients(outputs, inputs, use)]

    got = run(logits.dtype, "triton")
    assert [tensor.dtype for tensor in got[:2]] == [logits.dtype, torch.int64]
    exponent = exponent_of(logits, tau, noise, seed)
    compare(got, run(torch.float64, "reference"), run(logits.dtype, "plain"), exponent)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_with_tails_everywhere(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(0)
    logits = 3 * randn(70, 150, dtype=dtype)
    check_gumbel(logits, randn(150, 24, dtype=dtype), 0.7, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gumbel_where_tiles_fit(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tau = torch.tensor(1.3, device=DEVICE)
    check_gumbel(3 * randn(66, 256, dtype=dtype), randn(256, 32, dtype=dtype), tau, "soft", seed=-(2**63))


@pytest.mark.parametrize(("rows", "codes", "width"), [(1, 1, 8), (2, 5, 16), (3, 9, 256), (5, 130, 72)])
def test_gumbel_shapes(rows: int, codes: int, width: int) -> None:
    torch.manual_seed(2)
    check_gumbel(randn(rows, codes), randn(codes, width), 1.0, "soft")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", ["latents", "kl"])
def test_gumbel_with_one_gradient(mode: str, use: str) -> None:
    torch.manual_seed(3)
    check_gumbel(2 * randn(9, 40), randn(40, 16), 0.5, mode, use)


def test_gumbel_strides_and_batch() -> None:
    torch.manual_seed(4)
    logits, codebook = randn(2, 3, 50)[..., :37], randn(37, 16)
    assert not logits.is_contiguous()
    got = gumbel_lookup(logits, codebook, 1.0, seed=3, backend="triton")
    expected = gumbel_lookup(logits.contiguous(), codebook, 1.0, seed=3, backend="reference")
    assert got[0].shape == (2, 3, 16)
    for result, true in zip(got, expected, strict=True):
        torch.testing.assert_close(result, true, rtol=1e-5, atol=1e-5)
    rows = randn(8, 60)[:, :37]  # rows further apart than they are long
    torch.testing.assert_close(
        gumbel_lookup(rows, codebook, 1.0, seed=3, backend="triton")[0],
        gumbel_lookup(rows, codebook, 1.0, seed=3, backend="reference")[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_gumbel_takes_the_first_of_equal_codes() -> None:
    torch.manual_seed(5)
    logits = torch.randint(3, (40, 300), device=DEVICE).float()  # equal maxima in every quarter and tile
    logits[0] = 0
    indices = gumbel_lookup(logits, randn(300, 16), 1.0, noise=False, backend="triton")[1]
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(indices, first)


def test_gumbel_with_codes_ruled_out() -> None:
    torch.manual_seed(15)
    logits, codebook = randn(4, 50), randn(50, 16)
    logits[1, 5] = logits[2, 1:] = -torch.inf
    results = []
    for backend in ("triton", "reference"):
        inputs = [logits.clone().requires_grad_(), codebook.clone().requires_grad_()]
        outputs = gumbel_lookup(*inputs, 0.8, seed=2, backend=backend)
        results.append([*outputs, *gradients(outputs, inputs, "both")])
    for result, true in zip(*results, strict=True):
        torch.testing.assert_close(result, true, rtol=1e-5, atol=1e-5)


def test_gumbel_rows_without_a_distribution() -> None:
    logits = torch.zeros(3, 20, device=DEVICE)
    logits[1] = -torch.inf
    latents, indices, kl = gumbel_lookup(logits, randn(20, 16), 1.0, seed=1, backend="triton")
    assert kl[[0, 2]].isfinite().all()
    assert kl[1].isnan()
    assert latents[1].isnan().all()
    assert 0 <= int(indices[1]) < 20


def test_gumbel_no_rows() -> None:
    logits = torch.zeros(0, 20, device=DEVICE, requires_grad=True)
    latents, indices, kl = gumbel_lookup(logits, randn(20, 16), 1.0, backend="triton")
    assert (latents.shape, indices.shape, kl.shape) == ((0, 16), (0,), (0,))
    (latents.sum() + kl.sum()).backward()
    assert logits.grad is not None


def test_gumbel_gradients_repeat_bit_for_bit() -> None:
    torch.manual_seed(6)
    logits, codebook = randn(200, 40).requires_grad_(), randn(40, 16).requires_grad_()  # more than one part of rows
    runs = []
    for _ in range(2):
        latents, _, kl = gumbel_lookup(logits, codebook, 1.0, seed=1, backend="triton")
        runs.append(torch.autograd.grad(latents.square().sum() + kl.sum(), [logits, codebook]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 1, 1), (6, 33, 40)])
def test_parts_are_added_in_order(shape: tuple[int, ...]) -> None:
    parts = randn(*shape) * 10.0 ** torch.arange(shape[0], device=DEVICE)[:, None, None]
    wanted = parts[0].clone()
    for part in parts[1:]:
        wanted += part
    assert torch.equal(triton_tiles.sum_parts(parts, torch.float32), wanted)


def check_vq(features: torch.Tensor, codebook: torch.Tensor) -> None:
    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (features, codebook)]
        if backend == "plain":
            indices = torch.cdist(inputs[0].double(), inputs[1].double()).argmin(-1)
            nearest = inputs[1][indices]
            latents = nearest.detach() + inputs[0] - inputs[0].detach()
            outputs = latents, indices, (inputs[0] - nearest).square().sum(-1)
        else:
            outputs = vq_lookup(*inputs, backend=backend)
        return [*outputs, *gradients(outputs, inputs, "both")]

    compare(run(features.dtype, "triton"), run(torch.float64, "reference"), run(features.dtype, "plain"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "codes", "width"), [(1, 1, 8), (70, 150, 24), (130, 64, 64), (40, 5, 256)])
def test_vq(dtype: torch.dtype, rows: int, codes: int, width: int) -> None:
    torch.manual_seed(7)
    check_vq(randn(rows, width, dtype=dtype), randn(codes, width, dtype=dtype))


def test_vq_runs_longer_than_many_chunks() -> None:
    torch.manual_seed(8)
    codebook = randn(6, 8)
    codebook[3:] += 100  # nobody's nearest
    check_vq(randn(1500, 8), codebook)
    check_vq(randn(1100, 8) * 0.1 + codebook[1], codebook)


def test_vq_takes_the_first_of_equal_rows() -> None:
    codebook = torch.randint(-3, 4, (3, 16), device=DEVICE).float().repeat(60, 1)  # products without rounding
    indices = vq_lookup(codebook[100:103], codebook, backend="triton")[1]
    assert indices.tolist() == [1, 2, 0]


def check_projection(tensors: list[torch.Tensor | None], tau: float, mode: str, use: str = "both") -> None:
    hard, noise = MODES[mode]
    dtype = tensors[0].dtype  # type: ignore[union-attr]

    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        cast = [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        if backend == "plain":
            logits = F.linear(*cast[:3])  # type: ignore[arg-type]
            outputs = plain_gumbel(logits, cast[3], tau, hard, noise, 11)
        else:
            outputs = gumbel_projection_lookup(*cast, tau, hard, noise, 11, backend)  # type: ignore[arg-type]
        return [*outputs, *gradients(outputs, [tensor for tensor in cast if tensor is not None], use)]

    exponent = exponent_of(F.linear(*tensors[:3]), tau, noise, 11)  # type: ignore[arg-type]
    compare(run(dtype, "triton"), run(torch.float64, "reference"), run(dtype, "plain"), exponent)


def projection_inputs(
    rows: int, channels: int, codes: int, width: int, dtype: torch.dtype, bias: bool
) -> list[torch.Tensor | None]:
    weight = (3 * torch.randn(codes, channels, device=DEVICE) / channels**0.5).to(dtype)
    return [
        randn(rows, channels, dtype=dtype),
        weight,
        randn(codes, dtype=dtype) if bias else None,
        randn(codes, width, dtype=dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_projection_with_tails_everywhere(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(9)
    check_projection(projection_inputs(37, 20, 90, 24, dtype, bias=mode != "hard"), 0.8, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_where_tiles_fit(dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    check_projection(projection_inputs(66, 64, 128, 32, dtype, bias=True), 1.0, "soft")


@pytest.mark.parametrize("use", ["latents", "kl", "both"])
def test_projection_in_several_strips(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_projection, "STRIP_BYTES", 1)  # one step of rows each, the last one short
    torch.manual_seed(11)
    check_projection(projection_inputs(150, 24, 33, 16, torch.float32, bias=True), 0.9, "soft", use)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("only", ["distribution", None])
@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((37, 20, 90, 24), (False, True, 0.8)),
        ((66, 64, 128, 32), (True, False, 1.0)),
        ((5, 3, 2, 3), (True, True, 0.6)),
    ],
)
def test_projection_has_the_mean_distribution(shape: Any, mode: Any, only: str | None, dtype: torch.dtype) -> None:
    compare_with_distribution(shape, dtype, mode, shape[0] % 2 == 1, only, "triton", DEVICE)


def test_the_mean_distribution_of_several_strips_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_projection, "STRIP_BYTES", 1)
    monkeypatch.setattr(triton_projection, "MEAN_PROGRAMS", 1000)  # a share of rows for each step
    compare_with_distribution((150, 24, 33, 80), torch.float32, (False, True, 0.9), True, None, "triton", DEVICE)


def test_projection_s_mean_distribution_of_codes_ruled_out_and_of_no_rows() -> None:
    torch.manual_seed(16)
    features, weight, bias, codebook = (
        tensor.requires_grad_() for tensor in projection_inputs(9, 12, 600, 16, torch.float32, bias=True)
    )
    ruling = bias.detach().clone()
    ruling[:400] = -torch.inf
    made = gumbel_projection_lookup(
        features, weight, ruling, codebook, 1.0, seed=1, backend="triton", distribution=True
    )
    assert not made[3][:400].any()
    torch.testing.assert_close(made[3].sum(), torch.ones((), device=DEVICE))
    for gradient in torch.autograd.grad(made[3].square().sum(), [features, weight]):
        assert gradient.isfinite().all()
    for rows, layer in ((features[:0], bias), (features, torch.full_like(bias, -torch.inf))):
        made = gumbel_projection_lookup(rows, weight, layer, codebook, 1.0, backend="triton", distribution=True)
        assert made[3].shape == (600,)
        assert made[3].isnan().all()  # the mean of nothing, and of rows that have no distribution


def test_projection_is_the_lookup_of_the_product() -> None:
    torch.manual_seed(12)
    features, weight, bias, codebook = projection_inputs(30, 16, 50, 16, torch.float32, bias=True)
    fused = gumbel_projection_lookup(features, weight, bias, codebook, 0.6, seed=4, backend="triton")
    apart = gumbel_lookup(F.linear(features, weight, bias), codebook, 0.6, seed=4, backend="triton")
    for result, true in zip(fused, apart, strict=True):
        torch.testing.assert_close(result, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_projection_is_a_well_made_operation(backend: str) -> None:
    torch.manual_seed(13)
    inputs = projection_inputs(5, 8, 12, 16, torch.float32, bias=True)
    inputs = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    seed, tau = torch.tensor(3, device=DEVICE), torch.ones((), device=DEVICE)
    for bias in (inputs[2], None):
        args = (*inputs[:2], bias, inputs[3], tau, False, True, seed, torch.zeros_like(seed), False, False, 0, backend)
        opcheck(torch.ops.dalle_kernels.gumbel_projection_forward.default, args, atol=1e-4, rtol=1e-4)
    compiled = torch.compile(gumbel_projection_lookup, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs, 1.0, seed=seed, backend=backend)
    for result, true in zip(got, gumbel_projection_lookup(*inputs, 1.0, seed=seed, backend=backend), strict=True):
        torch.testing.assert_close(result, true)


def test_one_code_or_no_rows_at_any_stride() -> None:
    torch.manual_seed(15)
    logits, codebook = randn(4, 2).requires_grad_(), randn(1, 3).requires_grad_()
    latents, indices, kl = gumbel_lookup(logits[:, ::2], codebook, 1.0, seed=1, backend="triton")
    assert indices.tolist() == [0] * 4
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents, codebook.expand(4, 3))
    dlogits, dcodebook = torch.autograd.grad(latents.sum() + kl.sum(), [logits, codebook])
    torch.testing.assert_close(dlogits, torch.zeros_like(logits), atol=1e-6, rtol=0)
    torch.testing.assert_close(dcodebook, torch.full_like(codebook, 4))
    latents, indices, kl = gumbel_lookup(randn(0, 8)[:, ::2], randn(4, 3), 1.0, backend="triton")
    assert (latents.shape, indices.shape, kl.shape) == ((0, 3), (0,), (0,))


def test_projection_refuses_bad_input() -> None:
    features, weight, codebook = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5, 8)
    with pytest.raises(ValueError, match="weight: got 3 channels, wanted 4"):
        gumbel_projection_lookup(features, weight[:, :3], None, codebook, 1.0)
    with pytest.raises(ValueError, match="codebook: got 4 rows, wanted 5"):
        gumbel_projection_lookup(features, weight, None, codebook[:4], 1.0)
    with pytest.raises(ValueError, match="bias: got 4 numbers, wanted 5"):
        gumbel_projection_lookup(features, weight, torch.zeros(4), codebook, 1.0)
    with pytest.raises(TypeError, match=r"weight: got torch\.float64, wanted torch\.float32"):
        gumbel_projection_lookup(features, weight.double(), None, codebook, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        gumbel_projection_lookup(features, weight, None, codebook, 0.0)


@pytest.mark.parametrize("operation", ["gumbel", "vq"])
def test_compiles_without_a_break(operation: str) -> None:
    def lookup(inputs: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        if operation == "vq":
            return vq_lookup(inputs, codebook, backend="triton")[2].sum()
        latents, _, kl = gumbel_lookup(inputs, codebook, 1.0, seed=5, backend="triton")
        return latents.sum() + kl.sum()

    torch.manual_seed(14)
    inputs = randn(4, 16 if operation == "vq" else 20).requires_grad_()
    codebook = randn(20, 16).requires_grad_()
    eager = torch.autograd.grad(lookup(inputs, codebook), [inputs, codebook])
    compiled = torch.compile(lookup, fullgraph=True, backend="aot_eager")
    for result, true in zip(torch.autograd.grad(compiled(inputs, codebook), [inputs, codebook]), eager, strict=True):
        torch.testing.assert_close(result, true)


@pytest.mark.parametrize("module", [triton_gumbel, triton_vq, triton_projection])
def test_what_is_refused(module: Any) -> None:
    device = torch.device(DEVICE)
    assert module.refuse(Call(device, torch.bfloat16, 256)) is None
    assert "264 wide" in module.refuse(Call(device, torch.bfloat16, 264))
    assert "float64" in module.refuse(Call(device, torch.float64, 64))


@pytest.mark.parametrize(
    ("width", "hard", "use"),
    [(24, False, "both"), (24, True, "both"), (24, False, "latents"), (24, True, "kl"), (72, False, "both")],
)  # 72: in two pieces
def test_gradients_that_nobody_asked_for_are_not_made(width: int, hard: bool, use: str) -> None:
    """Those asked for have the bits they have among all."""
    rows, codes = 19, 22
    weight, bias, codebook = randn(codes, 12), randn(codes), randn(codes, width)
    latents = None if use == "kl" else randn(rows, width)
    kl = None if use == "latents" else randn(rows)
    settings = (0.7, hard, True, 3, 0)
    gumbel = gumbel_contract.Inputs(randn(rows, codes), codebook, *settings)
    mean = randn(codes) if use == "both" else None
    projection = projection_contract.Inputs(randn(rows, 12), weight, bias, codebook, *settings, mean is not None, False)
    for module, contract, inputs, grads in (
        (triton_gumbel, gumbel_contract, gumbel, (latents, kl)),
        (triton_projection, projection_contract, projection, (latents, kl, mean)),
    ):
        made = {**inputs._asdict(), **module.forward(inputs)._asdict()}
        kept = contract.Kept(*(made[field] for field in contract.Kept._fields))
        count = len(contract.Needs._fields)
        every = module.backward(contract.Grads(*grads), kept, contract.Needs(*[True] * count))
        alone = [[place == asked for place in range(count)] for asked in range(count)]
        for needs in (*alone, [True] * (count - 1) + [False], [False] * count):
            some = module.backward(contract.Grads(*grads), kept, contract.Needs(*needs))
            for gradient, whole, need in zip(some, every, needs, strict=True):
                assert (gradient is not None) == need
                assert gradient is None or torch.equal(gradient, whole)


def test_a_frozen_codebook_or_encoder_leaves_products_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codebook's gradient reads no codebook row, and no sum of parts is made for one that is frozen."""
    logits, codebook, grad = randn(20, 40), randn(40, 24), randn(20, 24)
    inputs = gumbel_contract.Inputs(logits, codebook, 0.7, False, True, 3, 0)
    made = triton_gumbel.forward(inputs)
    grads, outside = gumbel_contract.Grads(grad, None), torch.full_like(codebook, torch.nan)
    needs = gumbel_contract.Needs(False, True)
    kept = gumbel_contract.Kept(**inputs._asdict(), **made._asdict())
    _, whole = triton_gumbel.backward(grads, kept, needs)
    _, alone = triton_gumbel.backward(grads, kept._replace(codebook=outside), needs)
    assert torch.equal(whole, alone)
    monkeypatch.setattr(triton_gumbel, "sum_parts", None)
    triton_gumbel.backward(grads, kept, gumbel_contract.Needs(True, False))
