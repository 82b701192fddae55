"""Other projects' models before and after `accelerate`: their attention modules alone, a training step, sampling.

A peer adds a function to `PEERS` that lists its cells. A cell names its case and how to make its two sides; the rest,
checking included, is `before_and_after`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Cell, Check, Contender, Trial, UnavailableError, Work, dtype_name
from benchmarks.suites import integrations_rudalle, integrations_transformers
from benchmarks.suites.choice import Choice

OURS = "dalle_kernels"
LENGTH_OF_TEXT = 256


@dataclass(frozen=True)
class Side:
    """A peer's model or module, as it is or accelerated.

    Attributes:
        run: what is timed.
        answers: tensors that a run gives, the same for both sides.
        counts: as of `Trial`.
    """

    run: Callable[[], object]
    answers: Callable[[], Sequence[Tensor]]
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sides:
    """Both sides, made when the cell's turn comes, and the answers that they must give.

    Attributes:
        truth: those answers; may be in float64.
        tolerance: by how much of an answer's largest element an element may differ.
    """

    ours: Side
    theirs: Side
    truth: Callable[[], Sequence[Tensor]]
    tolerance: float = 1e-4


def before_and_after(peer: str, case: dict[str, Any], dtype: torch.dtype, make: Callable[[], Sides]) -> Cell:
    """The cell that times what `make` gives."""

    def contenders() -> Iterable[Contender]:
        sides = lru_cache(maxsize=1)(make)
        yield Contender(OURS, lambda: _trial(sides(), sides().ours))
        yield Contender(peer, lambda: _trial(sides(), sides().theirs))

    case = {"peer": peer, **case, "dtype": dtype_name(dtype)}
    return Cell("integrations", case, dtype, Work, contenders)


def _trial(sides: Sides, side: Side) -> Trial:
    def verify() -> Check:
        error = 0.0
        for got, wanted in zip(side.answers(), sides.truth(), strict=True):
            difference = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
            error = max(error, difference.item()) if difference == difference else torch.nan
        return Check(error, sides.tolerance)

    return Trial([side.run], verify, counts=side.counts)


def imported(name: str) -> ModuleType:
    """A peer's module; UnavailableError where tests/peers.txt is not installed."""
    from tests.integrations.peers import peer

    try:
        return peer(name)
    except ImportError as reason:
        raise UnavailableError(f"{name} cannot be imported: {reason}") from reason


def cells(choice: Choice) -> list[Cell]:
    """Every peer's cells."""
    return [cell for cells_of_peer in PEERS for cell in cells_of_peer(choice)]


# --- DALLE-pytorch ----------------------------------------------------------------------------------------------------

# Their layer types by the names that `--pattern` knows.
LAYERS = {"causal": "full", "axial_row": "axial_row", "column": "axial_col", "corner": "conv_like"}


def dalle_pytorch_cells(choice: Choice) -> list[Cell]:
    """Each attention module without and with its projections; then, unless patterns are asked for, whole models."""
    grid = (choice.grids or ((16,) if choice.quick else (32,)))[0]
    names = choice.patterns or (("axial_row", "corner") if choice.quick else tuple(LAYERS))
    modules = [
        dalle_pytorch_module(choice.device, LAYERS[name], backward, projections, grid)
        for name in names
        if name in LAYERS
        for backward in ((False,) if choice.quick else (False, True))
        for projections in ((False,) if choice.quick else (False, True))
    ]
    if choice.patterns:
        return modules
    sampling = ((1, 1.0),) if choice.quick else ((1, 1.0), (4, 1.0), (1, 3.0))
    tokens = 4 if choice.quick else 16
    return [
        *modules,
        dalle_pytorch_training(choice.device, grid),
        *(dalle_pytorch_sampling(choice.device, batch, scale, tokens, grid) for batch, scale in sampling),
        *(
            dalle_pytorch_sampling(choice.device, 1, 1.0, tokens, grid, number=number)
            for number in ((4,) if choice.quick else (16, 64))
        ),
    ]


def dalle_pytorch_module(
    device: torch.device,
    kind: str,
    backward: bool,
    projections: bool,
    grid: int,
    text: int = LENGTH_OF_TEXT,
    heads: int = 8,
) -> Cell:
    """One of their attention modules, rotary embedding included; fp32, batch 1. Without its two projections, which are
    the same matrix products on both sides, it is given what the first would leave."""
    what = "module" if projections else "attention"
    case = {"what": what, "layer": kind, "pass": "forward + backward" if backward else "forward"}

    def make() -> Sides:
        model = _dalle(device, grid, text, heads, (kind,))
        theirs = next(m for m in model.modules() if type(m).__module__ == "dalle_pytorch.attention")
        accelerated = _accelerated(model)
        ours = next(m for m in accelerated.modules() if hasattr(m, "pattern"))
        grad = torch.randn(1, text + grid * grid, heads * 64, device=device)
        x = torch.randn(*grad.shape[:2], heads * 64 * (1 if projections else 3), device=device)
        angles = model.transformer.pos_emb
        if not projections:
            ours.to_qkv = theirs.to_qkv = nn.Identity()
            ours.to_out = theirs.to_out = nn.Identity()

        def answers(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
            leaf = x.to(dtype).requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                out = module(leaf, rotary_pos_emb=angles.to(dtype))
            if not backward:
                return [out]
            return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], grad.to(dtype))]

        wide = copy.deepcopy(theirs).double()
        sides = (Side(partial(answers, module), partial(answers, module)) for module in (ours, theirs))
        return Sides(*sides, lru_cache(maxsize=1)(partial(answers, wide, torch.float64)))

    sizes = {"grid": grid, "text": text, "heads": heads, "batch": 1}
    return before_and_after("DALLE-pytorch", case | sizes, torch.float32, make)


