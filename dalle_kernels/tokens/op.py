"""The door to the likelihood of tokens: checks, schema, shapes, derivative and choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Derivative, Entry
from dalle_kernels.backends.sharding import flattened
from dalle_kernels.checks import check_tensor, rows_contiguous
from dalle_kernels.tokens import reference
from dalle_kernels.tokens.contract import AXES, Backend, Grads, Inputs, Kept, Needs, Outputs, call_of

if TYPE_CHECKING:
    _BACKENDS: tuple[Backend, ...] = (reference,)


def _describe(logits: torch.Tensor, *_: Any, **__: Any) -> Call:
    check_tensor("logits", logits)
    return Call(logits.device, logits.dtype, logits.shape[-1] if logits.dim() else 1)


OPERATION: Operation[Backend] = Operation("token_nll", {"reference": "dalle_kernels.tokens.reference"}, _describe)


def token_nll(logits: torch.Tensor, tokens: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """-log softmax(logits)[token], a row each; differentiable to `logits`.

    Args:
        logits: [..., V], float16, bfloat16, float32 or float64.
        tokens: int64 [...], 0 to V - 1.
        backend: "auto" or "reference"; see `explain`.

    Returns:
        float32 (float64 for float64 logits), shape of `tokens`, in nats.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes or devices.
        IndexError: on the CPU, for a token out of range.

    Example:
        >>> token_nll(torch.zeros(2, 4), torch.tensor([0, 3])).exp().tolist()
        [4.0, 4.0]
    """
    check_tensor("logits", logits)
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"tokens: got {type(tokens).__name__}, wanted a torch.Tensor")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens: got {tokens.dtype}, wanted torch.int64")
    if not logits.dim() or not logits.shape[-1] or tokens.shape != logits.shape[:-1]:
        shapes = f"{tuple(logits.shape)}, {tuple(tokens.shape)}"
        raise ValueError(f"logits, tokens: got shapes {shapes}, wanted [..., V] with V >= 1, and [...]")
    if tokens.device != logits.device:
        raise ValueError(f"tokens: got a tensor on {tokens.device}, wanted {logits.device} where logits are")
    rows = flattened(rows_contiguous(logits), tokens.numel(), logits.shape[-1])
    return _ENTRY(Inputs(rows, flattened(tokens, tokens.numel())), backend).nll.reshape(tokens.shape)


register(token_nll, OPERATION)


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    tokens, count = inputs.tokens, inputs.logits.shape[1]
    if tokens.device.type == "cpu" and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < count:
        worst = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise IndexError(f"tokens: got {worst}, wanted 0 to {count - 1}")
    return backend.forward(inputs)


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    wide = torch.float64 if inputs.logits.dtype == torch.float64 else torch.float32
    nll = inputs.logits.new_empty(inputs.logits.shape[0], dtype=wide)
    return Outputs(nll, torch.empty_like(nll))


def _backward(backend: Backend, grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    return backend.backward(grads, kept, needs)


_ENTRY = Entry(
    "token_nll_forward",
    OPERATION,
    Inputs,
    Outputs,
    call_of,
    _forward,
    _forward_fake,
    AXES,
    Derivative("token_nll_backward", Grads, Kept, Needs, _backward, reference.jvp),
)
