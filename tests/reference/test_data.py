"""Pictures from a folder, from shards and from OpenMoji; damaged input; the cache; the split."""

import collections
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from dalle_reference import loop
from dalle_reference.config import StreamedDataConfig
from dalle_reference.data import (
    CHANGES,
    PictureSet,
    ShardedPictures,
    decode_picture,
    load_pictures,
    open_pictures,
    pairs,
    split_pictures,
)
from dalle_reference.data.openmoji import LANGUAGES
from dalle_reference.data.pictures import Record
from dalle_reference.data.shards import captions_of
from dalle_reference.data.sources import find_shards
from dalle_reference.errors import UserError
from dalle_reference.loop import batch_indices
from dalle_reference.parallel import World
from PIL import Image

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def png(color: str, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    (folder / "red.png").write_bytes(png("red", (12, 8)))
    (folder / "red.txt").write_text("a red square\nкрасный квадрат\n", encoding="utf-8")
    (folder / "deeper" / "blue.PNG").write_bytes(png("blue"))
    (folder / "notes.md").write_text("not a picture")
    return folder


def test_folder(folder: Path, tmp_path: Path) -> None:
    pictures = load_pictures(str(folder), 8, tmp_path / "cache")
    assert pictures.images.dtype == torch.uint8
    assert pictures.images.shape == (2, 3, 8, 8)
    by_name = {record.key: (image, record) for image, record in zip(pictures.images, pictures.records, strict=True)}
    image, record = by_name["red.png"]
    assert image[:, 3, 3].tolist() == [255, 0, 0]
    assert list(record.captions.values()) == ["a red square", "красный квадрат"]
    assert by_name["blue.PNG"][1].captions == {}
    assert len(pictures.captioned()) == 1


def test_pairs_of_panels_show_what_their_captions_say() -> None:
    images = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    records = tuple(Record(str(n), f"concept {n % 10}", {"en": "a thing", "ru": "вещь"}) for n in range(20))
    training, held_out = pairs(PictureSet(images, records, "credit"))
    assert (len(training), len(held_out), training.credit) == (60, 20, "credit")
    together = {}
    for side in (training, held_out):
        for image, record in zip(side.images, side.records, strict=True):
            (caption,) = record.captions.values()
            number = int(record.key.split()[0])
            assert record.concept == records[number].concept
            together[number, caption] = image
            above, below = image[:, :4].int(), image[:, 4:].int()
            assert torch.equal(above, images[number].int())
            for row in range(4):
                for column in range(4):
                    wanted = {
                        "upside down": above[:, 3 - row, column],
                        "turned to the left": above[:, column, 3 - row],
                        "in grey": (above[:, row, column].float().mean().round().expand(3)).int(),
                        "in other colours": above[[2, 0, 1], row, column],
                    }[caption]
                    assert torch.equal(below[:, row, column], wanted)
    assert len(together) == 80
    left_out = [next(iter(record.captions.values())) for record in held_out.records]
    assert [record.key.split()[0] for record in held_out.records] == [record.key for record in records]
    assert left_out[:10] == left_out[10:], "by the concept"
    assert set(left_out) == set(CHANGES)


def test_folder_is_decoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = load_pictures(str(folder), 8, cache)
    monkeypatch.setattr("dalle_reference.data.sources.decode_picture", lambda *_: pytest.fail("decoded again"))
    second = load_pictures(str(folder), 8, cache)
    assert torch.equal(first.images, second.images)
    assert first.records == second.records


def test_changed_folder_and_damaged_cache_are_read_anew(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_pictures(str(folder), 8, cache)
    (folder / "green.png").write_bytes(png("lime"))
    assert len(load_pictures(str(folder), 8, cache)) == 3
    for file in cache.iterdir():
        os.truncate(file, file.stat().st_size // 2)
    assert len(load_pictures(str(folder), 8, cache)) == 3


def test_truncated_picture_is_one_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "jpeg")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:-200])
    with pytest.raises(UserError, match=r"cut\.jpg: cannot be read as a picture"):
        load_pictures(str(folder), 8, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("data", [b"", b"not a picture", png("red")[:40]])
def test_unreadable_picture(data: bytes) -> None:
    with pytest.raises(UserError, match=r"here: cannot be read as a picture \([^<>]+\); repair it or take it out"):
        decode_picture(data, 8, "here")


def test_transparency_becomes_white() -> None:
    assert decode_picture(png("#00000000", mode="RGBA"), 4, "x").unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bit_grey_keeps_its_brightness(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 20000, np.uint16)).save(buffer, kind)
    assert decode_picture(buffer.getvalue(), 4, "x").unique().tolist() == [78]  # 20000 / 65535 of 255


