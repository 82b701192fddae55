"""Operations on DTensors, in four processes: the whole batch's answers, gradients and draws, however it is divided.

The reference's training on four processes is here too: starting them costs more than its steps.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import dalle_kernels as dk
from dalle_kernels.backends import native
from dalle_kernels.codebook.gumbel.merge import _runs
from tests.memory import moments, peak_of_second

PROCESSES = 4
LAYOUT = dk.TokenLayout(4, (4, 4))
ROW = dk.Row(LAYOUT)
S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def attention(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    return dk.sparse_attention(q, k, v, ROW, key_padding_mask=mask, return_lse=True)


def gumbel(logits: Any, codebook: Any) -> Any:
    return dk.gumbel_lookup(logits, codebook, 0.7, seed=3)


def projection(features: Any, weight: Any, bias: Any, codebook: Any) -> Any:
    return dk.gumbel_projection_lookup(features, weight, bias, codebook, 0.7, seed=3, distribution=True)


def hard(logits: Any, codebook: Any) -> Any:
    return dk.gumbel_lookup(logits, codebook, 0.7, hard=True, seed=3)


def best(logits: Any, codebook: Any) -> Any:
    return dk.gumbel_lookup(logits, codebook, 0.7, noise=False)


def projected(features: Any, weight: Any, bias: Any, codebook: Any) -> Any:
    return dk.gumbel_projection_lookup(features, weight, bias, codebook, 0.7, seed=3)


def index_backpropagation(features: Any, weight: Any) -> Any:
    return dk.gumbel_projection_lookup(features, weight, None, weight, 1.0, hard=True, noise=False)


def drawn(features: Any, codebook: Any) -> Any:
    return dk.vq_lookup(features, codebook, temperature=0.5, seed=4)


def sampled(logits: Any, unconditional: Any) -> Any:
    return dk.sample_tokens(logits, unconditional_logits=unconditional, guidance_scale=2.0, seed=5)


Q = [randn(3, 4, LAYOUT.length, 8, seed=n) for n in range(3)]
GROUPED = [Q[0], *(randn(3, 2, LAYOUT.length, 8, seed=n) for n in (1, 2))]
MASK = randn(3, LAYOUT.length) > 1.0
LOGITS = [randn(10, 16), randn(16, 4)]
RULED_OUT = [torch.where(torch.arange(16) % 4 < 2, -torch.inf, LOGITS[0]), LOGITS[1]]
FEATURES = [randn(10, 6), randn(16, 6), randn(16), randn(16, 4)]
HEADS = [randn(2, 10, 6), randn(2, 16, 6)]
# What is called, its inputs, placements on a mesh of 2 x 2 for each of them, and how the first result is to be laid.
CASES: dict[str, tuple[Callable[..., Any], list[Any], list[Any], Any]] = {
    "attention, heads": (attention, Q, [(S1, R)] * 3, (S1, R)),
    "attention, batch and heads": (attention, Q, [(S0, S1)] * 3, (S0, S1)),
    "attention, batch, unevenly": (attention, [*Q, MASK], [(S0, R)] * 4, (S0, R)),
    "attention, fewer samples than processes": (attention, [*Q, MASK], [(S0, S0)] * 4, (S0, S0)),
    "attention, heads, with a mask": (attention, [*Q, MASK], [(S1, R)] * 3 + [(R, R)], (S1, R)),
    "attention, grouped heads": (attention, GROUPED, [(R, S1)] * 3, (R, S1)),
    "attention, too few grouped heads": (attention, GROUPED, [(S1, S1)] * 3, None),
    "attention, the sequence for heads": (attention, Q, [(S2, R)] * 3, (S2, R)),
    "attention, batch, and the sequence for heads": (attention, [*Q, MASK], [(S0, S2)] * 3 + [(S0, R)], (S0, S2)),
    "attention, keys laid otherwise": (attention, Q, [(S1, R), (S0, R), (R, S2)], (S1, R)),
    "attention, by width": (attention, Q, [(Shard(3), R)] * 3, (R, R)),
    "gumbel, rows": (gumbel, LOGITS, [(S0, S0), (R, R)], (S0, S0)),
    "gumbel, a divided codebook": (gumbel, LOGITS, [(S0, R), (S0, S1)], (S0, R)),
    "gumbel, codes": (gumbel, LOGITS, [(S1, R), (R, R)], (R, R)),
    "gumbel, rows, and codes of the codebook": (gumbel, LOGITS, [(S0, R), (R, S0)], (S0, R)),
    "gumbel, rows and codes": (gumbel, LOGITS, [(S0, S1), (R, S0)], (S0, R)),
    "gumbel, codes everywhere": (gumbel, LOGITS, [(R, R), (S0, S0)], (R, R)),
    "gumbel, hard, rows and codes": (hard, LOGITS, [(S0, S1), (R, S0)], (S0, R)),
    "gumbel, the best code, rows and codes": (best, LOGITS, [(S0, S1), (R, S0)], (S0, R)),
    "gumbel, codes that do not come in quarters": (gumbel, [randn(10, 12), randn(12, 4)], [(R, R), (S0, R)], (R, R)),
    "gumbel, best of codes that do not come in quarters": (
        best,
        [randn(10, 12), randn(12, 4)],
        [(R, R), (S0, R)],
        (R, R),
    ),
    "gumbel, some codes of a part ruled out": (hard, RULED_OUT, [(S0, R), (R, S0)], (S0, R)),
    "gumbel, rows of two dimensions": (gumbel, [randn(4, 3, 16), LOGITS[1]], [(S0, R), (R, R)], (S0, R)),
    "gumbel, rows of two dimensions, unevenly": (gumbel, [randn(3, 5, 16), LOGITS[1]], [(S0, R), (R, R)], (R, R)),
    "gumbel, fewer rows than processes": (gumbel, [randn(3, 16), LOGITS[1]], [(S0, S0), (R, R)], (S0, S0)),
    "projection, rows": (projection, FEATURES, [(S0, S0), *[(R, R)] * 3], (S0, S0)),
    "projection, a divided weight": (projection, FEATURES, [(R, S0), (S0, R), (R, R), (R, R)], (R, S0)),
    "projection, codes of the mean distribution": (
        projection,
        FEATURES,
        [(S0, R), (R, S0), (R, S0), (R, S0)],
        (S0, R),
    ),
    "projection, rows and codes": (projected, FEATURES, [(S0, R), (R, S0), (R, S0), (R, S0)], (S0, R)),
    "projection, codes laid otherwise": (projected, FEATURES, [(R, R), (S1, R), (R, R), (S0, R)], (R, R)),
    "projection, hard, rows and codes": (index_backpropagation, FEATURES[:2], [(R, S0), (S0, R)], (R, S0)),
    "projection, fewer rows than processes": (
        projection,
        [randn(3, 6), *FEATURES[1:]],
        [(S0, S0), (S0, R), (R, R), (R, R)],
        (S0, S0),
    ),
    "vq, rows": (dk.vq_lookup, FEATURES[:2], [(S0, S0), (R, R)], (S0, S0)),
    "vq, a divided codebook": (dk.vq_lookup, FEATURES[:2], [(R, S0), (S0, S1)], (R, S0)),
    "vq, codes everywhere": (dk.vq_lookup, FEATURES[:2], [(R, R), (S0, S0)], (R, R)),
    "vq, codes of heads": (dk.vq_lookup, HEADS, [(R, S0), (S1, R)], (R, S0)),
    "vq, too few codes to divide": (dk.vq_lookup, [FEATURES[0], FEATURES[1][:6]], [(R, R), (S0, S0)], (R, R)),
    "vq, heads": (dk.vq_lookup, HEADS, [(S0, S1), (S0, R)], (S0, S1)),
    "vq, rows drawn": (drawn, FEATURES[:2], [(S0, S0), (R, R)], (S0, S0)),
    "vq, rows of two dimensions drawn": (drawn, [randn(4, 3, 6), FEATURES[1]], [(S0, R), (R, R)], (S0, R)),
    "vq, drawn unevenly": (drawn, [randn(3, 5, 6), FEATURES[1]], [(S0, R), (R, R)], (S0, R)),
    "vq, heads drawn": (drawn, HEADS, [(S0, S1), (S0, R)], None),
    "codebook entropy": (dk.codebook_entropy, [randn(8, 6), FEATURES[1]], [(S0, S0), (R, R)], None),
    "binary entropy": (dk.binary_entropy, [randn(8, 6)], [(S0, R)], None),
    "likelihood": (dk.logit_laplace_nll, [torch.sigmoid(Q[0]), *Q[1:]], [(S0, S2)] * 3, (S0, S2)),
    "sampling": (sampled, [LOGITS[0], LOGITS[0] * 0.5], [(S0, S0)] * 2, (S0, S0)),
    "sampling, codes": (sampled, [LOGITS[0], LOGITS[0] * 0.5], [(S1, R)] * 2, (R, R)),
}


def flat(results: Any) -> list[Any]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


def loss(results: list[Any]) -> Any:
    return sum((result * torch.cos(result.detach())).sum() for result in results if result.requires_grad)


def leaves(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [value.detach().clone().requires_grad_(value.is_floating_point()) for value in inputs]


def check(name: str, mesh: Any) -> None:
    call, inputs, placements, laid = CASES[name]
    alone = leaves(inputs)
    wanted = flat(call(*alone))
    ours = [distribute_tensor(value, mesh, at) for value, at in zip(leaves(inputs), placements, strict=True)]
    ours = [value.detach().requires_grad_(value.is_floating_point()) for value in ours]
    got = flat(call(*ours))
    assert all(isinstance(result, DTensor) for result in got)
    assert laid is None or tuple(got[0].placements) == laid, got[0].placements
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-9, atol=1e-9)
    if any(result.requires_grad for result in wanted):
        loss(wanted).backward()
        loss(got).backward()
        for mine, theirs in zip(ours, alone, strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-9, atol=1e-9)


def check_statistics(mesh: Any) -> None:
    indices = torch.arange(10) % 4
    for at, laid in (((S0, R), (Partial(), R)), ((S0, S0), (Partial(), Partial())), ((S1, R), (R, R))):
        features = distribute_tensor(FEATURES[0], mesh, at)
        found = dk.code_statistics(features, distribute_tensor(indices, mesh, [S0 if a is S0 else R for a in at]), 4)
        for mine, theirs in zip(found, dk.code_statistics(FEATURES[0], indices, 4), strict=True):
            assert tuple(mine.placements) == laid
            torch.testing.assert_close(mine.full_tensor(), theirs)


def check_divided_codes_stay(mesh: Any) -> None:
    """What passes between processes that have parts of a codebook is what each found, not the codebook."""
    features, codebook = (
        distribute_tensor(value, mesh, at) for value, at in zip(FEATURES[:2], ((R, R), (R, S0)), strict=True)
    )
    with CommDebugMode() as seen:
        dk.vq_lookup(features, codebook)
    assert not [name for name in seen.get_comm_counts() if "gather" in str(name)], seen.get_comm_counts()
    assert seen.get_total_counts() == 5
    twice = distribute_tensor(FEATURES[1][:8].repeat(2, 1), mesh, (R, S0))
    assert dk.vq_lookup(features, twice)[1].full_tensor().max() < 8  # the first of equal ones, in whatever part


def check_codes_of_mixtures_stay(mesh: Any) -> None:
    """What passes between processes that have parts of a mixture's codebook is their parts of it, not the codebook; of
    every backend the codes are the whole lookup's, to the bit, and the rest to the rounding of float32."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for room, backend, settings in itertools.product(
        ("logits", "projection"),
        ("reference", *(("cpu",) if native.NATIVE else ()), *(("triton",) if find_spec("triton") else ())),
        ({"seed": 3}, {"seed": 3, "hard": True}, {"noise": False}),
    ):
        call: Any = dk.gumbel_lookup if room == "logits" else dk.gumbel_projection_lookup
        shapes = [(40, 96), (96, 24)] if room == "logits" else [(40, 12), (96, 12), (96,), (96, 24)]
        alone = leaves([randn(*shape).float() for shape in shapes])
        laid = [S1 if room == "logits" else R, *(S0 for _ in shapes[1:])]
        ours = [distribute_tensor(value.detach(), mesh, [at]) for value, at in zip(alone, laid, strict=True)]
        ours = [value.requires_grad_() for value in ours]
        wanted = call(*alone, 0.7, row_offset=5, backend=backend, **settings)
        loss(wanted).backward()
        with CommDebugMode() as seen:
            got = call(*ours, 0.7, row_offset=5, backend=backend, **settings)
            loss(got).backward()
        drawn_whole = backend == "triton" and "seed" in settings  # its kernels count from the first counter on
        gathered = [name for name in seen.get_comm_counts() if "gather" in str(name) or "reduce_scatter" in str(name)]
        assert bool(gathered) is drawn_whole, (room, backend, settings, seen.get_comm_counts())
        assert torch.equal(got[1].full_tensor(), wanted[1]), (room, backend, settings)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine.full_tensor(), theirs, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(ours, alone, strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, atol=2e-5, rtol=2e-5)


