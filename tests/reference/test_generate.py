"""Generation: with and without the cache, guided, from a prefix, and by seed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dalle_reference import generate as generation
from dalle_reference.generate import _step_seeds, generate
from dalle_reference.transformer import NO_TOKEN, DalleTransformer, TransformerConfig
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle_kernels import Column, Convolution, Row, sample_tokens
from dalle_kernels.nn import SparseSelfAttention
from dalle_kernels.patterns import Diagonal

CONFIG = TransformerConfig(vocab_text=30, text_length=6, grid=(6, 5), vocab_image=40, layers=4, heads=2, head_dim=16)


@pytest.fixture(scope="module")
def model() -> DalleTransformer:
    """Weights so large that every token depends visibly on what stands before it."""
    torch.manual_seed(0)
    model = DalleTransformer(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
        one, other = prefix(12), prefix(12)
        other[:, 5] = (other[:, 5] + 7) % CONFIG.vocab_image
        alone = torch.full((3, CONFIG.caption_length), NO_TOKEN)
        logits, moved = (
            model.image_head(model.hidden(alone, image))[:, CONFIG.text_length + 5 :] for image in (one, other)
        )
    assert bool(((logits - moved).abs().mean((0, 2)) > 0.01 * logits.std()).all())
    assert {type(block.attention.pattern) for block in model.blocks} == {Row, Column, Convolution}
    return model


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.tensor([[3, 4, -1, -1, -1], [7, 8, 9, 10, 11], [-1] * 5])


def prefix(cells: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_image, (3, cells), generator=torch.Generator().manual_seed(cells))


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "guided": {"guidance_scale": 2.5},
    "prefix": {"image_prefix": prefix(10)},
    "one cell given": {"image_prefix": prefix(1)},
    "one cell left": {"image_prefix": prefix(29)},
    "guided prefix": {"guidance_scale": 1.5, "image_prefix": prefix(13), "top_k": 30},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_cached_and_uncached_generation_draw_the_same_tokens(
    model: DalleTransformer, text: torch.Tensor, way: dict[str, Any]
) -> None:
    for seed in (0, -7):
        cached = generate(model, text, seed=seed, **way)
        uncached = generate(model, text, seed=seed, use_cache=False, **way)
        assert cached.shape == (3, 30)
        assert cached.dtype == torch.int64
        assert 0 <= int(cached.min()) <= int(cached.max()) < CONFIG.vocab_image
        assert torch.equal(cached, uncached)
        given = way.get("image_prefix", prefix(0))
        assert torch.equal(cached[:, : given.shape[1]], given)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_several_pictures_of_a_caption_are_those_of_its_copies(
    model: DalleTransformer, text: torch.Tensor, way: dict[str, Any]
) -> None:
    copied = {name: v.repeat_interleave(9, 0) if isinstance(v, torch.Tensor) else v for name, v in way.items()}
    wanted = generate(model, text.repeat_interleave(9, 0), seed=3, **copied)
    assert torch.equal(generate(model, text, seed=3, number=9, **way), wanted)
    assert torch.equal(generate(model, text, seed=3, number=9, use_cache=False, **way), wanted)


@pytest.mark.parametrize("schedule", ["dalle", "rowcol", "strided", "fixed", "causal"])
def test_latents_and_every_schedule_go_through_the_cache(schedule: Any, text: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = DalleTransformer(replace(CONFIG, schedule=schedule, latent=5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    latents = torch.randn(3, 5)
    for guidance in (1.0, 2.0):
        told = generate(model, text, seed=1, number=2, latents=latents, guidance_scale=guidance)
        slow = generate(model, text, seed=1, number=2, latents=latents, guidance_scale=guidance, use_cache=False)
        assert torch.equal(told, slow)
        assert not torch.equal(told, generate(model, text, seed=1, number=2, guidance_scale=guidance))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_window_of_a_whole_row_draws_the_raster_order_to_the_same_bits(
    model: DalleTransformer, text: torch.Tensor, way: dict[str, Any]
) -> None:
    seen: list[list[torch.Tensor]] = [[], []]
    for turn, order in enumerate(({}, {"order": "diagonal", "window": CONFIG.grid[1]})):
        hook = model.image_head.register_forward_hook(lambda *call, turn=turn: seen[turn].append(call[2]))
        drawn = generate(model, text, seed=3, number=2, **way, **order)
        hook.remove()
        seen[turn].append(drawn)
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def uncached(model: DalleTransformer, text: torch.Tensor, seed: int, window: int, way: dict[str, Any]) -> torch.Tensor:
    """The whole stream of tokens in their order, anew for each round, in which a token sees what `Diagonal` says."""
    size, (_, columns) = model.config, model.config.grid
    given = way.get("image_prefix", prefix(0))
    orders = [Diagonal(pattern, size.text_length, columns, window, given.shape[1]) for pattern in size.patterns]
    position, token, draws, rounds = (part.tolist() for part in orders[0].feeds)
    image = F.pad(given, (0, size.image_length - given.shape[1]))
    if "guidance_scale" in way:
        text = torch.cat([text, torch.full_like(text, NO_TOKEN)])
    for now in range(rounds[-1] + 1):
        stop = sum(turn <= now for turn in rounds)
        cells = torch.tensor(position[size.text_length : stop], dtype=torch.int64) - size.text_length
        tokens = torch.tensor(token[size.text_length : stop], dtype=torch.int64) - size.text_length
        stream = image[:, tokens].repeat(len(text) // len(image), 1)
        x = torch.cat([model.embed_text(text), model.embed_image(stream, cells)], 1)
        for block, pattern in zip(model.layers, orders, strict=True):
            attended = SparseSelfAttention(pattern, size.width, size.heads)
            attended.load_state_dict(block.attention.state_dict())
            x = x + attended(block.attention_norm(x))
            x = x + block._mlp(x)
        logits = model.image_head(model.final_norm(x))
        for feed in range(stop):
            cell = draws[feed] - size.text_length
            if rounds[feed] == now and 0 <= cell < size.image_length:
                conditional, unconditional = (
                    logits[:, feed].chunk(2) if "guidance_scale" in way else (logits[:, feed], None)
                )
                image[:, cell] = sample_tokens(
                    conditional,
                    seed=_step_seeds(seed, size.image_length, text.device)[cell],
                    unconditional_logits=unconditional,
                    **{name: value for name, value in way.items() if name != "image_prefix"},
                )
    return image


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("way", ["plain", "greedy", "guided prefix"])
def test_rows_side_by_side_with_and_without_a_cache(
    model: DalleTransformer, text: torch.Tensor, way: str, window: int
) -> None:
    calls: list[tuple[int, int]] = []
    with torch.no_grad():
        wanted = uncached(model, text, 5, window, WAYS[way])
    drawn = generate(
        model,
        text,
        seed=5,
        order="diagonal",
        window=window,
        progress=lambda done, tokens: calls.append((done, tokens.shape[1])),
        **WAYS[way],
    )
    assert torch.equal(drawn, wanted)
    assert calls[-1] == (30, 30)
    assert calls == sorted(set(calls))
    if way == "plain":
        assert len(calls) == 5 * window + 5
    assert not torch.equal(drawn, generate(model, text, seed=5, **WAYS[way]))


def test_the_grid_may_begin_in_the_text_or_have_one_row_or_column() -> None:
    for grid, options in (((3, 4), {"text_on_grid": True}), ((1, 4), {"text_on_grid": True}), ((4, 1), {})):
        torch.manual_seed(0)
        config = replace(CONFIG, grid=grid, **options)
        model, text = DalleTransformer(config), torch.tensor([[3, 4]])
        for window in {1, -(-grid[1] // 2), grid[1]}:
            drawn = generate(model, text, seed=1, order="diagonal", window=window, number=2)
            assert drawn.shape == (2, grid[0] * grid[1])
            if window == grid[1]:
                assert torch.equal(drawn, generate(model, text, seed=1, number=2))
            assert torch.equal(
                generate(model, text, seed=1, order="diagonal", window=window, image_prefix=drawn[:1]), drawn[:1]
            )


def test_eight_bits_between_steps_move_logits_by_little(model: DalleTransformer, text: torch.Tensor) -> None:
    logits: list[list[torch.Tensor]] = [[], []]
    prefixes = prefix(11)
    for turn, dtype in enumerate((None, torch.int8)):
        hook = model.image_head.register_forward_hook(lambda *call, turn=turn: logits[turn].append(call[2]))
        generate(model, text, seed=3, number=2, image_prefix=prefixes, top_k=1, cache_dtype=dtype)
        hook.remove()
    caches = model.new_caches(3, dtype=torch.int8)
    assert {cache.keys.dtype for cache in caches} == {torch.int8}
    assert torch.equal(logits[0][0], logits[1][0])  # of the prompt, which no cache takes part in
    moved = [(one - other).abs().max() / one.std() for one, other in zip(*logits, strict=True)]
    assert 0 < moved[1] < 0.2
    assert generate(model, text, seed=3, cache_dtype=torch.int8, order="diagonal").shape == (3, 30)


class Capturable(TorchDispatchMode):
    """Lets pass what a CUDA graph can hold: of the host's tensors nothing but numbers. It goes under a FakeTensorMode,
    which refuses whatever the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.met.append(func)
        made = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        strange = [tensor for tensor in given if tensor.device.type != "cuda"]
        assert all(tensor.dim() == 0 for tensor in strange), func
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert not (copies and strange and made.device.type == "cuda"), func
        return made


