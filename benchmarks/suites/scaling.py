"""Past one process: a training step of one and of two, what sharing weights, saving and compressing cost, and the input
pipeline alone.

Processes have a thread each, so that two of them on two cores can be at best twice as fast as one. All make the same
step: the whole batch's. They run the reference's own training loop (`team`).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Cell, Check, Contender, Trial, Work, when_installed
from benchmarks.suites.choice import Choice
from benchmarks.suites.team import Team, Training

MODEL = {"vocab_text": 512, "text_length": 8, "grid": (16, 16), "vocab_image": 512, "layers": 4, "heads": 4}
QUICK = {**MODEL, "grid": (8, 8), "layers": 2, "heads": 2}
SPEED_UP, SHARING, SAVING = 1.7, 0.05, 0.02
"""What is wanted of two processes, and the most that sharing weights and saving may add to a step."""
Rows = dict[str, dict[str, Any]]


def cells(choice: Choice) -> list[Cell]:
    """On two cores, without `--quick`, five minutes."""
    model = QUICK if choice.quick else MODEL
    return [
        step_cell(model, steps=4 if choice.quick else 2),
        checkpoint_cell(model, steps=20 if choice.quick else 10),
        compression_cell(QUICK, steps=20 if choice.quick else 60, ranks=(4,) if choice.quick else (1, 4)),
        input_cell(pictures=512 if choice.quick else 4096),
    ]


def _case(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, tuple) else value for name, value in model.items()} | more


def step_cell(model: dict[str, Any], steps: int, batch: int = 16) -> Cell:
    """The steps of a batch by one process and by two that share it, pictures a second."""
    ways = {
        "dalle_kernels, 1 process": (1, Training(model, batch=batch)),
        "2 processes, ddp": (2, Training(model, batch=batch)),
        "2 processes, fsdp": (2, Training(model, {"parallel": "fsdp"}, batch)),
        "2 processes, ddp, PowerSGD of rank 4": (2, Training(model, {"powersgd_rank": 4}, batch)),
        "1 process, 2 threads": (1, Training(model, batch=batch, threads=2)),
    }
    wanted: list[float] = []

    def prepare(processes: int, training: Training) -> Trial:
        team = Team(processes, training)
        losses = team.steps(2)  # the first two, before which nobody compresses
        wanted.extend(losses if not wanted else [])

        def verify() -> Check:
            return Check(max(abs(a - b) for a, b in zip(losses, wanted, strict=True)), 1e-4)

        return Trial([lambda: team.steps(steps)], verify, counts={"pictures": steps * batch}, elsewhere=True)

    def contenders() -> Iterable[Contender]:
        return (Contender(name, partial(prepare, *way)) for name, way in ways.items())

    return Cell(
        "scaling",
        _case(model, what="steps", batch=batch),
        torch.float32,
        Work,
        contenders,
        finish=lambda rows: step_figures(rows, *ways),
    )


def step_figures(rows: Rows, one: str, two: str, shared: str, *_: str) -> dict[str, Any]:
    """How much faster two are than one, and what sharing weights adds to their step."""
    if not {one, two, shared} <= rows.keys():
        return {}
    speed_up, sharing = rows[one]["ms"] / rows[two]["ms"], rows[shared]["ms"] / rows[two]["ms"] - 1
    note = f"2 processes {speed_up:.2f}x as fast, wanted {SPEED_UP}x; fsdp adds {sharing:.1%}, wanted {SHARING:.0%}"
    return {"speed_up": speed_up, "sharing": sharing, "note": note}


def checkpoint_cell(model: dict[str, Any], steps: int) -> Cell:
    """Some steps of two processes that share weights, without and with a checkpoint that is begun before them."""
    teams: list[Team] = []

    def prepare(save: bool) -> Trial:
        if not teams:
            teams.append(Team(2, Training(model, {"parallel": "fsdp"})))
        (team,) = teams
        return Trial([lambda: team.steps(steps, save)], _number(team), counts={"steps": steps}, elsewhere=True)

    def contenders() -> Iterable[Contender]:
        yield Contender("dalle_kernels, steps alone", partial(prepare, False))
        yield Contender("with a checkpoint", partial(prepare, True))

    def finish(rows: Rows) -> dict[str, Any]:
        teams.clear()
        return checkpoint_figures(rows, steps)

    return Cell("scaling", _case(model, what="checkpoint"), torch.float32, Work, contenders, finish=finish)


def checkpoint_figures(rows: Rows, steps: int) -> dict[str, Any]:
    """What a checkpoint takes, and its share of the steps between two of them."""
    from dalle_reference.config import RunConfig

    if len(rows) < 2:
        return {}
    alone, saving = (row["ms"] for row in rows.values())
    each = saving - alone
    share = each / (alone / steps * RunConfig.save_every)
    note = f"a checkpoint adds {each:.4g} ms, {share:.2%} of the {RunConfig.save_every} steps between two of them"
    return {"checkpoint_ms": each, "checkpoint_share": share, "note": f"{note}; wanted {SAVING:.0%}"}


def compression_cell(model: dict[str, Any], steps: int, ranks: tuple[int, ...]) -> Cell:
    """Bytes of gradients until a loss is reached that the uncompressed ones have after `steps`, and a step's time."""
    window = min(10, steps)
    goal: list[float] = []

    def mean(losses: list[float]) -> float:
        return sum(losses[-window:]) / window

    def prepare(rank: int) -> Trial:
        team = Team(2, Training(model, {"powersgd_rank": rank, "learning_rate": 3e-3}))
        losses = team.steps(window if goal else steps)
        while goal and mean(losses) > goal[0] and len(losses) < 4 * steps:
            losses += team.steps(1)
        goal.extend([] if goal else [mean(losses)])
        sent = team.gradient_bytes()
        note = f"{sent / 1e6:.4g} MB of gradients a process in {len(losses)} steps to a loss of {mean(losses):.4g}"
        notes = {"note": note, "gradient_bytes": sent, "steps_to_loss": len(losses)}

        def verify() -> Check:
            return Check(max(0.0, mean(losses) - goal[0]), 0.0)

        return Trial([lambda: team.steps(1)], verify, notes, elsewhere=True)

    def contenders() -> Iterable[Contender]:
        yield Contender("dalle_kernels, gradients as they are", partial(prepare, 0))
        for rank in ranks:
            yield Contender(f"PowerSGD of rank {rank}", partial(prepare, rank))

    return Cell("scaling", _case(model, what="compression", steps=steps), torch.float32, Work, contenders)


