"""Pictures' tokens on disk: the bits of those in memory, restarts, refusals, and the same training from them."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from dalle_reference import checkpoint, cli, picture_tokens
from dalle_reference.config import StreamedDataConfig
from dalle_reference.data import load_pictures, open_pictures
from dalle_reference.dvae import DiscreteVAE, DVAEConfig
from dalle_reference.errors import UserError
from dalle_reference.parallel import ALONE
from dalle_reference.picture_tokens import TokenSet, TokenShards, tokenize, tokenize_pictures
from dalle_reference.render import read_metrics

CONFIG = DVAEConfig(resolution=16, width=8, groups=2, blocks=1, vocab=32, code_width=8, patch=1)
KILLED = """
import os, signal, sys
from pathlib import Path
from dalle_reference import picture_tokens
from tests.reference.test_picture_tokens import dvae_of, pictures_of
kept, picture_tokens._ENCODE_BATCH, picture_tokens._PER_SHARD = picture_tokens._save, 2, 4

def save(draft, **arrays):
    kept(draft, **arrays)
    if len(list(draft.parent.glob("[!.]*.safetensors"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # the second shard is whole, but not yet in its place

picture_tokens._save = save
picture_tokens.tokenize(dvae_of(0), pictures_of(sys.argv[1]), Path(sys.argv[2]), picture_tokens.World("cpu"))
"""


def dvae_of(seed: int) -> DiscreteVAE:
    torch.manual_seed(seed)
    return DiscreteVAE(CONFIG).eval()


def pictures_of(source: str) -> picture_tokens.PictureSet | picture_tokens.ShardedPictures:
    return open_pictures(StreamedDataConfig(source, workers=0), 16, Path(source).parents[1] / "cache")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_reference.picture_tokens._ENCODE_BATCH", 2)
    monkeypatch.setattr("dalle_reference.picture_tokens._PER_SHARD", 4)


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> str:
    """The pictures of a folder as shards, and one more that has no caption."""
    (tmp_path / "shards").mkdir()
    files = sorted(pictures.glob("*.png"))
    for first in range(0, len(files), 5):
        with webdataset.TarWriter(str(tmp_path / "shards" / f"{first:02d}.tar")) as writer:
            for path in files[first : first + 5]:
                text = path.with_suffix(".txt").read_text()
                writer.write({"__key__": path.stem, "png": path.read_bytes(), "txt": text})
            if first:
                writer.write({"__key__": f"{path.stem}-silent", "png": path.read_bytes()})
    return str(tmp_path / "shards" / "*.tar")


def test_tokens_on_disk_are_those_in_memory(source: str, pictures: Path, tmp_path: Path) -> None:
    dvae = dvae_of(0)
    tokenize(dvae, pictures_of(source), tmp_path / "tokens", ALONE)
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 4  # of 14 pictures
    shards = TokenShards.open(tmp_path / "tokens", dvae)
    in_memory = load_pictures(str(pictures), 16, tmp_path / "cache")
    whole = TokenSet(tokenize_pictures(dvae, in_memory.images), in_memory)
    assert len(shards) == len(whole) == 12  # those with captions
    for index in range(12):
        assert torch.equal(shards.cells(index), whole.cells(index))
        assert shards.captions(index) == whole.captions(index)
    assert len(set(map(tuple, whole.tokens.tolist()))) > 6
    for side, in_memory_side in zip(shards.split(0.4), in_memory.split(0.4), strict=True):
        assert [side.captions(index) for index in range(len(side))] == [
            list(record.captions.values()) for record in in_memory_side.records
        ]
        assert len(side) > 2
    assert np.array_equal(shards.one_per_concept().chosen, shards.chosen)
    assert shards.take([5]).captions(0) == shards.captions(5)


def test_tokens_of_pictures_in_memory_are_written_too(pictures: Path, tmp_path: Path) -> None:
    dvae, in_memory = dvae_of(0), load_pictures(str(pictures), 16, tmp_path / "cache")
    tokenize(dvae, in_memory, tmp_path / "tokens", ALONE)
    shards = TokenShards.open(tmp_path / "tokens", dvae)
    wanted = tokenize_pictures(dvae, in_memory.images)
    assert torch.equal(torch.cat([shards.cells(index) for index in range(12)]), wanted)


def test_killed_tokenizing_goes_on_with_what_is_missing(source: str, tmp_path: Path) -> None:
    tokenize(dvae_of(0), pictures_of(source), tmp_path / "whole", ALONE)
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, source, str(out)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (first,) = out.glob("tokens-*.safetensors")
    made = first.stat().st_mtime_ns
    with pytest.raises(UserError, match="3 of 4 shards are missing; tokenize goes on with them"):
        TokenShards.open(out, dvae_of(0))
    tokenize(dvae_of(0), pictures_of(source), out, ALONE)
    assert first.stat().st_mtime_ns == made
    shards, whole = (TokenShards.open(folder, dvae_of(0)) for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(shards.cells(index), whole.cells(index)) for index in range(12))
    assert len(shards) == 12


def test_tokens_of_another_dvae_and_of_other_pictures_are_refused(source: str, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    tokenize(dvae_of(0), pictures_of(source), out, ALONE)
    with pytest.raises(UserError, match="another dVAE's tokens; tokenize the pictures again"):
        TokenShards.open(out, dvae_of(1))
    with pytest.raises(UserError, match="tokens of other pictures, or another dVAE's"):
        tokenize(dvae_of(1), pictures_of(source), out, ALONE)
    next((tmp_path / "shards").glob("*.tar")).unlink()
    with pytest.raises(UserError, match="tokens of other pictures, or another dVAE's"):
        tokenize(dvae_of(0), pictures_of(source), out, ALONE)
    shard = out / "tokens-00002.safetensors"
    os.truncate(shard, 100)
    picture_tokens._opened.cache_clear()
    with pytest.raises(UserError, match=r"tokens-00002\.safetensors: damaged"):
        TokenShards.open(out, dvae_of(0))


def test_training_from_tokens_is_training_from_pictures(source: str, pictures: Path, tmp_path: Path) -> None:
    dvae = tmp_path / "dvae"
    config = {"model": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(CONFIG).items()}}
    checkpoint.save(dvae, "dvae", 0, config, {f"ema.{name}": value for name, value in dvae_of(0).state_dict().items()})
    tokens, cache = str(tmp_path / "tokens"), ["--cache", str(tmp_path / "cache")]
    cli.main(["tokenize", "--dvae", str(dvae), "--source", source, "--out", tokens, "--workers", "0", *cache])
    losses = {}
    for name, where in (("folder", str(pictures)), ("shards", source), ("tokens", tokens)):
        model = ["--layers", "2", "--heads", "2", "--head-dim", "16", "--text-length", "8", "--vocab-text", "300"]
        model += ["--grid", "8", "8", "--vocab-image", "32", "--workers", "0", "--held-out", "0.3"]
        common = ["--batch", "4", "--steps", "4", "--log-every", "1", "--precision", "fp32", "--draw-every", "4"]
        run = ["--dvae", str(dvae), "--source", where, "--out", str(tmp_path / name), *cache]
        cli.main(["train-transformer", "demo", *model, *common, *run])
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses["tokens"] == losses["shards"] == losses["folder"]
    assert len(losses["tokens"]) == 4
