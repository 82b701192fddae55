"""The relatives of DALL-E from the command line: trained, stopped, gone on with, and used."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from dalle_reference import cli
from dalle_reference.checkpoint import latest
from dalle_reference.data import load_pictures
from dalle_reference.evaluate import pixel_loss, prior_cosines
from dalle_reference.judge import caption_vectors, picture_vectors
from dalle_reference.load import load_clip, load_decoder, load_pixels, load_prior
from PIL import Image

from tests.reference.test_train import (
    TINY_CLIP,
    TINY_DVAE,
    TINY_TRANSFORMER,
    losses,
    refused,
    start,
    wait_for_step,
    weights,
)

OFTEN = ["--log-every", "1", "--precision", "fp32", "--draw-every", "0", "--batch", "4", "--held-out", "0"]
TINY_PIXELS = ["--resolution", "8", "--layers", "2", "--heads", "2", "--head-dim", "16", *OFTEN]

TINY_PRIOR = ["--embedding", "8", "--vocab-text", "300", "--text-length", "12", "--layers", "2", "--head-dim", "16"]
TINY_PRIOR += ["--components", "4", "--buckets", "8", "--noise-steps", "8", *OFTEN]
TINY_TOKENS = ["--latent", "8", "--grid", "8", "8", "--vocab-image", "32", "--layers", "2", "--head-dim", "16", *OFTEN]
TINY_PATCHES = [
    "--embedding",
    "8",
    "--resolution",
    "16",
    "--layers",
    "2",
    "--head-dim",
    "16",
    "--noise-steps",
    "8",
    *OFTEN,
]


@pytest.fixture(scope="module")
def clip(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "run"
    command = ["train-clip", "demo", *TINY_CLIP, *common, "--held-out", "0", "--steps", "60", "--out", str(out)]
    cli.main([*command, "--average", "0.9", "--warm-up-steps", "5", "--learning-rate", "5e-3"])
    return out


@pytest.fixture(scope="module")
def dvae(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dvae") / "run"
    cli.main(["train-dvae", "demo", "--out", str(out), "--steps", "12", *TINY_DVAE, *common])
    return out


def resumes(command: list[str], folder: Path) -> Path:
    """Trains for six steps, and again with a stop after four; the same losses and weights. Returns the run."""
    whole, parts = folder / "whole", folder / "parts"
    cli.main([*command, "--steps", "6", "--save-every", "4", "--out", str(whole)])
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-00000006")
    cli.main([*command, "--steps", "6", "--save-every", "4", "--out", str(parts), "--resume"])
    assert losses(parts) == losses(whole)
    assert weights(parts) == weights(whole)
    return whole


@pytest.mark.parametrize("colours", ["0", "16"])
def test_pixels_resume_and_complete(colours: str, common: list[str], pictures: Path, tmp_path: Path) -> None:
    preset = "palette" if colours != "0" else "bytes"
    run = resumes(["train-pixels", preset, "--colours", colours, *TINY_PIXELS, *common], tmp_path)
    sheet = tmp_path / "completions.png"
    complete = ["complete", str(pictures / "red.png"), str(pictures / "blue.png"), "--model", str(run)]
    cli.main([*complete, "--number", "2", "--out", str(sheet)])
    first = np.array(Image.open(sheet))
    cli.main([*complete, "--number", "2", "--out", str(sheet)])
    assert np.array_equal(np.array(Image.open(sheet)), first)
    cli.main([*complete, "--number", "2", "--out", str(sheet), "--rows", "8"])
    assert not np.array_equal(np.array(Image.open(sheet)), first)
    model = load_pixels(run, torch.device("cpu"))
    assert len(model.palette) == int(colours)
    shown = load_pictures(common[1], 8, Path(common[3]))
    assert 0 < pixel_loss(model, shown, batch=5) == pytest.approx(float(model.loss(shown.images).detach()), rel=1e-5)


def test_pixels_learn_by_bert_s_objective_too(
    common: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-pixels", "bytes", "--objective", "bert", *TINY_PIXELS, *common, "--draw-every", "6"]
    run = resumes(command, tmp_path)
    refusal = refused(["complete", str(pictures / "red.png"), "--model", str(run)], capsys)
    assert "objective: got 'bert', wanted 'next'" in refusal
    model, shown = load_pixels(run, torch.device("cpu")), load_pictures(common[1], 8, Path(common[3]))
    assert pixel_loss(model, shown) == pixel_loss(model, shown) < np.log(256) + 0.1


def test_pixels_draw_and_stop_when_asked(common: list[str], tmp_path: Path) -> None:
    command = ["train-pixels", "bytes", *TINY_PIXELS, *common, "--out", str(tmp_path / "run"), "--steps", "5000"]
    process = start([*command, "--draw-every", "2"])
    wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume goes on" in output
    assert latest(tmp_path / "run") is not None
    assert len(list((tmp_path / "run" / "pictures").glob("completions-*.png"))) >= 2


def test_pixels_refuse_what_is_odd(
    common: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    cli.main(["train-pixels", "bytes", *TINY_PIXELS, *common, "--steps", "1", "--out", str(run)])
    complete = ["complete", str(pictures / "red.png"), "--model", str(run), "--out", str(tmp_path / "a.png")]
    assert "rows: got 9, wanted 0 to 8" in refused([*complete, "--rows", "9"], capsys)
    assert "train-clip" not in refused(["complete", "--model", str(run)], capsys)
    assert "a checkpoint of a pixels, wanted one of a dvae" in refused(
        ["reconstruct", str(pictures / "red.png"), "--model", str(run), "--out", str(tmp_path / "a.png")], capsys
    )
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "broken.png: cannot be read" in refused(["complete", str(tmp_path / "broken.png"), *complete[2:]], capsys)
    assert not (tmp_path / "a.png").exists()


def test_a_picture_s_change_is_learnt_from_pairs_of_panels(
    dvae: Path, common: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [*TINY_TRANSFORMER, "--grid", "16", "8", "--cell-dropout", "0", "--schedule", "causal"]
    command = ["train-transformer", "panels", "--dvae", str(dvae), *tiny, *common]
    run = resumes(command, tmp_path)
    sheet = tmp_path / "sheet.png"
    cli.main(["generate", "in grey", "--model", str(run), "--complete", str(pictures / "red.png"), "--out", str(sheet)])
    with Image.open(sheet) as picture:
        assert picture.height > 2 * 96
    asked = ["generate", "in grey", "--model", str(run), "--complete", str(pictures / "red.png"), "--rows", "9"]
    assert "rows: got 9, wanted 0 to 8" in refused(asked, capsys)
    refusal = refused([*command, "--grid", "8", "8", "--out", str(tmp_path / "other")], capsys)
    assert "its pictures are --grid 16 8 of --vocab-image 32, the transformer's 8 8 of 32" in refusal


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_a_prior_resumes_and_learns_the_vectors_of_captions(
    kind: str, clip: Path, common: list[str], tmp_path: Path
) -> None:
    command = ["train-prior", kind, "--clip-run", str(clip), *TINY_PRIOR, *common]
    resumes(command, tmp_path)
    out = tmp_path / "learnt"
    learn = ["--steps", "250", "--learning-rate", "3e-3", "--average", "0.9", "--warm-up-steps", "10"]
    cli.main([*command, *learn, "--out", str(out), "--draw-every", "250"])
    prior, its_clip, tokenizer = load_prior(out, torch.device("cpu"))
    pictures = load_pictures(common[1], 16, Path(common[3]))
    mean = picture_vectors(its_clip, pictures.images).mean(dim=0)
    cosines = prior_cosines(prior, its_clip, tokenizer, pictures, mean, seed=0)
    assert set(cosines) == {"one draw", "best of two", "caption", "mean"}
    assert cosines["best of two"] > cosines["mean"] + 0.05, cosines
    assert caption_vectors(its_clip, tokenizer, ["red", "a blue square"]).shape == (2, 8)


def test_pictures_are_drawn_of_captions_and_of_pictures(
    clip: Path, dvae: Path, common: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = tmp_path / "prior"
    train = ["train-prior", "diffusion", "--clip-run", str(clip), *TINY_PRIOR, *common, "--steps", "2"]
    cli.main([*train, "--out", str(prior)])
    (tmp_path / "t").mkdir()
    (tmp_path / "p").mkdir()
    tokens = ["train-decoder", "tokens", "--clip-run", str(clip), "--dvae", str(dvae), *TINY_TOKENS, *common]
    patches = ["train-decoder", "pixels", "--clip-run", str(clip), *TINY_PATCHES, *common]
    for run in (resumes(tokens, tmp_path / "t"), resumes(patches, tmp_path / "p")):
        decoder, _ = load_decoder(run, torch.device("cpu"))
        assert decoder.embedding == 8
        out = tmp_path / "sheet.png"
        generate = ["generate", "red", "синий", "--model", str(run), "--prior", str(prior), "--out", str(out)]
        variations = ["variations", str(pictures / "red.png"), "--model", str(run), "--out", str(out), "--number", "2"]
        between = ["interpolate", str(pictures / "red.png"), str(pictures / "blue.png"), "--model", str(run)]
        for command in (
            [*generate, "--number", "2"],
            [*generate, "--clip", str(clip), "--candidates", "3", "--best", "1"],
            variations,
            [*between, "--out", str(out), "--steps", "3", "--rows", "1"],
        ):
            cli.main(command)
            first = out.read_bytes()
            cli.main(command)
            assert out.read_bytes() == first
            cli.main([*command, "--seed", "5"])
            assert out.read_bytes() != first
            out.unlink()
    # Nothing that is at odds goes on.
    message = refused([*generate, "--complete", str(pictures / "red.png")], capsys)
    assert "with --prior" in message
    assert "a checkpoint of a clip, wanted one of a prior" in refused(
        [*generate[:5], "--prior", str(clip), "--out", str(out)], capsys
    )
    other = tmp_path / "clip"
    cli.main(["train-clip", "demo", *TINY_CLIP, *common, "--held-out", "0", "--steps", "1", "--out", str(other)])
    cli.main([*train[:2], "--clip-run", str(other), *train[4:], "--out", str(tmp_path / "other")])
    message = refused([*generate[:5], "--prior", str(tmp_path / "other"), "--out", str(out)], capsys)
    assert "was trained with another CLIP than the prior" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train-prior", "diffusion", *TINY_PRIOR, "--embedding", "9"], "this CLIP has --embedding 8"),
        (
            ["train-decoder", "pixels", *TINY_PATCHES, "--embedding", "9"],
            "its vectors are --embedding 8, the decoder's 9",
        ),
        (["train-decoder", "pixels", *TINY_PATCHES, "--patch", "5"], "patch: got 5, wanted a divisor"),
        (["train-decoder", "tokens", *TINY_TOKENS, "--latent", "9"], "its vectors are --latent 8, the decoder's 9"),
        (["train-decoder", "tokens", *TINY_TOKENS, "--grid", "6", "6"], "its pictures are --grid 8 8"),
    ],
)
def test_what_does_not_fit_its_clip_is_refused(
    command: list[str],
    message: str,
    clip: Path,
    dvae: Path,
    common: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--clip-run", str(clip), "--out", str(tmp_path / "run"), *common]
    places += ["--dvae", str(dvae)] if command[1] == "tokens" else []
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, *places])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_the_clip_beside_a_run_is_the_one_it_was_trained_with(clip: Path, common: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    cli.main(
        ["train-prior", "diffusion", "--clip-run", str(clip), *TINY_PRIOR, *common, "--steps", "1", "--out", str(run)]
    )
    kept, given = load_clip(run / "clip", torch.device("cpu")), load_clip(clip, torch.device("cpu"))
    assert all(map(torch.equal, kept[0].state_dict().values(), given[0].state_dict().values()))
    assert kept[1].vocab_size == given[1].vocab_size
