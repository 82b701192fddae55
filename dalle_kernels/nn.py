"""Modules over the operations: what a model needs around `sparse_attention`, `gumbel_lookup` and `vq_lookup`.

Each module holds parameters and calls one public operation; there is no maths here that the operation's room
does not define. They behave like `torch.nn` modules: `state_dict`, `to`, autocast, `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.checks import check_softcap
from dalle_kernels.codebook.binary import WIDEST, binary_entropy, binary_latents, binary_quantize
from dalle_kernels.codebook.gumbel.op import gumbel_lookup
from dalle_kernels.codebook.vq.op import vq_lookup
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.decode.op import decode_attention
from dalle_kernels.patterns import Pattern

__all__ = [
    "BinaryQuantized",
    "BinaryQuantizer",
    "EMAVectorQuantizer",
    "GumbelQuantizer",
    "Quantized",
    "SparseSelfAttention",
    "VectorQuantized",
    "VectorQuantizer",
]


class SparseSelfAttention(nn.Module):
    """Multi-head self-attention in which every query sees the keys of a `Pattern`.

    One projection makes queries, keys and values; the operation reads them as strided views, so nothing is
    transposed in memory. The same weights serve training (`forward`), reading a prompt (`forward` with a
    cache) and producing one token at a time (`step`).

    Args:
        pattern: which keys each query sees; sequences may be shorter than `pattern.length`.
        embed_dim: E, the width of the input and of the output.
        num_heads: H.
        head_dim: D of each head; E // H unless told.
        bias: whether the two projections have biases.
        softcap: bounds the scores softly, as in `sparse_attention`.
        backend: as in `sparse_attention` and `decode_attention`.

    Example:
        >>> pattern = Row(TokenLayout(4, (3, 3)))
        >>> attention = SparseSelfAttention(pattern, embed_dim=32, num_heads=2)
        >>> x = torch.randn(1, 13, 32)
        >>> whole = attention(x)
        >>> cache = attention.new_cache(batch=1)
        >>> with torch.no_grad():                                      # decoding has no backward
        ...     prompt = attention(x[:, :4], cache=cache)              # the first four positions at once
        ...     fifth = attention.step(x[:, 4:5], cache, position=4)   # then one at a time
        >>> torch.allclose(fifth, whole[:, 4:5], atol=1e-5)
        True
    """

    def __init__(
        self,
        pattern: Pattern,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads: got {num_heads}, wanted at least 1")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim: got {embed_dim}, wanted a multiple of num_heads ({num_heads})")
            head_dim = embed_dim // num_heads
        self.pattern = pattern
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.softcap = check_softcap(softcap)
        self.backend = backend
        self.project_qkv = nn.Linear(embed_dim, 3 * num_heads * head_dim, bias=bias)
        self.project_out = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, E] -> q, k, v, each a [B, H, S, D] view of one [B, S, 3, H, D] tensor."""
        qkv = self.project_qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return q, k, v

    def _join(self, heads: Tensor) -> Tensor:
        """heads [B, H, S, D] -> [B, S, E]."""
        return self.project_out(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Attend over a whole sequence.

        Args:
            x: [B, S, E], positions 0 .. S - 1.
            key_padding_mask: bool [B, S], True where a key is padding, as in `torch.nn.MultiheadAttention`.
            cache: an empty one, filled with the keys and values of these positions and with what of them is padding,
                so that `step` can go on from S.

        Returns:
            [B, S, E].
        """
        q, k, v = self._qkv(x)
        if cache is not None:
            cache.prefill(k, v, key_padding_mask)
        return self._join(
            sparse_attention(q, k, v, self.pattern, None, key_padding_mask, backend=self.backend, softcap=self.softcap)
        )

    def step(self, x: Tensor, cache: KVCache, position: int | Tensor) -> Tensor:
        """Attend from the next tokens: x [B, G, E], the first at `position`, as in `decode_attention` -> [B, G, E].

        What was padding when the cache was filled stays hidden.
        """
        q, k, v = self._qkv(x)
        return self._join(decode_attention(q, k, v, cache, position, backend=self.backend, softcap=self.softcap))

    def new_cache(
        self,
        batch: int,
        dtype: torch.dtype | None = None,
        copies: int = 1,
        rewind: int = 0,
        pattern: Pattern | None = None,
    ) -> KVCache:
        """An empty cache for `batch` prompts on this module's device, in the dtype of its keys; else as `KVCache`.

        `pattern` takes the place of this module's where the tokens after the prompt come in another order, such as
        `Diagonal`'s.
        """
        weight = self.project_qkv.weight
        if dtype is None:
            kind = weight.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        pattern = self.pattern if pattern is None else pattern
        return KVCache(pattern, batch, self.num_heads, self.head_dim, dtype, weight.device, copies, rewind)

    def extra_repr(self) -> str:
        cap = "" if self.softcap is None else f", softcap={self.softcap}"
        return f"{self.pattern}, num_heads={self.num_heads}, head_dim={self.head_dim}{cap}"


def _codes(num_codes: int, code_dim: int) -> Tensor:
    """Memory for a codebook."""
    for name, size in (("num_codes", num_codes), ("code_dim", code_dim)):
        if size < 1:
            raise ValueError(f"{name}: got {size}, wanted at least 1")
    return torch.empty(num_codes, code_dim)


class Quantized(NamedTuple):
    """What `GumbelQuantizer` returns for logits [..., K]."""

    latents: Tensor
    """[..., D] in the codebook's dtype (autocast's under autocast)."""
    indices: Tensor
    """int64 [...]."""
    kl: Tensor
    """float32 [...]: KL from the codes' distribution to the uniform one, in nats."""