def test_transparent_16_bit_grey_is_white() -> None:
    grey = np.full((4, 4), 20000, np.uint16)
    grey[:2] = 30000
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "png", transparency=20000)
    assert decode_picture(buffer.getvalue(), 4, "x")[0, :, 0].tolist() == [117, 117, 255, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_greys_without_a_white_are_refused(dtype: type) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 20000, dtype)).save(buffer, "tiff")
    with pytest.raises(UserError, match="do not say what is white"):
        decode_picture(buffer.getvalue(), 4, "x")


@pytest.mark.parametrize(
    ("orientation", "red"),  # where the stored picture's red top comes to lie
    [(1, "top"), (2, "top"), (3, "bottom"), (4, "bottom"), (5, "left"), (6, "right"), (7, "right"), (8, "left")],
)
def test_pictures_stand_as_their_camera_was_held(orientation: int, red: str) -> None:
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste("red", (0, 0, 8, 2))
    exif = Image.Exif()
    exif[0x112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, "png", exif=exif.tobytes())
    green = decode_picture(buffer.getvalue(), 8, "x")[1]
    sides = {"top": green[0, 4], "bottom": green[7, 4], "left": green[4, 0], "right": green[4, 7]}
    assert [name for name, value in sides.items() if value == 0] == [red]


def test_damaged_exif_is_passed_over() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert decode_picture(buffer.getvalue(), 8, "x")[0].min() > 200


def test_bands_of_rows_change_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    on_white = Image.alpha_composite(Image.new("RGBA", (83, 61), "white"), Image.fromarray(noise)).convert("RGB")
    whole = np.array(on_white.crop((11, 0, 72, 61)).resize((16, 16), Image.Resampling.LANCZOS))
    monkeypatch.setattr("dalle_reference.data.pictures._BAND", 200)
    assert np.array_equal(decode_picture(buffer.getvalue(), 16, "x").permute(1, 2, 0).numpy(), whole)


