"""How weights move: AdamW, and Muon for the matrices of a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dalle_reference.config import RunConfig
from dalle_reference.errors import UserError
from dalle_reference.parallel import World, local, whole

OWN = "moments-"
"""What the names of 8-bit moments begin with that one process alone has."""
_ROUNDS = 5
_ORTHOGONAL = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz x <- a x + b x x' x + c (x x')^2 x, whose slope at 0 is as large as lets 0.7 to 1.2 be its end."""


class Muon(torch.optim.Optimizer):
    """Momentum of matrices, of which a step takes the nearest orthogonal one (Jordan et al. 2024).

    All directions of a matrix then move alike, also those that gradients hardly point to. `torch.optim.Muon` multiplies
    in bfloat16, which many CPUs do in software: 30 times as long as this, in float32.

    Args:
        parameters: matrices; where processes share them, however divided, each makes the whole of a step and keeps its
            part.
        lr: how far a step goes, by the root mean square of the singular values of a change, times
            sqrt(rows / columns) where there are more rows.
        momentum: of Nesterov's kind.

    Raises:
        ValueError: if a parameter is no matrix.

    Example:
        >>> layer = torch.nn.Linear(8, 4, bias=False)
        >>> optimizer = Muon(layer.parameters(), lr=0.02)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"parameters: got one of shape {tuple(parameter.shape)}, wanted matrices")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self.state:
                    self.state[parameter] = {"mean": torch.zeros_like(parameter)}
                mean = self.state[parameter]["mean"]
                mean.lerp_(parameter.grad, 1.0 - group["momentum"])
                change = orthogonal(whole(parameter.grad.lerp(mean, group["momentum"])))
                rows, columns = parameter.shape
                far = group["lr"] * max(1.0, rows / columns) ** 0.5
                parameter.sub_(_divided(change, parameter), alpha=far)


def optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """What moves a model's weights.

    Raises:
        UserError: if Muon is asked for and the model has no blocks with matrices, or 8-bit moments without torchao.
    """
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, value in model.named_parameters():
        muons = config.optimizer == "muon" and "blocks." in name and value.dim() == 2
        (hidden if muons else others).append(value)
    groups = [
        *_by_mesh(value for value in others if value.dim() > 1),
        *_by_mesh((value for value in others if value.dim() <= 1), weight_decay=0.0),
    ]
    adamw = _adamw(config)(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    if config.optimizer == "adamw":
        return [adamw]
    if not hidden:
        raise UserError("optimizer: got muon, wanted adamw for a model that has no blocks with matrices")
    return [adamw, Muon(hidden, config.learning_rate)]


def _adamw(config: RunConfig) -> Callable[..., torch.optim.Optimizer]:
    if config.moments == "fp32":
        return partial(torch.optim.AdamW, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "moments: got 8bit, which torchao computes: pip install 'dalle_kernels[low-bit]' brings it"
        ) from error
    return cast("Callable[..., torch.optim.Optimizer]", AdamW8bit)


def move(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Moves weights by their gradients, steps of size `rate`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # as torchao has it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    on_cpu = optimizer.param_groups[0]["params"][0].device.type == "cpu"
    # torchao compiles its update for each shape of a weight, which takes a CPU minutes.
    with torch.compiler.set_stance("force_eager") if on_cpu and _is_eight_bit(optimizer) else nullcontext():
        optimizer.step()


def _is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "block_size")  # torchao's


def moments(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], world: World) -> dict[str, Tensor]:
    """What an optimizer keeps, by name, as checkpoints have it.

    8-bit numbers are a process's own, named by it: blocks that share a scale lie where weights were divided.
    """
    kept = {}
    for parameter, state in optimizer.state.items():
        for entry, value in state.items():
            name = f"{entry}.{names[parameter]}"
            if not _is_eight_bit(optimizer):
                kept[f"optimizer.{name}"] = value
                continue
            prefix = f"{OWN}{world.rank}-of-{world.size}" if isinstance(parameter, DTensor) else "optimizer"
            part = local(value)
            for field in ("codes", "scale") if is_traceable_wrapper_subclass(part) else ("",):
                kept[f"{prefix}.{name}{'.' * bool(field)}{field}"] = getattr(part, field) if field else part
    return kept


def _by_mesh(parameters: Iterable[nn.Parameter], **options: float) -> list[dict[str, Any]]:
    """Groups of parameters: a fused update takes DTensors of one mesh alone."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": some, **options} for some in groups.values()]


def begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the state it has before its first step, for a checkpoint to be read into."""
    if _is_eight_bit(optimizer):
        for parameter in (value for group in optimizer.param_groups for value in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        move(optimizer, 0.0)
        optimizer.zero_grad(set_to_none=True)
        return
    for parameter in (value for group in optimizer.param_groups for value in group["params"]):
        # In the parameter's own memory order, which the fused update takes for granted.
        if isinstance(optimizer, Muon):
            optimizer.state[parameter] = {"mean": torch.zeros_like(parameter)}
        else:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U V' of a matrix [R, C] = U S V': singular values become 0.7 to 1.2, but for those near 0."""
    a, b, c = _ORTHOGONAL
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.float() / wide.float().norm().clamp(min=1e-12)
    for _ in range(_ROUNDS):
        squares = x @ x.T
        x = torch.addmm(x, torch.addmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def _divided(change: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, divided as `like` is."""
    if not isinstance(like, DTensor):
        return change
    everywhere = DTensor.from_local(change, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)