def _number(team: Team) -> Callable[[], Check]:
    def verify() -> Check:
        (loss,) = team.steps(1)
        return Check(abs(loss) if loss == loss else torch.inf, 1e3)

    return verify


def input_cell(pictures: int, side: int = 128, resolution: int = 64, batch: int = 8) -> Cell:
    """Pictures from shards, JPEGs of `side` decoded to `resolution`, in a shuffled order and nothing done with them.

    Who reads ahead begins with a few batches that are there already, and ends with none.
    """
    case = {"what": "input", "side": side, "resolution": resolution, "pictures": pictures}

    def contenders() -> Iterable[Contender]:
        folder = tempfile.TemporaryDirectory(prefix="shards-")
        write_shards(Path(folder.name), pictures, side, shards=4, distinct=64)
        for workers in (1, 0, 2):
            yield Contender(f"dalle_kernels, {workers} workers", partial(ours, folder, workers))
        yield from when_installed(_webdataset, lambda read: [Contender("webdataset, 1 worker", partial(read, folder))])

    def ours(folder: tempfile.TemporaryDirectory[str], workers: int) -> Trial:
        from dalle_reference.config import StreamedDataConfig
        from dalle_reference.data import open_pictures
        from dalle_reference.loop import batch_indices

        data = StreamedDataConfig(source=f"{folder.name}/*.tar", workers=workers)
        found = open_pictures(data, resolution, Path(folder.name) / "cache")
        feed = found.feed(lambda step: batch_indices(step, batch, len(found), 0))
        steps = itertools.count()

        def run(_: object = folder) -> None:  # which lives as long as what reads it
            for _ in range(pictures // batch):
                feed(next(steps), [range(batch)])

        def verify() -> Check:
            step = next(steps)
            (got,) = feed(step, [range(batch)])
            wanted = found.pictures(batch_indices(step, batch, len(found), 0).tolist())
            return Check((got.double() - wanted.double()).abs().max().item(), 0.0)

        return Trial([run], verify, counts={"pictures": pictures})

    def _webdataset() -> Callable[[tempfile.TemporaryDirectory[str]], Trial]:
        import webdataset
        from dalle_reference.data import decode_picture
        from torch.utils.data import DataLoader

        def read(folder: tempfile.TemporaryDirectory[str]) -> Trial:
            files = sorted(str(path) for path in Path(folder.name).glob("*.tar"))
            samples = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(1024)
            decoded = samples.map(partial(_decoded, decode_picture, resolution)).batched(batch).repeat()
            batches: Iterator[Any] = iter(DataLoader(decoded, batch_size=None, num_workers=1))

            def run(_: object = folder) -> None:
                for _ in range(pictures // batch):
                    next(batches)

            return Trial([run], lambda: Check(0.0, 0.0), counts={"pictures": pictures})

        return read

    return Cell("scaling", case, torch.float32, Work, contenders)


def _decoded(decode: Callable[[bytes, int, str], torch.Tensor], resolution: int, sample: dict[str, Any]) -> np.ndarray:
    return decode(sample["jpg"], resolution, sample["__key__"]).numpy()


def write_shards(folder: Path, pictures: int, side: int, shards: int, distinct: int) -> None:
    """Tar files of captioned JPEGs of `side`, of which `distinct` differ, the same ones each time."""
    import io
    import tarfile

    from PIL import Image

    chance = np.random.default_rng(0)
    files = []
    for _ in range(min(distinct, pictures)):
        coarse = Image.fromarray(chance.integers(256, size=(8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as archive:
            for number in range(shard * pictures // shards, (shard + 1) * pictures // shards):
                for suffix, data in (("jpg", files[number % len(files)]), ("txt", b"a picture\n")):
                    member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
