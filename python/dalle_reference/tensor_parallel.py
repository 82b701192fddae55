"""A transformer divided among processes that compute the same pictures: its heads, the columns of its MLPs, its codes.

torch.distributed.tensor.parallel does it, Megatron's way (Shoeybi et al. 2019, section 3): a block's first product is
divided by columns and its second by rows, whose partial sums are added up, so that between them nothing is sent. Norms,
embeddings and positions are whole on each process, and so are the gradients that reach them.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from dalle_reference.errors import UserError
from dalle_reference.transformer import DalleTransformer


def divide(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives each process of `mesh`, which has one dimension, its share of a `DalleTransformer`, in place.

    Weights become DTensors under their names. Logits are divided by codes: the loss and its backward pass belong under
    `torch.distributed.tensor.parallel.loss_parallel()`.

    Raises:
        UserError: for another model, or where the processes do not divide its heads and vocabularies.
    """
    parts = mesh.size()
    if not isinstance(model, DalleTransformer):
        raise UserError(f"tensor: got {parts} with a {type(model).__name__}, wanted 1: transformers alone are divided")
    for name in ("heads", "vocab_text", "vocab_image"):
        if getattr(model.config, name) % parts:
            raise UserError(f"tensor: got {parts}, wanted a divisor of {name} ({getattr(model.config, name)})")
    for block in model.layers:
        block.attention.num_heads //= parts
        plan: dict[str, ParallelStyle] = {
            "attention.project_qkv": _OwnHeads(),
            "attention.project_out": RowwiseParallel(),
            "expand": ColwiseParallel(),
            "contract": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
    for name in ("text_head", "image_head"):
        parallelize_module(model, mesh, {name: ColwiseParallel(use_local_output=False)})


class _OwnHeads(ParallelStyle):
    """A projection to queries, keys and values, of which a process computes those of its heads.

    Rows are kept in the order of the whole weight, as checkpoints have them, in which a head's queries, keys and values
    lie far apart: so a process gathers the rows of its heads before it multiplies.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        for name, parameter in list(module.named_parameters()):
            rows = distribute_tensor(parameter, device_mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(rows, parameter.requires_grad))
        module.forward = partial(_project, module, device_mesh)  # type: ignore[method-assign]
        return module


def _project(module: nn.Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """x [B, S, E], the same on each process -> [B, S, 3 x its heads x D]."""
    everywhere = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return F.linear(everywhere.to_local(grad_placements=[Partial()]), _own(module.weight), _own(module.bias))


def _own(rows: Tensor) -> Tensor:
    assert isinstance(rows, DTensor)
    whole = rows.redistribute(placements=[Replicate()]).unflatten(0, (3, -1))
    return whole.redistribute(placements=[Shard(1)]).to_local().flatten(0, 1)
