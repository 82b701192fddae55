"""A Llama of Hugging Face's with our attention and with SDPA under the same masks: a training step, `generate`, and the
attention of one of its steps, with each cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cell, Check, Contender, Trial, Work, when_installed
from dalle_kernels import TokenLayout, dalle_pattern_schedule

LAYERS = 4


def cells(device: torch.device, quick: bool = False, grid: int = 32, text: int = 256, hidden: int = 512) -> list[Cell]:
    """Four layers of the paper's schedule in float32, two query heads to a key head; tokens of a picture's middle.
    Drawing on a grid twice as wide as well, unless `quick`."""
    tokens = min(16 if quick else 32, grid)
    cell = partial(_cell, device, text, hidden)
    sides = (grid,) if quick else (grid, 2 * grid)
    return [
        cell("training step", _Model.training, grid),
        *(cell(f"sampling {tokens} tokens", partial(_Model.sampling, tokens=tokens), side) for side in sides),
        *(
            cell("attention of a step", partial(_Model.attention, rows=rows), side, rows)
            for side in sides
            for rows in ((4,) if quick else (1, 16))
        ),
        candidates_cell(device, 4, tokens, grid, text, hidden),
    ]


def candidates_cell(device: torch.device, number: int, tokens: int, grid: int, text: int, hidden: int) -> Cell:
    """Drawing `tokens` cells of `number` candidates of one prompt."""
    contenders = partial(_Model.sampling, tokens=tokens, candidates=number)
    return _cell(device, text, hidden, f"sampling {tokens} tokens of candidates", contenders, grid, number)


def _cell(
    device: torch.device,
    text: int,
    hidden: int,
    setting: str,
    contenders: Callable[[_Model], Iterable[Contender]],
    grid: int,
    rows: int = 1,
) -> Cell:
    heads = max(2, hidden // 64)
    size = {"grid": grid, "text": text, "layers": LAYERS, "heads": heads, "batch": rows, "dtype": "fp32"}
    case = {"peer": "transformers' Llama", "what": setting} | size
    make = partial(_Model, device, TokenLayout(text, (grid, grid)), heads, hidden)
    return Cell("integrations", case, torch.float32, Work, lambda: when_installed(make, contenders), setting)


class _Model:
    """One model, whose attention is switched."""

    def __init__(self, device: torch.device, layout: TokenLayout, heads: int, hidden: int) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from dalle_kernels.integrations.transformers import register

        patterns = dalle_pattern_schedule(LAYERS, layout)

        @lru_cache(maxsize=8)
        def dense(layer: int) -> Tensor:
            return patterns[layer].mask().to(device)

        def masked(module: Any, query: Tensor, key: Tensor, value: Tensor, offset: Tensor, **named: Any) -> Any:
            places = offset.reshape(1) + torch.arange(query.shape[2], device=device)
            rows = dense(module.layer_idx).index_select(0, places)[None, None, :, : key.shape[2]]
            return sdpa_attention_forward(module, query, key, value, rows, **named)

        def offset(*, q_offset: int | Tensor, **_: Any) -> Tensor:
            return torch.as_tensor(q_offset, device=device).reshape(1, 1, 1, 1).clone()

        self.name = f"benchmark_{layout.text_length}_{layout.rows}"
        register(layout, self.name)
        AttentionInterface.register("benchmark_masked", masked)
        AttentionMaskInterface.register("benchmark_masked", offset)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=layout.length,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.layout = layout
        self.model = AutoModelForCausalLM.from_config(config).to(device)
        self.ids = torch.randint(1, 8192, (1, layout.length), device=device)

    def training(self) -> Iterable[Contender]:
        """Forward, backward and the optimizer's step of one sequence."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

        def run(name: str) -> float:
            self.model.set_attn_implementation(name)
            optimizer.zero_grad(set_to_none=True)
            loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            return loss.item()

        def prepare(name: str, same: bool = True) -> Trial:
            def verify() -> Check:
                return Check(abs(run(name) - run("benchmark_masked")), 1e-4 if same else 1.0)

            return Trial(
                [partial(run, name)], verify, {} if same else {"note": "another model, for scale"}, {"steps": 1}
            )

        yield Contender("dalle_kernels", partial(prepare, self.name))
        yield Contender("SDPA mask", partial(prepare, "benchmark_masked"))
        yield Contender("SDPA causal in every layer", partial(prepare, "sdpa", False))

    def new_cache(self, kind: str, candidates: int = 1) -> Any:
        from transformers import DynamicCache, StaticCache

        from dalle_kernels.integrations.transformers_cache import PatternCache

        if kind == "PatternCache":
            return PatternCache(copies=candidates)
        if kind == "StaticCache":
            return StaticCache(config=self.model.config, max_cache_len=self.layout.length)
        return DynamicCache(config=self.model.config)

    def sampling(self, tokens: int, candidates: int = 1) -> Iterable[Contender]:
        """Greedy `generate`; reading the prompt is part of the time. Candidates are rows of one prompt."""
        from dalle_kernels.integrations.transformers_cache import ARGUMENT

        begin = self.layout.text_length + (self.layout.image_length - tokens) // 2

        def draw(name: str, kind: str) -> Tensor:
            self.model.set_attn_implementation(name)
            prompt = self.ids[:, :begin].repeat(candidates, 1)
            with torch.no_grad():
                drawn = self.model.eval().generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=tokens,
                    do_sample=False,
                    disable_compile=True,
                    **{ARGUMENT: self.new_cache(kind, candidates)},
                )
            return drawn[:, begin:]

        def prepare(name: str, kind: str) -> Trial:
            def verify() -> Check:
                wanted = draw("benchmark_masked", "DynamicCache")
                return Check((draw(name, kind) != wanted).double().mean().item(), 0.0)

            return Trial([partial(draw, name, kind)], verify, counts={"tokens": tokens * candidates})

        yield from self._contenders(prepare)

    def attention(self, rows: int) -> Iterable[Contender]:
        """All layers' attention for a token in the middle of a picture, without the projections around it: what a cache
        does with the new key and value, and the product."""
        heads, groups = self.model.config.num_attention_heads, self.model.config.num_key_value_heads
        begin, device = self.layout.text_length + self.layout.image_length // 2, self.ids.device
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, tokens: int) -> Tensor:
            return torch.randn(rows, heads, tokens, 64, generator=generator, device=device)

        before = normal(heads, begin), normal(groups, begin), normal(groups, begin)
        token = normal(heads, 1), normal(groups, 1), normal(groups, 1)
        modules = [SimpleNamespace(layer_idx=i, is_causal=True, config=self.model.config) for i in range(LAYERS)]

        def attend(name: str, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.masking_utils import causal_mask_function

            length, offset = cache.get_mask_sizes(q.shape[2], 0)
            mask = AttentionMaskInterface()[name](
                batch_size=rows,
                q_length=q.shape[2],
                kv_length=length,
                q_offset=cache.get_seq_length(),
                kv_offset=offset,
                mask_function=causal_mask_function,
                attention_mask=None,
                device=device,
                config=self.model.config,
            )
            outs = []
            for module in modules:
                keys, values = cache.update(k, v, module.layer_idx)
                module.num_key_value_groups = heads // groups
                outs.append(AttentionInterface()[name](module, q, keys, values, mask, scaling=0.125)[0])
            return torch.stack(outs)

        def prepare(name: str, kind: str) -> Trial:
            cache = self.new_cache(kind)
            with torch.no_grad():
                attend(name, cache, *before)

            def run() -> Tensor:
                with torch.no_grad():
                    out = attend(name, cache, *token)
                cache.crop(-1)
                return out

            def verify() -> Check:
                got, patterns = run().double(), dalle_pattern_schedule(LAYERS, self.layout)
                q, keys, values = (
                    token[0].double(),
                    *(torch.cat(pair, 2) for pair in zip(before[1:], token[1:], strict=True)),
                )
                keys, values = (t.double().repeat_interleave(heads // groups, 1) for t in (keys, values))
                error = 0.0
                for layer, pattern in enumerate(patterns):
                    seen = pattern.mask()[begin, : begin + 1].to(device)
                    scores = (0.125 * q @ keys.mT).masked_fill(~seen, -torch.inf)
                    wanted = (scores.softmax(-1) @ values).transpose(1, 2)
                    error = max(error, float((got[layer] - wanted).abs().max()))
                return Check(error, 1e-5)

            if kind == "PatternCache":
                size = cache.nbytes
            else:
                size = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
            return Trial([run], verify, {"note": f"{size / 2**20:.1f} MiB of cache"}, {"tokens": rows})

        yield from self._contenders(prepare)

    def _contenders(self, prepare: Callable[[str, str], Trial]) -> Iterable[Contender]:
        for kind in ("PatternCache", "DynamicCache", "StaticCache"):
            yield Contender(f"dalle_kernels, {kind}", partial(prepare, self.name, kind))
        for kind in ("DynamicCache", "StaticCache"):
            yield Contender(f"SDPA mask, {kind}", partial(prepare, "benchmark_masked", kind))
