"""DALLE-pytorch's own models and modules before and after: masks, outputs, gradients, generated tokens."""

from __future__ import annotations

import copy
import io
import pickle
import random
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_kernels import AxialRow, Causal, Column, Convolution, MaskPattern
from dalle_kernels.integrations import dalle_pytorch as ours

from .peers import peer

peer("dalle_pytorch")
theirs = sys.modules["dalle_pytorch.attention"]
DALLE = sys.modules["dalle_pytorch"].DALLE
DiscreteVAE = sys.modules["dalle_pytorch"].DiscreteVAE

TEXT, SIDE = 6, 4  # text_seq_len, and the image's side in tokens
LENGTH = TEXT + SIDE**2  # seq_len; with <bos> there is one token more than that
MIXED = ("full", "axial_row", "axial_col", "conv_like")


def static_mask(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (torch.rand(LENGTH, LENGTH) < 0.4) | torch.eye(LENGTH, dtype=torch.bool)


GRID: dict[str, Any] = {"seq_len": LENGTH, "image_size": SIDE}
MODULES: list[tuple[str, dict[str, Any]]] = [
    ("Attention", {"seq_len": LENGTH}),
    ("Attention", {"seq_len": LENGTH, "static_mask": static_mask()}),
    ("Attention", {"seq_len": LENGTH, "causal": False}),
    ("Attention", {"seq_len": LENGTH, "causal": False, "static_mask": static_mask(1)}),
    ("SparseAxialCausalAttention", {**GRID, "axis": 0}),
    ("SparseAxialCausalAttention", {**GRID, "axis": 1}),
    ("SparseConvCausalAttention", {**GRID, "kernel_size": 1}),
    ("SparseConvCausalAttention", {**GRID, "kernel_size": 3}),
    ("SparseConvCausalAttention", {**GRID, "kernel_size": 5}),
    ("SparseConvCausalAttention", {**GRID, "kernel_size": 3, "dilation": 2}),
    ("SparseConvCausalAttention", {**GRID, "kernel_size": 5, "dilation": 3}),
]


def name_of(case: object) -> str | None:
    if isinstance(case, dict):
        left = {key: value for key, value in case.items() if key not in GRID}
        return ",".join(key if isinstance(value, Tensor) else f"{key}={value}" for key, value in left.items()) or "-"
    return None


def pair(kind: str, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """Their module and ours with the same weights, in float64."""
    torch.manual_seed(0)
    options = {"dim": 24, "heads": 2, "dim_head": 16, **options, **more}
    one, other = getattr(theirs, kind)(**options).double(), getattr(ours, kind)(**options).double()
    other.load_state_dict(one.state_dict())
    return one, other


def angles(length: int, width: int) -> Tensor:
    """[1, length, width]: what their transformer registers as pos_emb, in kind."""
    return (3 * torch.randn(1, length, width // 2, dtype=torch.float64)).repeat_interleave(2, -1)


def run(module: nn.Module, x: Tensor, grad: Tensor, **named: Any) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = module(x, **named)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], grad)]


def assert_equal(got: list[Tensor], wanted: list[Tensor], error: float = 1e-10) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=error, atol=error)


# --- Modules ----------------------------------------------------------------------------------------------------------


