"""Training steps of quantizers with large codebooks, and the product inside `vq_lookup` beside the machine's.

vector-quantize-pytorch's run before and after `accelerate`, IBQ's by our one call and by eager PyTorch. A step is
forward and backward. Both sides of a cell start from the same weights; a wrong code or gradient is a row that says so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Cell, Check, Contender, Trial, Work, when_installed
from benchmarks.suites.choice import Choice
from dalle_kernels import gumbel_projection_lookup, vq_lookup

OURS, EAGER = "dalle_kernels", "eager"
SLICE = 64  # rows that an answer is checked on


def cells(choice: Choice) -> list[Cell]:
    """Quick: a few small codebooks. Else up to 65,536 codes (VQ) and 2^18 (LFQ, IBQ)."""
    device, quick = choice.device, choice.quick
    rows, codes = (1024, 8192) if quick else (4096, 65536)
    widths = (64,) if quick else (64, 256)
    found = [product_cell(device, rows, codes, width) for width in widths]
    found += [vq_cell(device, rows, codes, width) for width in widths]
    found.append(residual_cell(device, rows, 2 if quick else 8, 1024, 256))
    for spherical, sizes in ((False, (14, 16, 18)), (True, (14, 16))):
        found += [lfq_cell(device, 1024, bits, spherical) for bits in ((12,) if quick else sizes)]
    found += [ibq_cell(device, 1024, codes, 256) for codes in ((4096,) if quick else (16384, 65536, 262144))]
    return found


# --- vector-quantize-pytorch ------------------------------------------------------------------------------------------


def vq_cell(device: torch.device, rows: int, codes: int, width: int) -> Cell:
    """VectorQuantize as it is made by default: an EMA codebook, the rotation trick."""
    case = {"quantizer": "VectorQuantize, EMA", "rows": rows, "codes": codes, "width": width}

    def make() -> nn.Module:
        from vector_quantize_pytorch import VectorQuantize

        return VectorQuantize(dim=width, codebook_size=codes)

    def check(module: Any, x: Tensor) -> Check:
        with torch.no_grad():
            indices = module(x, freeze_codebook=True)[1]
        return _nearness(x, module._codebook.embed[0], indices)

    return _peer(device, case, make, rows, width, check)


def residual_cell(device: torch.device, rows: int, quantizers: int, codes: int, width: int) -> Cell:
    """ResidualVQ: each quantizer sees what the ones before left over."""
    case = {"quantizer": f"ResidualVQ of {quantizers}", "rows": rows, "codes": codes, "width": width}

    def make() -> nn.Module:
        from vector_quantize_pytorch import ResidualVQ

        return ResidualVQ(dim=width, codebook_size=codes, num_quantizers=quantizers)

    def check(module: Any, x: Tensor) -> Check:
        with torch.no_grad():
            indices = module(x, freeze_codebook=True)[1]
        worst, left = Check(0.0, 1.0), x
        for layer, index in zip(module.layers, indices.unbind(-1), strict=True):
            embed = layer._codebook.embed[0]
            found = _nearness(left, embed, index)
            worst = max(worst, found, key=lambda one: one.error / one.allowed)
            left = left - embed[index]
        return worst

    return _peer(device, case, make, rows, width, check)


def lfq_cell(device: torch.device, rows: int, bits: int, spherical: bool) -> Cell:
    """LFQ with its two entropies over all 2^bits codes; spherical: BSQ."""
    case = {"quantizer": "BSQ" if spherical else "LFQ", "rows": rows, "codes": 2**bits, "width": bits}

    def make() -> nn.Module:
        from vector_quantize_pytorch import LFQ

        return LFQ(dim=bits, codebook_size=2**bits, spherical=spherical)

    def check(module: Any, x: Tensor) -> Check:
        """The signs; the entropies' floor is theirs alone."""
        powers = 2 ** torch.arange(bits - 1, -1, -1, device=x.device)
        wanted = ((x > 0) * powers).sum(-1)
        with torch.no_grad():
            indices = module.eval()(x)[1]
        module.train()
        return Check((indices != wanted).double().mean().item(), 0.0)

    return _peer(device, case, make, rows, bits, check)


def _nearness(x: Tensor, embed: Tensor, indices: Tensor) -> Check:
    """Which code is nearest may differ within rounding: distances must agree."""
    wide, table = x[0].double(), embed.double()
    chosen = (wide - table[indices[0]]).square().sum(-1)
    nearest = torch.cdist(wide, table).square().amin(-1)
    return Check(((chosen - nearest).max() / nearest.max()).item(), 1e-5)


