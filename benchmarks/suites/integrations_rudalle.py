"""ruDALL-E before and after `accelerate`: an attention module, a training step, and sampling with its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cell, Check, Contender, Trial, Work, when_installed

LAYERS = {"row": 0, "column": 1, "convolution": 3}  # of four


def cells(device: torch.device, quick: bool = False, grid: int = 32, text: int = 128, hidden: int = 512) -> list[Cell]:
    """Four layers in float32; sampling draws cells of the middle of a picture, where a step costs the average."""
    tokens = min(16 if quick else 32, grid)
    cell = partial(_cell, device, grid, text, hidden)
    found = [
        cell("training step", _Models.training),
        cell(f"sampling {tokens} tokens", partial(_Models.sampling, tokens=tokens)),
        *(candidates_cell(device, number, tokens, grid, text, hidden) for number in ((4,) if quick else (16, 64))),
    ]
    names = ["row"] if quick else LAYERS
    return [cell(f"module, {name}", partial(_Models.attention, layer=LAYERS[name])) for name in names] + found


def candidates_cell(device: torch.device, number: int, tokens: int, grid: int, text: int, hidden: int) -> Cell:
    """Drawing `tokens` cells of `number` candidates of one caption."""
    contenders = partial(_Models.sampling, tokens=tokens, candidates=number)
    return _cell(device, grid, text, hidden, f"sampling {tokens} tokens of candidates", contenders, number)


def _cell(
    device: torch.device,
    grid: int,
    text: int,
    hidden: int,
    setting: str,
    contenders: Callable[[_Models], Iterable[Contender]],
    rows: int = 1,
) -> Cell:
    size = {"grid": grid, "text": text, "layers": 4, "heads": max(1, hidden // 64), "batch": rows, "dtype": "fp32"}
    case = {"peer": "ruDALL-E", "what": setting} | size
    make = partial(_Models, device, grid, text, hidden)
    return Cell("integrations", case, torch.float32, Work, lambda: when_installed(make, contenders), setting)


class _Models:
    """One model as it comes, and its accelerated copy."""

    def __init__(self, device: torch.device, grid: int, text: int, hidden: int) -> None:
        from dalle_kernels.integrations.rudalle import accelerate
        from tests.integrations.peers import peer

        torch.manual_seed(0)
        self.theirs = (
            peer("rudalle.dalle.model")
            .DalleModel(
                device=device,
                num_layers=4,
                hidden_size=hidden,
                num_attention_heads=max(1, hidden // 64),
                embedding_dropout_prob=0.0,
                output_dropout_prob=0.0,
                attention_dropout_prob=0.0,
                text_seq_length=text,
                image_tokens_per_dim=grid,
                cogview_sandwich_layernorm=True,
                cogview_pb_relax=True,
                vocab_size=16384 + text,
                image_vocab_size=8192,
            )
            .to(device)
        )
        self.ours = accelerate(copy.deepcopy(self.theirs))
        length = self.theirs.total_seq_length
        self.mask = torch.ones(1, 1, length, length, device=device).tril()
        words = torch.randint(1, 16384, (1, text), device=device)
        self.ids = torch.cat([words, torch.randint(8192, (1, grid * grid), device=device)], 1)

    def attention(self, layer: int) -> Iterable[Contender]:
        """Forward and backward of one DalleSelfAttention, projections included."""
        from dalle_kernels.integrations.rudalle import _View

        width = self.theirs.transformer.layers[0].attention.hidden_size
        x = torch.randn(1, self.ids.shape[1], width, device=self.ids.device, requires_grad=True)
        dense = self.mask * self.theirs.transformer._get_layer_mask(layer)
        ours, theirs = (model.transformer.layers[layer].attention for model in (self.ours, self.theirs))

        def run(module: Any, seen: Any) -> list[Tensor]:
            out = module(x, seen)[0]
            return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

        def verify(module: Any, seen: Any) -> Check:
            pairs = zip(run(module, seen), run(theirs, dense), strict=True)
            error = max(float((got - wanted).abs().max() / wanted.abs().max()) for got, wanted in pairs)
            return Check(error, 1e-3)

        view = _View(self.ours.transformer._patterns[layer])
        for name, module, seen in (("dalle_kernels", ours, view), ("ruDALL-E", theirs, dense)):
            yield Contender(name, lambda m=module, s=seen: Trial([partial(run, m, s)], partial(verify, m, s)))

    def training(self) -> Iterable[Contender]:
        """Forward, backward and the optimizer's step of one picture."""

        def prepare(model: Any) -> Trial:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

            def run() -> float:
                optimizer.zero_grad(set_to_none=True)
                loss = model(self.ids, self.mask, return_loss=True)[0]
                loss.backward()
                optimizer.step()
                return loss.item()

            def verify() -> Check:
                with torch.no_grad():
                    wanted = self.theirs(self.ids, self.mask, return_loss=True)[0].item()
                return Check(abs(run() - wanted), 1e-4)

            return Trial([run], verify, counts={"steps": 1})

        yield Contender("dalle_kernels", partial(prepare, self.ours))
        yield Contender("ruDALL-E", partial(prepare, self.theirs))

    def sampling(self, tokens: int, candidates: int = 1) -> Iterable[Contender]:
        """Greedy, as `generate_images` calls the model, with `candidates` rows of one caption and prefix; reading them
        is part of the time."""
        begin = self.theirs.text_seq_length + (self.theirs.image_seq_length - tokens) // 2

        def draw(model: Any, use_cache: bool) -> Tensor:
            ids, cache = self.ids[:, :begin].repeat(candidates, 1), None
            mask = self.mask.expand(candidates, -1, -1, -1)
            with torch.no_grad():
                for _ in range(tokens):
                    logits, cache = model.eval()(ids, mask, use_cache=use_cache, cache=cache)
                    chosen = logits[:, -1, model.vocab_size :].argmax(-1, keepdim=True)
                    ids = torch.cat([ids, chosen], 1)
            return ids[:, begin:]

        def prepare(model: Any, use_cache: bool) -> Trial:
            def verify() -> Check:
                return Check((draw(model, use_cache) != draw(self.theirs, True)).double().mean().item(), 0.0)

            return Trial([lambda: draw(model, use_cache)], verify, counts={"tokens": tokens * candidates})

        yield Contender("dalle_kernels", partial(prepare, self.ours, True))
        yield Contender("ruDALL-E", partial(prepare, self.theirs, True))
        if candidates == 1:
            yield Contender("ruDALL-E, uncached", partial(prepare, self.theirs, False))