class _Probe(nn.Module):
    """Queries and keys of zero, so that attention is uniform over what is seen; values that say where they stand."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), torch.zeros_like(x), x], -1)


@pytest.mark.parametrize("n", [1, TEXT + 1, TEXT + 4, LENGTH])
@pytest.mark.parametrize(("kind", "options"), MODULES, ids=name_of)
def test_the_pattern_is_what_their_module_lets_through(kind: str, options: dict[str, Any], n: int) -> None:
    module = getattr(theirs, kind)(dim=n, heads=1, dim_head=n, **options).double()
    module.to_qkv, module.to_out = _Probe(), nn.Identity()
    weights = module(torch.eye(n, dtype=torch.float64)[None])[0]  # row i: what token i takes from each token
    pattern = getattr(ours, kind)(dim=n, heads=1, dim_head=n, **options).pattern
    assert torch.equal(weights > 0, pattern.mask(n))
    # Rows that sum to 1 leave nothing to the zeros that theirs pads tokens and edges with.
    torch.testing.assert_close(weights.sum(-1), torch.ones(n, dtype=torch.float64))


def test_patterns_have_their_names() -> None:
    kinds = [type(getattr(ours, kind)(dim=8, **options).pattern) for kind, options in MODULES[:1] + MODULES[4:7]]
    assert kinds == [Causal, AxialRow, Column, Convolution]


@pytest.mark.parametrize("n", [1, TEXT, TEXT + 1, TEXT + 4, LENGTH])
@pytest.mark.parametrize(("kind", "options"), MODULES, ids=name_of)
def test_modules_agree(kind: str, options: dict[str, Any], n: int) -> None:
    one, other = pair(kind, options, stable=n == LENGTH)
    x, grad = torch.randn(2, 3, n, 24, dtype=torch.float64)
    rotary = angles(LENGTH + 1, 10) if n != TEXT else None
    mask = torch.rand(3, max(n, TEXT + 1)) < 0.7
    for named in ({}, {"mask": mask[:, :n] if kind == "Attention" else mask}):
        assert_equal(
            run(other, x, grad, rotary_pos_emb=rotary, **named), run(one, x, grad, rotary_pos_emb=rotary, **named)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), MODULES, ids=name_of)
def test_modules_agree_to_rounding(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """At most twice their own distance from float64, and a few units of rounding."""
    one, other = pair(kind, options)
    x, grad = torch.randn(2, 2, LENGTH, 24, dtype=torch.float64)
    rotary = angles(LENGTH + 1, 10)
    true = run(one, x, grad, rotary_pos_emb=rotary)
    one, other, rotary = one.to(dtype), other.to(dtype), rotary.to(dtype)
    rounded = run(one, x.to(dtype), grad.to(dtype), rotary_pos_emb=rotary)
    got = run(other, x.to(dtype), grad.to(dtype), rotary_pos_emb=rotary)
    for exact, usual, answer in zip(true, rounded, got, strict=True):
        allowed = 2 * (usual.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (answer.double() - exact).abs().max() <= allowed


def test_a_static_mask_that_blinds_a_query() -> None:
    mask = static_mask()
    mask[3] = mask[9] = False
    one, other = pair("Attention", {"seq_len": LENGTH, "static_mask": mask})
    x, grad = torch.randn(2, 2, LENGTH, 24, dtype=torch.float64)
    assert_equal(run(other, x, grad), run(one, x, grad))
    with pytest.raises(ValueError, match="static_mask"), torch.no_grad():
        other(x, cache={})


@pytest.mark.parametrize(("kind", "options"), [MODULES[0], MODULES[4], MODULES[7]], ids=name_of)
def test_dropout_under_a_seed(kind: str, options: dict[str, Any]) -> None:
    one, other = pair(kind, options, dropout=0.5)
    x, grad = torch.randn(2, 2, TEXT + 3, 24, dtype=torch.float64)
    results = []
    for module in (other, one):
        torch.manual_seed(7)
        results.append(run(module, x, grad))
    assert_equal(*results)
    assert_equal(run(other.eval(), x, grad), run(one.eval(), x, grad))


@pytest.mark.parametrize(("kind", "options"), [MODULES[0], MODULES[1], MODULES[5], MODULES[9]], ids=name_of)
def test_a_cache_continues_the_sequence(kind: str, options: dict[str, Any]) -> None:
    _, module = pair(kind, options)
    x, rotary = torch.randn(2, LENGTH, 24, dtype=torch.float64), angles(LENGTH + 1, 10)
    whole = module(x, rotary_pos_emb=rotary)
    cache: dict[Any, Any] = {}
    with torch.no_grad():
        parts = [module(x[:, :9], rotary_pos_emb=rotary, cache=cache, cache_key="layer")]
        for position in range(9, LENGTH):
            cache["offset"] = position
            parts.append(module(x[:, position, None], rotary_pos_emb=rotary, cache=cache, cache_key="layer"))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_what_others_hold_is_left_alone() -> None:
    one, other = pair("Attention", {"seq_len": LENGTH})
    x, grad = torch.randn(2, 2, LENGTH, 24, dtype=torch.float64)
    rotary, seen = angles(LENGTH, 10), []
    for module in (one, other):
        module.to_qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
        run(module, x, grad, rotary_pos_emb=rotary)
    assert_equal([seen[1].detach()], [seen[0].detach()])
    other.to_qkv, packed = nn.Identity(), torch.randn(2, LENGTH, 96, dtype=torch.float64)
    before = packed.clone()
    other(packed, rotary_pos_emb=rotary)
    assert torch.equal(packed, before)


def test_angles_may_change() -> None:
    one, other = pair("Attention", {"seq_len": LENGTH})
    x, grad = torch.randn(2, 2, LENGTH, 24, dtype=torch.float64)
    rotary = angles(LENGTH, 10)
    with torch.inference_mode():
        other(x, rotary_pos_emb=rotary)
    for change in (lambda: None, lambda: rotary.mul_(2), lambda: rotary.set_(angles(LENGTH, 8))):
        change()
        assert_equal(run(other, x, grad, rotary_pos_emb=rotary), run(one, x, grad, rotary_pos_emb=rotary))


@pytest.mark.parametrize(("kind", "options"), [MODULES[0], MODULES[1], MODULES[4], MODULES[7]], ids=name_of)
def test_modules_compile(kind: str, options: dict[str, Any]) -> None:
    _, module = pair(kind, options)
    x, grad = torch.randn(2, 2, LENGTH, 24, dtype=torch.float64)
    rotary = angles(LENGTH + 1, 10)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, x, grad, rotary_pos_emb=rotary), run(module, x, grad, rotary_pos_emb=rotary))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="axis: got 2"):
        ours.SparseAxialCausalAttention(8, LENGTH, SIDE, axis=2)
    with pytest.raises(ValueError, match="kernel_size: got 4"):
        ours.SparseConvCausalAttention(8, LENGTH, SIDE, kernel_size=4)
    with pytest.raises(ValueError, match="seq_len: got 22"):
        ours.SparseAttention(8, LENGTH)
    with pytest.raises(ValueError, match="num_random_blocks: got 9"):
        ours.SparseAttention(8, 128, num_random_blocks=9)
    module = ours.Attention(8, LENGTH, heads=1, dim_head=8)
    with pytest.raises(ValueError, match="rotary_pos_emb: got 10"):
        module(torch.randn(1, 4, 8), rotary_pos_emb=torch.zeros(1, LENGTH, 10))
    with pytest.raises(ValueError, match="mask"):
        module(torch.randn(1, 4, 8), mask=torch.ones(1, 4, dtype=torch.bool), cache={})


# --- Models -----------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "shifting": {},
    "not shifting": {"shift_tokens": False},
    "reversible": {"reversible": True},
    "shared": {"depth": 6, "shared_attn_ids": (0, 1, 2, 3, 0, 1), "shared_ff_ids": (0, 0, 1, 1, 2, 2)},
    "stable, sandwiched": {"stable": True, "sandwich_norm": True},
    "learned positions": {"rotary_emb": False, "share_input_output_emb": True},
    "static masks": {"optimize_for_inference": True, "attn_types": ("axial_row", "axial_col", "full")},
    "reversible, shifting, shared": {"reversible": True, "attn_types": ("conv_like",), "shared_attn_ids": (0,)},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=4 * SIDE, num_layers=2, num_tokens=20, codebook_dim=8, hidden_dim=8)
    options = {"depth": 4, "attn_types": MIXED, **options}
    model = DALLE(dim=32, vae=vae, num_text_tokens=30, text_seq_len=TEXT, heads=2, dim_head=16, **options).to(dtype)
    for name, parameter in model.named_parameters():  # as if it had been trained: what attention finds counts
        if name.endswith(".scale"):
            parameter.data.fill_(0.7)
        elif "to_qkv" in name or "to_out.0" in name:
            parameter.data.mul_(4)
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    text = torch.randint(1, 30, (2, TEXT))
    text[1, 4:] = 0
    return text, torch.randint(20, (2, SIDE**2))


def step(model: Any) -> list[Tensor]:
    text, image = batch()
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    loss = model(text, image, return_loss=True)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_training_step(options: dict[str, Any]) -> None:
    model = make(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted, logits = step(model), model(*batch()).detach()
    assert ours.accelerate(model) is model
    assert isinstance(model, DALLE)
    assert not any(type(module).__module__ == "dalle_pytorch.attention" for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_equal(step(model), wanted)
    assert_equal([model(*batch()).detach()], [logits])
    text, image = batch()
    assert_equal([model(text, image[:, :5]).detach()], [make(**options)(text, image[:, :5]).detach()])


def test_a_training_step_in_single_precision() -> None:
    model = make(torch.float32)
    wanted = step(model)
    assert_equal(step(ours.accelerate(model)), wanted, 1e-4)


def test_a_training_step_under_autocast() -> None:
    """No further from single precision than theirs is, over all gradients together."""
    results = []
    for model in (make(torch.float32), make(torch.float32), ours.accelerate(make(torch.float32))):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(results)):
            results.append(step(model))
    sizes = [tensor.abs().max() for tensor in results[0]]
    true, usual, got = (torch.cat([(t / s).flatten() for t, s in zip(ts, sizes, strict=True)]) for ts in results)
    assert (got - true).norm() <= (usual - true).norm()
    assert (got - true).norm() < 0.1 * true.norm()


def test_a_training_step_with_dropout() -> None:
    model = make(attn_dropout=0.3, ff_dropout=0.1, reversible=True)
    wanted = step(model)
    assert_equal(step(ours.accelerate(model)), wanted)


def test_dropped_captions() -> None:
    model = make().eval()
    results = []
    for one in (copy.deepcopy(model), ours.accelerate(model)):
        text, image = batch()
        torch.manual_seed(3)
        results.append([one(text, image, null_cond_prob=0.5).detach()])
    assert_equal(*results)


def test_static_masks_are_recognised() -> None:
    model = ours.accelerate(make(**MODELS["static masks"]))
    patterns = {type(module.pattern) for module in model.modules() if hasattr(module, "pattern")}
    assert patterns == {AxialRow, Column, Causal}


# --- Generation -------------------------------------------------------------------------------------------------------


def drawn(model: Any, **named: Any) -> Tensor:
    """The tokens behind the pictures of `generate_images`."""
    seen: list[Tensor] = []
    decode = model.vae.decode
    model.vae.decode = lambda tokens: (seen.append(tokens.clone()), decode(tokens))[1]
    try:
        torch.manual_seed(5)
        images = model.generate_images(batch()[0], **named)
    finally:
        del model.vae.decode
    assert images.shape == (2, 3, 4 * SIDE, 4 * SIDE)
    return seen[0]


def guided_as_meant(model: Any) -> Any:
    """`model` whose forward pass leaves the caller's caption alone, which theirs overwrites."""
    forward = type(model).forward
    model.forward = lambda text, *args, **named: forward(model, text.clone(), *args, **named)
    return model


