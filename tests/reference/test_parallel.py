"""Runs on several processes, on gloo: the same losses as on one, and one clear end when something is wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import webdataset
from dalle_reference import cli
from dalle_reference.config import RunConfig
from dalle_reference.errors import UserError
from dalle_reference.load import load_dvae, load_transformer_alone
from dalle_reference.loop import sample_generator, step_generator
from dalle_reference.parallel import World, _of_this_start
from dalle_reference.picture_tokens import tokenize_pictures
from dalle_reference.render import read_metrics
from dalle_reference.tensor_parallel import divide
from dalle_reference.transformer import PRESETS, DalleTransformer
from PIL import Image

CPU = torch.device("cpu")
COMMON = ["--log-every", "1", "--precision", "fp32", "--draw-every", "4", "--steps", "4", "--held-out", "0"]
COMMON += ["--save-every", "2"]
DVAE = ["--resolution", "16", "--width", "8", "--groups", "2", "--blocks", "1", "--vocab", "32", "--code-width", "8"]
DVAE = ["train-dvae", "demo", *DVAE, "--patch", "1", "--no-fitted", *COMMON, "--batch", "8"]
TRANSFORMER = ["--layers", "2", "--heads", "2", "--head-dim", "16", "--text-length", "8", "--vocab-text", "300"]
TRANSFORMER = ["train-transformer", "demo", *TRANSFORMER, "--grid", "8", "8", "--vocab-image", "32", *COMMON]
TRANSFORMER += ["--batch", "8", "--bpe-dropout", "0.5", "--caption-dropout", "0.3", "--cell-dropout", "0.5"]
CLIP = ["--resolution", "16", "--width", "16", "--layers", "2", "--vocab-text", "300", "--text-length", "12"]
CLIP = ["train-clip", "demo", *CLIP, "--text-width", "16", "--text-layers", "2", "--embedding", "8", *COMMON]
CLIP += ["--batch", "8"]

PIXELS = ["train-pixels", "bytes", "--resolution", "8", "--layers", "1", "--heads", "2", "--head-dim", "16", *COMMON]
PIXELS += ["--batch", "8"]

WIDE = ["--head-dim", "64"]  # more weights than DistributedDataParallel sends at once
COMPRESSED = ["--powersgd-rank", "1", "--steps", "8", "--save-every", "4", *WIDE]
LONG = [*DVAE, "--steps", "80", "--save-every", "3", "--draw-every", "0"]

PROGRAM = """
import json, os, resource, sys
from dalle_reference import cli, picture_tokens
from dalle_reference.parallel import joined
if __name__ == "__main__":  # and not in processes that decode
    picture_tokens._ENCODE_BATCH, picture_tokens._PER_SHARD = 2, 4
    if os.environ.get("FULL_DISK_OF") == os.environ["RANK"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
    with joined("cpu"):
        for arguments in json.loads(sys.argv[1]):
            cli.main(arguments)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        picture = Image.new("RGB", (16, 16), "white")
        picture.paste((20 * number, 255 - 20 * number, 128), (3, 3, 6 + number % 8, 13))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture of the number {number}\n{number}\n")
    return ["--source", str(folder), "--cache", str(tmp_path_factory.mktemp("cache"))]


@pytest.fixture(scope="module")
def shards(source: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same pictures in tar files."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(Path(source[1]).glob("*.png"))
    for first in range(0, len(files), 5):
        with webdataset.TarWriter(str(folder / f"{first:02d}.tar")) as writer:
            for path in files[first : first + 5]:
                text = path.with_suffix(".txt").read_text()
                writer.write({"__key__": path.stem, "png": path.read_bytes(), "txt": text})
    return ["--source", str(folder / "*.tar"), *source[2:]]


Done = subprocess.CompletedProcess[str]
Launch = Callable[..., Done]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs commands one after the other in each of some processes that torchrun starts."""
    program = tmp_path_factory.mktemp("program") / "program.py"
    program.write_text(PROGRAM)

    def launched(processes: int, *commands: list[str], options: tuple[str, ...] = ()) -> Done:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run(
            [*torchrun, *options, str(program), json.dumps(commands)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return launched


def records(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []  # of which a kill may have cut the last line


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def assert_same_run(run: Path, other: Path) -> None:
    """Every number that was logged is the same to the rounding of float32, grown over a few steps."""
    ours, theirs = records(run), records(other)
    assert len(ours) == len(theirs) > 0
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name in mine.keys() - {"pictures_per_second"}:
            assert mine[name] == pytest.approx(yours[name], rel=2e-5, abs=1e-6), (name, mine["step"])


@pytest.fixture(scope="module")
def runs(source: list[str], shards: list[str], launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process ("one"), of two that have all weights each ("two"), of two that share them ("sharded")."""
    folder = tmp_path_factory.mktemp("runs")

    def commands(name: str, *more: str) -> list[list[str]]:
        kinds = {
            "dvae": DVAE,
            **{kind: [*DVAE, "--quantizer", kind] for kind in ("vq", "vq-ema", "lfq")},
            "transformer": [*TRANSFORMER, "--dvae", str(folder / "one" / "dvae")],
            "parts": [*TRANSFORMER, "--dvae", str(folder / "one" / "dvae"), "--accumulate", "2"],
            "pixels": PIXELS,
        }
        if name != "sharded":
            kinds["clip"] = CLIP
        else:
            kinds["parts"] += ["--recompute", "selective"]
        return [[*kind, *source, "--out", str(folder / name / stage), *more] for stage, kind in kinds.items()]

    for command in commands("one"):
        cli.main(command)
    compressed = [*TRANSFORMER, *source, "--dvae", str(folder / "one" / "dvae"), "--out", str(folder / "compressed")]
    dvae, tokens = ["--dvae", str(folder / "one" / "dvae")], str(folder / "tokens")
    more = [
        [*compressed, *COMPRESSED],
        [*compressed[:-1], str(folder / "wide"), *WIDE],
        [*LONG, *source, "--out", str(folder / "long")],
        [*DVAE, *shards, "--out", str(folder / "streamed" / "dvae"), "--workers", "1"],
        ["tokenize", *dvae, *shards, "--out", tokens],
        [*TRANSFORMER, *dvae, "--source", tokens, "--out", str(folder / "streamed" / "transformer")],
    ]
    done = launch(2, *commands("two"), *commands("sharded", "--parallel", "fsdp"), *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("transformer in") == 7  # one process says so, of each run
    return folder


def test_two_processes_make_the_run_of_one(runs: Path) -> None:
    for name in ("dvae", "vq", "vq-ema", "lfq", "transformer", "parts", "clip", "pixels"):
        for way in ("two", "sharded"):
            if (way, name) != ("sharded", "clip"):  # which has a weight that is one number
                assert_same_run(runs / way / name, runs / "one" / name)
    assert_same_run(runs / "one" / "parts", runs / "one" / "transformer")
    for name in ("dvae", "transformer"):
        assert_same_run(runs / "streamed" / name, runs / "one" / name)
    idle = [load_dvae(runs / way / "vq", CPU).quantizer.idle for way in ("one", "two", "sharded")]
    assert torch.equal(idle[0], idle[1])
    assert torch.equal(idle[0], idle[2])
    assert 0 < int((idle[0] > 0).sum()) < 32
    drawn = [path.name for path in (runs / "sharded" / "vq" / "pictures").iterdir()]
    assert drawn == ["reconstructions-00000004.png"]


def test_what_two_processes_saved_one_goes_on_from_and_the_other_way(
    runs: Path, source: list[str], launch: Launch, tmp_path: Path
) -> None:
    def begun(way: str, run: Path | None = None) -> list[str]:
        """A run that was stopped at its last checkpoint but one."""
        out = tmp_path / way
        shutil.copytree(run or runs / way / "transformer", out)
        shutil.rmtree(sorted(out.glob("checkpoints/*"))[-1])
        return [*TRANSFORMER, "--dvae", str(runs / "one" / "dvae"), *source, "--out", str(out), "--resume"]

    assert len(list((runs / "sharded" / "transformer" / "checkpoints" / "step-00000002").glob("*.safetensors"))) == 2
    cli.main(begun("sharded"))
    assert_same_run(tmp_path / "sharded", runs / "one" / "transformer")
    compressed = [*begun("compressed", runs / "compressed"), *COMPRESSED]
    done = launch(2, [*begun("one"), "--parallel", "fsdp"], begun("two"), compressed)
    assert done.returncode == 0, done.stderr
    for way in ("one", "two"):
        assert_same_run(tmp_path / way, runs / "one" / "transformer")
    # On as many processes as before, to the bit.
    assert losses(tmp_path / "two") == losses(runs / "two" / "transformer")
    assert losses(tmp_path / "compressed") == losses(runs / "compressed")


def test_compressed_gradients_train(runs: Path) -> None:
    whole, compressed = losses(runs / "wide"), losses(runs / "compressed")
    assert compressed[:2] == whole[:2]
    assert compressed[3] != whole[3]
    assert compressed[-1] < compressed[0]


def test_moments_of_eight_bits_train_and_go_on_exactly(
    runs: Path, source: list[str], launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    command = [*TRANSFORMER, *source, "--dvae", str(runs / "one" / "dvae"), *WIDE, "--moments", "8bit", "--steps", "6"]
    command += ["--optimizer", "adamw", "--save-every", "3", "--learning-rate", "1e-3", "--out"]
    sharded = ["--parallel", "fsdp"]
    ways = {"all": [], "parts": sharded}
    whole = [*command, str(tmp_path / "whole"), "--moments", "fp32"]
    done = launch(2, whole, *([*command, str(tmp_path / way), *layout] for way, layout in ways.items()))
    assert done.returncode == 0, done.stderr
    for way in ways:
        assert losses(tmp_path / way) == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)
        assert losses(tmp_path / way)[2:] != losses(tmp_path / "whole")[2:]
        shutil.copytree(tmp_path / way, tmp_path / f"again {way}")
        shutil.rmtree(tmp_path / f"again {way}" / "checkpoints" / "step-00000006")
    done = launch(2, *([*command, str(tmp_path / f"again {way}"), *ways[way], "--resume"] for way in ways))
    assert done.returncode == 0, done.stderr
    for way in ways:
        assert losses(tmp_path / f"again {way}") == losses(tmp_path / way)
    sizes = {
        way: sum(file.stat().st_size for file in (tmp_path / way / "checkpoints" / "step-00000006").iterdir())
        for way in ("whole", "all")
    }
    assert sizes["all"] < 0.7 * sizes["whole"]  # of four floats a weight two, and two bytes
    shutil.rmtree(tmp_path / "again parts" / "checkpoints" / "step-00000006")
    with pytest.raises(SystemExit):
        cli.main([*command, str(tmp_path / "again parts"), "--resume"])
    assert "its 8-bit moments lie as other processes divided them" in capsys.readouterr().err


def test_a_run_is_exported_as_one_file(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "transformer.safetensors"
    cli.main(["export", str(runs / "sharded" / "transformer"), str(file)])
    exported = load_transformer_alone(file, CPU)
    for name, value in load_transformer_alone(runs / "sharded" / "transformer", CPU).state_dict().items():
        assert torch.equal(exported.state_dict()[name], value)
        torch.testing.assert_close(value, load_transformer_alone(runs / "one" / "transformer", CPU).state_dict()[name])
    with pytest.raises(SystemExit):
        cli.main(["export", str(runs / "sharded" / "transformer"), str(file)])


def test_tokens_do_not_depend_on_the_number_of_processes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dvae = load_dvae(runs / "one" / "dvae", CPU)
    monkeypatch.setattr("dalle_reference.picture_tokens._ENCODE_BATCH", 3)
    monkeypatch.setattr(World, "gather", lambda self, rows: rows)
    images = torch.randint(256, (11, 3, 16, 16), dtype=torch.uint8)
    whole = tokenize_pictures(dvae, images)
    for size in (2, 3, 4, 7):
        parts = [tokenize_pictures(dvae, images, World(CPU, rank, size)) for rank in range(size)]
        assert torch.equal(torch.cat(parts), whole)


def test_places_of_a_batch_are_shared_out_in_order() -> None:
    for size, accumulate in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 4)):
        worlds = [World(CPU, rank, size) for rank in range(size)]
        turns = zip(*(world.parts(8, accumulate) for world in worlds), strict=True)
        assert [place for turn in turns for part in turn for place in part] == list(range(8))


def test_processes_that_compute_together_have_the_same_places() -> None:
    worlds = [World(CPU, rank, size=4, tensor=2) for rank in range(4)]
    assert [world.parts(8) for world in worlds] == [[range(4)], [range(4)], [range(4, 8)], [range(4, 8)]]


def test_layouts_that_cannot_be_are_refused(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, said in (
        ({"tensor": 2}, "tensor: got 2 with --parallel ddp, wanted 1"),
        ({"replicate": 2}, "replicate: got 2 with --parallel ddp, wanted 1"),
        ({"tensor": 0, "parallel": "fsdp"}, "tensor: got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            RunConfig(out=tmp_path, **wrong)
    mesh: Any = SimpleNamespace(size=lambda: 3)
    with pytest.raises(UserError, match=r"tensor: got 3, wanted a divisor of heads \(2\)"):
        divide(DalleTransformer(PRESETS["demo"]), mesh)
    with pytest.raises(UserError, match="tensor: got 3 with a Linear, wanted 1"):
        divide(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(SystemExit):
        cli.main([*DVAE, *source, "--out", str(tmp_path / "run"), "--parallel", "fsdp", "--tensor", "2"])
    assert "got tensor 2 x replicate 1, wanted a divisor of 1 processes" in capsys.readouterr().err


def test_every_place_has_a_chance_of_its_own() -> None:
    drawn = [sample_generator(3, step, place).integers(2**63) for step in range(5) for place in range(5)]
    drawn += [step_generator(3, step).integers(2**63) for step in range(5)]
    assert len(set(drawn)) == 30


def test_what_fails_on_one_process_is_said_once_and_ends_all(source: list[str], launch: Launch, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    done = launch(2, [*DVAE, *source, *out, "--batch", "7"])
    assert done.returncode != 0
    assert done.stderr.count("batch: got 7, wanted a multiple of 2 processes") == 1
    assert "Error: " not in done.stderr.split("torch/distributed/run")[0]

    done = launch(2, [*DVAE, *source, *out, "--learning-rate", "1e30"])
    assert done.returncode != 0
    assert 1 <= done.stderr.count("try a smaller step size") <= 2  # each process that has it says so


def test_a_broken_picture_ends_all_by_the_word_of_who_read_it(
    shards: list[str], launch: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(Path(shards[1]).parent, folder)
    with webdataset.TarWriter(str(folder / "10.tar")) as writer:
        writer.write({"__key__": "broken", "png": b"no picture"})
    broken = ["--source", str(folder / "*.tar"), *shards[2:], "--broken", "0", "--workers", "1"]
    done = launch(2, [*DVAE, *broken, "--out", str(tmp_path / "run")])
    assert done.returncode != 0
    assert done.stderr.count("dalle-reference: broken: 1 of ") == 1
    assert "broken.png: cannot be read as a picture" in done.stderr
    assert "Error: " not in done.stderr.split("torch/distributed/run")[0]


def test_a_full_disk_ends_all_and_the_last_checkpoint_stands(
    source: list[str], launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = [*DVAE, *source, "--out", str(run), "--parallel", "fsdp"]
    assert launch(2, command).returncode == 0
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    monkeypatch.setenv("FULL_DISK_OF", "1")
    done = launch(2, [*command, "--resume"])
    assert done.returncode != 0
    assert done.stderr.count("dalle-reference: ") == done.stderr.count("what was saved before stands") == 1, done.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.delenv("FULL_DISK_OF")
    assert launch(2, [*command, "--resume"]).returncode == 0
    assert len(losses(run)) == 4


def workers(agent: int) -> dict[int, int]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            said = dict(entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry)
            if parent == agent and "RANK" in said:
                found[int(said["RANK"])] = int(folder.name)
    return found


def test_those_who_start_together_meet_neither_the_dead_nor_what_they_left() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def joined(rank: int) -> dist.Store:
        return _of_this_start(dist.TCPStore("127.0.0.1", server.port), rank, 3)

    with ThreadPoolExecutor(3) as pool:
        for start in range(5):
            server.set("asks/1", "one that was killed before it heard an answer")
            stores = list(pool.map(joined, range(3)))
            assert not any(store.check(["address"]) for store in stores)
            stores[start % 3].set("address", str(start))
            assert {store.get("address") for store in stores} == {str(start).encode()}


def test_killed_workers_are_started_anew_and_end_with_the_undisturbed_losses(
    runs: Path, source: list[str], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    agent = subprocess.Popen(
        [sys.executable, *torchrun, str(program), json.dumps([[*LONG, *source, "--out", str(killed)]])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for rank, step in ((1, 8), (0, 40)):
        deadline = time.monotonic() + 300
        # The second one while a checkpoint is being written.
        while len(records(killed)) < step or (step == 40 and not list(killed.glob("checkpoints/.step-*"))):
            assert agent.poll() is None, agent.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(workers(agent.pid)[rank], signal.SIGKILL)
    output, _ = agent.communicate(timeout=240)
    assert agent.returncode == 0, output
    assert losses(killed) == losses(runs / "long")
    assert len(losses(killed)) == 80
