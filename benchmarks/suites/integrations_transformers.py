"""A Llama of Hugging Face's with our attention and with SDPA under the same masks: a training step, and `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cell, Check, Contender, Trial, Work, when_installed
from dalle_kernels import TokenLayout, dalle_pattern_schedule

LAYERS = 4


def cells(device: torch.device, quick: bool = False, grid: int = 32, text: int = 256, hidden: int = 512) -> list[Cell]:
    """Four layers of the paper's schedule in float32, two query heads to a key head; tokens of a picture's middle."""
    heads = max(2, hidden // 64)
    size = {"grid": grid, "text": text, "layers": LAYERS, "heads": heads, "batch": 1, "dtype": "fp32"}
    tokens = min(16 if quick else 32, grid)

    def cell(setting: str, contenders: Callable[[_Model], Iterable[Contender]]) -> Cell:
        case = {"peer": "transformers' Llama", "what": setting} | size
        make = partial(_Model, device, TokenLayout(text, (grid, grid)), heads, hidden)
        return Cell("integrations", case, torch.float32, Work, lambda: when_installed(make, contenders), setting)

    return [
        cell("training step", _Model.training),
        cell(f"sampling {tokens} tokens", partial(_Model.sampling, tokens=tokens)),
    ]


class _Model:
    """One model, whose attention is switched."""

    def __init__(self, device: torch.device, layout: TokenLayout, heads: int, hidden: int) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from dalle_kernels.integrations.transformers import register

        patterns = dalle_pattern_schedule(LAYERS, layout)

        @lru_cache(maxsize=8)
        def dense(layer: int) -> Tensor:
            return patterns[layer].mask().to(device)

        def masked(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **named: Any) -> Any:
            stop = key.shape[2]
            rows = dense(module.layer_idx)[None, None, stop - query.shape[2] : stop, :stop]
            return sdpa_attention_forward(module, query, key, value, rows, **named)

        self.name = f"benchmark_{layout.text_length}_{layout.rows}"
        register(layout, self.name)
        AttentionInterface.register("benchmark_masked", masked)
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

    def sampling(self, tokens: int) -> Iterable[Contender]:
        """Greedy `generate`; reading the prompt is part of the time."""
        begin = self.layout.text_length + (self.layout.image_length - tokens) // 2

        def draw(name: str, cache: str) -> Tensor:
            self.model.set_attn_implementation(name)
            with torch.no_grad():
                drawn = self.model.eval().generate(
                    self.ids[:, :begin],
                    attention_mask=torch.ones_like(self.ids[:, :begin]),
                    max_new_tokens=tokens,
                    do_sample=False,
                    cache_implementation=cache,
                    disable_compile=True,
                )
            return drawn[:, begin:]

        def prepare(name: str, cache: str) -> Trial:
            def verify() -> Check:
                wanted = draw("benchmark_masked", "dynamic")
                return Check((draw(name, cache) != wanted).double().mean().item(), 0.0)

            return Trial([partial(draw, name, cache)], verify, counts={"tokens": tokens})

        yield Contender("dalle_kernels, DynamicCache", partial(prepare, self.name, "dynamic"))
        yield Contender("dalle_kernels, StaticCache", partial(prepare, self.name, "static"))
        yield Contender("SDPA mask, DynamicCache", partial(prepare, "benchmark_masked", "dynamic"))