PRIMING = {"img": torch.rand(2, 3, 4 * SIDE, 4 * SIDE, dtype=torch.float64, generator=torch.manual_seed(4))}
GREEDY, SAMPLED = {"filter_thres": 1.0}, {"filter_thres": 0.8, "temperature": 1.3}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_greedy_generation(options: dict[str, Any]) -> None:
    model = make(**options)
    runs: list[dict[str, Any]] = [GREEDY, {**GREEDY, **PRIMING}]
    wanted = [drawn(model, **named) for named in runs]
    assert len({tuple(tokens.flatten().tolist()) for tokens in wanted}) == len(runs)
    assert all(len(tokens.unique()) > 4 for tokens in wanted), "a model that says the same of every token shows little"
    ours.accelerate(model)
    for named, tokens in zip(runs, wanted, strict=True):
        assert torch.equal(drawn(model, **named), tokens)


@pytest.mark.parametrize("named", [SAMPLED, {}, {**SAMPLED, **PRIMING}], ids=["filtered", "default", "primed"])
@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_sampling_under_a_seed(named: dict[str, Any], cond_scale: float) -> None:
    model = make(**MODELS["shifting" if cond_scale == 1 else "stable, sandwiched"])
    wanted = drawn(guided_as_meant(copy.deepcopy(model)), **named, cond_scale=cond_scale)
    assert torch.equal(drawn(ours.accelerate(model), **named, cond_scale=cond_scale), wanted)


