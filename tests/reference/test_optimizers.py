"""Muon against its definition, written out in float64."""

import sys
from pathlib import Path

import pytest
import torch
from dalle_reference.config import RunConfig
from dalle_reference.dvae import PRESETS, DiscreteVAE
from dalle_reference.errors import UserError
from dalle_reference.optimizers import Muon, begin_state, moments, optimizers, orthogonal
from dalle_reference.parallel import ALONE
from dalle_reference.transformer import DalleTransformer, TransformerConfig


def newton_schulz(singular: torch.Tensor) -> torch.Tensor:
    """What five rounds make of singular values that have norm 1 together."""
    for _ in range(5):
        singular = 3.4445 * singular - 4.775 * singular**3 + 2.0315 * singular**5
    return singular


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64), (1, 7)])
def test_orthogonal_keeps_directions_and_evens_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, sizes, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    wanted = left * newton_schulz(sizes / sizes.norm()) @ right
    assert torch.allclose(orthogonal(matrix).double(), wanted, atol=1e-5)
    large = sizes / sizes.norm() > 0.01
    assert ((newton_schulz(sizes / sizes.norm())[large] - 1).abs() < 0.35).all()


def test_orthogonal_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_muon_moves_by_its_definition() -> None:
    chance = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 4, generator=chance))
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    wanted, mean = weight.detach().double().clone(), torch.zeros(12, 4, dtype=torch.float64)
    for _ in range(3):
        weight.grad = torch.randn(12, 4, generator=chance)
        mean = 0.9 * mean + 0.1 * weight.grad.double()
        left, sizes, right = torch.linalg.svd(0.1 * weight.grad.double() + 0.9 * mean, full_matrices=False)
        wanted -= 0.1 * 3**0.5 * (left * newton_schulz(sizes / sizes.norm()) @ right)
        optimizer.step()
        assert torch.allclose(weight.double(), wanted, atol=1e-5)
    weight.grad = None
    optimizer.step()
    assert torch.allclose(weight.double(), wanted, atol=1e-5)


def test_moments_of_eight_bits_are_torchaos() -> None:
    torchao = pytest.importorskip("torchao")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
    (optimizer,) = optimizers(model, RunConfig(Path("unused"), moments="8bit"))
    assert isinstance(optimizer, torchao.optim.AdamW8bit)
    before = [value.detach().clone() for value in model.parameters()]
    begin_state(optimizer)
    assert all(torch.equal(mine, old) for mine, old in zip(model.parameters(), before, strict=True))
    kept = moments(optimizer, {value: name for name, value in model.named_parameters()}, ALONE)
    assert kept["optimizer.exp_avg.0.weight.codes"].shape == (64, 64)
    assert kept["optimizer.exp_avg_sq.0.weight.scale"].shape == (16,)
    assert kept["optimizer.exp_avg.1.weight"].dtype == torch.float32  # too few to share scales


def test_moments_of_eight_bits_want_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"moments: got 8bit, .* pip install 'dalle_kernels\[low-bit\]'"):
        optimizers(torch.nn.Linear(2, 2), RunConfig(Path("unused"), moments="8bit"))
    with pytest.raises(ValueError, match="moments: got 'bf16', wanted fp32 or 8bit"):
        RunConfig(Path("unused"), moments="bf16")  # type: ignore[arg-type]


def test_muon_takes_matrices_of_blocks_alone() -> None:
    with pytest.raises(ValueError, match=r"parameters: got one of shape \(3,\), wanted matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    config = RunConfig(Path("unused"), optimizer="muon")
    model = DalleTransformer(TransformerConfig(layers=2, heads=2, head_dim=8))
    adamw, muon = optimizers(model, config)
    hidden = [value for value in model.blocks.parameters() if value.dim() == 2]
    assert [id(value) for group in muon.param_groups for value in group["params"]] == list(map(id, hidden))
    others = {id(value) for group in adamw.param_groups for value in group["params"]}
    assert others == {id(value) for value in model.parameters()} - set(map(id, hidden))
    with pytest.raises(UserError, match="optimizer: got muon, wanted adamw for a model"):
        optimizers(DiscreteVAE(PRESETS["tiny"]), config)
    with pytest.raises(ValueError, match="optimizer: got 'sgd', wanted adamw or muon"):
        RunConfig(Path("unused"), optimizer="sgd")  # type: ignore[arg-type]