class GumbelQuantizer(nn.Module):
    """The dVAE's bottleneck: a codebook read through Gumbel-softmax (Ramesh et al. 2021; Jang et al. 2016).

    Training mixes codebook rows with noisy weights; evaluation picks the likeliest row, without noise.

    Args:
        num_codes: K.
        code_dim: D, the width of a codebook row.
        hard: pick one row in the forward pass while training too, with the soft mixture's gradient.
        backend: as in `gumbel_lookup`.

    Example:
        >>> quantizer = GumbelQuantizer(num_codes=512, code_dim=64)
        >>> logits = torch.randn(2, 8, 8, 512, requires_grad=True)
        >>> latents, indices, kl = quantizer(logits, temperature=0.5)
        >>> latents.shape, indices.shape, kl.shape
        (torch.Size([2, 8, 8, 64]), torch.Size([2, 8, 8]), torch.Size([2, 8, 8]))
        >>> torch.equal(quantizer.eval()(logits).indices, logits.argmax(-1))
        True
    """

    def __init__(self, num_codes: int, code_dim: int, *, hard: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.hard = hard
        self.backend = backend
        self.codebook = nn.Parameter(_codes(num_codes, code_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)

    def forward(
        self,
        logits: Tensor,
        temperature: float | Tensor = 1.0,
        seed: int | Tensor | None = None,
        row_offset: int | Tensor = 0,
    ) -> Quantized:
        """Quantize.

        Args:
            logits: [..., K]; channels come last.
            temperature: of the relaxation; has no effect in evaluation.
            seed: of the noise; drawn from PyTorch's default generator unless told.
            row_offset: which row of the noise the first row takes, as in `gumbel_lookup`.
        """
        return Quantized(
            *gumbel_lookup(
                logits,
                self.codebook,
                temperature,
                hard=self.hard,
                noise=self.training,
                seed=seed,
                row_offset=row_offset,
                backend=self.backend,
            )
        )

    def extra_repr(self) -> str:
        codes, width = self.codebook.shape
        return f"num_codes={codes}, code_dim={width}, hard={self.hard}"


class VectorQuantized(NamedTuple):
    """What `VectorQuantizer` returns for features [..., D]."""

    latents: Tensor
    """[..., D]: the nearest codebook rows; their gradient goes straight to the features."""
    indices: Tensor
    """int64 [...]."""
    codebook_loss: Tensor
    """0-dim: mean squared distance, moving the chosen rows towards the features."""
    commitment_loss: Tensor
    """0-dim: the same number, moving the features towards the chosen rows; weigh it by about 0.25."""


class VectorQuantizer(nn.Module):
    """The VQ-VAE's bottleneck: each feature becomes its nearest codebook row (van den Oord et al. 2017).

    Codes that no feature chooses get no gradient and die. The buffer `idle` counts, for each code, the
    training batches since it was last chosen; `dead_codes` lists those past a limit and `revive` moves them
    onto features.

    Args:
        num_codes: K.
        code_dim: D.
        backend: as in `vq_lookup`.

    Example:
        >>> quantizer = VectorQuantizer(num_codes=512, code_dim=64)
        >>> features = torch.randn(2, 8, 8, 64, requires_grad=True)
        >>> latents, indices, codebook_loss, commitment_loss = quantizer(features)
        >>> (latents.square().mean() + codebook_loss + 0.25 * commitment_loss).backward()
        >>> quantizer.revive(features, idle_batches=1) == 512 - indices.unique().numel()
        True
    """

    idle: Tensor

    def __init__(self, num_codes: int, code_dim: int, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.codebook = nn.Parameter(_codes(num_codes, code_dim))
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)
        self.idle.zero_()

    def forward(self, features: Tensor) -> VectorQuantized:
        """Quantize features [..., D]; channels come last."""
        # The lookup sees detached features: its distance then moves the codebook alone, and the commitment,
        # which the caller weighs on its own, moves the features alone.
        nearest, indices, distance = vq_lookup(features.detach(), self.codebook, backend=self.backend)
        codebook_loss = distance.mean() / features.shape[-1]
        commitment_loss = (features.to(distance.dtype) - nearest.to(distance.dtype)).square().mean()
        # The row to the last bit, with the features' gradient.
        latents = nearest + (features - features.detach())
        if self.training:
            self.idle.add_(1).index_fill_(0, indices.flatten(), 0)
        return VectorQuantized(latents, indices, codebook_loss, commitment_loss)

    def dead_codes(self, idle_batches: int) -> Tensor:
        """The codes that the last `idle_batches` training batches never chose: int64 [n], ascending."""
        if idle_batches < 1:
            raise ValueError(f"idle_batches: got {idle_batches}, wanted at least 1")
        return (self.idle >= idle_batches).nonzero().squeeze(1)

    @torch.no_grad()
    def revive(self, features: Tensor, idle_batches: int) -> int:
        """Put each dead code onto a random one of features [..., D]; returns how many there were."""
        dead = self.dead_codes(idle_batches)
        pool = features.detach().reshape(-1, features.shape[-1])
        chosen = torch.randint(len(pool), (len(dead),), device=pool.device)
        self.codebook[dead] = pool[chosen].to(self.codebook.dtype)
        self.idle[dead] = 0
        return len(dead)

    def extra_repr(self) -> str:
        codes, width = self.codebook.shape
        return f"num_codes={codes}, code_dim={width}"


class EMAVectorQuantizer(nn.Module):
    """The VQ-VAE's bottleneck with codes that are running means of the features that chose them.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 to 8. The running sum of a code's features is its count
    times the code, so that the count alone is kept: with n features of sum s, it becomes N = decay N + (1 - decay) n,
    and the code moves by (1 - decay) (s - n code) / N. Counts start at 0, so that the first features take a code over.
    A code that nothing chose stays; `revive` moves those that nothing has chosen for long onto features.

    Both are buffers, changed in place in the forward pass of training mode; no gradient and no optimizer moves codes.

    Args:
        num_codes: K.
        code_dim: D.
        decay: the share of the running means that a batch keeps, from 0 to below 1.
        backend: as in `vq_lookup`.

    Example:
        >>> quantizer = EMAVectorQuantizer(num_codes=512, code_dim=64)
        >>> features = torch.randn(2, 8, 8, 64, requires_grad=True)
        >>> latents, indices, codebook_loss, commitment_loss = quantizer(features)
        >>> (latents.square().mean() + 0.25 * commitment_loss).backward()
        >>> float(codebook_loss)
        0.0
    """

    codebook: Tensor
    counts: Tensor

    def __init__(self, num_codes: int, code_dim: int, *, decay: float = 0.99, backend: str = "auto") -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay!r}, wanted a number from 0 to below 1")
        self.decay = decay
        self.backend = backend
        self.register_buffer("codebook", _codes(num_codes, code_dim))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)
        self.counts.zero_()

    def forward(self, features: Tensor, all_reduce: Callable[[Tensor], object] | None = None) -> VectorQuantized:
        """Quantize.

        Args:
            features: [..., D]; channels come last.
            all_reduce: sums a tensor over processes, in place, as `torch.distributed.all_reduce` does: the codes then
                follow the features of all of them.
        """
        latents, indices, distance, *found = vq_lookup(
            features,
            self.codebook.to(features.dtype),
            self.backend,
            statistics=self.training,
            all_reduce=all_reduce if self.training else None,
        )  # type: ignore[call-overload]
        if self.training:
            self._follow(*found[0])
        loss = distance.mean() / features.shape[-1]
        return VectorQuantized(latents, indices, torch.zeros_like(loss), loss)

    @torch.no_grad()
    def _follow(self, counts: Tensor, sums: Tensor) -> None:
        share = 1 - self.decay
        self.counts.lerp_(counts.to(self.counts.dtype), share)
        step = (sums - counts[:, None] * self.codebook) * (share / self.counts)[:, None]
        self.codebook.add_(torch.where(counts[:, None] > 0, step, 0.0))

    @torch.no_grad()
    def revive(self, features: Tensor, idle_batches: int, generator: torch.Generator | None = None) -> int:
        """Puts codes that are hardly chosen onto random ones of features [..., D], as if each had chosen its code now.

        Args:
            features: the pool; each gives one code at most.
            idle_batches: moved are codes that one feature chose once, and none in so many training batches since; those
                that more had chosen live longer.
            generator: of the choice, on the CPU; the same on each of several processes, as features are.

        Returns:
            How many codes were moved.
        """
        if idle_batches < 1:
            raise ValueError(f"idle_batches: got {idle_batches}, wanted at least 1")
        dead = (self.counts < (1 - self.decay) * self.decay**idle_batches).nonzero().squeeze(1)
        pool = features.detach().reshape(-1, features.shape[-1])
        chosen = torch.randperm(len(pool), generator=generator)[: len(dead)].to(pool.device)
        dead = dead[: len(chosen)]
        self.codebook[dead] = pool[chosen].to(self.codebook.dtype)
        self.counts[dead] = 1 - self.decay
        return len(dead)

    def extra_repr(self) -> str:
        codes, width = self.codebook.shape
        return f"num_codes={codes}, code_dim={width}, decay={self.decay}"


