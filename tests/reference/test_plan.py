"""A step that has no memory needs what one with memory is seen to take."""

import pytest
import torch
from dalle_reference import cli, plan
from dalle_reference.errors import UserError
from dalle_reference.plan import Layout, Needs, fitting, needs, sampling_bytes
from dalle_reference.transformer import DalleTransformer, Recompute, TransformerConfig

from dalle_kernels.backends import native
from tests.memory import moments, peak_of_second

SMALL = TransformerConfig(vocab_text=300, vocab_image=512, grid=(12, 12), layers=4)


def measured(config: TransformerConfig, batch: int, recompute: Recompute, bf16: bool) -> int:
    """Bytes at the worst moment of a second step, as torch's allocator sees them."""
    model, mean = DalleTransformer(config), DalleTransformer(config)
    model.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    text = torch.zeros(batch, config.caption_length, dtype=torch.int64)
    image = torch.zeros(batch, config.image_length, dtype=torch.int64)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(text, image).total
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return peak_of_second(
        step,
        lambda: sum(tensor.nbytes for tensor in (*model.parameters(), *mean.parameters(), *moments(optimizer))),
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", ["none", "blocks", "selective"])
def test_the_peak_is_that_of_a_step_with_memory(recompute: Recompute, bf16: bool) -> None:
    if native.NATIVE is None:
        pytest.skip("the reference backend takes what the CPU kernels do not")
    limit = native.NATIVE.kept_limit()
    native.NATIVE.set_kept_limit(0)  # memory that earlier results left is not the allocator's
    try:
        seen = measured(SMALL, 4, recompute, bf16)
    finally:
        native.NATIVE.set_kept_limit(limit)
    assert needs(SMALL, Layout(1, 4, "ddp", recompute=recompute, bf16=bf16)).peak == pytest.approx(seen, rel=0.1)


def test_four_processes_each_have_a_quarter_and_send_what_they_lack() -> None:
    alone, shared = needs(SMALL, Layout(1, 8, "ddp", bf16=False)), needs(SMALL, Layout(4, 8, bf16=False))
    assert shared.parameters == alone.parameters
    assert 4 * shared.weights == pytest.approx(alone.weights, rel=0.01)
    assert 4 * shared.moments == pytest.approx(alone.moments, rel=0.01)
    assert shared.peak < alone.peak / 3
    assert shared.flops == pytest.approx(alone.flops / 4, rel=0.01)
    whole = 4 * alone.parameters
    assert shared.sent["reduce_scatter"] == pytest.approx(whole * 3 / 4, rel=0.02)
    # What is in blocks is gathered forward and backward, the rest once.
    assert whole * 3 / 4 < shared.sent["allgather"] < 2 * whole * 3 / 4
    both = needs(SMALL, Layout(4, 8, "ddp", bf16=False))
    assert both.sent == {"allreduce": pytest.approx(2 * whole * 3 / 4, abs=1)}


def test_groups_that_have_all_weights_add_up_their_parts_of_the_gradients() -> None:
    alone, groups = needs(SMALL, Layout(1, 8, "ddp", bf16=False)), needs(SMALL, Layout(4, 8, bf16=False, replicate=2))
    whole = 4 * alone.parameters
    assert 2 * groups.weights == pytest.approx(alone.weights, rel=0.01)
    assert groups.flops == pytest.approx(alone.flops / 4, rel=0.01)
    assert groups.sent["reduce_scatter"] == pytest.approx(whole / 2, rel=0.02)
    assert groups.sent["allreduce"] == pytest.approx(whole / 2, rel=0.02)  # of halves, twice half of each
    assert whole / 2 < groups.sent["allgather"] < 2 * whole / 2
    assert set(groups.sent) == {"allgather", "reduce_scatter", "allreduce"}


def test_processes_that_compute_together_send_what_they_compute() -> None:
    alone, pairs = needs(SMALL, Layout(1, 8, "ddp", bf16=False)), needs(SMALL, Layout(4, 8, bf16=False, tensor=2))
    halves = ("attention.project_qkv", "attention.project_out.weight", "expand", "contract.weight", "_head.")
    named = DalleTransformer(SMALL).named_parameters()
    halved = 4 * sum(value.numel() for name, value in named if any(half in name for half in halves))
    assert pairs.weights == pytest.approx(halved / 4 + (4 * alone.parameters - halved) / 2, rel=0.01)
    assert pairs.flops == pytest.approx(alone.flops / 4, rel=0.01)
    # Each block adds up two sums forward and two backward, the heads one; of two processes each sends what there is.
    stream = 4 * 4 * (SMALL.layout.length - 1) * SMALL.width
    assert pairs.sent["tensor allreduce"] == pytest.approx(stream * (4 * SMALL.layers + 1), rel=0.05)
    # Projections to queries, keys and values, and their gradients, half of which each lacks.
    of_heads = SMALL.layers * 4 * 3 * SMALL.width**2
    assert of_heads * 0.95 < pairs.sent["tensor allgather"] < of_heads * 1.3
    with pytest.raises(ValueError, match="tensor, replicate: got tensor 2 x replicate 4, wanted a divisor of 4 GPUs"):
        needs(SMALL, Layout(4, 8, tensor=2, replicate=4))
    with pytest.raises(UserError, match=r"tensor: got 4, wanted a divisor of heads \(2\)"):
        needs(SMALL, Layout(4, 8, tensor=4))


def test_parts_compute_the_same_with_less_memory() -> None:
    whole, parts = needs(SMALL, Layout(2, 16, bf16=False)), needs(SMALL, Layout(2, 16, accumulate=8, bf16=False))
    assert parts.flops == whole.flops
    assert parts.peak < whole.peak / 2
    assert parts.sent["reduce_scatter"] == pytest.approx(8 * whole.sent["reduce_scatter"], rel=0.01)


def test_operations_are_those_of_the_products() -> None:
    config = TransformerConfig(
        vocab_text=64, text_length=4, vocab_image=32, grid=(3, 3), layers=1, heads=1, head_dim=16
    )
    found = needs(config, Layout(1, 2, "ddp", bf16=False)).flops
    tokens, width = 2 * (config.layout.length - 1), config.width
    products = tokens * 12 * width**2 + 2 * 3 * width * 64 + 2 * 9 * width * 32
    pairs = config.patterns[0].visible_pairs
    assert found == pytest.approx(6 * products + 2 * 14 * width * pairs, rel=0.05)


def test_sampling_grows_by_the_caches_of_candidates() -> None:
    two, three, four = (sampling_bytes(SMALL, number) for number in (2, 3, 4))
    assert two < three < four
    assert three - two == pytest.approx(four - three, rel=0.01)
    caches = DalleTransformer(SMALL).new_caches(1, copies=3)
    prompt = torch.zeros(1, SMALL.heads, SMALL.text_length, SMALL.head_dim)
    for cache in caches:
        cache.prefill(prompt, prompt)
    kept = sum(parameter.nbytes for parameter in DalleTransformer(SMALL).parameters())
    logits = 4 * 3 * SMALL.vocab_image
    assert sampling_bytes(SMALL, 3, bf16=False) == kept + sum(cache.nbytes for cache in caches) + logits
    assert sum(cache.nbytes for cache in caches) > 3 * SMALL.layers * prompt.nbytes


def test_the_fewest_parts_that_fit_are_found_in_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Layout] = []

    def pretended(config: TransformerConfig, layout: Layout) -> Needs:
        tried.append(layout)
        peak = 100 + layout.batch // (layout.gpus * layout.accumulate) * (10 if layout.recompute == "none" else 1)
        return Needs(0, 0, 0, peak * 10**9, {}, 0.0, 0)

    monkeypatch.setattr(plan, "needs", pretended)
    for memory, fewest in ((101, [256, 256]), (103, [128, 128]), (120, [128, 16, 16]), (3000, [1, 1, 1]), (90, [])):
        tried.clear()
        found = fitting(SMALL, 2, 512, memory * 1e9, bf16=True)
        assert [layout.accumulate for layout, _ in found if layout.parallel == "fsdp"] == fewest
        assert len(tried) <= 6 * 5


def test_the_command_prints_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "--preset", "demo", "--gpus", "2", "--memory", "0.2", "--batch", "8"])
    said = capsys.readouterr().out
    assert "--parallel fsdp --recompute selective --accumulate 1" in said
    assert "GB" in said.splitlines()[-1]
    with pytest.raises(SystemExit):
        cli.main(["plan", "--gpus", "3"])
    several = ["--gpus", "4", "--replicate", "1", "2", "--tensor", "1", "2", "--batch", "8"]
    cli.main(["plan", "--preset", "demo", *several, "--memory", "0.2"])
    said = capsys.readouterr().out
    assert "| --parallel ddp --recompute none --accumulate 1 |" in said
    for grid in ("", " --replicate 2", " --tensor 2", " --replicate 2 --tensor 2"):
        assert f"| --parallel fsdp --recompute none --accumulate 1{grid} |" in said
    assert "tensor allreduce" in said
    with pytest.raises(SystemExit):
        cli.main(["plan", "--gpus", "4", "--tensor", "3"])
    assert "replicate, tensor: got replicate 1 x tensor 3, wanted a divisor of 4 GPUs" in capsys.readouterr().err