@pytest.mark.parametrize(("guided", "cache_dtype"), [(False, None), (True, torch.int8)])
def test_a_step_can_be_captured(guided: bool, cache_dtype: torch.dtype | None) -> None:
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = DalleTransformer(CONFIG)
        rows, number = 2 + 2 * guided, 3
        caches = model.new_caches(rows, number, cache_dtype)
        for cache in caches:
            cache.lengths = None  # the host's own count, here a fake one
        model.hidden(torch.zeros(rows, 5, dtype=torch.int64), torch.zeros(rows, 0, dtype=torch.int64), caches)
        image, seeds = torch.zeros(2 * number, 30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)
        sampling = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "guidance_scale": 2.0 if guided else 1.0}
        drawing = generation._Drawing(model, caches, image, seeds, guided, sampling)
        for taken, drawn in ((1, 1), (3, 2)):
            places = torch.zeros(1 + 2 * taken + 2 * drawn, dtype=torch.int64)
            with Capturable() as mode:
                drawing.advance(places, taken, drawn)
            for name, count in (("decode_forward", CONFIG.layers), ("sample_tokens", drawn)):
                assert sum(name in str(func) for func in mode.met) == count
        with Capturable(), pytest.raises(DataDependentOutputException):
            places.tolist()
        with Capturable(), pytest.raises(AssertionError):
            torch.zeros(2, device="cpu").to("cuda")


