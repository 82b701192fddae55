"""Pictures from a folder, from shards and from OpenMoji; damaged input; the cache; the split."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from dalle_reference.data import CHANGES, PictureSet, decode_picture, load_pictures, pairs
from dalle_reference.data.openmoji import LANGUAGES
from dalle_reference.data.pictures import Record
from dalle_reference.errors import UserError
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
