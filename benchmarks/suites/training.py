"""The reference transformer's training step: ours against SDPA, and against no attention at all.

The last row says what share of a step attention is, so that nobody takes a kernel's ratio for a model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from dalle_reference.transformer import DalleTransformer, TransformerConfig
from torch import Tensor

from benchmarks.competitors.adapter import Lookup
from benchmarks.competitors.cross_entropy import linear_cross_entropies
from benchmarks.harness import Cell, Check, Contender, Trial, Work, dtype_name
from benchmarks.suites.choice import Choice
from benchmarks.suites.models import NoAttention, SdpaCausal, SdpaMasked, attention_of, autocast
from dalle_kernels.nn import SparseSelfAttention


def cells(choice: Choice) -> list[Cell]:
    """A step of a transformer over 256 text tokens and a grid; bf16 is autocast, as training is."""
    dtypes = choice.dtypes or (
        (torch.bfloat16,) if choice.gpu else (torch.float32,) if choice.quick else (torch.float32, torch.bfloat16)
    )
    grids, texts = choice.grids or (32,), choice.texts or (256,)
    return [cell(choice.device, text, grid, dtype) for grid in grids for text in texts for dtype in dtypes]


def cell(
    device: torch.device, text: int, grid: int, dtype: torch.dtype, layers: int = 4, heads: int | None = None
) -> Cell:
    """Forward, backward and the optimizer's step of one batch."""
    large = device.type == "cuda"
    batch, heads = (8 if large else 1), heads or (16 if large else 8)
    layers = 8 if large else layers
    case = {
        "grid": grid,
        "text": text,
        "layers": layers,
        "heads": heads,
        "batch": batch,
        "dtype": dtype_name(dtype),
    }

    config = TransformerConfig(
        vocab_text=2048, text_length=text, grid=(grid, grid), vocab_image=1024, layers=layers, heads=heads
    )

    def contenders() -> Iterable[Contender]:
        step = Step(device, config, dtype, batch)
        yield Contender("dalle_kernels", step.trial)
        yield Contender("SDPA mask", partial(step.trial, SdpaMasked))
        yield Contender("SDPA causal in every layer", partial(step.trial, SdpaCausal, same=False))
        for loss in linear_cross_entropies():
            yield Contender(f"dalle_kernels, loss by {loss.name}", partial(step.trial, loss=loss))
        yield Contender("no attention at all", partial(step.trial, NoAttention, same=False))

    return Cell("training", case, dtype, Work, contenders, f"{text} {dtype_name(dtype)}", _share)


class Step:
    """One model and one batch, which all contenders train on."""

    def __init__(self, device: torch.device, config: TransformerConfig, dtype: torch.dtype, batch: int) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model = DalleTransformer(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.text = torch.randint(config.vocab_text, (batch, config.caption_length), device=device)
        self.image = torch.randint(config.vocab_image, (batch, config.image_length), device=device)

    def _loss(self, fused: Callable[..., Tensor] | None) -> Tensor:
        with autocast(self.device, self.dtype):
            if fused is None:
                return self.model.loss(self.text, self.image).total
            predictors = self.model.config.caption_length
            hidden = self.model.hidden(self.text, self.image[:, :-1])
            losses = []
            for head, states, targets in (
                (self.model.text_head, hidden[:, :predictors], self.text),
                (self.model.image_head, hidden[:, predictors:], self.image),
            ):
                flat = states.flatten(0, 1).to(self.dtype)
                weight, bias = head.weight.to(self.dtype), head.bias.to(self.dtype)
                losses.append(fused(flat, weight, bias, targets.flatten()))
            return losses[0] / 8 + losses[1] * 7 / 8

    def trial(
        self, attention: type[SparseSelfAttention] = SparseSelfAttention, same: bool = True, loss: Lookup | None = None
    ) -> Trial:
        """A training step with this attention; `same` where it must give the reference's loss."""
        fused = loss.make().function if loss is not None else None

        def run() -> None:
            with attention_of(self.model, attention):
                self.optimizer.zero_grad(set_to_none=True)
                self._loss(fused).backward()
                self.optimizer.step()

        def verify() -> Check:
            with torch.no_grad():
                with attention_of(self.model, attention):
                    got = self._loss(fused).item()
                if not same:  # another model: its loss need only be a number
                    return Check(abs(got) if got == got else torch.inf, 1e3)
                with attention_of(self.model, SdpaMasked):
                    wanted = self._loss(None).item()
            return Check(abs(got - wanted), 2e-2 if self.dtype != torch.float32 else 1e-4)

        notes: dict[str, Any] = {} if same else {"note": "another model, for scale"}
        return Trial([run], verify, notes, {"steps": 1})


def _share(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Attention's share of our step: what the step would be shorter by without any."""
    if "dalle_kernels" not in rows or "no attention at all" not in rows:
        return {}
    return {"attention_share": 1 - rows["no attention at all"]["ms"] / rows["dalle_kernels"]["ms"]}