def test_replays_of_a_traced_step_draw_the_same(
    model: DalleTransformer, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace stands for a CUDA graph: it holds tensors and the numbers of its one pass, and carries nothing out."""
    traced: list[int] = []

    def captured(work: Callable[[], None]) -> Callable[[], None]:
        graph = make_fx(work, tracing_mode="fake", _allow_non_fake_inputs=True)()
        traced.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(generation, "captured", captured)
    for way in (*WAYS.values(), {"order": "diagonal", "window": 2}, {"cache_dtype": torch.int8}):
        wanted = generate(model, text, seed=2, number=2, **way)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            assert torch.equal(generate(model, text, seed=2, number=2, **way), wanted)
    assert len(traced) >= len(WAYS)
    assert min(traced) > 4 * CONFIG.layers


def test_the_seed_decides_and_rows_differ(model: DalleTransformer) -> None:
    text = torch.tensor([[5, 6, 7]]).expand(3, -1)
    one = generate(model, text, seed=1)
    assert torch.equal(one, generate(model, text, seed=1))
    assert not torch.equal(one, generate(model, text, seed=2))
    assert len(one.unique(dim=0)) == 3
    greedy = generate(model, text, seed=1, temperature=0.0)
    assert len(greedy.unique(dim=0)) == 1


def test_completing_its_own_top_rows_gives_the_same_picture(model: DalleTransformer, text: torch.Tensor) -> None:
    whole = generate(model, text, seed=5)
    for rows in (1, 3, 6):
        completed = generate(model, text, seed=5, image_prefix=whole[:, : rows * CONFIG.grid[1]])
        assert torch.equal(completed, whole)


def test_guidance_moves_logits_away_from_the_empty_caption(model: DalleTransformer, text: torch.Tensor) -> None:
    empty = torch.full_like(text, NO_TOKEN)
    with torch.no_grad():
        nothing = torch.empty(3, 0, dtype=torch.int64)
        conditional = model.image_head(model.hidden(text, nothing)[:, -1])
        unconditional = model.image_head(model.hidden(empty, nothing)[:, -1])
    wanted = (unconditional + 20.0 * (conditional - unconditional)).argmax(-1)
    assert not torch.equal(wanted, conditional.argmax(-1))
    drawn = generate(model, text, seed=0, temperature=0.0, guidance_scale=20.0)
    assert torch.equal(drawn[:, 0], wanted)
    plain = generate(model, empty, seed=0)
    assert torch.equal(generate(model, empty, seed=0, guidance_scale=3.0), plain)


def test_generation_under_autocast_keeps_a_cache_of_that_dtype(model: DalleTransformer, text: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert {cache.keys.dtype for cache in model.new_caches(3)} == {torch.bfloat16}
        tokens = generate(model, text, seed=0)
    assert tokens.shape == (3, 30)


def test_progress_and_gradients(model: DalleTransformer, text: torch.Tensor) -> None:
    calls: list[tuple[int, int]] = []
    tokens = generate(
        model,
        text,
        seed=0,
        image_prefix=prefix(27),
        progress=lambda done, tokens: calls.append((done, tokens.shape[1])),
    )
    assert calls == [(28, 30), (29, 30), (30, 30)]
    model.loss(text, tokens).total.backward()
    model.zero_grad()


def test_step_seeds_are_splitmix64() -> None:
    published = [  # of state 1234567, as uint64
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    seeds = _step_seeds(1234567, 5, torch.device("cpu"))
    assert [seed % 2**64 for seed in seeds.tolist()] == published
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert len(set(_step_seeds(seed, 1024, torch.device("cpu")).tolist())) == 1024


def test_it_learns_captions_and_draws_them() -> None:
    """Four captions, four pictures: after a few steps greedy generation draws each caption's picture."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_text=8, text_length=4, grid=(3, 4), vocab_image=16, layers=3, heads=2, head_dim=16)
    model = DalleTransformer(config)
    text = torch.tensor([[1, 2, -1], [2, 1, -1], [1, 2, 3], [4, -1, -1]])
    image = torch.randint(16, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(text, image).total.backward()
        optimizer.step()
    assert torch.equal(generate(model, text, seed=0, temperature=0.0), image)
    completed = generate(model, text, seed=0, temperature=0.0, image_prefix=image[:, :4])
    assert torch.equal(completed, image)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (torch.tensor([[30]]), {}, ValueError, "text_tokens: got values in 30 .. 30, wanted them in -1 .. 29"),
        (torch.tensor([[-2, 3]]), {}, ValueError, "text_tokens: got values in -2 .. 3"),
        (torch.tensor([[1.0]]), {}, TypeError, "text_tokens: got torch.float32"),
        (torch.zeros(1, 6).long(), {}, ValueError, r"text_tokens: got shape \(1, 6\)"),
        (torch.zeros(3).long(), {}, ValueError, r"text_tokens: got shape \(3,\)"),
        (torch.tensor([[1]]), {"image_prefix": torch.tensor([[40]])}, ValueError, "image_prefix: got values"),
        (torch.tensor([[1]]), {"image_prefix": torch.tensor([[-1]])}, ValueError, "image_prefix: got values"),
        (torch.tensor([[1]]), {"image_prefix": torch.zeros(1, 31).long()}, ValueError, "image_prefix: got shape"),
        (torch.tensor([[1]]), {"image_prefix": torch.zeros(2, 3).long()}, ValueError, "image_prefix: got shape"),
        (torch.tensor([[1]]), {"temperature": -1.0}, ValueError, "temperature"),
        (torch.tensor([[1]]), {"top_p": 0.0}, ValueError, "top_p"),
        (torch.tensor([[1]]), {"number": 0}, ValueError, "number: got 0, wanted at least 1"),
        (torch.tensor([[1]]), {"number": 1.5}, ValueError, "number: got 1.5, wanted an int"),
        (torch.tensor([[1]]), {"seed": "x"}, ValueError, "seed: got 'x', wanted an int"),
        (torch.tensor([[1]]), {"seed": 2**63}, ValueError, "seed: got 9223372036854775808, wanted an int of 64 bits"),
        (torch.tensor([[1]]), {"order": "diagonal", "window": 2.0}, ValueError, "window: got 2.0, wanted an int"),
        (torch.tensor([[1]]), {"order": "spiral"}, ValueError, "order: got 'spiral', wanted 'raster' or 'diagonal'"),
        (
            torch.tensor([[1]]),
            {"window": 3},
            ValueError,
            "window: got 3 with order='raster', wanted it with 'diagonal'",
        ),
        (
            torch.tensor([[1]]),
            {"order": "diagonal", "window": 6},
            ValueError,
            "window: got 6, wanted an int from 1 to 5",
        ),
        (
            torch.tensor([[1]]),
            {"order": "diagonal", "use_cache": False},
            ValueError,
            "use_cache: got False, wanted True",
        ),
        (torch.tensor([[1]]), {"cache_dtype": torch.int8, "use_cache": False}, ValueError, "use_cache: got False"),
        (torch.tensor([[1]]), {"cache_dtype": torch.int16}, ValueError, "dtype: got torch.int16"),
    ],
)
def test_bad_requests_are_refused(
    model: DalleTransformer,
    text: torch.Tensor,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        generate(model, text, **{"seed": 0, **options})


def test_numpy_integers_are_integers(model: DalleTransformer, text: torch.Tensor) -> None:
    seed, window, number = np.int64(3), np.int32(2), np.uint8(2)
    drawn = generate(model, text, seed=seed, order="diagonal", window=window, number=number)
    assert torch.equal(drawn, generate(model, text, seed=3, order="diagonal", window=2, number=2))


def test_the_lines_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/pages/training.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*from dalle_reference.generate import[^`]*)```", page)
    names: dict[str, Any] = {}
    exec(block, names)
    for pictures in ("pictures", "fewer_steps", "half_the_memory"):
        assert names[pictures].shape == (64, 64)
    assert len(names["pictures"].unique(dim=0)) == 64
