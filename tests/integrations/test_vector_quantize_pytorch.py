"""vector-quantize-pytorch before and after: the same indices, losses, gradients and codebooks, step after step."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dalle_kernels.integrations.vector_quantize_pytorch import _rotate_to, accelerate

theirs = pytest.importorskip("vector_quantize_pytorch")

STEPS = 50
PLAIN: dict[str, dict[str, Any]] = {
    "ema": {},
    "ema without rotation": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "learned": {"learnable_codebook": True, "ema_update": False},
    "dead codes": {"threshold_ema_dead_code": 2},
    "k-means": {"kmeans_init": True},
    "k-means, cosine, dead codes": {"kmeans_init": True, "use_cosine_sim": True, "threshold_ema_dead_code": 1},
    "projected": {"codebook_dim": 8},
    "heads": {"heads": 2, "codebook_dim": 8},
    "heads apart": {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True},
    "affine": {"affine_param": True},
    "orthogonal": {"orthogonal_reg_weight": 1.0, "ema_update": False, "orthogonal_reg_active_codes_only": True},
    "in place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    },
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 2},
    "manual": {"manual_ema_update": True},
    "half updates": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.5},
}


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Theirs turns everything to float32; here everything stays float64, so that nothing hides behind rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(make: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    before = make()
    after = accelerate(copy.deepcopy(before))
    optimizer = getattr(after, "in_place_codebook_optimizer", None)
    if optimizer is not None:  # a copied optimizer holds copies of its parameters, not the module's
        after.in_place_codebook_optimizer = PLAIN["in place"]["in_place_codebook_optimizer"](
            after._codebook.parameters()
        )  # type: ignore[operator]
    return before, after


def step(module: nn.Module, x: torch.Tensor, seed: int, **named: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients of one training step, under a seed of its own."""
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    quantized, indices, loss = module(leaf, **named)[:3]
    (quantized.square().mean() + loss.sum()).backward()
    gradients = [leaf.grad, *(parameter.grad for parameter in module.parameters())]
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    return [quantized, indices, loss], [gradient for gradient in gradients if gradient is not None]


def same(got: Any, wanted: Any, gain: float = 1.0) -> None:
    """Equal to 1e-10, or to `gain` times that where a loss multiplies the features' own rounding."""
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10 * gain, atol=1e-10 * gain)


def train_both(
    before: nn.Module, after: nn.Module, shape: tuple[int, ...], steps: int = STEPS, gain: float = 1.0, **named: Any
) -> None:
    for number in range(steps):
        torch.manual_seed(1000 + number)
        x = torch.randn(shape)
        wanted, got = (step(module, x, number, **named) for module in (before, after))
        same(got[0], wanted[0], gain)
        same(got[1], wanted[1], gain)
    states = before.state_dict(), after.state_dict()
    assert list(states[0]) == list(states[1])
    same(list(states[1].values()), list(states[0].values()), gain)
    results = []
    for module in (before, after):
        torch.manual_seed(0)  # diveq draws in evaluation too
        results.append(module.eval()(x, **named)[:2])
    same(results[1], results[0], gain)


@pytest.mark.parametrize("case", PLAIN)
def test_vector_quantize(case: str) -> None:
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40, **PLAIN[case]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may fall to their own code
        train_both(before, after, (2, 37, 16))


