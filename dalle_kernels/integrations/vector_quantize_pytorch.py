"""vector-quantize-pytorch (PyPI `vector-quantize-pytorch` 1.32) on our operations.

`accelerate(model)` changes the quantizers in a model in place: same weights, same `state_dict`, same indices, losses,
gradients and EMA updates, without their tables of every row against every code.

- `VectorQuantize`, in every module that is made of it (`ResidualVQ` with its beams, `GroupedResidualVQ`,
  `HierarchicalVQ`, `RandomProjectionQuantizer`): EMA and learned codebooks, cosine similarity, heads, masks, k-means
  initialisation, dead codes, rotation trick, affine parameters, orthogonal loss, in-place optimizers, `topk` up to 8.
  One product, a gather and a segmented sum stand for their three products and one-hot table.
  `stochastic_sample_codes` draws from the same distribution with the noise that `dalle_kernels.noise` defines, so that
  a seed draws other codes than theirs does.
- `SimVQ` and `ResidualSimVQ`: the same for their projected codebook.
- `LFQ`, and `ResidualLFQ` and `GroupedResidualLFQ` made of it, spherical (BSQ) too: the entropies over all codes
  exactly, from tables of N x sqrt(K). Theirs puts a floor of 1e-5 under the probability inside each logarithm, which
  takes the gradient from a codebook of 2^17 codes or more that is used evenly; ours has no floor.
  Under a mask theirs takes each row's entropy for that of the batch; ours takes the rows together.

What needs every distance (a larger `topk`, `straight_through`, a diversity or cross-entropy loss, indices to score)
runs their own code, and says so once. `implicit_neural_codebook` (QINCo), whose codes differ by row, is refused.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels.backends.choice import check_backend
from dalle_kernels.codebook.binary import WIDEST, binary_entropy
from dalle_kernels.codebook.entropy import entropy
from dalle_kernels.codebook.statistics.op import code_statistics
from dalle_kernels.codebook.vq.contract import MOST
from dalle_kernels.codebook.vq.op import vq_lookup
from dalle_kernels.integrations.extension import Extension, extend

Model = TypeVar("Model", bound=nn.Module)
_PACKAGE = "vector_quantize_pytorch"


def accelerate(model: Model, backend: str = "auto") -> Model:
    """Makes the quantizers of vector-quantize-pytorch in `model` use our operations, in place.

    Parameters, buffers, hooks and `state_dict` stay what they are; the classes of codebooks, `SimVQ` and `LFQ` change.
    The model can be copied, pickled and saved as before.

    Args:
        model: a module that is, or holds, quantizers of vector-quantize-pytorch.
        backend: as in `vq_lookup`; another call may change it.

    Returns:
        `model` itself.

    Raises:
        TypeError: if there is nothing to accelerate, or something that cannot be; nothing has been changed then.
        ValueError: for an unknown backend.

    Example:
        >>> from vector_quantize_pytorch import VectorQuantize                           # doctest: +SKIP
        >>> from dalle_kernels.integrations.vector_quantize_pytorch import accelerate
        >>> quantizer = accelerate(VectorQuantize(dim=256, codebook_size=65536))         # doctest: +SKIP
        >>> quantized, indices, loss = quantizer(torch.randn(1, 1024, 256))              # doctest: +SKIP
    """
    check_backend(backend)
    found: list[tuple[Any, type]] = []
    for name, module in model.named_modules():
        where = name or "model"
        if getattr(module, "implicit_neural_codebook", False) and type(module).__module__.startswith(_PACKAGE):
            raise TypeError(f"{where}: got an implicit_neural_codebook, whose codes differ by row; wanted plain codes")
        for file, kind, extension in _EXTENSIONS:
            if _is_theirs(module, file, kind):
                found.append((module, extension))
    if not found:
        kinds = ", ".join(dict.fromkeys(kind for _, kind, _ in _EXTENSIONS))
        raise TypeError(f"model: got {type(model).__qualname__} without a {kinds} of {_PACKAGE}")
    for module, extension in found:
        if not isinstance(module, extension):
            module.__class__ = extend(extension, type(module))
        module.dalle_kernels_backend = backend
    return model


def _is_theirs(module: object, file: str, name: str) -> bool:
    return any((kind.__module__, kind.__name__) == (f"{_PACKAGE}.{file}", name) for kind in type(module).__mro__)


_said: set[str] = set()


def _say(why: str) -> None:
    if why not in _said:
        _said.add(why)
        warnings.warn(f"{why}: vector-quantize-pytorch's own code runs, with every distance in memory", stacklevel=3)


# --- Codebooks --------------------------------------------------------------------------------------------------------


def _nearest(rows: Tensor, codes: Tensor, backend: str, **named: Any) -> Tensor:
    """int64 [h, n] (or [h, n, k]): of codes [h, c, d], those that `vq_lookup` takes for rows [h, n, d]."""
    with torch.no_grad():
        return vq_lookup(rows.detach(), codes.detach(), backend, **named)[1]


def _statistics(rows: Tensor, indices: Tensor, codes: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many rows [h, c] chose each code, and their sums [h, c, d]."""
    if mask is not None:
        indices = indices.masked_fill(~mask, -1)
    return code_statistics(rows, indices, codes, heads=True)


