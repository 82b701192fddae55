"""Fast PyTorch operations for DALL-E-style models."""

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.backends.choice import explain
from dalle_kernels.codebook.binary import binary_entropy, binary_latents, binary_quantize
from dalle_kernels.codebook.entropy import codebook_entropy
from dalle_kernels.codebook.gumbel.op import gumbel_lookup
from dalle_kernels.codebook.projection.op import gumbel_projection_lookup
from dalle_kernels.codebook.statistics.op import code_statistics
from dalle_kernels.codebook.vq.op import vq_lookup
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.decode.op import decode_attention
from dalle_kernels.likelihood.op import logit_laplace_nll
from dalle_kernels.patterns import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Fixed,
    MaskPattern,
    Neighborhood,
    Packed,
    Pattern,
    Row,
    Schedule,
    Strided,
    TokenLayout,
    dalle_pattern_schedule,
)
from dalle_kernels.sampling.op import sample_tokens

__version__ = "0.1.0"

__all__ = [
    "AxialRow",
    "Causal",
    "Column",
    "Convolution",
    "Fixed",
    "KVCache",
    "MaskPattern",
    "Neighborhood",
    "Packed",
    "Pattern",
    "Row",
    "Schedule",
    "Strided",
    "TokenLayout",
    "binary_entropy",
    "binary_latents",
    "binary_quantize",
    "code_statistics",
    "codebook_entropy",
    "dalle_pattern_schedule",
    "decode_attention",
    "explain",
    "gumbel_lookup",
    "gumbel_projection_lookup",
    "logit_laplace_nll",
    "sample_tokens",
    "sparse_attention",
    "vq_lookup",
]
