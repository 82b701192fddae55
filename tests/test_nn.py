"""The modules: each against the same thing said in plain PyTorch."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

import dalle_kernels
from dalle_kernels import Column, Convolution, Row, Strided, TokenLayout, nn

LAYOUT = TokenLayout(5, (4, 3))
LENGTH = LAYOUT.length


def test_examples_run() -> None:
    names = {**vars(dalle_kernels), **vars(nn), "torch": torch}
    outcome = doctest.testmod(nn, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted > 10
    assert outcome.failed == 0


def attention(pattern: dalle_kernels.Pattern, **options: object) -> nn.SparseSelfAttention:
    torch.manual_seed(0)
    return nn.SparseSelfAttention(pattern, 24, 2, **options).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [LENGTH, 9, 1])
@pytest.mark.parametrize("head_dim", [None, 16])
def test_attention_is_torch_multihead_attention_with_the_patterns_mask(length: int, head_dim: int | None) -> None:
    pattern = Column(LAYOUT)
    module = attention(pattern, head_dim=head_dim)
    x = torch.randn(3, length, 24, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(3, length, dtype=torch.bool)
    padding[1, 1:3] = True
    got = module(x, key_padding_mask=padding)

    width = 2 * module.head_dim
    q, k, v = (
        part.reshape(3, length, 2, width // 2).transpose(1, 2)
        for part in F.linear(x, module.project_qkv.weight, module.project_qkv.bias).split(width, -1)
    )
    visible = pattern.mask(length) & ~padding[:, None, None]
    weights = (q @ k.mT / math.sqrt(width // 2)).masked_fill(~visible, -math.inf).softmax(-1)
    wanted = module.project_out((weights @ v).transpose(1, 2).reshape(3, length, width))
    torch.testing.assert_close(got, wanted)
    inputs = [x, *module.parameters()]
    pull = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, inputs, pull), torch.autograd.grad(wanted, inputs, pull), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_attention_takes_the_weights_of_torch_multihead_attention() -> None:
    """The projections have torch's own layout, so its weights load as they are."""
    pattern = Row(LAYOUT)
    module, theirs = attention(pattern), torch.nn.MultiheadAttention(24, 2, batch_first=True).double()
    module.project_qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    module.project_out.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, LENGTH, 24, dtype=torch.float64)
    wanted, _ = theirs(x, x, x, attn_mask=~pattern.mask(), need_weights=False)
    torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize(
    "pattern", [Row(LAYOUT), Column(LAYOUT), Convolution(LAYOUT, kernel_size=3), Strided(LENGTH, 4)], ids=repr
)
@pytest.mark.parametrize("prompt", [0, 1, 7])
@torch.no_grad()
def test_steps_after_a_prompt_give_what_the_whole_sequence_gives(pattern: dalle_kernels.Pattern, prompt: int) -> None:
    module = attention(pattern)
    x = torch.randn(2, LENGTH, 24, dtype=torch.float64)
    whole = module(x)
    cache = module.new_cache(2)
    assert cache.keys.dtype == torch.float64
    parts = [module(x[:, :prompt], cache=cache)] if prompt else []
    for position in range(prompt, LENGTH):
        at = position if position % 2 else torch.tensor(position)
        parts.append(module.step(x[:, position : position + 1], cache, at))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_a_soft_cap_bounds_scores_of_training_and_of_steps() -> None:
    plain, module = attention(Row(LAYOUT)), attention(Row(LAYOUT), softcap=0.1)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, LENGTH, 24, dtype=torch.float64)
    q, k, v = module._qkv(x)
    wanted = module._join(dalle_kernels.sparse_attention(q, k, v, Row(LAYOUT), softcap=0.1))
    torch.testing.assert_close(module(x), wanted)
    assert not torch.allclose(plain(x), wanted)
    cache = module.new_cache(2)
    module(x[:, :-1], cache=cache)
    torch.testing.assert_close(module.step(x[:, -1:], cache, LENGTH - 1), wanted[:, -1:])
    assert "softcap=0.1" in repr(module)
    with pytest.raises(ValueError, match="softcap: got 0, wanted"):
        attention(Row(LAYOUT), softcap=0)


