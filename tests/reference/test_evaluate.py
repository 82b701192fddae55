"""The figures: retrieval, PSNR, use of the codebook; and the sheets that show the pictures."""

import math
from pathlib import Path

import pytest
import torch
from dalle_reference import render
from dalle_reference.data import load_pictures
from dalle_reference.ema import MovingAverage
from dalle_reference.evaluate import codebook_use, psnr, retrieval
from PIL import Image


def test_retrieval_counts_the_nearest() -> None:
    gallery = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    samples = torch.tensor([[0, 0, 9, 9], [2, 1, 2, 9]])
    found = retrieval(samples, torch.tensor([0, 1]), gallery)
    assert found.right == 0.5
    assert found.chance == 0.25
    assert found.times_chance == 2.0
    assert (found.captions, found.candidates) == (2, 4)


def test_retrieval_shares_a_tie() -> None:
    gallery = torch.tensor([[0, 0], [0, 0], [5, 5]])
    assert retrieval(torch.tensor([[0, 1]]), torch.tensor([1]), gallery).right == 0.5
    assert retrieval(torch.tensor([[9, 9]]), torch.tensor([1]), gallery).right == pytest.approx(1 / 3)


def test_retrieval_of_noise_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randint(4, (40, 6), generator=generator)
    samples = torch.randint(4, (4000, 6), generator=generator)
    targets = torch.randint(40, (4000,), generator=generator)
    assert 0.8 < retrieval(samples, targets, gallery).times_chance < 1.2


def test_psnr() -> None:
    assert psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)) == pytest.approx(20.0, abs=1e-4)


def test_codebook_use() -> None:
    use = codebook_use(torch.tensor([[0, 0], [1, 1]]), 8)
    assert use == {"codebook_usage": 0.25, "codebook_perplexity": pytest.approx(2.0)}


def test_moving_average_is_the_mean_it_says() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(module, 0.9)
    wanted = float(module.weight.detach())
    for step in range(200):
        with torch.no_grad():
            module.weight.fill_(math.sin(step))
        average.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * math.sin(step)
    assert float(average.module.weight) == pytest.approx(wanted, rel=1e-4)


def test_every_letter_of_every_caption_has_a_glyph(tmp_path_factory: pytest.TempPathFactory) -> None:
    records = load_pictures("openmoji", 16, tmp_path_factory.mktemp("cache")).records
    captions = {caption for record in records for caption in record.captions.values()}
    needed = {(render._font(caption, 13), c) for caption in captions for c in caption if not c.isspace()}
    absent = {font: bytes(font.getmask("\U0010fffe")) for font, _ in needed}
    assert len(absent) == 3
    assert {c for font, c in needed if bytes(font.getmask(c)) == absent[font]} == set()


def test_sheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    captions = ["red", "красное сердце и ещё много слов которые не помещаются", "红心", "빨간색 하트"]
    render.sheet(path, torch.rand(4, 3, 12, 12), captions, columns=2, side=48, heading="heading", footer="footer")
    with Image.open(path) as sheet:
        assert sheet.width == 2 * (48 + 8) + 8
        assert sheet.height > 2 * 48
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_headings_take_the_lines_that_they_need(tmp_path: Path) -> None:
    heights = []
    for heading in ("", "short", "what was given, what was made of it, and the picture"):
        render.sheet(tmp_path / "sheet.png", torch.rand(2, 3, 12, 12), columns=2, side=48, heading=heading)
        with Image.open(tmp_path / "sheet.png") as sheet:
            heights.append(sheet.height)
    none, one, several = heights
    assert none < one < several


def test_curves_skip_a_line_cut_short(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [record["step"] for record in render.read_metrics(metrics)] == [1, 2]
    render.curves(tmp_path / "curves.png", {"a": metrics}, {"a": [["loss"], ["absent"]]})
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 100