def test_a_large_picture_of_one_bit_stays_small_in_memory() -> None:
    code = """
import io, resource
from PIL import Image
from dalle_reference.data import decode_picture
data = io.BytesIO()
Image.new("1", (9400, 9400), 1).save(data, "png")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert decode_picture(data.getvalue(), 48, "x").min() == 255
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert int(grown.stdout) < 300_000  # KB; it was 1,600,000


def test_files_that_are_no_files(folder: Path, tmp_path: Path) -> None:
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(UserError, match=r"link\.png: No such file"):
        load_pictures(str(folder), 8, tmp_path / "cache")
    (folder / "link.png").unlink()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png: no ordinary file"):
        load_pictures(str(folder), 8, tmp_path / "cache")


def test_captions_are_bounded(folder: Path, tmp_path: Path) -> None:
    (folder / "red.txt").write_text("a" * (1 << 20) + "\n")
    with pytest.raises(UserError, match=r"red\.txt: has 1048577 bytes, wanted at most 1048576"):
        load_pictures(str(folder), 8, tmp_path / "cache")


def test_a_cache_that_cannot_be_kept_is_no_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    assert len(load_pictures(str(folder), 8, tmp_path / "cache")) == 2
    assert "the decoded pictures are not kept" in capsys.readouterr().err


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no pictures found"):
        load_pictures(str(tmp_path / "empty"), 8, tmp_path / "cache")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_pictures(str(tmp_path / "nowhere"), 8, tmp_path / "cache")
    with pytest.raises(UserError, match="no such shards"):
        load_pictures(str(tmp_path / "*.tar"), 8, tmp_path / "cache")


def test_caption_that_is_not_text(folder: Path, tmp_path: Path) -> None:
    (folder / "red.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"red\.txt: the caption is not UTF-8"):
        load_pictures(str(folder), 8, tmp_path / "cache")


def test_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"shard-{shard}.tar")) as writer:
            for number in range(3):
                key = f"{shard}{number}"
                writer.write({"__key__": key, "png": png("red"), "txt": f"picture {key}"})
    pictures = load_pictures(str(tmp_path / "shard-*.tar"), 8, tmp_path / "cache")
    assert [record.key for record in pictures.records] == ["00", "01", "02", "10", "11", "12"]
    assert pictures.records[4].captions == {"0": "picture 11"}
    assert pictures.images[:, 0].unique().tolist() == [255]


def test_damaged_shards(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "a", "png": png("red")[:40]})
    with pytest.raises(UserError, match=r"shard\.tar: a\.png: cannot be read as a picture"):
        load_pictures(str(path), 8, tmp_path / "cache")
    path.write_bytes(b"no archive at all" * 100)
    with pytest.raises(UserError, match=r"shard\.tar"):
        load_pictures(str(path), 8, tmp_path / "cache")


def test_split_keeps_a_concept_on_one_side_whatever_is_added() -> None:
    records = tuple(Record(str(i), f"concept {i // 3}", {}) for i in range(300))
    pictures = PictureSet(torch.zeros(300, 3, 1, 1, dtype=torch.uint8), records)
    training, held_out = pictures.split(0.2)
    assert 30 <= len(held_out) <= 90
    assert not {r.concept for r in training.records} & {r.concept for r in held_out.records}
    fewer = pictures.take(list(range(150))).split(0.2)[1]
    assert {r.key for r in fewer.records} == {r.key for r in held_out.records if int(r.key) < 150}


def test_openmoji(tmp_path: Path) -> None:
    pictures = load_pictures("openmoji", 16, tmp_path)
    assert len(pictures) > 4400
    assert "CC BY-SA 4.0" in pictures.credit
    by_key = {record.key: index for index, record in enumerate(pictures.records)}
    heart = pictures.records[by_key["2764"]].captions
    assert (heart["en"], heart["zh"]) == ("red heart", "红心")
    assert "сердце" in heart["ru"]
    assert "하트" in heart["ko"]
    red, green, blue = pictures.images[by_key["2764"], :, 8, 8].tolist()
    assert red > 200 > 100 > max(green, blue)
    # The five skin tones of a waving hand are variants of one concept.
    assert len({pictures.records[by_key[f"1F44B{tone}"]].concept for tone in ("", "-1F3FB", "-1F3FF")}) == 1
    complete = [record for record in pictures.records if set(LANGUAGES) <= record.captions.keys()]
    assert len(complete) > 3900
    assert pictures.images.flatten(1).float().std(dim=1).min() > 0  # nothing was drawn blank


def write_shards(folder: Path, samples: list[dict[str, bytes | str]], each: int = 3) -> str:
    """Samples by suffix, in shards of `each`; gives the pattern that names them."""
    folder.mkdir()
    for first in range(0, len(samples), each):
        with webdataset.TarWriter(str(folder / f"{first // each:03d}.tar")) as writer:
            for number, sample in enumerate(samples[first : first + each], first):
                writer.write({"__key__": f"deep/er/{number:04d}", **sample})
    return str(folder / "*.tar")


def streamed(source: str, tmp_path: Path, **options: Any) -> ShardedPictures:
    pictures = open_pictures(StreamedDataConfig(source, **options), 8, tmp_path / "cache")
    assert isinstance(pictures, ShardedPictures)
    return pictures


@pytest.fixture
def many(tmp_path: Path) -> str:
    """20 pictures of a grey each, of several sizes and formats."""
    samples = []
    for number in range(20):
        buffer = io.BytesIO()
        kind = ("png", "jpeg", "webp", "tiff", "bmp")[number % 5]
        Image.new("RGB", (8 + number, 30 - number), (10 * number,) * 3).save(buffer, kind)
        samples.append({kind: buffer.getvalue(), "txt": f"number {number}\nn{number}"})
    return write_shards(tmp_path / "many", samples)


def shades(images: torch.Tensor) -> list[int]:
    return [round(value / 10) for value in images.float().mean(dim=(1, 2, 3)).tolist()]


def test_shards_are_read_where_they_lie(many: str, tmp_path: Path) -> None:
    pictures = streamed(many, tmp_path)
    whole = load_pictures(many, 8, tmp_path / "cache")
    assert torch.equal(pictures.pictures(range(20)), whole.images)
    assert shades(pictures.pictures([3, 17])) == [3, 17]
    sides, sides_in_memory = pictures.split(0.4), whole.split(0.4)
    for side, in_memory in zip(sides, sides_in_memory, strict=True):
        assert 3 < len(side) < 17
        assert torch.equal(side.pictures(range(len(side))), in_memory.images)
    (batch,) = pictures.batches([range(20)])
    assert batch.captions[7] == ["number 7", "n7"]
    assert batch.captions == [list(record.captions.values()) for record in whole.records]


def test_what_to_train_on_is_chosen_alike_in_memory_and_in_shards(many: str, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "many", tmp_path / "variants")
    data = StreamedDataConfig(f"{many}::{tmp_path}/variants/*.tar", held_out=0.4, one_per_concept=True, pictures=5)
    every, _ = load_pictures(many, 8, tmp_path / "cache").split(0.4)
    evenly = [number * len(every) // 5 for number in range(5)]
    for pictures in (load_pictures(data.source, 8, tmp_path / "cache"), streamed(data.source, tmp_path)):
        assert len(pictures) == 40
        training, held_out = split_pictures(pictures, data)
        assert torch.equal(training.pictures(range(len(training))), every.images[evenly])
        assert len(held_out) == 40 - 2 * len(every)
    with pytest.raises(UserError, match="openmoji: no captioned pictures to train on"):
        split_pictures(every.take([]), StreamedDataConfig(), "captioned pictures")


def test_the_index_is_made_once_and_anew_for_other_shards(
    many: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = streamed(many, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("dalle_reference.data.shards.samples", lambda *_: pytest.fail("looked through again"))
        assert np.array_equal(streamed(many, tmp_path).index, first.index)
    (tmp_path / "many" / "006.tar").unlink()
    assert len(streamed(many, tmp_path)) == 18
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert len(streamed(many, tmp_path)) == 18


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    old = os.fsdecode("été".encode("latin-1"))
    (tmp_path / old).mkdir()
    (tmp_path / old / f"{old}.png").write_bytes(png("red"))
    with tarfile.open(tmp_path / old / f"{old}.tar", "w") as archive:
        archive.add(tmp_path / old / f"{old}.png", f"{old}.png")
    for _ in range(2):  # made, and from the cache
        in_memory = load_pictures(str(tmp_path / old), 8, tmp_path / "cache")
        assert in_memory.records[0].concept == old
        shards = streamed(str(tmp_path / old / "*.tar"), tmp_path, workers=0)
        assert torch.equal(shards.pictures([0]), in_memory.images)
        assert [len(side) for side in shards.split(0.5)] == [len(side) for side in in_memory.split(0.5)]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [len(side) for side in pairs(in_memory)] == [3, 1]


def order(step: int) -> np.ndarray:
    return batch_indices(step, 8, 20, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_processes_and_from_any_step(
    many: str, tmp_path: Path, workers: int
) -> None:
    pictures = streamed(many, tmp_path, workers=workers)
    feeds = {(rank, size): pictures.feed(order) for size in ((1, 2) if workers else (1, 2, 4)) for rank in range(size)}
    for step in range(6):
        for (rank, size), feed in feeds.items():
            accumulate = 2 if size == 2 else 1
            parts = World(torch.device("cpu"), rank, size).parts(8, accumulate)
            wanted = [order(step)[part.start : part.stop].tolist() for part in parts]
            assert [shades(images) for images in feed(step, parts)] == wanted
    assert [shades(images) for images in pictures.feed(order)(4, [range(8)])] == [order(4).tolist()]  # gone on with
    assert sorted(np.concatenate([order(step) for step in range(5)]).tolist()) == sorted([*range(20)] * 2)


def test_an_order_of_many_pictures_mixes_some_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_reference.loop._BLOCK", 4)
    monkeypatch.setattr("dalle_reference.loop._MIXED", 3)
    loop._shuffled.cache_clear()
    epochs = [batch_indices(epoch, 50, 50, seed=1) for epoch in range(3)]
    loop._shuffled.cache_clear()
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
        for start in range(0, 48, 12):  # three blocks, which the epoch's shift may have put about the end
            blocks = (np.diff(np.sort(epoch[start : start + 12]), append=0) != 1).sum()
            assert blocks <= 4
            assert (np.diff(epoch[start : start + 12]) != 1).sum() > 4
    assert not np.array_equal(epochs[0], epochs[1])


def test_broken_samples_are_left_out_up_to_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [{"png": png(f"rgb({10 * number}, {10 * number}, {10 * number})")} for number in range(20)]
    samples[4]["png"] = samples[4]["png"][:40]
    samples[5]["png"] = b"no picture"
    source = write_shards(tmp_path / "shards", samples)
    for workers in (0, 1):
        pictures = streamed(source, tmp_path, workers=workers)
        feed = pictures.feed(lambda step: np.arange(8) + 8 * (step % 2))
        assert [shades(feed(step, [range(8)])[0])[:7] for step in range(3)] == [
            [0, 1, 2, 3, 6, 6, 6],
            [8, 9, 10, 11, 12, 13, 14],
            [0, 1, 2, 3, 6, 6, 6],
        ]
        said = capsys.readouterr().err
        assert said.count("left out: ") == 2  # each once
        assert "001.tar: deep/er/0004.png: cannot be read as a picture" in said
    batch, last = pictures.batches([range(10), range(10, 20)])
    assert shades(batch.images) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert len(batch.captions) == len(batch.concepts) == 8
    assert len(last.images) == 10
    with pytest.raises(UserError, match=r"broken: 1 of 8 pictures, wanted 0\.00%; .*0004\.png: cannot be read"):
        streamed(source, tmp_path, workers=0, broken=0.0).feed(np.arange)(8, [range(8)])
    feed = streamed(source, tmp_path, workers=0, broken=0.005).feed(lambda step: np.arange(8))
    feed(0, [range(8)])
    with pytest.raises(UserError, match=r"broken: 6 of \d+ pictures, wanted 0\.50%"):
        feed(1, [range(8)])


def test_captions_in_a_field_of_a_json(tmp_path: Path) -> None:
    said = ['{"caption": "one", "other": 3}', '{"caption": ["two", " "]}', '{"other": 1}', '{"caption": 5}', "[1]"]
    samples = [{"png": png("red"), "json": text, "txt": "not this"} for text in said[:3]]
    source = write_shards(tmp_path / "shards", samples)
    (batch,) = streamed(source, tmp_path, caption_field="caption", workers=0).batches([range(3)])
    assert batch.captions == [["one"], ["two"], []]
    in_memory = load_pictures(source, 8, tmp_path / "cache", "caption").captioned()
    assert [record.captions["0"] for record in in_memory.records] == ["one", "two"]
    (tmp_path / "folder").mkdir()
    for suffix, data in samples[1].items():
        (tmp_path / "folder" / f"two.{suffix}").write_bytes(data if isinstance(data, bytes) else data.encode())
    of_folder = load_pictures(str(tmp_path / "folder"), 8, tmp_path / "cache", "caption")
    assert [list(record.captions.values()) for record in of_folder.records] == [["two"]]
    for text, reason in (
        (said[3], "caption is '5', wanted a text or a list"),
        (said[4], "wanted a JSON object"),
        ('{"caption": ["cut \\ud83d"]}', "here: the caption is not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=reason):
            captions_of(text.encode(), "caption", "here")
    with pytest.raises(UserError, match="caption_field: got caption with openmoji"):
        load_pictures("openmoji", 8, tmp_path / "cache", "caption")


def test_shards_by_braces_and_lists(many: str, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    assert [path.name for path in find_shards(f"{folder}/{{000..002}}.tar")] == ["000.tar", "001.tar", "002.tar"]
    assert len(find_shards(f"{folder}/00[12].tar::{folder}/000.tar::{folder}/001.tar")) == 3
    assert find_shards("openmoji") == find_shards("a.tar.d/folder") == []
    with pytest.raises(UserError, match=r"007\.tar: no such shards"):
        find_shards(f"{folder}/{{000..009}}.tar")


def test_shards_that_were_cut_or_have_gone(many: str, tmp_path: Path) -> None:
    shard = tmp_path / "many" / "000.tar"
    streamed(many, tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 3 // 512 * 512 + 100])
    with pytest.raises(UserError, match=r"000\.tar"):
        streamed(many, tmp_path)
    shard.write_bytes(whole)
    pictures = streamed(many, tmp_path, broken=0.0, workers=0)
    shard.unlink()
    with pytest.raises(UserError, match=r"broken: 3 of 4 pictures|broken: 1 of 4 pictures"):
        pictures.pictures([0, 1, 2, 3])


def test_a_decoding_process_that_ends_is_one_error(many: str, tmp_path: Path) -> None:
    feed = streamed(many, tmp_path, workers=1).feed(order)
    feed(0, [range(8)])
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(UserError, match="what decodes its pictures has failed"):
        collections.deque((feed(step, [range(8)]) for step in range(1, 9)), maxlen=0)