def test_caches_follow_autocast() -> None:
    module = nn.SparseSelfAttention(Row(LAYOUT), 32, 2, bias=False)
    assert module.project_qkv.bias is None
    assert module.new_cache(1).keys.dtype == torch.float32
    assert module.new_cache(1, dtype=torch.float16).keys.dtype == torch.float16
    x = torch.randn(1, LENGTH, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = module.new_cache(1)
        whole = module(x, cache=cache)
        cache.truncate(LENGTH - 1)
        step = module.step(x[:, -1:], cache, LENGTH - 1)
    assert cache.keys.dtype == step.dtype == torch.bfloat16
    torch.testing.assert_close(step, whole[:, -1:], rtol=0.02, atol=0.02)


def test_attention_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="embed_dim: got 25, wanted a multiple of num_heads"):
        nn.SparseSelfAttention(Row(LAYOUT), 25, 2)
    with pytest.raises(ValueError, match="num_heads: got 0"):
        nn.SparseSelfAttention(Row(LAYOUT), 25, 0)
    with pytest.raises(ValueError, match="got 18 tokens, wanted 1 to 17"):
        nn.SparseSelfAttention(Row(LAYOUT), 24, 2)(torch.randn(1, LENGTH + 1, 24))


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_quantizer_is_the_lookup_of_its_codebook(hard: bool) -> None:
    torch.manual_seed(0)
    module = nn.GumbelQuantizer(12, 6, hard=hard).double()
    logits = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    got = module(logits, temperature=0.7, seed=3)
    wanted = dalle_kernels.gumbel_lookup(logits, module.codebook, 0.7, hard=hard, seed=3)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    rows = F.embedding(got.indices, module.codebook)
    assert torch.equal(got.latents, rows) == hard
    (got.latents.square().sum() + got.kl.sum()).backward()
    assert logits.grad is not None
    assert module.codebook.grad is not None
    assert logits.grad.isfinite().all()


def test_gumbel_quantizer_draws_noise_only_while_training() -> None:
    torch.manual_seed(0)
    module = nn.GumbelQuantizer(12, 6)
    logits = torch.randn(50, 12)
    assert not torch.equal(module(logits).indices, module(logits).indices)
    torch.manual_seed(5)
    first = module(logits)
    torch.manual_seed(5)
    assert torch.equal(module(logits).latents, first.latents)
    module.eval()
    assert torch.equal(module(logits).indices, logits.argmax(-1))
    assert torch.equal(module(logits).latents, module.codebook[logits.argmax(-1)])


def test_vector_quantizer_losses_move_one_side_each() -> None:
    torch.manual_seed(0)
    module = nn.VectorQuantizer(7, 4).double()
    features = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    got = module(features)
    distances = torch.cdist(features.detach().flatten(0, 1), module.codebook.detach())
    assert torch.equal(got.indices.flatten(), distances.argmin(-1))
    nearest = module.codebook[got.indices]
    assert torch.equal(got.latents, nearest)
    error = (features - nearest).detach()
    torch.testing.assert_close(got.codebook_loss, error.square().mean())
    torch.testing.assert_close(got.commitment_loss, error.square().mean())

    by_features, by_codebook = torch.autograd.grad(
        got.commitment_loss, [features, module.codebook], allow_unused=True, retain_graph=True
    )
    torch.testing.assert_close(by_features, 2 * error / error.numel())
    assert by_codebook is None
    by_features, by_codebook = torch.autograd.grad(
        got.codebook_loss, [features, module.codebook], allow_unused=True, retain_graph=True
    )
    assert by_features is None
    wanted = torch.zeros_like(module.codebook).index_add(
        0, got.indices.flatten(), -2 * error.flatten(0, 1) / error.numel()
    )
    torch.testing.assert_close(by_codebook, wanted)
    pull = torch.randn_like(features)
    (straight,) = torch.autograd.grad(got.latents, features, pull)
    assert torch.equal(straight, pull)


def test_vector_quantizer_counts_and_revives_dead_codes() -> None:
    torch.manual_seed(0)
    module = nn.VectorQuantizer(6, 2)
    with torch.no_grad():
        module.codebook.copy_(torch.tensor([[0.0, 0], [1, 0], [9, 9], [0, 1], [8, 8], [-9, 9]]))
    features = torch.tensor([[0.1, 0], [0.9, 0], [0, 1.1]])
    for _ in range(3):
        module(features)
    assert module.idle.tolist() == [0, 0, 3, 0, 3, 3]
    module.eval()
    module(features)
    assert module.idle.tolist() == [0, 0, 3, 0, 3, 3], "evaluation does not count"
    module.train()
    module(torch.tensor([[8.0, 8.1]]))
    assert module.dead_codes(4).tolist() == [2, 5]
    assert module.dead_codes(1).tolist() == [0, 1, 2, 3, 5]
    kept = module.codebook.detach()[[0, 1, 3, 4]].clone()
    assert module.revive(features, idle_batches=4) == 2
    assert torch.equal(module.codebook[[0, 1, 3, 4]], kept)
    for row in module.codebook[[2, 5]]:
        assert (row == features).all(-1).any()
    assert module.dead_codes(4).tolist() == []
    assert "idle" in module.state_dict()
    with pytest.raises(ValueError, match="idle_batches: got 0"):
        module.dead_codes(0)


