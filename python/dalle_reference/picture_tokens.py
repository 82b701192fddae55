"""Pictures as the dVAE's tokens, in memory or in a folder of shards, from which stage 2 trains.

    tokens/tokens.json                   which dVAE's they are, of what pictures, and how many shards there are to be
           tokens-00000.safetensors      tokens [n, cells], captions (JSON, as bytes), where each ends, concepts

A shard appears whole or not at all, so whoever is stopped goes on with those that are not there yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from dalle_reference.data import PictureSet, ShardedPictures
from dalle_reference.data.pictures import first_of_each, on_held_out_side
from dalle_reference.dvae import DiscreteVAE
from dalle_reference.errors import UserError
from dalle_reference.files import replacing
from dalle_reference.parallel import World

_ENCODE_BATCH = 128
_PER_SHARD = 64 * _ENCODE_BATCH
_FORMAT = 1
_DOCUMENT = "tokens.json"


@dataclass(frozen=True)
class TokenSet:
    """Tokens of captioned pictures in memory.

    Attributes:
        tokens: int64 [N, cells].
        pictures: what they are of.
    """

    tokens: torch.Tensor
    pictures: PictureSet

    @property
    def credit(self) -> str:
        return self.pictures.credit

    def __len__(self) -> int:
        return len(self.tokens)

    def cells(self, index: int) -> torch.Tensor:
        """int64 [1, cells]."""
        return self.tokens[index : index + 1]

    def captions(self, index: int) -> list[str]:
        return list(self.pictures.records[index].captions.values())


@dataclass(frozen=True)
class TokenShards:
    """Tokens of captioned pictures in a folder's shards, of which no more is read than is asked for.

    Attributes:
        folder: what `tokenize` wrote.
        starts: int64 [shards], the number of pictures before each.
        concepts: int64 [pictures], a number for the concept of each.
        chosen: int64 [N], the pictures that this set has.
        credit: as a `PictureSet` has it.
    """

    folder: Path
    starts: np.ndarray
    concepts: np.ndarray
    chosen: np.ndarray
    credit: str

    @classmethod
    def open(cls, folder: Path, dvae: DiscreteVAE) -> TokenShards:
        """The pictures of `folder` that have captions.

        Raises:
            UserError: if shards are missing or damaged, or the tokens are another dVAE's.
        """
        document = _document(folder)
        if document["dvae"] != dvae_digest(dvae):
            raise UserError(f"{folder}: has another dVAE's tokens; tokenize the pictures again for this one")
        paths = [_path(folder, number) for number in range(document["shards"])]
        missing = sum(not path.exists() for path in paths)
        if missing:
            raise UserError(f"{folder}: {missing} of {len(paths)} shards are missing; tokenize goes on with them")
        concepts, captioned = [], []
        for path in paths:
            file = _opened(path)
            concepts.append(file.get_tensor("concepts"))
            captioned.append(np.diff(file.get_tensor("caption_ends"), prepend=0) > 0)
            if file.get_slice("tokens").get_shape() != [len(concepts[-1]), dvae.config.grid[0] * dvae.config.grid[1]]:
                raise UserError(f"{path}: damaged; take it away, and tokenize makes it again")
        starts = np.cumsum([0, *map(len, concepts[:-1])])
        chosen = np.flatnonzero(np.concatenate(captioned))
        return cls(folder, starts, np.concatenate(concepts), chosen, document["credit"])

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: Sequence[int] | np.ndarray) -> TokenShards:
        """The pictures at `indices`, in that order."""
        return replace(self, chosen=self.chosen[indices])

    def one_per_concept(self) -> TokenShards:
        """The first picture of each concept."""
        return self.take(first_of_each(self.concepts[self.chosen]))

    def split(self, held_out: float) -> tuple[TokenShards, TokenShards]:
        """(training, held out), as `PictureSet.split`."""
        out = on_held_out_side(self.concepts[self.chosen], held_out)
        return self.take(np.flatnonzero(~out)), self.take(np.flatnonzero(out))

    def cells(self, index: int) -> torch.Tensor:
        """int64 [1, cells]."""
        file, row = self._place(index)
        return torch.from_numpy(file.get_slice("tokens")[row : row + 1].astype(np.int64))

    def captions(self, index: int) -> list[str]:
        file, row = self._place(index)
        ends = file.get_slice("caption_ends")[max(row - 1, 0) : row + 1].tolist()
        return json.loads(file.get_slice("captions")[ends[0] if row else 0 : ends[-1]].tobytes())

    def _place(self, index: int) -> tuple[Any, int]:
        picture = self.chosen[index]
        shard = int(np.searchsorted(self.starts, picture, side="right")) - 1
        return _opened(_path(self.folder, shard)), int(picture - self.starts[shard])


@torch.no_grad()
def encode(dvae: DiscreteVAE, images: torch.Tensor) -> torch.Tensor:
    """Tokens of uint8 pictures [N, 3, S, S]: int64 [N, cells], on the CPU."""
    device = next(dvae.parameters()).device
    return dvae.encode(images.to(device).float() / 255.0).flatten(1).cpu()


def tokenize_pictures(dvae: DiscreteVAE, images: torch.Tensor, world: World | None = None) -> torch.Tensor:
    """Tokens of uint8 pictures [N, 3, S, S]: int64 [N, h * w], on the CPU; of n panels [N, 3, n S, S] n times as many.

    The processes of `world` share the work, in batches that are the same however many they are.
    """
    world = world or World(next(dvae.parameters()).device)
    panels = images.unflatten(2, (-1, dvae.config.resolution)).transpose(1, 2)  # [N, n, 3, S, S]
    batches = panels.flatten(0, 1).split(_ENCODE_BATCH)
    own = batches[len(batches) * world.rank // world.size : len(batches) * (world.rank + 1) // world.size]
    cells = dvae.config.grid[0] * dvae.config.grid[1]
    every = world.gather(torch.cat([encode(dvae, part) for part in own] or [torch.empty(0, cells, dtype=torch.int64)]))
    return every.reshape(-1, panels.shape[1] * cells)


def tokenize(dvae: DiscreteVAE, pictures: PictureSet | ShardedPictures, folder: Path, world: World) -> None:
    """Writes the tokens of `pictures` into `folder`, with their captions; the processes of `world` share the shards.

    Shards that are there already stay.

    Raises:
        UserError: if the folder has tokens of other pictures or of another dVAE; if too many pictures are broken.
    """

    def begin() -> list[int]:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is no folder; choose another --out")
        count = -(-len(pictures) // _PER_SHARD)
        said = {"dvae": dvae_digest(dvae), "pictures": pictures.digest(), "shards": count, "credit": pictures.credit}
        if (folder / _DOCUMENT).exists():
            if {name: _document(folder)[name] for name in said} != said:
                raise UserError(f"{folder}: has tokens of other pictures, or another dVAE's; choose another --out")
        else:
            with replacing(folder / _DOCUMENT) as draft:
                draft.write_text(json.dumps({"format": _FORMAT, **said}, ensure_ascii=False) + "\n", encoding="utf-8")
        return [number for number in range(count) if not _path(folder, number).exists()]

    own = world.first(begin)[world.rank :: world.size]
    ranges = {number: range(number * _PER_SHARD, min((number + 1) * _PER_SHARD, len(pictures))) for number in own}
    groups = [some[at : at + _ENCODE_BATCH] for some in ranges.values() for at in range(0, len(some), _ENCODE_BATCH)]
    coming = pictures.batches(groups)
    with tqdm(total=sum(map(len, groups)), desc="tokens", unit="pictures", disable=not world.main) as bar:
        for number, some in ranges.items():
            tokens, texts, concepts = [], [], []
            for _ in range(0, len(some), _ENCODE_BATCH):
                batch = next(coming)
                tokens.append(encode(dvae, batch.images).numpy())
                texts += [json.dumps(said, ensure_ascii=False).encode() if said else b"" for said in batch.captions]
                concepts.append(batch.concepts)
                bar.update(min(_ENCODE_BATCH, bar.total - bar.n))
            with replacing(_path(folder, number)) as draft:
                # A vocabulary is a model's side: it has room in 16 bits, or in 32.
                kind = np.uint16 if dvae.config.vocab <= 1 << 16 else np.int32
                _save(
                    draft,
                    tokens=np.concatenate(tokens).astype(kind),
                    captions=np.frombuffer(b"".join(texts), np.uint8),
                    caption_ends=np.cumsum([len(text) for text in texts], dtype=np.int64),
                    concepts=np.concatenate(concepts),
                )
    world.agree()


def _save(path: Path, **arrays: np.ndarray) -> None:
    try:
        save_file(arrays, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def is_tokens(folder: Path) -> bool:
    """Whether `tokenize` has been at work there."""
    return (folder / _DOCUMENT).exists()


def dvae_digest(dvae: DiscreteVAE) -> str:
    """Of all that a picture's tokens depend on."""
    digest = hashlib.blake2b(repr(dvae.config).encode(), digest_size=16)
    for name, value in dvae.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _document(folder: Path) -> dict[str, Any]:
    path = folder / _DOCUMENT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
        return {name: document[name] for name in ("dvae", "pictures", "shards", "credit")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _path(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:05d}.safetensors"


@lru_cache(maxsize=1024)
def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error}); take it away, and tokenize makes it again") from error
