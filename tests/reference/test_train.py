"""Training end to end on a handful of pictures; resuming bit for bit after SIGKILL and Ctrl-C; the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dalle_reference import cli
from dalle_reference.checkpoint import latest
from dalle_reference.clip import caption_tokens
from dalle_reference.files import exclusive
from dalle_reference.generate import generate
from dalle_reference.load import load_clip, load_dvae
from dalle_reference.loop import batch_indices, distinct_indices
from dalle_reference.schedules import half_cosine, warm_up
from dalle_reference.train import hide_cells, shifted
from dalle_reference.transformer import NO_TOKEN
from PIL import Image
from safetensors.torch import load_file

TINY_DVAE = [
    *["--resolution", "16", "--width", "8", "--groups", "2", "--blocks", "1", "--vocab", "32", "--code-width", "8"],
    *["--patch", "1", "--no-fitted"],
    *["--batch", "4", "--log-every", "1", "--precision", "fp32", "--draw-every", "0"],
]
TINY_TRANSFORMER = [
    *["--layers", "2", "--heads", "2", "--head-dim", "16", "--text-length", "8", "--vocab-text", "300"],
    *["--grid", "8", "8", "--vocab-image", "32", "--cell-dropout", "0.5"],
    *["--batch", "4", "--log-every", "1", "--precision", "fp32", "--draw-every", "0"],
]

TINY_CLIP = [
    *["--resolution", "16", "--width", "16", "--layers", "2", "--vocab-text", "300", "--text-length", "12"],
    *["--text-width", "16", "--text-layers", "2", "--embedding", "8"],
    *["--batch", "4", "--log-every", "1", "--precision", "fp32", "--draw-every", "0"],
]


@pytest.fixture(scope="module")
def stage_1(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage-1") / "run"
    cli.main(["train-dvae", "demo", "--out", str(out), "--steps", "12", *TINY_DVAE, *common])
    return out


def losses(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records]


def weights(run: Path) -> dict[str, bytes]:
    """All tensors of the newest checkpoint, to the bit; the order in which its header names them is by chance."""
    newest = latest(run)
    assert newest is not None
    (shard,) = newest.glob("*.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(shard).items()}


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dalle_reference", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stage", ["dvae", "transformer"])
def test_a_killed_run_goes_on_bit_for_bit(stage: str, stage_1: Path, common: list[str], tmp_path: Path) -> None:
    if stage == "dvae":
        command = ["train-dvae", "demo", *TINY_DVAE]
    else:
        command = ["train-transformer", "demo", "--dvae", str(stage_1), *TINY_TRANSFORMER]
    # Long enough that the kill comes before the end; the comparison stops earlier.
    command += ["--steps", "3000", "--save-every", "7", *common]
    killed = tmp_path / "killed"
    process = start([*command, "--out", str(killed)])
    wait_for_step(killed, 15, process)  # a checkpoint is written before the next, of step 14, is begun
    process.send_signal(signal.SIGKILL)
    process.communicate()
    at_kill = losses(killed)
    assert 15 <= len(at_kill) < 3000
    newest = latest(killed)
    assert newest is not None
    restart = int(newest.name.removeprefix("step-"))
    # The run goes on in a new process to well past the kill, and an undisturbed one is made beside it.
    end = at_kill[-1][0] + 5
    for out, resume in ((killed, ["--resume"]), (tmp_path / "whole", [])):
        process = start([*command, "--out", str(out), *resume])
        wait_for_step(out, end if out != killed else max(end, restart + 5), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    whole, continued = dict(losses(tmp_path / "whole")), dict(losses(killed))
    shared = sorted(whole.keys() & continued.keys())
    assert shared == list(range(1, len(shared) + 1))
    assert shared[-1] >= end
    assert [whole[step] for step in shared] == [continued[step] for step in shared]


def test_a_fitted_run_begins_better_and_resumes(common: list[str], tmp_path: Path) -> None:
    shape = ["--groups", "1", "--patch", "4"]
    tiny = [*TINY_DVAE[: TINY_DVAE.index("--groups")], *TINY_DVAE[TINY_DVAE.index("--groups") + 2 :]]
    tiny = tiny[: tiny.index("--patch")] + tiny[tiny.index("--patch") + 3 :]
    command = ["train-dvae", "demo", *tiny, *shape, *common, "--steps", "6", "--save-every", "4"]
    cli.main([*command, "--out", str(tmp_path / "whole")])
    cli.main([*command, "--out", str(tmp_path / "plain"), "--no-fitted"])
    assert losses(tmp_path / "whole")[0][1] < losses(tmp_path / "plain")[0][1]
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000006")
    cli.main([*command, "--out", str(tmp_path / "half"), "--resume"])
    assert weights(tmp_path / "half") == weights(tmp_path / "whole")


def test_interrupt_saves_and_resume_reaches_the_same_weights(common: list[str], tmp_path: Path) -> None:
    command = ["train-dvae", "demo", *TINY_DVAE, "--steps", "60", "--save-every", "1000", *common]
    stopped = tmp_path / "stopped"
    process = start([*command, "--out", str(stopped)])
    wait_for_step(stopped, 5, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume goes on" in output
    assert "Traceback" not in output
    newest = latest(stopped)
    assert newest is not None
    assert 5 <= int(newest.name.removeprefix("step-")) < 60
    cli.main([*command, "--out", str(stopped), "--resume"])
    cli.main([*command, "--out", str(tmp_path / "whole")])
    assert losses(stopped) == losses(tmp_path / "whole")
    assert weights(stopped) == weights(tmp_path / "whole")


def test_a_signal_that_ends_who_decodes_saves_the_run(pictures: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        for path in sorted(pictures.iterdir()):
            archive.add(path, path.name)
    source = ["--source", str(tmp_path / "pictures.tar"), "--cache", str(tmp_path / "cache"), "--workers", "1"]
    run = tmp_path / "run"
    command = ["train-dvae", "demo", *TINY_DVAE, *source, "--steps", "90000", "--save-every", "90000"]
    process = start([*command, "--out", str(run)], start_new_session=True)
    wait_for_step(run, 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "saved; --resume goes on" in output
    newest = latest(run)
    assert newest is not None
    assert int(newest.name.removeprefix("step-")) == len(losses(run)) >= 5


def test_clip_resumes_names_pictures_and_judges_candidates(
    stage_1: Path, common: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-clip", "demo", *TINY_CLIP, *common, "--steps", "200", "--save-every", "150", "--held-out", "0"]
    command += ["--average", "0.9", "--warm-up-steps", "10", "--learning-rate", "5e-3"]
    clip = tmp_path / "clip"
    cli.main([*command, "--out", str(clip), "--draw-every", "200"])
    whole = weights(clip), losses(clip)
    assert whole[1][-1][1] < 0.5 * whole[1][0][1]
    shutil.rmtree(clip / "checkpoints" / "step-00000200")
    cli.main([*command, "--out", str(clip), "--resume"])
    assert (weights(clip), losses(clip)) == whole

    capsys.readouterr()
    names = ["--names", "red", "green", "a blue square", "--model", str(clip)]
    cli.main(["classify", str(pictures / "green.png"), str(pictures / "red.png"), *names])
    first, second = capsys.readouterr().out.splitlines()
    assert "green.png: green " in first
    assert "red.png: red " in second
    cli.main(["classify", str(pictures / "green.png"), *names, "--templates", "a {} square", "{}"])
    assert "green.png: green " in capsys.readouterr().out

    transformer = tmp_path / "transformer"
    train = ["train-transformer", "demo", "--dvae", str(stage_1), "--out", str(transformer), "--steps", "2"]
    cli.main([*train, *TINY_TRANSFORMER, *common])
    sheet = tmp_path / "samples.png"
    generate = ["generate", "red", "green", "--model", str(transformer), "--out", str(sheet), "--temperature", "1"]
    cli.main([*generate, "--clip", str(clip), "--candidates", "6", "--best", "2"])
    judged = np.array(Image.open(sheet))
    cli.main([*generate, "--number", "6"])
    every = np.array(Image.open(sheet))
    side, gap = 96, 8

    def cell(canvas: np.ndarray, row: int, column: int) -> np.ndarray:
        height = (canvas.shape[0] - gap) // 2
        top, left = gap + row * height, gap + column * (side + gap)
        return canvas[top : top + side, left : left + side]

    model, tokenizer = load_clip(clip, torch.device("cpu"))
    for row, caption in enumerate(("red", "green")):
        drawn = [cell(every, row, column) for column in range(6)]
        shown = torch.stack([torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in drawn]).float() / 255.0
        wanted = model.encode_captions(caption_tokens([caption], tokenizer, model.config))[0]
        scores = model.encode_pictures(shown[:, :, 3::6, 3::6]) @ wanted
        best = [cell(judged, row, place) for place in range(2)]
        chosen = [next(n for n in range(6) if np.array_equal(picture, drawn[n])) for picture in best]
        assert chosen[0] != chosen[1]
        # The sheet's pixels are rounded; CLIP judged them before that.
        assert torch.allclose(scores[chosen], scores.sort(descending=True).values[:2], rtol=0, atol=3e-4)


def test_many_pictures_are_drawn_in_parts_that_differ(
    stage_1: Path, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train = ["train-transformer", "demo", "--dvae", str(stage_1), "--out", str(run), "--steps", "1"]
    cli.main([*train, *TINY_TRANSFORMER, *common])
    seen = []
    monkeypatch.setattr(cli, "_AT_ONCE", 4)
    monkeypatch.setattr(cli, "generate", lambda *given, **options: seen.append(generate(*given, **options)) or seen[-1])
    command = ["generate", "red", "green", "--model", str(run), "--number", "5", "--temperature", "1"]
    cli.main([*command, "--out", str(tmp_path / "a.png")])
    assert [len(part) for part in seen] == [4, 4, 2]
    assert len(torch.cat(seen).unique(dim=0)) == 10
    first, second = seen[:2]  # after one step tokens follow the noise: the same noise, from another cell on, would show
    for shift in range(8):
        assert (first[:, shift:] == second[:, : 64 - shift]).float().mean() < 0.3


def test_a_batch_of_clip_holds_no_concept_twice(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(30):
        assert len(set(distinct_indices(step, 7, 10, 0).tolist())) == 7
    assert set(distinct_indices(4, 5, 10, 0)) | set(distinct_indices(5, 5, 10, 0)) == set(range(10))
    command = ["train-clip", "demo", *TINY_CLIP, *common, "--out", str(tmp_path / "run"), "--held-out", "0"]
    assert "shows 12 concepts to learn" in refused([*command, "--batch", "13"], capsys)


def test_clip_sees_pictures_moved_by_as_much_as_it_is_told() -> None:
    image = torch.arange(3 * 6 * 6, dtype=torch.uint8).reshape(3, 6, 6)
    framed = torch.nn.functional.pad(image.float()[None], (2, 2, 2, 2), mode="replicate")[0].to(torch.uint8)
    windows = {(y, x): framed[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)}
    chance = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        moved = shifted(image, 2, chance)
        (place,) = (place for place, window in windows.items() if torch.equal(window, moved))
        seen.add(place)
    assert seen == set(windows)


def test_all_commands_in_order(stage_1: Path, common: list[str], pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "transformer"
    arguments = ["train-transformer", "demo", "--dvae", str(stage_1), "--out", str(run), "--steps", "8"]
    cli.main([*arguments, *TINY_TRANSFORMER[:-1], "8", *common])  # draws at step 8, the last
    assert sorted(path.name for path in run.iterdir() if "events" not in path.name) == [
        "checkpoints",
        "dvae",
        "metrics.jsonl",
        "pictures",
        "tokenizer.json",
    ]
    assert any("events" in path.name for path in run.iterdir())
    sheet = tmp_path / "samples.png"
    generate = ["generate", "a red square", "синий", "红", "빨강", "--model", str(run), "--number", "2"]
    cli.main([*generate, "--out", str(sheet), "--guidance-scale", "1.5", "--top-k", "8"])
    first = sheet.read_bytes()
    cli.main([*generate, "--out", str(sheet), "--guidance-scale", "1.5", "--top-k", "8"])
    assert sheet.read_bytes() == first
    side_by_side = [*generate, "--out", str(sheet), "--order", "diagonal", "--window", "2", "--cache-dtype", "int8"]
    cli.main([*side_by_side, "--guidance-scale", "1.5"])
    assert sheet.read_bytes() != first
    picture = pictures / "red.png"
    cli.main([*generate, "--out", str(sheet), "--complete", str(picture), "--rows", "5"])
    assert sheet.read_bytes() != first
    cli.main(["reconstruct", str(picture), str(picture), "--model", str(stage_1), "--out", str(tmp_path / "r.png")])
    assert Image.open(tmp_path / "r.png").size[0] > 100


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    return message[-1]


def test_refusals(stage_1: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["train-dvae", "demo", "--out", str(stage_1), "--steps", "12", *TINY_DVAE, *common]
    before = weights(stage_1)
    assert "holds a run already; go on with --resume" in refused(again, capsys)
    other = ["--width", "16"]
    assert "another configuration: model.width was 8, is 16" in refused([*again, "--resume", *other], capsys)
    assert weights(stage_1) == before
    absent = ["train-dvae", "demo", "--out", str(tmp_path / "none"), *TINY_DVAE, *common, "--resume"]
    assert "no checkpoint there" in refused(absent, capsys)
    wrong_kind = ["generate", "red", "--model", str(stage_1)]
    assert "a checkpoint of a dvae, wanted one of a transformer" in refused(wrong_kind, capsys)
    unreadable = tmp_path / "broken.png"
    unreadable.write_bytes(b"no picture")
    assert "broken.png: cannot be read as a picture" in refused(
        ["reconstruct", str(unreadable), "--model", str(stage_1)], capsys
    )
    assert "none.png" in refused(["reconstruct", str(tmp_path / "none.png"), "--model", str(stage_1)], capsys)
    (tmp_path / "empty").mkdir()
    empty = ["train-dvae", "demo", "--out", str(tmp_path / "x"), *TINY_DVAE, "--source", str(tmp_path / "empty")]
    assert "no pictures found there" in refused([*empty, "--cache", str(tmp_path)], capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train-dvae demo --clip -1", "clip: got -1.0, wanted above 0"),
        ("train-dvae demo --average 2", "average: got 2.0, wanted at least 0 and below 1"),
        ("train-dvae demo --held-out nan", "held_out: got nan"),
        ("train-dvae demo --held-out 1", "held_out: got 1.0"),
        ("train-dvae demo --seed -1", "seed: got -1, wanted 0 to 2**63 - 1"),
        ("train-dvae demo --seed 9223372036854775808", "seed: got 9223372036854775808"),
        ("train-dvae demo --learning-rate inf", "learning_rate: got inf"),
        ("train-dvae demo --beta1 1", "beta1: got 1.0"),
        ("train-dvae demo --epsilon 0", "epsilon: got 0.0"),
        ("train-dvae demo --draw-every -1", "draw_every: got -1"),
        ("train-dvae demo --warm-up-steps -1", "warm_up_steps: got -1"),
        ("train-dvae demo --quantizer lfq", "fitted: got True with quantizer lfq"),
        ("train-dvae demo --patch 65", "patch: got 65"),
        ("train-dvae demo --temperature 0", "temperature: got 0.0"),
        ("train-dvae demo --kl-share 1.5", "kl_share: got 1.5"),
        ("train-dvae demo --kl-weight nan", "kl_weight: got nan"),
        ("train-dvae demo --least-log-b nan", "least_log_b: got nan"),
        ("train-dvae demo --groups 60", "groups: got 60"),
        ("train-dvae demo --device bogus", "device: got 'bogus', wanted cpu, cuda"),
        ("train-dvae demo --device meta", "device: got 'meta'"),
        ("train-dvae demo --device cuda:99", "device: got cuda:99"),
        ("train-dvae demo --out /dev/null", "/dev/null: is no folder"),
        ("train-dvae demo --out /dev/null/run", "/dev/null/run: Not a directory"),
        ("train-dvae demo --out /proc/run", "/proc/run: No such file"),
        ("train-transformer demo --pictures 0", "pictures: got 0, wanted at least 1"),
        ("train-clip demo --pictures 3", "batch: got 64, but openmoji shows 3 concepts to learn"),
        ("train-transformer demo --bpe-dropout 2", "bpe_dropout: got 2.0, wanted 0 to 1"),
        ("train-transformer demo --caption-dropout -0.5", "caption_dropout: got -0.5"),
        ("train-transformer demo --cell-dropout 1.5", "cell_dropout: got 1.5"),
        ("train-transformer demo --vocab-text 10", "vocab_text: got 10"),
        ("train-transformer demo --vocab-text 999999999999999999999999", "vocab_text: got 999999999999999999999999"),
        ("train-transformer demo --head-dim 999999999999999999999999", "head_dim: got 999999999999999999999999"),
        ("train-dvae demo --steps 999999999999999999999999", "steps: got 999999999999999999999999"),
        ("train-dvae demo --width 1048580", "width: got 1048580"),
        ("train-transformer demo --guidance-scale nan", "guidance_scale: got nan"),
        ("train-transformer demo --dvae /nowhere --out {folder}", "/nowhere: no checkpoint there"),
        ("generate red --number 0", "number: got 0"),
        ("generate red --seed -1", "seed: got -1"),
        ("generate red --seed 99999999999999999999", "seed: got 99999999999999999999"),
        ("generate red --temperature nan", "temperature: got nan"),
        ("generate red --top-k 0", "top_k: got 0"),
        ("generate red --top-p 1.1", "top_p: got 1.1"),
        ("generate red --guidance-scale inf", "guidance_scale: got inf"),
        ("generate red --candidates 3", "candidates: got 3 without --clip"),
        ("generate red --best 3", "best: got 3 without --clip"),
        ("generate red --clip runs/clip --candidates 2 --best 3", "best: got 3, wanted at most the 2 candidates"),
        ("generate red --clip runs/clip --candidates 0", "candidates: got 0"),
        ("classify a.png --names cat --templates picture", "templates: got ('picture',), wanted texts with {} in them"),
        ("classify a.png --names cat --model nowhere", "nowhere: no checkpoint there"),
        ("train-clip demo --patch 5", "patch: got 5, wanted a divisor of the resolution 48"),
        ("train-clip demo --vocab-text 256", "vocab_text: got 256, wanted at least 257"),
        ("train-clip demo --text-length 1", "text_length: got 1"),
        ("generate red --rows 3", "rows: got 3 without --complete"),
        ("generate red --out samples.jpg", "samples.jpg: got a name that ends in .jpg, wanted .png"),
        ("generate red --out /", "/: got a name that ends in nothing"),
        ("generate red --out /dev/null/a.png", "/dev/null is no folder"),
        ("reconstruct a.png --out a.gif", "a.gif: got a name that ends in .gif"),
        ("reconstruct a.png --device bogus --out {folder}/a.png", "device: got 'bogus'"),
        ("convert a.pkl /dev/null", "/dev/null: is no ordinary file"),
        ("demo --minutes nan", "minutes: got nan"),
        ("demo --minutes 0", "minutes: got 0.0"),
        ("demo --out /dev/null", "File exists"),
    ],
)
def test_nothing_odd_is_accepted_without_a_word(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments.format(folder=tmp_path / "folder").split())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert message in " ".join(said.replace("│", " ").split())  # in a frame, where the parser says it
    assert not (tmp_path / "folder").exists()


def test_a_run_that_failed_before_its_first_checkpoint_begins_anew(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-dvae", "demo", *TINY_DVAE, *common]
    failing = tmp_path / "failing"
    assert "try a smaller step size" in refused([*command, "--out", str(failing), "--learning-rate", "1e30"], capsys)
    assert "no checkpoint there to go on from" in refused([*command, "--out", str(failing), "--resume"], capsys)
    cli.main([*command, "--out", str(failing), "--steps", "3"])
    cli.main([*command, "--out", str(tmp_path / "whole"), "--steps", "3"])
    assert losses(failing) == losses(tmp_path / "whole")


def test_a_run_has_its_folder_alone(common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-dvae", "demo", *TINY_DVAE, *common, "--out", str(tmp_path), "--steps", "2"]
    cli.main(command)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with exclusive(tmp_path):
        for resume in ([], ["--resume"]):
            code = subprocess.run(
                [sys.executable, "-m", "dalle_reference", *command, *resume],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert code.returncode == 2
            assert f"another process ({os.getpid()}) is at work there" in code.stderr
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_is_one_line(common: list[str], tmp_path: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
    code += "from dalle_reference import cli; cli.main(sys.argv[1:])"
    command = ["train-dvae", "demo", *TINY_DVAE, *common, "--out", str(tmp_path / "run"), "--steps", "3"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert latest(tmp_path / "run") is None


def test_a_copy_of_the_dvae_replaces_nobody_s_folder(
    stage_1: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stage_1, tmp_path / "dvae")
    command = ["train-transformer", "demo", "--dvae", str(tmp_path / "dvae"), "--out", str(tmp_path)]
    assert "dvae: is in the way" in refused([*command, *TINY_TRANSFORMER, *common, "--steps", "2"], capsys)
    assert weights(tmp_path / "dvae") == weights(stage_1)


def test_a_dvae_of_another_grid_is_refused_with_the_options_that_fit(
    stage_1: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-transformer", "demo", "--dvae", str(stage_1), "--out", str(tmp_path / "run"), *TINY_TRANSFORMER]
    message = refused([*command, *common, "--grid", "6", "6"], capsys)
    assert "its pictures are --grid 8 8 of --vocab-image 32, the transformer's 6 6 of 32" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["vq", "vq-ema", "lfq"])
def test_every_quantizer_resumes_bit_for_bit_and_loads(kind: str, common: list[str], tmp_path: Path) -> None:
    command = ["train-dvae", "demo", *TINY_DVAE, *common, "--quantizer", kind, "--steps", "6", "--save-every", "4"]
    cli.main([*command, "--out", str(tmp_path / "whole")])
    cli.main([*command, "--out", str(tmp_path / "half")])
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000006")
    cli.main([*command, "--out", str(tmp_path / "half"), "--resume"])
    assert weights(tmp_path / "half") == weights(tmp_path / "whole")
    model = load_dvae(tmp_path / "whole", torch.device("cpu"))
    assert model.config.quantizer == kind
    if kind == "vq":
        assert int(model.quantizer.idle.max()) == 6  # a code that nothing has chosen yet
    if kind == "vq-ema":
        assert float(model.quantizer.counts.min()) > 0  # those that nothing chose were put onto features
    logged = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert ("entropy" in logged[-1], "distance" in logged[-1], "kl" in logged[-1]) == (kind == "lfq", True, False)


@pytest.mark.parametrize("kind", ["vq-ema", "lfq"])
def test_stage_2_reads_the_tokens_of_every_quantizer(kind: str, common: list[str], tmp_path: Path) -> None:
    dvae, run = tmp_path / "dvae", tmp_path / "run"
    cli.main(["train-dvae", "demo", *TINY_DVAE, *common, "--quantizer", kind, "--steps", "2", "--out", str(dvae)])
    command = ["train-transformer", "demo", "--dvae", str(dvae), *TINY_TRANSFORMER, *common, "--steps", "2"]
    cli.main([*command, "--out", str(run)])
    picture = tmp_path / "picture.png"
    cli.main(["generate", "red", "--model", str(run), "--out", str(picture)])
    assert picture.exists()


@pytest.mark.parametrize("kind", ["vq-ema", "lfq"])
def test_statistics_of_a_whole_batch_cannot_be_accumulated(
    kind: str, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-dvae", "demo", *TINY_DVAE, *common, "--quantizer", kind, "--accumulate", "2"]
    message = refused([*command, "--out", str(tmp_path / "run")], capsys)
    assert f"accumulate: got 2, wanted 1: {kind} goes by a batch's features as a whole" in message


def test_a_caption_longer_than_the_text_is_said_to_be_cut(
    stage_1: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train-transformer", "demo", "--dvae", str(stage_1), "--out", str(run), "--steps", "1"]
    cli.main([*command, *TINY_TRANSFORMER, *common])
    capsys.readouterr()
    cli.main(["generate", "a red square", "x" * 100_000, "a\nb", "--model", str(run), "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("caption cut: of 'xxx")
    assert "reads 7 tokens, 'x" in said[0]
    message = refused(["generate", "\udcff", "--model", str(run), "--out", str(tmp_path / "a.png")], capsys)
    assert message == "dalle-reference: captions: got '\\udcff', wanted text in UTF-8"


def test_resuming_a_damaged_checkpoint_changes_nothing(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train-dvae", "demo", "--out", str(run), "--steps", "6", "--save-every", "3", *TINY_DVAE, *common]
    cli.main(command)
    newest = latest(run)
    assert newest is not None
    (shard,) = newest.glob("*.safetensors")
    os.truncate(shard, 100)
    metrics = (run / "metrics.jsonl").read_bytes()
    message = refused([*command, "--resume"], capsys)
    assert "step-00000006: damaged checkpoint" in message
    assert "go on from step-00000003" in message
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_every_picture_comes_once_an_epoch_and_seeds_shuffle() -> None:
    order = np.concatenate([batch_indices(step, 4, 10, seed=3) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])
    other = np.concatenate([batch_indices(step, 4, 10, seed=4) for step in range(5)])
    assert list(order) != list(other)


def test_cells_are_hidden_in_a_share_that_differs_by_picture() -> None:
    tokens = torch.arange(400).expand(300, -1)
    seen = hide_cells(tokens, 0.8, np.random.default_rng(0))
    assert torch.equal(seen[seen >= 0], tokens[seen >= 0])
    shares = (seen == NO_TOKEN).float().mean(dim=1)
    assert shares.max() < 0.88
    counts = torch.histc(shares, 4, 0.0, 0.8)
    assert counts.min() > 50, counts
    assert torch.equal(hide_cells(tokens, 0.0, np.random.default_rng(0)), tokens)


def test_schedules() -> None:
    values = [half_cosine(step, 10, 1.0, 1 / 16) for step in range(13)]
    assert values[0] == 1.0
    assert values[5] == pytest.approx((1 + 1 / 16) / 2)
    assert values[10:] == [1 / 16] * 3
    assert values == sorted(values, reverse=True)
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