def _peer(
    device: torch.device,
    case: dict[str, Any],
    make: Callable[[], nn.Module],
    rows: int,
    width: int,
    check: Callable[[Any, Tensor], Check],
) -> Cell:
    def contenders(module: nn.Module) -> Iterable[Contender]:
        from dalle_kernels.integrations.vector_quantize_pytorch import accelerate

        def prepare(change: Callable[[nn.Module], nn.Module]) -> Trial:
            torch.manual_seed(0)
            x = torch.randn(1, rows, width, device=device)
            mine = change(copy.deepcopy(module))

            def run() -> object:
                leaf = x.clone().requires_grad_()
                quantized, _, loss = mine(leaf)[:3]
                (quantized.square().mean() + loss.sum()).backward()
                return leaf.grad

            return Trial([run], lambda: check(mine, x[:, :SLICE]))

        yield Contender(OURS, lambda: prepare(accelerate))
        yield Contender("vector-quantize-pytorch", lambda: prepare(lambda module: module))

    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().to(device)

    return Cell("quantizers", case, torch.float32, Work, lambda: when_installed(made, contenders), case["quantizer"])


# --- IBQ --------------------------------------------------------------------------------------------------------------


def ibq_cell(device: torch.device, rows: int, codes: int, width: int) -> Cell:
    """Index backpropagation (Shi et al. 2024): the straight-through mixture of all codes, distances, both entropies."""
    case = {"quantizer": "IBQ", "rows": rows, "codes": codes, "width": width}
    # The least there is to do: scores, twice; the derivatives of weights, features and codebook.
    work = Work(5 * 2.0 * rows * codes * width)

    def contenders() -> Iterable[Contender]:
        @lru_cache(maxsize=1)
        def inputs() -> tuple[Tensor, Tensor]:
            generator = torch.Generator(device).manual_seed(0)
            features = torch.randn(rows, width, generator=generator, device=device)
            return features, torch.randn(codes, width, generator=generator, device=device) * width**-0.5

        for name, step in ((OURS, _ibq_ours), (EAGER, _ibq_eager)):
            yield Contender(name, lambda step=step: _ibq_trial(step, *inputs()))

    return Cell("quantizers", case, torch.float32, lambda: work, contenders, "IBQ")


def _ibq_ours(features: Tensor, codebook: Tensor) -> Tensor:
    latents, _, kl, mean = gumbel_projection_lookup(
        features, codebook, None, codebook, 1.0, hard=True, noise=False, distribution=True
    )
    rows = math.log(codebook.shape[0]) - kl.mean()
    return _ibq_loss(features, latents, rows, torch.special.entr(mean).sum())


def _ibq_eager(features: Tensor, codebook: Tensor) -> Tensor:
    logits = features @ codebook.T
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), codebook.shape[0]).to(soft.dtype)
    latents = (hard - soft.detach() + soft) @ codebook
    rows = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    mean = soft.mean(0)
    return _ibq_loss(features, latents, rows, -(mean * mean.clamp_min(1e-30).log()).sum())


def _ibq_loss(features: Tensor, latents: Tensor, rows: Tensor, mean: Tensor) -> Tensor:
    distances = (latents - features.detach()).square().mean() + 0.25 * (latents.detach() - features).square().mean()
    return latents.sin().mean() + distances + 0.1 * (rows - mean)


def _ibq_trial(step: Callable[[Tensor, Tensor], Tensor], features: Tensor, codebook: Tensor) -> Trial:
    def gradients(function: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*leaves), leaves)

    def verify() -> Check:
        rows = features[:SLICE]
        truth = gradients(_ibq_eager, rows.double(), codebook.double())
        pairs = zip(gradients(step, rows, codebook), truth, strict=True)
        return Check(max(((got - true).abs().max() / true.abs().max()).item() for got, true in pairs), 1e-3)

    return Trial([partial(gradients, step, features, codebook)], verify)


# --- vq_lookup's product ----------------------------------------------------------------------------------------------


def product_cell(device: torch.device, rows: int, codes: int, width: int) -> Cell:
    """The lookup alone, forward: its product's share of the rate that is measured beside it."""
    case = {"quantizer": "vq_lookup, forward", "rows": rows, "codes": codes, "width": width}

    def contenders() -> Iterable[Contender]:
        def prepare() -> Trial:
            generator = torch.Generator(device).manual_seed(0)
            features = torch.randn(rows, width, generator=generator, device=device)
            codebook = torch.randn(codes, width, generator=generator, device=device)

            def verify() -> Check:
                indices = vq_lookup(features[:SLICE], codebook)[1]
                return _nearness(features[None, :SLICE], codebook, indices[None])

            return Trial([lambda: vq_lookup(features, codebook)], verify)

        yield Contender(OURS, prepare)

    work = Work(2.0 * rows * codes * width)
    return Cell("quantizers", case, torch.float32, lambda: work, contenders)
