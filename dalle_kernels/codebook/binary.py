"""Binary codes: the codebook is every vector of signs, {-scale, +scale}^d, and nothing of it is stored.

Look-up free quantisation (LFQ; Yu et al. 2024, MAGVIT-v2) and binary spherical quantisation (BSQ; Zhao et al. 2024).
Over the full hypercube the softmax of the scores is a product of d Bernoullis: with p_i = sigmoid(4 scale z_i /
temperature) the entropy of a row is the sum of d binary entropies, and the probability of a code splits into that of
its first and of its last half of bits. So the mean distribution of N rows over K = 2^d codes is one product,
P_first^T P_last / N, of two tables N x sqrt(K), exactly, where a softmax would make N x K.
"""

from __future__ import annotations

import math

import torch

from dalle_kernels.backends.library import plain
from dalle_kernels.backends.sharding import divided, everywhere
from dalle_kernels.checks import as_int, check_number, check_temperature, check_tensor, outside_autocast
from dalle_kernels.codebook.checks import refuse_nan
from dalle_kernels.codebook.entropy import CodebookEntropy, entropy, masked_rows

WIDEST = 20  # bits: the mean distribution has 2^20 entries


def binary_quantize(features: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest vector of signs, with the straight-through gradient.

    Source: Yu et al. 2024, equations 3 and 4; for Zhao et al. 2024 hand over rows of length 1 and scale = d ** -0.5.

    Args:
        features: [..., d], float16, bfloat16, float32 or float64, d up to 62.
        scale: of the codes' entries, above 0.

    Returns:
        latents: [..., d], scale where a feature is above 0 and -scale elsewhere; its gradient passes to `features`.
        indices: int64 [...], the signs as a number, the first the most significant bit.

    Raises:
        TypeError, ValueError: for what is no such tensor, more than 62 bits, a scale that is not above 0, or, on the
            CPU, NaN among the features.

    Example:
        >>> latents, indices = binary_quantize(torch.tensor([[0.3, -2.0, 0.1]]))
        >>> latents.tolist(), indices.tolist()
        ([[1.0, -1.0, 1.0]], [5])
    """
    _refuse_divided("features", features)
    bits = _check(features, 62)
    scale = _check_scale(scale)
    if plain((features,)):  # a compiler, torch.func and fake tensors have no numbers to look at
        refuse_nan("features", features, features.detach().sum(-1))
    positive = features > 0
    signs = torch.where(positive, scale, -scale).to(features.dtype)
    place = 2 ** torch.arange(bits - 1, -1, -1, device=features.device)
    return signs + (features - features.detach()), (positive * place).sum(-1)


def binary_latents(indices: torch.Tensor, bits: int, scale: float = 1.0) -> torch.Tensor:
    """The codes that `indices` number: the inverse of `binary_quantize`.

    Args:
        indices: int64 [...], from 0 to 2^bits - 1.
        bits: d, up to 62.
        scale: of the codes' entries.

    Returns:
        float32 [..., bits].

    Raises:
        TypeError, ValueError: for what is no such tensor or number, or, on the CPU, an index outside of the codebook.

    Example:
        >>> binary_latents(torch.tensor([5]), bits=3).tolist()
        [[1.0, -1.0, 1.0]]
    """
    bits = as_int("bits", bits)
    if not 1 <= bits <= 62:
        raise ValueError(f"bits: got {bits!r}, wanted an int from 1 to 62")
    _refuse_divided("indices", indices)
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"indices: got {type(indices).__name__}, wanted a torch.Tensor")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: got {indices.dtype}, wanted int64")
    if plain((indices,)) and indices.numel() and not 0 <= indices.min() <= indices.max() < 2**bits:
        came = f"{int(indices.min())} to {int(indices.max())}"
        raise ValueError(f"indices: got {came}, wanted 0 to {2**bits - 1}")
    scale = _check_scale(scale)
    place = torch.arange(bits - 1, -1, -1, device=indices.device)
    return torch.where((indices[..., None] >> place & 1).bool(), scale, -scale)


def binary_entropy(
    features: torch.Tensor, scale: float = 1.0, temperature: float = 1.0, row_mask: torch.Tensor | None = None
) -> CodebookEntropy:
    """The entropies that LFQ's and BSQ's losses are made of, exactly, over all 2^d codes; differentiable.

    Row n gives code c the probability softmax_c(2 z_n . c / temperature), as softmax of minus the squared distances
    over the temperature does, for all codes are equally long. Memory and time are those of tables N x sqrt(K) and of
    the K entries of the mean distribution.

    Source: Yu et al. 2024, equation 5; Jansen et al. 2020 (the two entropies).

    Args:
        features: [..., d], float16, bfloat16, float32 or float64, d up to 20; computed in float32 (or float64) inside.
        scale: of the codes' entries.
        temperature: what the squared distances are divided by.
        row_mask: bool [...], False at rows that do not count (as padding does not); all count where None.

    Raises:
        TypeError, ValueError: for wrong shapes or dtypes, more than 20 bits, numbers that are not above 0, no row, or,
            on the CPU, NaN among the features.

    Example:
        >>> rows, mean, distribution = binary_entropy(torch.randn(64, 10))
        >>> distribution.shape, bool(mean >= rows)
        (torch.Size([1024]), True)
    """
    _check(features, WIDEST)
    scale, temperature = _check_scale(scale), check_temperature(temperature)
    rows = masked_rows(features, row_mask)
    logit = (rows if rows.dtype == torch.float64 else rows.float()) * (4 * scale / temperature)
    distance = logit.abs()
    # The entropy of sigmoid(t), without a difference of large numbers.
    row_entropies = (torch.log1p((-distance).exp()) + distance * (-distance).sigmoid()).sum(-1)
    if plain((rows,)):
        refuse_nan("features", rows, row_entropies)
    distribution = outside_autocast(logit.device.type, _distribution, logit)
    return CodebookEntropy(row_entropies.mean(), entropy(distribution), distribution)


def _distribution(logit: torch.Tensor) -> torch.Tensor:
    """[N, d] -> [2^d]: the mean over rows of the probability of each code."""
    rows, bits = logit.shape
    first, last = _products(logit[:, : bits // 2]), _products(logit[:, bits // 2 :])
    return (first.mT @ (last / rows)).reshape(-1)


def _products(logit: torch.Tensor) -> torch.Tensor:
    """[N, b] -> [N, 2^b]: the probability of each choice of b signs, the first the most significant.

    Its logarithm is a sum of log-probabilities of signs, none above 0, so that nothing cancels; one small product makes
    all of them, and one their gradient. In powers of two, for torch's exp is ten times as slow where it underflows.
    """
    bits = logit.shape[1]
    place = torch.arange(bits - 1, -1, -1, device=logit.device)
    positive = (torch.arange(2**bits, device=logit.device) >> place[:, None] & 1).to(logit.dtype)  # [b, 2^b]
    nothing = torch.zeros_like(logit)  # log sigmoid(x) = -log(e^0 + e^-x), which DTensors know how to differentiate
    of_signs = torch.cat([torch.logaddexp(nothing, -logit), torch.logaddexp(nothing, logit)], 1) * -math.log2(math.e)
    return (of_signs @ everywhere(torch.cat([positive, 1 - positive]), logit)).exp2()


def _check(features: torch.Tensor, most: int) -> int:
    check_tensor("features", features)
    if features.dim() < 1 or not 1 <= features.shape[-1] <= most:
        raise ValueError(f"features: got shape {tuple(features.shape)}, wanted 1 to {most} bits a row")
    return features.shape[-1]


def _refuse_divided(name: str, tensor: object) -> None:
    if divided((tensor,)):
        raise TypeError(f"{name}: got a DTensor, wanted a torch.Tensor: rows are independent, each process has its own")


def _check_scale(scale: float) -> float:
    return check_number("scale", scale, "a finite number above 0", least=torch.finfo(torch.float32).tiny)