def test_vector_quantizer_learns_clusters_that_its_codes_missed() -> None:
    """With revival every one of eight clusters gets a code; the distance falls to the clusters' spread."""
    torch.manual_seed(0)
    centres = torch.eye(8) * 10
    module = nn.VectorQuantizer(8, 8)
    optimizer = torch.optim.SGD(module.parameters(), lr=8.0)
    for _ in range(60):
        features = centres[torch.randint(8, (64,))] + 0.1 * torch.randn(64, 8)
        loss = module(features).codebook_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.revive(features, idle_batches=5)
    assert module.eval()(centres).indices.unique().numel() == 8
    assert module(centres).codebook_loss.item() < 0.1


def test_ema_quantizer_keeps_the_running_means() -> None:
    """Three batches, by the sums and counts that van den Oord et al. write down; theirs and another process's."""
    torch.manual_seed(0)
    module = nn.EMAVectorQuantizer(7, 4, decay=0.8).double()
    counts, sums = torch.zeros(7, dtype=torch.float64), torch.zeros(7, 4, dtype=torch.float64)
    for doubled in (False, True, False):
        features = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        before = module.codebook.clone()
        got = module(features, all_reduce=(lambda tensor: tensor.mul_(2)) if doubled else None)
        chosen = F.one_hot(torch.cdist(features.detach().flatten(0, 1), before).argmin(-1), 7).double()
        counts = 0.8 * counts + 0.2 * (1 + doubled) * chosen.sum(0)
        sums = 0.8 * sums + 0.2 * (1 + doubled) * chosen.T @ features.detach().flatten(0, 1)
        torch.testing.assert_close(module.counts, counts)
        codes = torch.where(counts[:, None] > 0, sums / counts[:, None], before)
        torch.testing.assert_close(module.codebook, codes)
        # Latents and gradients are of the codes as they were, whatever has become of them.
        assert torch.equal(got.latents, before[got.indices])
        assert got.codebook_loss == 0
        (gradient,) = torch.autograd.grad(got.commitment_loss, features)
        torch.testing.assert_close(gradient, 2 * (features - before[got.indices]) / features.numel())
    kept = module.codebook.clone()
    module.eval()(features)
    assert torch.equal(module.codebook, kept)
    assert not list(module.parameters())
    with pytest.raises(ValueError, match="decay: got 1, wanted a number from 0 to below 1"):
        nn.EMAVectorQuantizer(7, 4, decay=1)


def test_ema_quantizer_revives_what_is_hardly_chosen() -> None:
    torch.manual_seed(0)
    module = nn.EMAVectorQuantizer(6, 2, decay=0.5)
    with torch.no_grad():
        module.codebook.copy_(torch.tensor([[0.0, 0], [9, 9], [1, 0], [8, 8], [0, 1], [-9, 9]]))
    features = torch.tensor([[0.1, 0], [0.9, 0], [0, 1.1], [0, 1.2]])
    module(features[1:2])
    module(features[2:])
    used = module.codebook.clone()
    # Code 2 was chosen one batch ago, by one: it is dead after one batch and not after two.
    assert module.revive(features[:0], idle_batches=2) == 0
    assert module.revive(features, 2, torch.Generator().manual_seed(1)) == 4
    moved = module.codebook[[0, 1, 3, 5]]
    assert sorted(moved.tolist()) == sorted(features.tolist())  # each feature once
    assert torch.equal(module.codebook[[2, 4]], used[[2, 4]])
    assert module.counts[[0, 1, 3, 5]].tolist() == [0.5] * 4
    again = module.codebook.clone()
    assert module.revive(features, 2) == 0
    assert torch.equal(module.codebook, again)
    with pytest.raises(ValueError, match="idle_batches: got 0"):
        module.revive(features, 0)


def test_binary_quantizer_takes_the_entropies_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    module = nn.BinaryQuantizer(6, temperature=0.5)
    features, others = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    latents, indices, commitment, entropy = module(features, batch=lambda rows: torch.cat([rows, others]))
    assert torch.equal(latents, features.sign())
    assert torch.equal(module.latents(indices).double(), latents)
    torch.testing.assert_close(commitment.double(), (features.abs() - 1).square().mean())
    codes = module.latents(torch.arange(64)).double()
    p = (-torch.cdist(torch.cat([features.flatten(0, 1), others]), codes).square() / 0.5).softmax(-1)
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1).mean() - torch.special.entr(p.mean(0)).sum())


def test_quantizers_refuse_what_is_no_codebook() -> None:
    for quantizer in (nn.GumbelQuantizer, nn.VectorQuantizer, nn.EMAVectorQuantizer):
        with pytest.raises(ValueError, match="num_codes: got 0, wanted at least 1"):
            quantizer(0, 4)
        with pytest.raises(ValueError, match="code_dim: got -1, wanted at least 1"):
            quantizer(4, -1)
    for bits in (0, 21):
        with pytest.raises(ValueError, match=f"bits: got {bits}, wanted 1 to 20"):
            nn.BinaryQuantizer(bits)