@pytest.mark.parametrize("name", ["shifting", "learned positions", "reversible, shifting, shared"])
def test_greedy_guidance(name: str) -> None:
    model = make(**MODELS[name])
    plain, wanted = drawn(model, **GREEDY), drawn(guided_as_meant(copy.deepcopy(model)), **GREEDY, cond_scale=4.0)
    assert not torch.equal(plain, wanted)
    assert torch.equal(drawn(ours.accelerate(model), **GREEDY, cond_scale=4.0, use_cache=True), wanted)


def test_their_guidance_forgets_the_caption_and_ours_does_not() -> None:
    model = make()
    for accelerated in (False, True):
        text = batch()[0]
        if accelerated:
            ours.accelerate(model)
        model.generate_images(text, cond_scale=2.0, **GREEDY)
        assert torch.equal(text, batch()[0] if accelerated else torch.zeros_like(text))


def test_generation_in_single_precision_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from dalle_kernels.integrations.dalle_pytorch import attention

    steps: list[str] = []
    step_of = attention.decode_attention

    def counted(*args: Any) -> Tensor:
        steps.append(type(args[3].pattern).__name__)
        return step_of(*args)

    monkeypatch.setattr(attention, "decode_attention", counted)
    model = make(torch.float32)
    wanted = drawn(model, **GREEDY)
    assert torch.equal(drawn(ours.accelerate(model), **GREEDY), wanted)
    assert steps == ["Causal", "AxialRow", "Column", "Convolution"] * (SIDE**2 - 1)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_several_pictures_of_a_caption_are_those_of_its_copies(options: dict[str, Any]) -> None:
    model, text, tokens = ours.accelerate(make(**options)), batch()[0], []
    model.vae.decode = lambda drawn: tokens.append(drawn.clone())
    for named in (GREEDY, SAMPLED, {**SAMPLED, "cond_scale": 2.0}, {**SAMPLED, **PRIMING}):
        copied = {**named, "img": named["img"].repeat_interleave(3, 0)} if "img" in named else named
        for captions, extra in ((text.repeat_interleave(3, 0), copied), (text, {**named, "number": 3})):
            torch.manual_seed(5)
            model.generate_images(captions, **extra)
        assert tokens[-1].shape == (6, SIDE**2)
        assert torch.equal(*tokens[-2:])
    with pytest.raises(ValueError, match="number: got 0, wanted at least 1"):
        model.generate_images(text, number=0)