# With heads and a mask theirs fails by itself: it compares the heads' rows with the whole input.
@pytest.mark.parametrize("case", ["ema", "learned", "k-means", "dead codes", "affine", "in place"])
def test_masks(case: str) -> None:
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40, **PLAIN[case]))
    mask = torch.arange(30) < torch.tensor([30, 17])[:, None]
    train_both(before, after, (2, 30, 16), steps=10, mask=mask)
    train_both(before.train(), after.train(), (2, 30, 16), steps=3, lens=torch.tensor([30, 17]))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"accept_image_fmap": True}, (2, 16, 5, 6)),
        ({"channel_last": False}, (2, 16, 20)),
        ({"accept_3d_fmap": True}, (1, 16, 3, 4, 5)),
        ({}, (7, 16)),
    ],
    ids=str,
)
def test_layouts(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    train_both(*pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40, **options)), shape, steps=5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize_dropout": True},
        {"shared_codebook": True},
        {"kmeans_init": True, "threshold_ema_dead_code": 1},
        {"use_cosine_sim": True},
    ],
    ids=str,
)
def test_residual(options: dict[str, Any]) -> None:
    make = lambda: theirs.ResidualVQ(dim=16, codebook_size=20, num_quantizers=3, **options)  # noqa: E731
    before, after = pair(make)
    # A row that k-means made a code leaves a residual of rounding alone, which the rotation trick divides by 1e-6.
    train_both(before, after, (2, 37, 16), steps=20, gain=1e3 if "kmeans_init" in options else 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"codebook_size": (5, 12, 20)},
        {"codebook_size": 20, "num_quantizers": 3, "codebook_dim": 8, "beam_size": 2, "eval_beam_size": 3},
        {"codebook_size": 20, "num_quantizers": 3, "quantize_dropout": True, "beam_size": 2},
        {"codebook_size": 20, "num_quantizers": 3, "directional_reparam": True, "threshold_ema_dead_code": 2},
        {"codebook_size": 20, "num_quantizers": 3, "diveq": True},
        {"codebook_size": 20, "num_quantizers": 3, "quant_grad_frac": 0.1},
    ],
    ids=str,
)
def test_residual_kinds(options: dict[str, Any]) -> None:
    before, after = pair(lambda: theirs.ResidualVQ(dim=16, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may fall to their own code
        train_both(before, after, (2, 37, 16), steps=10)
    x = torch.randn(2, 37, 16)
    _, indices, *_ = after(x)
    same([after.get_output_from_indices(indices)], [before.get_output_from_indices(indices)])


def test_hierarchical() -> None:
    options = {"accept_image_fmap": True, "scales": (1, 2, 4, 7), "quant_resi": 0.5, "share_quant_resi": 1}
    before, after = pair(lambda: theirs.HierarchicalVQ(dim=16, codebook_size=20, **options))
    for number in range(5):
        torch.manual_seed(1000 + number)
        x = torch.randn(2, 16, 7, 7, requires_grad=True)
        results = []
        for module in (before, after):
            torch.manual_seed(number)
            quantized, indices, loss = module(x)
            (gradient,) = torch.autograd.grad(quantized.square().mean() + loss.sum(), x)
            results.append([quantized, *indices, loss, gradient])
        same(results[1], results[0])
    same(list(after.state_dict().values()), list(before.state_dict().values()))


def test_random_projections() -> None:
    make = lambda: theirs.RandomProjectionQuantizer(dim=16, num_codebooks=3, codebook_dim=8, codebook_size=40)  # noqa: E731
    before, after = pair(make)
    x = torch.randn(2, 37, 16)
    assert torch.equal(after(x), before(x))


def test_a_bridge_in_front_of_the_codes() -> None:
    def make() -> nn.Module:
        return theirs.VectorQuantize(
            dim=16, codebook_size=40, vq_bridge=nn.Linear(16, 16), learnable_codebook=True, ema_update=False
        )

    train_both(*pair(make), (2, 37, 16), steps=10)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_weighted_and_accumulated_updates(cosine: bool, called: bool) -> None:
    options = {"use_cosine_sim": cosine, "codebook_dim": 8, "decay": 0.8}
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=12, **options))
    weights = (torch.arange(12) % 2).double()
    weight = (lambda sums, counts: weights) if called else weights
    for number in range(4):
        torch.manual_seed(number)
        x = torch.randn(2, 50, 16)
        for named in ({"ema_update_weight": weight}, {"accum_ema_update": True}, {"accum_ema_update": True}, {}):
            same(after(x, **named), before(x, **named))
            same(list(after.state_dict().values()), list(before.state_dict().values()))


def test_indices_of_one_call_update_the_codebook_in_another() -> None:
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40))
    x, mask = torch.randn(2, 30, 16), torch.arange(30) < torch.tensor([30, 17])[:, None]
    for module in (before, after):
        _, indices, _ = module(x, mask=mask, topk=1, ema_update=False)
        module.update_ema_indices(x, indices[..., 0], mask=mask)
    same(list(after.state_dict().values()), list(before.state_dict().values()))


def test_grouped_residual() -> None:
    make = lambda: theirs.GroupedResidualVQ(dim=16, codebook_size=20, num_quantizers=2, groups=2)  # noqa: E731
    train_both(*pair(make), (2, 37, 16), steps=10)


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"channel_first": True}], ids=str)
def test_sim_vq(options: dict[str, Any]) -> None:
    shape = (2, 16, 37) if options.get("channel_first") else (2, 37, 16)
    train_both(*pair(lambda: theirs.SimVQ(dim=16, codebook_size=40, **options)), shape, steps=10)


def test_residual_sim_vq() -> None:
    make = lambda: theirs.ResidualSimVQ(dim=16, codebook_size=20, num_quantizers=3)  # noqa: E731
    train_both(*pair(make), (2, 37, 16), steps=10)