MIXED = ("full", "axial_row", "axial_col", "conv_like")


def dalle_pytorch_training(
    device: torch.device, grid: int, text: int = LENGTH_OF_TEXT, heads: int = 8, batch: int = 1
) -> Cell:
    """Loss and gradients of a model with a layer of each type; fp32."""
    case = {"what": "training step", "layers": ",".join(MIXED)}

    def make() -> Sides:
        model = _dalle(device, grid, text, heads, MIXED)
        captions, image = _batch(model, batch)

        def step(model: Any) -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            loss = model(captions, image, return_loss=True)
            loss.backward()
            return [loss.detach(), *(p.grad for name, p in model.named_parameters() if "to_qkv" in name)]

        ours, theirs = (Side(partial(step, one), partial(step, one)) for one in (_accelerated(model), model))
        return Sides(ours, theirs, lru_cache(maxsize=1)(theirs.answers), 1e-3)

    sizes = {"grid": grid, "text": text, "heads": heads, "batch": batch}
    return before_and_after("DALLE-pytorch", case | sizes, torch.float32, make)


def dalle_pytorch_sampling(
    device: torch.device,
    batch: int,
    cond_scale: float,
    tokens: int,
    grid: int,
    text: int = LENGTH_OF_TEXT,
    heads: int = 8,
    number: int = 1,
) -> Cell:
    """Drawing the last `tokens` of a picture, greedily; reading what is before them is part of the time, the VAE not.
    `number` candidates of each caption: theirs is given it so many times.

    The first of them must be the same; later ones may part where two are close, and with guidance because theirs has
    lost the caption by then.
    """
    case = {"what": "sampling", "layers": ",".join(MIXED), "cond_scale": cond_scale, "tokens": tokens}

    def make() -> Sides:
        model = _dalle(device, grid, text, heads, MIXED)
        captions, image = _batch(model, batch)
        prefix = image[:, : grid * grid - tokens]
        model.vae.get_codebook_indices = lambda picture: prefix.repeat_interleave(len(picture) // batch, 0)
        model.vae.decode = lambda drawn: drawn
        named = {"filter_thres": 1.0, "num_init_img_tokens": prefix.shape[1], "cond_scale": cond_scale}

        def draw(model: Any, copies: int, **candidates: int) -> Tensor:
            text = captions.repeat_interleave(copies, 0)  # a copy: their guidance overwrites it
            picture = torch.zeros(len(text), 3, model.vae.image_size, model.vae.image_size, device=device)
            return model.generate_images(text, img=picture, **named, **candidates)

        def side(draw: Callable[[], Tensor]) -> Side:
            counts = {"tokens": float(batch * number * tokens)}
            return Side(draw, lambda: [draw()[:, prefix.shape[1]].double() + 1], counts)

        ours = side(partial(draw, _accelerated(model), 1, number=number))
        theirs = side(partial(draw, model, number))
        return Sides(ours, theirs, lru_cache(maxsize=1)(theirs.answers), 0.0)

    sizes = {"grid": grid, "text": text, "heads": heads, "batch": batch, "candidates": number}
    return before_and_after("DALLE-pytorch", case | sizes, torch.float32, make)


def _dalle(device: torch.device, grid: int, text: int, heads: int, kinds: tuple[str, ...]) -> Any:
    """Their model, a layer of each kind, heads of 64."""
    peer = imported("dalle_pytorch")
    torch.manual_seed(0)
    vae = peer.DiscreteVAE(image_size=2 * grid, num_layers=1, num_tokens=1024, codebook_dim=16, hidden_dim=16)
    sizes = {"num_text_tokens": 2048, "text_seq_len": text, "depth": len(kinds), "heads": heads, "attn_types": kinds}
    return peer.DALLE(dim=64 * heads, vae=vae, **sizes).to(device)


def _accelerated(model: Any) -> Any:
    from dalle_kernels.integrations.dalle_pytorch import accelerate

    return accelerate(copy.deepcopy(model))


def _batch(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    device = model.transformer.pos_emb.device
    captions = torch.randint(1, 2048, (batch, model.text_seq_len), device=device)
    return captions, torch.randint(1024, (batch, model.image_seq_len), device=device)


# --- Every peer: add yours here ---------------------------------------------------------------------------------------

PEERS: tuple[Callable[[Choice], list[Cell]], ...] = (
    dalle_pytorch_cells,
    lambda choice: integrations_rudalle.cells(choice.device, choice.quick),
    lambda choice: integrations_transformers.cells(choice.device, choice.quick),
)
