"""The demo, from pictures to report, with models so small that it takes seconds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dalle_reference import checkpoint, demo, dvae
from dalle_reference.errors import UserError
from PIL import Image

from benchmarks import drawing


def stop(_: object) -> None:
    raise KeyboardInterrupt


def test_demo_leaves_all_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    description, stage_1 = demo.DVAE_PRESETS["demo"]
    stage_1 = replace(stage_1, model=dvae.PRESETS["tiny"], run=replace(stage_1.run, steps=50))
    monkeypatch.setitem(demo.DVAE_PRESETS, "demo", (description, stage_1))
    description, stage_2 = demo.TRANSFORMER_PRESETS["demo"]
    stage_2 = replace(
        stage_2,
        model=replace(stage_2.model, grid=(8, 8), vocab_image=32, layers=2, heads=2, head_dim=16, vocab_text=512),
        data=replace(stage_2.data, pictures=80),
        run=replace(stage_2.run, steps=50),
    )
    monkeypatch.setitem(demo.TRANSFORMER_PRESETS, "demo", (description, stage_2))
    config = demo.DemoConfig(out=tmp_path / "demo", device="cpu", cache=tmp_path / "cache")
    # Stopped before stage 2; the second call goes on from there.
    with monkeypatch.context() as patch:
        patch.setattr(demo.train, "train_transformer", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.run(config)
    newest = checkpoint.latest(config.out / "dvae")
    assert newest is not None
    written = next(newest.glob("*.safetensors")).stat().st_mtime_ns
    demo.run(config)
    assert next(newest.glob("*.safetensors")).stat().st_mtime_ns == written
    said = capsys.readouterr().out
    report = json.loads((config.out / "report.json").read_text())
    assert report["steps"] == {"dvae": 50, "transformer": 50}
    assert report["training_pictures"] == 80
    assert report["retrieval"]["captions"] == 64
    assert report["retrieval"]["candidates"] == 80
    assert report["retrieval"]["text"] in said
    assert set(report["retrieval_by_language"]) == {"en", "ru", "zh", "ko"}
    mean = sum(report["retrieval_by_language"].values()) / 4
    assert mean == pytest.approx(report["retrieval"]["right"])
    assert "unseen combinations of colour and thing" in said
    assert set(report["backends"]) == {
        "sparse_attention",
        "decode_attention",
        "gumbel_lookup",
        "logit_laplace_nll",
        "sample_tokens",
    }
    assert "times as fast" in said
    assert drawing.main([str(config.out), "--quick", "--device", "cpu", "--cache", str(config.cache)]) == 0
    drawn = capsys.readouterr().out.splitlines()
    ways = [line.split(" | ")[0] for line in drawn[2:]]
    assert ways == [
        "| raster",
        "| raster, eight bits",
        "| diagonal, window 4",
        "| diagonal, window 4, eight bits",
    ]
    assert [int(line.split(" | ")[1]) for line in drawn[2:]] == [64, 64, 36, 36]
    assert "CC BY-SA 4.0" in said
    for name in ("reconstructions.png", "samples.png", "curves.png"):
        with Image.open(config.out / name) as picture:
            assert picture.width > 400
    for stage in ("dvae", "transformer"):
        assert list((config.out / stage / "checkpoints").glob("step-*/*.safetensors"))
    with pytest.raises(UserError, match="holds a demo already"):
        demo.run(config)