class BinaryQuantized(NamedTuple):
    """What `BinaryQuantizer` returns for features [..., bits]."""

    latents: Tensor
    """[..., bits], of 1 and -1: the signs; their gradient goes straight to the features."""
    indices: Tensor
    """int64 [...]: the signs as a number, the first the most significant bit."""
    commitment_loss: Tensor
    """0-dim: mean squared distance of the features to their signs."""
    entropy_loss: Tensor
    """0-dim, in nats: the rows' mean entropy less that of their mean distribution; the lower, the surer each row and
    the more evenly codes are used."""


class BinaryQuantizer(nn.Module):
    """Look-up free quantization: features become their signs. It has no weights.

    Source: Yu et al. 2024 (MAGVIT-v2), section 3.2.

    Args:
        bits: d, of 2 ** d codes; up to 20, whose entropies are exact.
        temperature: of the distribution whose entropies are taken: the squared distances are divided by it.

    Example:
        >>> quantizer = BinaryQuantizer(bits=10)
        >>> latents, indices, commitment_loss, entropy_loss = quantizer(torch.randn(2, 8, 8, 10))
        >>> torch.equal(quantizer.latents(indices), latents)
        True
    """

    def __init__(self, bits: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        if not 1 <= bits <= WIDEST:
            raise ValueError(f"bits: got {bits}, wanted 1 to {WIDEST}")
        self.bits = bits
        self.temperature = temperature

    def forward(self, features: Tensor, batch: Callable[[Tensor], Tensor] | None = None) -> BinaryQuantized:
        """Quantize.

        Args:
            features: [..., bits]; channels come last.
            batch: features of this process [n, bits] -> those of all processes, differentiably: the mean distribution
                is then that of the whole batch.
        """
        latents, indices = binary_quantize(features)
        commitment = (features.float() - latents.detach().float()).square().mean()
        rows = features.reshape(-1, self.bits)
        found = binary_entropy(rows if batch is None else batch(rows), temperature=self.temperature)
        return BinaryQuantized(latents, indices, commitment, found.rows - found.mean)

    def latents(self, indices: Tensor) -> Tensor:
        """The codes of int64 [...]: [..., bits], of 1 and -1."""
        return binary_latents(indices, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, temperature={self.temperature}"