def check_one_seed(mesh: Any) -> None:
    """Where no seed is given, what is whole is alike in all processes, though their generators differ."""
    torch.manual_seed(dist.get_rank())
    tokens = dk.sample_tokens(distribute_tensor(torch.zeros(64, 1000), mesh, (R, R))).to_local()
    gathered = [torch.empty_like(tokens) for _ in range(PROCESSES)]
    dist.all_gather(gathered, tokens)
    assert all(torch.equal(tokens, other) for other in gathered)


def check_strides(mesh: Any) -> None:
    """Heads that were transposed, as a projection leaves them, give results laid out alike."""
    q, k, v = (distribute_tensor(value.transpose(1, 2).contiguous(), mesh, (S0, S2)).transpose(1, 2) for value in Q)
    out, _ = attention(q, k, v)
    assert out.stride() == q.stride()
    assert out.to_local().stride() == q.to_local().stride()
    torch.testing.assert_close(out.full_tensor(), attention(*Q)[0])


def check_compiled(mesh: Any) -> None:
    compiled = torch.compile(lambda q, k, v: attention(q, k, v)[0] * 2, fullgraph=True, backend="aot_eager")
    ours = [distribute_tensor(value, mesh, (S0, S1)).requires_grad_() for value in Q]
    out = compiled(*ours)
    alone = leaves(Q)
    wanted = attention(*alone)[0] * 2
    torch.testing.assert_close(out.full_tensor(), wanted)
    out.sum().backward()
    wanted.sum().backward()
    for mine, theirs in zip(ours, alone, strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


def check_row_entropy_alone(mesh: Any) -> None:
    alone = leaves(FEATURES[:2])
    ours = [
        distribute_tensor(value.detach(), mesh, at).requires_grad_()
        for value, at in zip(alone, [(S0, R), (R, R)], strict=True)
    ]
    for inputs in (alone, ours):
        dk.codebook_entropy(*inputs)[0].backward()
    for mine, theirs in zip(ours, alone, strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


def check_refusals(mesh: Any) -> None:
    q = distribute_tensor(Q[0], mesh, (S1, R))
    with pytest.raises(TypeError, match=r"k: got a torch\.Tensor, wanted a DTensor as q is"):
        attention(q, Q[1], Q[2])
    features = distribute_tensor(FEATURES[0], mesh, (S0, R))
    codebook = distribute_tensor(FEATURES[1], mesh, (R, R))
    with pytest.raises(TypeError, match=r"row_mask: got a torch\.Tensor, wanted a DTensor as features are"):
        dk.vq_lookup(features, codebook, row_mask=torch.ones(10, dtype=torch.bool))
    cache = dk.KVCache(ROW, 3, 4, 8, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(TypeError, match="each process decodes its heads"):
        dk.decode_attention(*(distribute_tensor(value[:, :, :1], mesh, (S1, R)) for value in Q), cache, 0)
    with pytest.raises(TypeError, match=r"features: got a DTensor, wanted .*: rows are independent"):
        dk.binary_quantize(q)
    with pytest.raises(TypeError, match="indices: got a DTensor"):
        dk.binary_latents(q, 4)
    other = init_device_mesh("cpu", (PROCESSES,))
    with pytest.raises(ValueError, match="v: got a DTensor on"):
        attention(q, q, distribute_tensor(Q[2], other, (R,)))


def check_training(mesh: Any) -> None:
    """Four processes make the run of one, whatever they divide, and what some layout saved another goes on from."""
    import shutil
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    from dalle_reference import checkpoint
    from dalle_reference.config import RunConfig
    from dalle_reference.loop import Run
    from dalle_reference.parallel import World
    from dalle_reference.render import read_metrics
    from dalle_reference.transformer import DalleTransformer, TransformerConfig

    world = World(torch.device("cpu"), dist.get_rank(), PROCESSES)
    config = TransformerConfig(vocab_text=16, text_length=4, vocab_image=8, grid=(3, 4), layers=3, heads=4, head_dim=8)
    place = [tempfile.mkdtemp() if world.main else ""]
    dist.broadcast_object_list(place, src=0)
    folder = Path(place[0])

    def tokens(step: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.randint(8, (8, length), generator=generator) for length in (3, 12)]

    def train(world: World, name: str, recompute: Any = "none", **layout: Any) -> None:
        torch.manual_seed(0)
        model = DalleTransformer(config)
        model.recompute = recompute
        run = RunConfig(
            out=folder / name, steps=4, batch=8, log_every=1, save_every=2, draw_every=0, precision="fp32", **layout
        )
        run.out.mkdir(exist_ok=True)
        world = replace(world, tensor=run.tensor)
        training = Run(run, "transformer", model, lambda model, *batch: (model.loss(*batch).total, None), {}, world)
        training.train(
            lambda step, parts: [tuple(rows[part.start : part.stop] for rows in tokens(step)) for part in parts],
            lambda *_: {},
            lambda *_: None,
        )

    def go_on(name: str, begun: str, **layout: Any) -> None:
        """From the last checkpoint but one of another layout's run."""
        if world.main:
            shutil.copytree(folder / begun, folder / name)
            shutil.rmtree(folder / name / "checkpoints" / "step-00000004")
        dist.barrier()
        train(world, name, resume=True, **layout)

    if world.main:
        train(World(world.device), "alone")
        train(World(world.device), "matrices alone", optimizer="muon")
    dist.barrier()
    train(world, "all weights")
    train(world, "groups", parallel="fsdp", replicate=2)
    train(world, "matrices of groups of pairs", parallel="fsdp", replicate=2, tensor=2, optimizer="muon")
    train(world, "matrices of four together", parallel="fsdp", tensor=4, optimizer="muon")
    train(world, "groups of pairs", parallel="fsdp", replicate=2, tensor=2, recompute="selective")
    go_on("pairs", "groups of pairs", parallel="fsdp", tensor=2)
    go_on("four together", "groups", parallel="fsdp", tensor=4)
    if world.main:
        numbers = {path.name: read_metrics(path / "metrics.jsonl") for path in folder.iterdir()}
        for name, lines in numbers.items():
            alone = "matrices alone" if name.startswith("matrices") else "alone"
            wanted = checkpoint.load(folder / alone, "transformer").group("ema")
            for mine, theirs in zip(lines, numbers[alone], strict=True):
                for number in ("loss", "gradient_norm"):
                    assert mine[number] == pytest.approx(theirs[number], rel=2e-5), (name, mine["step"], number)
            for key, value in checkpoint.load(folder / name, "transformer").group("ema").items():
                torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-5)
        shutil.rmtree(folder)


PLANNED: dict[str, dict[str, int]] = {
    "parts of weights": {},
    "pairs": {"tensor": 2},
    "groups": {"replicate": 2},
    "groups of pairs": {"replicate": 2, "tensor": 2},
}


def planned_model() -> Any:
    from dalle_reference.transformer import TransformerConfig

    return TransformerConfig(vocab_text=300, vocab_image=512, grid=(12, 12), layers=4)


def measured(replicate: int = 1, tensor: int = 1) -> int:
    """Bytes at the worst moment of a second training step, as torch's allocator sees them."""
    from dalle_reference.parallel import World, clip, local, shard
    from dalle_reference.tensor_parallel import divide
    from dalle_reference.transformer import DalleTransformer
    from torch.distributed.tensor.parallel import loss_parallel

    class Pass(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *batch: torch.Tensor) -> torch.Tensor:
            found = self.model.loss(*batch).total
            return found.to_local().clone() if isinstance(found, DTensor) else found

    grid = World(torch.device("cpu"), dist.get_rank(), PROCESSES, tensor=tensor).grid(replicate)
    model, mean = DalleTransformer(planned_model()), DalleTransformer(planned_model()).requires_grad_(False)
    run = Pass(model)
    for part, root in ((model, run), (mean, mean)):
        if tensor > 1:
            divide(part, grid["tensor"])
        shard(root, grid["replicate", "shard"] if replicate > 1 else grid["shard"], bf16=False)
    by_mesh: dict[Any, list[Any]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(parameter.device_mesh, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": some} for some in by_mesh.values()], fused=True)
    own = 8 * tensor // PROCESSES
    batch = [torch.zeros(own, length, dtype=torch.int64) for length in (model.config.caption_length, 144)]

    def step() -> None:
        found = run(*batch)
        found.backward()
        del found
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with loss_parallel():
        return peak_of_second(
            step,
            lambda: sum(local(part).nbytes for part in (*model.parameters(), *mean.parameters(), *moments(optimizer))),
        )


CHECKS = {
    check.__name__: check
    for check in (
        check_statistics,
        check_divided_codes_stay,
        check_codes_of_mixtures_stay,
        check_one_seed,
        check_strides,
        check_compiled,
        check_row_entropy_alone,
        check_refusals,
        check_training,
    )
}


def work(rank: int, port: int, told: Any, names: tuple[str, ...] = (*CASES, *CHECKS, *PLANNED)) -> None:
    """A process's part of all checks: what went wrong, by check, goes to `told`, and the memory of planned steps."""
    import traceback

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (2, 2))
    for name in (name for name in names if name not in PLANNED):
        try:
            check(name, mesh) if name in CASES else CHECKS[name](mesh)
        except Exception:
            told.put((name, rank, traceback.format_exc()))
        dist.barrier()
    if native.NATIVE is not None:
        native.NATIVE.set_kept_limit(0)  # memory that earlier results left is not the allocator's
        for name in (name for name in PLANNED if name in names):
            told.put((name, rank, measured(**PLANNED[name])))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, Any]]:
    """What the processes say: a check's or a planned layout's name, the process, the fault or the bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Manager().Queue()
    torch.multiprocessing.spawn(work, (port, queue), nprocs=PROCESSES)
    said = []
    while not queue.empty():
        said.append(queue.get())
    return said


@pytest.mark.parametrize("name", [*CASES, *CHECKS])
def test_dtensors(told: list[tuple[str, int, Any]], name: str) -> None:
    faults = [f"process {rank}:\n{fault}" for about, rank, fault in told if about == name]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", PLANNED)
def test_a_step_of_four_processes_takes_what_was_planned(told: list[tuple[str, int, Any]], name: str) -> None:
    from dalle_reference.plan import Layout, needs

    if native.NATIVE is None:
        pytest.skip("the reference backend takes what the CPU kernels do not")
    taken = [size for about, _, size in told if about == name]
    assert len(taken) == PROCESSES
    planned = needs(planned_model(), Layout(PROCESSES, 8, bf16=False, **PLANNED[name]))
    assert planned.peak == pytest.approx(max(taken), rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_codes_are_exchanged_so_that_each_has_some_of_every_quarter(count: int) -> None:
    codes = 4 * count * 3
    held = torch.arange(codes).view(count, -1)
    for taker in range(count):
        got = [held[holder][low : low + n] for holder in range(count) for low, n in _runs(holder, taker, codes, count)]
        assert torch.equal(torch.cat(got), torch.arange(codes).view(4, count, 3)[:, taker].flatten())