SCORES = 400.0  # what LFQ multiplies features by before it takes a softmax of them, at its inv_temperature of 100
LFQ: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"dim": 6}, (2, 37, 6)),
    ({"dim": 16, "codebook_size": 2**7}, (2, 37, 16)),
    ({"dim": 6, "spherical": True}, (2, 37, 6)),
    ({"dim": 6, "spherical": True, "codebook_scale": 0.5}, (2, 37, 6)),
    ({"dim": 8, "codebook_size": 2**4, "num_codebooks": 2}, (2, 37, 8)),
    ({"dim": 6, "commitment_loss_weight": 0.25, "diversity_gamma": 2.0}, (2, 37, 6)),
    ({"dim": 6, "soft_clamp_input_value": 2.0, "experimental_softplus_entropy_loss": True}, (2, 37, 6)),
    ({"dim": 6, "orthogonal_rotation": True}, (2, 37, 6)),
    ({"dim": 6, "frac_per_sample_entropy": 0.5}, (2, 37, 6)),
    ({"dim": 6}, (2, 6, 5, 7)),
]


@pytest.mark.parametrize(("options", "shape"), LFQ, ids=str)
def test_lfq(options: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    file = __import__("vector_quantize_pytorch.lookup_free_quantization", fromlist=["log"])
    monkeypatch.setattr(file, "log", lambda t, eps=0.0: t.clamp(min=1e-300).log())  # without their floor of 1e-5
    before, after = pair(lambda: theirs.LFQ(**options))
    train_both(before, after, shape, steps=10, gain=SCORES)


def test_lfq_takes_a_mask_s_rows_together() -> None:
    """Theirs loses an axis under a mask, and takes each row's entropy for the batch's."""
    module = accelerate(theirs.LFQ(dim=6))
    x = torch.randn(2, 37, 6)
    mask = torch.arange(37) < torch.tensor([37, 11])[:, None]
    same(module(x, mask=mask, return_loss_breakdown=True)[1], module(x[mask][None], return_loss_breakdown=True)[1])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_lfq_under_masks_of_whole_samples(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs is right there; nothing but padding gives NaN for entropies in both."""
    file = __import__("vector_quantize_pytorch.lookup_free_quantization", fromlist=["log"])
    monkeypatch.setattr(file, "log", lambda t, eps=0.0: t.clamp(min=1e-300).log())
    before, after = pair(lambda: theirs.LFQ(dim=6, frac_per_sample_entropy=share))
    x = torch.randn(2, 6, 5, 7)
    for mask in ([True, True], [True, False], [False, False]):
        results = []
        for module in (before, after):
            torch.manual_seed(3)
            returned, losses = module(x, mask=torch.tensor(mask), return_loss_breakdown=True)
            results.append([*returned, *losses])
        for got, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8, equal_nan=True)
        assert bool(results[1][-2].isnan()) == (not any(mask))


def test_residual_lfq(monkeypatch: pytest.MonkeyPatch) -> None:
    file = __import__("vector_quantize_pytorch.lookup_free_quantization", fromlist=["log"])
    monkeypatch.setattr(file, "log", lambda t, eps=0.0: t.clamp(min=1e-300).log())
    make = lambda: theirs.ResidualLFQ(dim=16, codebook_size=2**5, num_quantizers=3)  # noqa: E731
    train_both(*pair(make), (2, 37, 16), steps=10, gain=SCORES)


def test_loss_breakdowns() -> None:
    x = torch.randn(2, 37, 16)
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40))
    same(after(x, return_loss_breakdown=True)[3], before(x, return_loss_breakdown=True)[3])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"straight_through": True, "rotation_trick": False}, {}),
        ({"codebook_diversity_loss_weight": 1.0}, {}),
        ({"commitment_use_cross_entropy_loss": True}, {}),
        ({}, {"topk": 9}),
    ],
    ids=str,
)
def test_what_needs_every_distance_is_theirs(options: dict[str, Any], named: dict[str, Any]) -> None:
    from dalle_kernels.integrations import vector_quantize_pytorch as ours

    ours._said.clear()
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40, **options))
    x = torch.randn(2, 37, 16)
    with pytest.warns(UserWarning, match="own code runs, with every distance in memory"):
        got = step(after, x, 1, **named)
    wanted = step(before, x, 1, **named)
    same(got[0], wanted[0])
    same(got[1], wanted[1])


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"rotation_trick": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_topk(options: dict[str, Any], training: bool) -> None:
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40, **options))
    for module in (before, after):
        module.train(training)
    x = torch.randn(2, 37, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for topk in (1, 3, 8):
            wanted, got = (step(module, x, 1, topk=topk) for module in (before, after))
            same(got[0], wanted[0])
            same(got[1], wanted[1])
    same(list(after.state_dict().values()), list(before.state_dict().values()))


@pytest.mark.parametrize("cosine", [False, True])
def test_sampled_codes_have_the_same_distribution(cosine: bool) -> None:
    options = {"stochastic_sample_codes": True, "sample_codebook_temp": 0.5, "use_cosine_sim": cosine}
    before, after = pair(lambda: theirs.VectorQuantize(dim=4, codebook_size=6, rotation_trick=False, **options))
    x = torch.randn(4).expand(1, 30000, 4)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = [
            module(x, freeze_codebook=True)[1].flatten().bincount(minlength=6) / 30000 for module in (before, after)
        ]
    torch.testing.assert_close(shares[1], shares[0], rtol=0, atol=0.015)
    torch.manual_seed(2)
    once = after(x, freeze_codebook=True)[1]
    torch.manual_seed(2)
    assert torch.equal(after(x, freeze_codebook=True)[1], once)  # the seed is torch's
    before.eval(), after.eval()
    same(after(x), before(x))


def test_indices_can_be_scored() -> None:
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40))
    x, indices = torch.randn(2, 37, 16), torch.randint(0, 40, (2, 37))
    same(after(x, indices=indices), before(x, indices=indices))


def test_external_indices_update_the_codebook() -> None:
    before, after = pair(lambda: theirs.VectorQuantize(dim=16, codebook_size=40))
    x, indices = torch.randn(2, 37, 16), torch.randint(0, 40, (2, 37))
    for module in (before, after):
        module.update_indices(x, indices)
    same(list(after.state_dict().values()), list(before.state_dict().values()))


def test_an_accelerated_module_is_still_theirs() -> None:
    module = theirs.VectorQuantize(dim=16, codebook_size=40)
    keys, kind = list(module.state_dict()), type(module)
    assert accelerate(module) is module
    assert accelerate(module) is module  # again changes nothing
    assert isinstance(module, kind)
    assert list(module.state_dict()) == keys
    x = torch.randn(1, 5, 16)
    module.eval()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[1], module(x)[1])


def test_no_gradient_is_lost_to_an_update_between_forward_and_backward() -> None:
    module = accelerate(theirs.VectorQuantize(dim=16, codebook_size=40))
    x = torch.randn(2, 37, 16, requires_grad=True)
    first = module(x)
    module(x)  # the codebook moves
    (first[0].sum() + first[2]).backward()
    assert x.grad is not None


def test_rotations() -> None:
    """Also of rows of length 0, and of opposite ones."""
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    src, tgt, grad = torch.randn(3, 2, 9, 7).unbind()
    src[0, 0], tgt[0, 1], tgt[0, 2] = 0, 0, -src[0, 2]
    src.requires_grad_()
    results = [function(src, tgt) for function in (_rotate_to, rotate_to)]
    same(results[:1], results[1:])
    gradients = [torch.autograd.grad(result, src, grad) for result in results]
    same(*gradients)


def test_who_is_not_accelerated_rotates_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = pair(lambda: theirs.VectorQuantize(dim=8, codebook_size=20))
    calls: list[str] = []
    name = "vector_quantize_pytorch.vector_quantize_pytorch.rotate_to"
    monkeypatch.setattr(name, lambda src, tgt: calls.append("theirs") or tgt)
    x = torch.randn(2, 5, 8, requires_grad=True)
    before(x)
    after(x)
    assert calls == ["theirs"]


GAIN = 1.0


def test_somebody_s_own_subclass_keeps_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(theirs.VectorQuantize):
        def forward(self, x: torch.Tensor, *args: Any, factor: float = 1.0, **named: Any) -> Any:
            quantized, indices, loss = super().forward(x, *args, **named)
            return quantized * GAIN * factor, indices, loss

    before, after = pair(lambda: Mine(dim=8, codebook_size=20))
    x = torch.randn(2, 5, 8)
    same(after.eval()(x)[:1], before.eval()(x)[:1])
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    same(after(x, factor=3.0)[:1], before(x, factor=3.0)[:1])


def test_what_cannot_be_served_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="implicit_neural_codebook"):
        accelerate(theirs.ResidualVQ(dim=16, codebook_size=8, num_quantizers=2, implicit_neural_codebook=True))
    with pytest.raises(TypeError, match="without a Codebook"):
        accelerate(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="backend"):
        accelerate(theirs.VectorQuantize(dim=16, codebook_size=40), backend="abacus")
    with pytest.raises(ValueError, match="codebook_size: got 2\\^21"):
        accelerate(LFQ_21())(torch.randn(1, 2, 21))


def LFQ_21() -> nn.Module:  # noqa: N802
    """An LFQ whose list of all codes would be large, without it."""
    module = theirs.LFQ(dim=4)
    module.dim = module.codebook_dim = 21
    return module