class _Codebook(Extension):
    """In front of `Codebook`: its nearest codes and their statistics."""

    def _dense(
        self: Any, topk: int | None, transform: Callable[..., Any] | None, temperature: float | None
    ) -> str | None:
        """Why every distance is needed, or None."""
        asked = getattr(self.gumbel_sample, "keywords", None)
        if topk is not None and topk > MOST:
            return f"a topk of more than {MOST}"
        if transform is not None:
            return "codebook_transform_fn"
        if asked is None:
            return "gumbel_sample of the caller's"
        heat = self.sample_codebook_temp if temperature is None else temperature
        if asked.get("straight_through") and self.training and heat > 0:
            return "straight_through sampling"
        return None

    def _chosen(self: Any, rows: Tensor, embed: Tensor, topk: int | None, temperature: float | None) -> Tensor:
        """int64 [h, n] (or [h, n, k]): the codes that theirs would choose, but for the seed of a draw."""
        heat = self.sample_codebook_temp if temperature is None else temperature
        drawn = self.gumbel_sample.keywords.get("stochastic") and self.training and heat > 0
        metric = "dot" if self.use_cosine_sim else "distance"
        return _nearest(
            rows, embed, self.dalle_kernels_backend, metric=metric, k=topk, temperature=heat if drawn else None
        )

    @torch.jit.ignore
    def init_embed_(self: Any, data: Tensor, mask: Tensor | None = None) -> None:
        if self.initted:
            return
        if mask is not None:
            data = data[mask].unflatten(0, (data.shape[0], -1))
        means, counts = _kmeans(self, data)
        self.embed_avg.data.copy_(means * counts[..., None])
        self.cluster_size.data.copy_(counts)
        self.update_ema()
        self.initted.data.fill_(True)

    def track_cluster_size_and_embed_avg(
        self: Any,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
    ) -> None:
        if embed_onehot.dtype != torch.int64:  # from their own path
            return super().track_cluster_size_and_embed_avg(  # type: ignore[misc]
                flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
            )
        theirs = sys.modules[f"{_PACKAGE}.vector_quantize_pytorch"]
        if self.affine_param:
            spread = self.codebook_variance.clamp(min=1e-5).sqrt() / self.batch_variance.clamp(min=1e-5).sqrt()
            flatten = (flatten - self.batch_mean) * spread + self.codebook_mean
        counts, sums = _statistics(flatten.detach(), embed_onehot, self.codebook_size, mask)
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, counts)
        for average, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
            if accum_ema_update:
                theirs.accum_grad_(average, new)
            else:
                theirs.ema_inplace(average, new, self.decay, ema_update_weight)
        return None

    def update_indices(
        self: Any,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        x = x.float()
        if x.dim() < 4:
            x, embed_ind = x[None], embed_ind[None]
        rows = x.flatten(1, -2)
        indices = embed_ind.flatten(1).masked_fill(embed_ind.flatten(1) == -1, 0)
        self.update_codebook(
            rows,
            indices,
            mask=_spread(mask, rows),
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )

    update_ema_indices = update_indices

    def forward(
        self: Any,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
        distances: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As theirs; the distances are None, unless `distances` says what needs them."""
        if why := distances or self._dense(topk, codebook_transform_fn, sample_codebook_temp):
            _say(why)
            return super().forward(  # type: ignore[misc]
                x,
                sample_codebook_temp=sample_codebook_temp,
                mask=mask,
                freeze_codebook=freeze_codebook,
                codebook_transform_fn=codebook_transform_fn,
                ema_update_weight=ema_update_weight,
                accum_ema_update=accum_ema_update,
                ema_update=ema_update,
                topk=topk,
                update_usage=update_usage,
            )
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            # Beams put a dimension in front of the width, where heads of one codebook have theirs.
            single = x.dim() < 4 or x.shape[0] != self.embed.shape[0]
            if single:
                x = x[None]
            rows = x.flatten(1, -2)
            mask = _spread(mask, rows)
            self.init_embed_(rows, mask=mask)
            if self.affine_param:
                self.update_affine(rows, self.embed, mask=mask)
            embed = (self.embed if self.learnable_codebook else self.embed.detach()).to(rows.dtype)
            if self.vq_bridge is not None:
                embed = self.vq_bridge(embed)
            if self.affine_param:
                spread = self.batch_variance.clamp(min=1e-5).sqrt() / self.codebook_variance.clamp(min=1e-5).sqrt()
                embed = (embed - self.codebook_mean) * spread + self.batch_mean
            indices = self._chosen(rows, embed, topk, sample_codebook_temp)
            # A gather by each head's indices, taken before the codebook moves below.
            first = torch.arange(0, embed.shape[0] * embed.shape[1], embed.shape[1], device=indices.device)
            places = indices + first.view(-1, *[1] * (indices.dim() - 1))
            quantize = F.embedding(places, embed.flatten(0, 1))
            if self.training and update_usage and not freeze_codebook and topk is None:
                self.update_codebook(
                    rows,
                    indices,
                    mask=mask,
                    ema_update_weight=ema_update_weight,
                    accum_ema_update=accum_ema_update,
                    ema_update=ema_update,
                )
            several = () if topk is None else (topk,)
            quantize = quantize.view(*x.shape[:-1], *several, x.shape[-1])
            indices = indices.view(*x.shape[:-1], *several)
            return (quantize[0], indices[0], None) if single else (quantize, indices, None)


class _VectorQuantize(Extension):
    """In front of `VectorQuantize`: tells its codebook when a loss is made of distances, and has our `_rotate_to`."""

    _theirs: Callable[..., Any]

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        forward: Any = cls._parts[1].forward  # type: ignore[attr-defined]
        cls._theirs = forward
        module = vars(sys.modules[f"{_PACKAGE}.vector_quantize_pytorch"])
        if getattr(forward, "__globals__", None) is module:  # else somebody's own, which calls theirs as it is
            # Their function once more, with another `rotate_to` to call: modules that nobody accelerated keep theirs.
            again = FunctionType(
                forward.__code__,
                module | {"rotate_to": _rotate_to},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            again.__kwdefaults__ = forward.__kwdefaults__
            cls._theirs = again

    def forward(self: Any, x: Tensor, indices: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        why = None
        if indices is not None:
            why = "indices to score"
        elif self.training and self.has_codebook_diversity_loss:
            why = "codebook_diversity_loss_weight"
        elif self.training and self.has_commitment_loss and self.commitment_use_cross_entropy_loss:
            why = "commitment_use_cross_entropy_loss"
        if why is None:
            return self._theirs(x, indices, *args, **kwargs)
        codebook = self._codebook
        plain = codebook.forward
        codebook.forward = lambda *inputs, **named: plain(*inputs, **named, distances=why)
        try:
            return self._theirs(x, indices, *args, **kwargs)
        finally:
            del codebook.forward


def _rotate_to(src: Tensor, tgt: Tensor) -> Tensor:
    """Rows of `tgt`, of which `src` learns by the rotation that takes its own direction to theirs (Fifty et al. 2024,
    section 4.2). Theirs makes each row a matrix of its own; these are dot products of rows."""
    theirs = sys.modules[f"{_PACKAGE}.vector_quantize_pytorch"]
    with torch.no_grad():
        length, wanted = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (src, tgt))
        old, new = theirs.safe_div(src, length), theirs.safe_div(tgt, wanted)
        between = theirs.l2norm(old + new)
        stretch = theirs.safe_div(wanted, length)
    along_between, along_old = ((src * rows).sum(-1, keepdim=True) for rows in (between, old))
    return torch.addcmul(torch.addcmul(src, along_between, between, value=-2), along_old, new, value=2) * stretch


def _spread(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """A mask [b, n] over rows [h, b x heads x n, d], as theirs repeats it."""
    if mask is None:
        return None
    heads = rows.shape[1] // mask.numel()
    return mask[:, None].expand(-1, heads, -1).reshape(1, -1).expand(rows.shape[0], -1)


def _kmeans(codebook: Any, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from sampled rows: means [h, c, d] and counts [h, c]. Whom nobody chose keeps its mean."""
    means = codebook.sample_fn(samples, codebook.codebook_size)
    counts = means.new_zeros(means.shape[:2])
    for _ in range(codebook.kmeans_iters):
        metric = "dot" if codebook.use_cosine_sim else "euclidean"
        indices = _nearest(samples, means, codebook.dalle_kernels_backend, metric=metric)
        counts, sums = _statistics(samples, indices, codebook.codebook_size, None)
        codebook.kmeans_all_reduce_fn(counts)
        new = sums / counts.clamp_min(1)[..., None]
        codebook.kmeans_all_reduce_fn(new)
        if codebook.use_cosine_sim:
            new = F.normalize(new, dim=-1, eps=1e-6)
        means = torch.where(counts[..., None] == 0, means, new)
    return means, counts


# --- SimVQ ------------------------------------------------------------------------------------------------------------


def _straight_through(rows: Tensor, quantized: Tensor) -> Tensor:
    return (quantized - rows).detach() + rows


class _SimVQ(Extension):
    """In front of `SimVQ`."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.channel_first:
            x = x.movedim(1, -1)
        rows = x.flatten(1, -2)
        codes = self.codebook
        indices = _nearest(rows.detach().flatten(0, 1)[None], codes.detach()[None], self.dalle_kernels_backend)[0]
        indices = indices.view(rows.shape[:-1])
        quantized = F.embedding(indices, codes)
        loss = F.mse_loss(rows.detach(), quantized)
        loss = loss + F.mse_loss(rows, quantized.detach()) * self.input_to_quantize_commit_loss_weight
        through = _rotate_to if self.rotation_trick else _straight_through
        quantized = through(rows, quantized)
        quantized, indices = quantized.view(x.shape), indices.view(x.shape[:-1])
        if self.channel_first:
            quantized = quantized.movedim(-1, 1)
        return quantized, indices, loss * self.commitment_weight


# --- LFQ --------------------------------------------------------------------------------------------------------------


class _LFQ(Extension):
    """In front of `LFQ`: exact entropies without the table of every row against every code."""

    def forward(
        self: Any,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        theirs = sys.modules[f"{_PACKAGE}.lookup_free_quantization"]
        if self.training and self.codebook_dim > WIDEST:
            raise ValueError(
                f"codebook_size: got 2^{self.codebook_dim}, wanted at most 2^{WIDEST} to train with entropies"
            )
        first = x.dim() >= 4 if self.channel_first is None else self.channel_first
        if first:
            x = x.movedim(1, -1)
        if x.shape[-1] != self.dim:
            raise ValueError(f"x: got {x.shape[-1]} channels, wanted {self.dim}")
        shape = x.shape
        x = self.project_in(x.flatten(1, -2) if first else x)
        if self.soft_clamp_input_value is not None:
            x = (x / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        x = x.unflatten(-1, (self.num_codebooks, -1))
        if self.orthogonal_rotation:
            x = x @ self.orthogonal_rot
        x = self.maybe_l2norm(x)
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False) if self.force_quantization_f32 else contextlib.nullcontext():
            if self.force_quantization_f32:
                x = x.float()
            features = x
            positive = x > 0
            quantized = torch.where(positive, self.codebook_scale, -self.codebook_scale).to(x.dtype)
            indices = (positive * self.mask).sum(-1)
            quantized = self.maybe_l2norm(quantized)
            if self.training:
                x = self.activation(x)
                x = x + (quantized - x).detach()
            else:
                x = quantized
            sample = spread = commitment = aux = self.zero
            if self.training:
                sample, spread = self._entropies(features, inv_temperature, mask)
                aux = sample - self.diversity_gamma * spread
                if self.experimental_softplus_entropy_loss:
                    aux = F.softplus(aux + self.entropy_loss_offset)
                if self.commitment_loss_weight > 0:
                    commitment = (features - quantized.detach()).square()
                    commitment = (commitment if mask is None else commitment[mask]).mean()
            x = x.to(dtype)
        if self.orthogonal_rotation:
            x = x @ self.orthogonal_rot.t()
        x = self.project_out(x.flatten(-2))
        if first:
            x = x.view(*shape[:-1], x.shape[-1]).movedim(-1, 1)
            indices = indices.view(*shape[:-1], indices.shape[-1])
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        result = theirs.Return(x, indices, aux * self.entropy_loss_weight + commitment * self.commitment_loss_weight)
        return (result, theirs.LossBreakdown(sample, spread, commitment)) if return_loss_breakdown else result

    def _entropies(self: Any, features: Tensor, inv_temperature: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean of the rows' entropies, and that of the codebooks' entropies of the mean distribution."""
        theirs = sys.modules[f"{_PACKAGE}.lookup_free_quantization"]
        rows = (features if mask is None else features[mask]).reshape(-1, *features.shape[-2:])
        if self.frac_per_sample_entropy < 1:
            number = int(len(rows) * self.frac_per_sample_entropy)
            rows = rows[torch.randn(len(rows)).argsort(dim=-1) < number]
        if not len(rows):  # theirs is the mean of nothing
            nothing = rows.new_full((), torch.nan)
            return nothing, nothing
        # Of a spherical codebook each entry is codebook_scale / sqrt(d), for theirs scales the unit vectors by it.
        scale = self.codebook_scale * (self.codebook_dim**-0.5 if self.spherical else 1.0)
        each = [binary_entropy(part, scale, 1 / inv_temperature) for part in rows.unbind(-2)]
        mean = [theirs.maybe_distributed_mean(one.distribution) for one in each]
        sample = torch.stack([one.rows for one in each]).mean()
        return sample, torch.stack([entropy(distribution) for distribution in mean]).mean()


_EXTENSIONS: tuple[tuple[str, str, type], ...] = (
    ("vector_quantize_pytorch", "Codebook", _Codebook),
    ("vector_quantize_pytorch", "VectorQuantize", _VectorQuantize),
    ("sim_vq", "SimVQ", _SimVQ),
    ("lookup_free_quantization", "LFQ", _LFQ),
)