def test_generation_leaves_the_mode_and_scores() -> None:
    class Clip(nn.Module):
        def forward(self, text: Tensor, images: Tensor, return_loss: bool) -> Tensor:
            return text.sum(1) + images.mean((1, 2, 3))

    model = ours.accelerate(make(attn_dropout=0.5))
    images, scores = model.generate_images(batch()[0], clip=Clip(), **GREEDY)
    assert model.training
    assert all(module.training for module in model.transformer.modules())
    torch.testing.assert_close(scores, Clip()(batch()[0], images, False))
    model.eval().generate_images(batch()[0], **GREEDY)
    assert not model.training
    with pytest.raises(ValueError, match="text: got 4 tokens, wanted at least 6"):
        model.train().generate_images(batch()[0][:, :4])
    assert model.training
    for named, name in (({"img": torch.rand(3, 3, 5, 5)}, "img"), ({**PRIMING, "num_init_img_tokens": 16}, "num_init")):
        with pytest.raises(ValueError, match=name):
            model.generate_images(batch()[0], **named)


def test_their_cached_protocol() -> None:
    """`model(text, image, cache=...)` token by token, as their own `forward_with_cond_scale` calls it."""
    model = ours.accelerate(make()).eval()
    text, image = batch()
    whole = model(text, image[:, :-1]).detach()
    cache: dict[Any, Any] = {}
    with torch.no_grad():
        parts = [model(text, image[:, :cells], cache=cache) for cells in range(2, SIDE**2)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


# --- What surrounds a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reversible": True}], ids=["sequential", "reversible"])
def test_copies_and_pickles(options: dict[str, Any]) -> None:
    model = make(**options)
    wanted = step(model)
    tokens = drawn(model, **GREEDY)
    ours.accelerate(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)
    for twin in copies:
        assert type(twin) is type(model)
        assert_equal(step(twin), wanted)
        assert torch.equal(drawn(twin, **GREEDY), tokens)
        assert_equal(list(twin.state_dict().values()), list(model.state_dict().values()), 0)


def test_a_mask_pattern_survives_pickling_alone() -> None:
    mask = static_mask(3)
    text = pickle.dumps(ours.Attention(24, LENGTH, heads=2, dim_head=16, static_mask=mask))
    module = pickle.loads(text)
    assert module.pattern == MaskPattern(mask.tril())
    module(torch.randn(1, LENGTH, 24))


def test_their_subclass_stays_one() -> None:
    class Mine(DALLE):  # type: ignore[valid-type, misc]
        def forward(self, *args: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*args, **named)

    model = make()
    model.__class__ = Mine
    wanted = step(model)
    assert_equal(step(ours.accelerate(model)), wanted)
    assert isinstance(copy.deepcopy(model), Mine)


def test_twice_changes_the_backend_alone() -> None:
    model = ours.accelerate(make(torch.float32))
    kinds = [type(module) for module in model.modules()]
    wanted = step(model)
    ours.accelerate(model, backend="reference")
    assert [type(module) for module in model.modules()] == kinds
    assert {module.backend for module in model.modules() if hasattr(module, "pattern")} == {"reference"}
    assert_equal(step(model), wanted, 1e-4)
    ours.accelerate(model, backend="cuda")
    with pytest.raises(ValueError, match="backend: 'cuda' cannot serve"):
        step(model)


def test_hooks_and_loading_go_on() -> None:
    model = make()
    seen: list[str] = []
    for module in model.modules():
        if type(module).__module__ == "dalle_pytorch.attention":
            module.register_forward_hook(lambda module, *_: seen.append(type(module.pattern).__name__))
    ours.accelerate(model)
    other = make(attn_types=MIXED)
    for parameter in other.parameters():
        parameter.data.add_(0.01)
    model.load_state_dict(other.state_dict())
    assert_equal(step(model), step(other))
    assert seen == ["Causal", "AxialRow", "Column", "Convolution"]


def test_the_model_compiles() -> None:
    model = make(shift_tokens=False, depth=2, attn_types=("axial_row", "conv_like"))
    wanted = step(model)
    compiled = torch.compile(ours.accelerate(model), backend="aot_eager")
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    loss = compiled(*batch(), return_loss=True)
    loss.backward()
    got = [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
    assert_equal(got, wanted)


def test_sampling_compiles_to_two_graphs() -> None:
    """One for the prompt, one for every token after it, whichever column it stands in."""
    model = ours.accelerate(make(shift_tokens=True, depth=2, attn_types=("axial_row", "conv_like")))
    wanted, graphs = drawn(model), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model.transformer.compile(backend=backend)
    assert torch.equal(drawn(model), wanted)
    assert len(graphs) == 2


def test_what_is_not_theirs_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: got torch.nn.modules.linear.Linear, wanted a dalle_pytorch.DALLE"):
        ours.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend: got 'quick'"):
        ours.accelerate(make(), backend="quick")
    model = make()
    *_, last = (module for module in model.modules() if type(module).__name__ == "NonCached")
    last.fn = nn.Identity()
    with pytest.raises(TypeError, match=r"Identity in layer 3, wanted one of Attention, .*1\.6\.6"):
        ours.accelerate(model)
    assert type(model) is DALLE
    assert type(model.transformer.layers.layers[0][0].fn.fn.fn.fn.fn) is theirs.Attention
    model = make()
    model.transformer.pos_emb[0, 0, 0] += 1
    with pytest.raises(ValueError, match="pos_emb"):
        ours.accelerate(model)


# --- Sparse attention, without DeepSpeed ------------------------------------------------------------------------------


class _Config:
    """What their constructor says to DeepSpeed, and a layout that shows every kind of block."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def layout(self, seq_len: int) -> Tensor:
        """int64 [heads, blocks, blocks]."""
        blocks, causal = seq_len // self.options["block"], self.options["attention"] == "unidirectional"
        layout = torch.zeros(self.options["num_heads"], blocks, blocks, dtype=torch.int64)
        for row in range(blocks):
            for column in random.sample(range(blocks), self.options["num_random_blocks"]):
                layout[:, row, column] = 1
        for row in range(blocks):
            for column in range(row + 1 if causal else blocks):
                if row // 4 == column // 4 or column in self.options["global_block_indices"]:
                    layout[:, row, column] = 1
        return layout


class _Dense(nn.Module):
    """DeepSpeed's SparseSelfAttention, densely; the padding that it adds to the scores is left out."""

    def __init__(self, sparsity_config: _Config, max_seq_length: int, attn_mask_mode: str) -> None:
        super().__init__()
        assert attn_mask_mode == "add"
        self.block = sparsity_config.options["block"]
        self.register_buffer("master_layout", sparsity_config.layout(max_seq_length))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor) -> Tensor:
        n = q.shape[2]
        seen = torch.kron(self.master_layout, torch.ones(1, self.block, self.block, dtype=torch.int64)).bool()
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores + attn_mask
        scores = scores.masked_fill(~seen[:, :n, :n], -torch.inf)
        return scores.masked_fill(key_padding_mask[:, None, None], -torch.inf).softmax(-1) @ v


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deepspeed", "deepspeed.ops", "deepspeed.ops.sparse_attention"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    found: Any = sys.modules["deepspeed.ops.sparse_attention"]
    found.VariableSparsityConfig, found.SparseSelfAttention = _Config, _Dense


SPARSE: dict[str, Any] = {"dim": 24, "seq_len": 96, "heads": 2, "dim_head": 16, "block_size": 8, "text_seq_len": 20}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.usefixtures("deepspeed")
def test_sparse_modules_agree(causal: bool) -> None:
    modules = []
    for kind in (theirs.SparseAttention, ours.SparseAttention):
        random.seed(3)
        torch.manual_seed(0)
        modules.append(kind(**SPARSE, causal=causal).double())
    one, other = modules
    assert one.state_dict().keys() == other.state_dict().keys()
    assert_equal(list(other.state_dict().values()), list(one.state_dict().values()), 0)
    rotary = angles(97, 10)
    for n in (96, 83) if causal else (96,):  # theirs lets tokens see its padding where they see later ones
        x, grad = torch.randn(2, 2, n, 24, dtype=torch.float64)
        mask = (torch.arange(n) < 5) | (torch.rand(2, n) < 0.7)
        for named in ({}, {"mask": mask}):
            named = {**named, "rotary_pos_emb": rotary}
            assert_equal(run(other, x, grad, **named), run(one, x, grad, **named))
    random.seed(4)
    third = ours.SparseAttention(**SPARSE, causal=causal).double()
    assert third.pattern != other.pattern
    third.load_state_dict(one.state_dict())
    assert third.pattern == other.pattern


@pytest.mark.usefixtures("deepspeed")
def test_a_sparse_model() -> None:
    """Theirs cannot run: their wrapper hands the layer a cache. The same masks in `full` layers are the yardstick."""
    options = {"attn_types": ("sparse", "axial_col"), "shift_tokens": True}
    vae = DiscreteVAE(image_size=32, num_layers=2, num_tokens=20, codebook_dim=8, hidden_dim=8)
    made = {"dim": 32, "vae": vae, "num_text_tokens": 30, "text_seq_len": 16, "depth": 2, "heads": 2, "dim_head": 16}
    torch.manual_seed(0)
    model = DALLE(**made, **options).double()
    text, image = torch.randint(1, 30, (2, 16)), torch.randint(20, (2, 64))
    with pytest.raises(TypeError, match="cache"):
        model(text, image)
    yardstick = copy.deepcopy(model)
    sparse = next(module for module in yardstick.modules() if isinstance(module, theirs.SparseAttention))
    mask = torch.kron(sparse.attn_fn.master_layout[0], torch.ones(16, 16, dtype=torch.int64)).bool()
    sparse.__class__ = theirs.Attention
    sparse.register_buffer("static_mask", mask, persistent=False)
    model = ours.accelerate(model)
    assert_equal([model(text, image).detach()], [yardstick(text, image).detach()])
    tokens = []
    for one in (model, yardstick):
        torch.manual_seed(6)
        one.vae.decode = lambda drawn: tokens.append(drawn)
        one.generate_images(text, filter_thres=1.0)
        del one.vae.decode
    assert torch.equal(*tokens)


def test_sparse_layers_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's exchange of the class: their constructor would import DeepSpeed."""
    page = (Path(__file__).parents[2] / "docs/pages/models/dalle-pytorch.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if ".SparseAttention =" in block)
    transformer = sys.modules["dalle_pytorch.transformer"]
    monkeypatch.setattr(transformer, "SparseAttention", transformer.SparseAttention)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.sparse_attention", None)
    options = {"attn_types": ("sparse", "axial_row"), "depth": 2, "text_seq_len": 16, "dim": 32, "num_text_tokens": 30}
    vae = DiscreteVAE(image_size=32, num_layers=2, num_tokens=20, codebook_dim=8, hidden_dim=8)
    with pytest.raises(ImportError):
        DALLE(vae=vae, heads=2, dim_head=16, **options)
    exec(block, {})
    model = ours.accelerate(DALLE(vae=vae, heads=2, dim_head=16, **options))
    model(torch.randint(1, 30, (2, 16)), torch.randint(20, (2, 64)), return_loss=True).backward()
    assert all(parameter.grad is not None for parameter in model.transformer.parameters())
