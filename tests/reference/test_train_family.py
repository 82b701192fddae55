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
from dalle_reference.load import load_pixels
from dalle_reference.train_family import pixel_loss
from PIL import Image

from tests.reference.test_train import losses, refused, start, wait_for_step, weights

OFTEN = ["--log-every", "1", "--precision", "fp32", "--draw-every", "0", "--batch", "4", "--held-out", "0"]
TINY_PIXELS = ["--resolution", "8", "--layers", "2", "--heads", "2", "--head-dim", "16", *OFTEN]


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
