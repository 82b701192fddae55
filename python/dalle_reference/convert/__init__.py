"""Other projects' weights as safetensors; `dalle-reference convert` is its command.

Nothing of a file is run and no other project is imported (`pickles.py` says how). What comes out has the names of
`dalle_reference`'s own models where these run the weights, and the other project's names where they do not:

    openai-dvae         OpenAI's encoder.pkl and decoder.pkl                       runs as a DiscreteVAE
    flava-codebook      FLAVA's image codebook, which is that encoder again        runs with OpenAI's decoder.pkl
    rudalle-v3, -v2     ruDALL-E: Malevich, Kandinsky, Surrealist; Emojich (v2)    runs as a DalleTransformer
    openai-clip, open-clip  CLIP of either, from its own names or transformers'    runs as a CLIP
    taming-gumbel       taming-transformers' Gumbel VQGAN, ruDALL-E's f8 too       names of taming's GumbelVQ
    dalle-pytorch-vae   DALLE-pytorch's train_vae.py                               names of its DiscreteVAE
    dalle-pytorch       DALLE-pytorch's train_dalle.py                             names of its DALLE
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from dalle_reference.convert import clip, dalle_pytorch, openai, rudalle, taming
from dalle_reference.convert.source import Source, some
from dalle_reference.errors import UserError
from dalle_reference.weights import Weights

KINDS = (
    *openai.KINDS,
    *rudalle.KINDS,
    *clip.KINDS,
    *taming.KINDS,
    *dalle_pytorch.KINDS,
)
"""What `convert` can be told that files are."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

DTYPES = ("keep", *_DTYPES)


def convert(
    paths: Sequence[Path],
    *,
    kind: str | None = None,
    heads: int | None = None,
    dtype: str = "keep",
    progress: Callable[[int], object] | None = None,
) -> Weights:
    """Another project's weights.

    Args:
        paths: one file; two only for a dVAE whose encoder and decoder are apart.
        kind: one of `KINDS`; found from the names of the tensors where not given.
        heads: attention heads of a ruDALL-E of unpublished size; its weights do not tell.
        dtype: of the floating-point tensors: "keep", "float32", "float16" or "bfloat16".
        progress: called with numbers of bytes read.

    Raises:
        UserError: for a file that is refused, of no known kind, or whose tensors are not those of its kind.

    Example:
        >>> weights = convert([Path("encoder.pkl"), Path("decoder.pkl")])
        >>> weights.kind, weights.model
        ('openai-dvae', 'dvae')
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if not paths:
        raise ValueError("paths: got none, wanted at least one")
    weights = _convert([Source.open(path) for path in paths], kind, heads)
    if kind not in (None, weights.kind):
        raise UserError(f"kind: got {kind}, but {paths[0]} is of kind {weights.kind}")
    if dtype != "keep":
        tensors = {
            name: tensor.to(_DTYPES[dtype]) if tensor.is_floating_point() else tensor
            for name, tensor in weights.tensors.items()
        }
        weights = replace(weights, tensors=tensors)
    return replace(weights, sources={_sha256(path, progress): path.name for path in paths})


def _convert(sources: Sequence[Source], kind: str | None, heads: int | None) -> Weights:
    def is_of(family: ModuleType) -> bool:
        return kind in family.KINDS if kind else family.recognises(sources[0])

    if heads is not None and not is_of(rudalle):
        raise UserError(f"heads: got {heads}, but only ruDALL-E's weights do not tell it")
    if is_of(openai):
        return openai.convert(sources)
    if len(sources) != 1:
        raise UserError(f"inputs: got {len(sources)} files, wanted one (two only for a dVAE's encoder and decoder)")
    (source,) = sources
    if is_of(rudalle):
        return rudalle.convert(source, kind, heads)
    if is_of(clip):
        return clip.convert(source, kind)
    if is_of(taming):
        return taming.convert(source)
    if is_of(dalle_pytorch):
        return dalle_pytorch.convert(source, kind)
    raise UserError(
        f"{source.path}: of no known kind: its tensors are {some(source.tensors)}; wanted one of {', '.join(KINDS)}"
    )


def _sha256(path: Path, progress: Callable[[int], object] | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()
