"""`dalle-reference family` beside a demo, with models so small that it takes seconds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dalle_reference import cli, clip, demo, dvae, family, pixels, prior, unclip
from dalle_reference.errors import UserError
from PIL import Image

from tests.reference.test_train import refused


def test_the_family_leaves_one_table_and_its_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shrink(presets: dict[str, Any], name: str, steps: int, few: bool = False, **changes: Any) -> None:
        description, config = presets[name]
        small = replace(config, run=replace(config.run, steps=steps), **changes)
        if few:
            small = replace(small, data=replace(small.data, pictures=70))
        monkeypatch.setitem(presets, name, (description, small))

    shape = replace(demo.TRANSFORMER_PRESETS["demo"][1].model, layers=2, head_dim=16, vocab_text=512)
    shape = replace(shape, grid=(8, 8), vocab_image=32)
    shrink(demo.DVAE_PRESETS, "demo", 2, model=dvae.PRESETS["tiny"])
    shrink(demo.TRANSFORMER_PRESETS, "demo", 2, few=True, model=shape)
    tiny_clip = replace(clip.PRESETS["tiny"], vocab_text=512)
    shrink(family.CLIP_PRESETS, "demo", 2, model=tiny_clip)
    shrink(family.PIXELS_PRESETS, "bytes", 2, model=pixels.PRESETS["tiny"])
    shrink(family.PIXELS_PRESETS, "palette", 2, model=replace(pixels.PRESETS["tiny"], colours=16))
    for kind in ("diffusion", "autoregressive"):
        small = prior.PriorConfig(
            kind, 8, 512, tiny_clip.text_length, layers=1, heads=1, head_dim=16, noise_steps=2, components=4, buckets=4
        )
        shrink(family.PRIOR_PRESETS, kind, 2, model=small)
    small_decoder = replace(unclip.TOKEN_DECODER, latent=8, layers=2, head_dim=16)
    shrink(family.DECODER_PRESETS, "tokens", 2, few=True, model=small_decoder)
    small_painter = replace(unclip.PIXEL_DECODERS["demo"], embedding=8, resolution=16, layers=1, heads=1, noise_steps=2)
    shrink(family.DECODER_PRESETS, "pixels", 2, few=True, model=small_painter)
    small_panels = replace(family.TRANSFORMER_PRESETS["panels"][1].model, layers=2, head_dim=16)
    shrink(family.TRANSFORMER_PRESETS, "panels", 2, few=True, model=small_panels)
    monkeypatch.setattr(family, "_CANDIDATES", 8)

    cache = ["--cache", str(tmp_path / "cache"), "--device", "cpu"]
    places = ["--demo", str(tmp_path / "demo"), "--out", str(tmp_path / "family"), *cache]
    assert "demo/dvae: no checkpoint there" in refused(["family", *places], capsys)
    cli.main(["demo", "--out", str(tmp_path / "demo"), *cache])
    # Stopped in the middle; the second call goes on from there.
    with monkeypatch.context() as patch:
        patch.setattr(family.train_family, "train_decoder", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as stop:
            cli.main(["family", *places])
        assert stop.value.code == 130
    cli.main(["family", *places])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "family" / "report.json").read_text())
    stages = {"clip", "pixels", "palette", "prior", "autoregressive", "decoder", "pixel-decoder", "panels"}
    assert set(report["steps"]) == stages
    for name in (
        "CLIP, held-out names, ko",
        "CLIP, held-out concepts, one of five skin tones",
        "DALL-E at temperature 1",
        "DALL-E at temperature 1, CLIP's best of 1",
        "DALL-E at temperature 1, CLIP's best of 8",
        "pixels, held-out pictures",
        "palette, held-out pictures",
        "diffusion prior, held-out cosine",
        "autoregressive prior, held-out cosine",
        "unCLIP's decoder of the picture's vector",
        "unCLIP's decoder of the prior's",
        "unCLIP's pixel decoder, cosine to the picture",
        "picture to picture, held-out combinations",
    ):
        assert f"{name} " in said
        assert report["figures"][name] in said
    assert "CC BY-SA 4.0" in said
    alone, best = (report["figures"][f"DALL-E at temperature 1, CLIP's best of {number}"] for number in (1, 8))
    shares = re.findall(r"([\d.]+)%", alone)
    assert shares == shares[:1] * 3, "of one there is no choice"
    assert float(re.findall(r"([\d.]+)%", best)[2]) >= float(shares[0])
    for sheet in ("best-of", "pixels", "palette", "variations", "variations-pixels", "panels"):
        with Image.open(tmp_path / "family" / f"{sheet}.png") as picture:
            assert picture.width > 400
    with pytest.raises(UserError, match="holds a family already"):
        family.run(family.FamilyConfig(tmp_path / "demo", tmp_path / "family"))
    assert "minutes: got 0.0" in refused(["family", "--minutes", "0"], capsys)
