"""The door to decoding: checks, schema, shapes and choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Entry, define
from dalle_kernels.backends.sharding import divided
from dalle_kernels.checks import as_int, autocast, check_scale, check_softcap, check_tensor, rows_contiguous
from dalle_kernels.decode.cache import KVCache, check_empty, check_next, check_position
from dalle_kernels.decode.contract import WRITTEN, Backend, Inputs, Outputs, call_of, extras
from dalle_kernels.decode.eight_bit import quantize
from dalle_kernels.device import remembered, settled
from dalle_kernels.patterns.decode_table import decode_table_for
from dalle_kernels.patterns.patterns import Pattern

if TYPE_CHECKING:
    from dalle_kernels.decode import cpu, cuda, reference, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, cuda, triton, reference)


def _describe(
    q: torch.Tensor,
    _k: object,
    _v: object,
    cache: KVCache,
    position: int | torch.Tensor = 0,
    *_: Any,
    softcap: float | None = None,
    **__: Any,
) -> Call:
    check_tensor("q", q, rank=4)
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: got {type(cache).__name__}, wanted a KVCache")
    by_row = isinstance(position, torch.Tensor) and position.numel() > 1
    asked = extras(cache.inputs(q, q, q, position, softcap=softcap), by_row)
    return Call(q.device, autocast(q)[0].dtype, q.shape[-1], asked)


OPERATION: Operation[Backend] = Operation(
    "decode_attention",
    {
        "cuda": "dalle_kernels.decode.cuda",
        "triton": "dalle_kernels.decode.triton",
        "cpu": "dalle_kernels.decode.cpu",
        "reference": "dalle_kernels.decode.reference",
    },
    _describe,
)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    position: int | torch.Tensor,
    scale: float | None = None,
    backend: str = "auto",
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention for the next tokens: writes their keys and values into `cache`, then attends to what each may see.

    Called for positions 0, 1, 2, ... (or from n on, after `cache.prefill` took n tokens), one token at a time or
    several, it gives row by row what `sparse_attention` gives at once. It has no backward.

    Args:
        q, k, v: [B, H, G, D], the next G tokens'; dtype and device of the cache (autocast casts them first), or any
            one floating-point dtype where the cache is int8. B counts the copies of a prompt. q may have n H heads, of
            which each n in a row see one head of k and v, as in grouped-query attention.
        cache: the layer's KVCache; it says the pattern, and is changed in place.
        position: where the first of them stands in the sequence, which is how many tokens the cache holds: an int or
            an int64 tensor on the cache's device, of one element or, where rows differ, [B]. A tensor on a GPU lets
            one CUDA graph serve every position; it is not checked there.
        scale: what the scores are multiplied by; D ** -0.5 where None.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `explain`.
        softcap: as in `sparse_attention`.

    Returns:
        Like q.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes or devices, a position outside the pattern, or one that is not
            the cache's next (`cache.truncate` goes back); the cache is then as it was.
        RuntimeError: if a gradient would be needed.

    Example:
        >>> cache = KVCache(Row(TokenLayout(4, (2, 2))), batch=1, heads=2, head_dim=16)
        >>> q = k = v = torch.randn(1, 2, 5, 16)
        >>> decode_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], cache, position=0).shape
        torch.Size([1, 2, 1, 16])
        >>> decode_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], cache, position=1).shape
        torch.Size([1, 2, 4, 16])
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: got {type(cache).__name__}, wanted a KVCache")
    cache.check()
    if cache.copies > 1 and cache.shared_keys is None:
        raise ValueError(
            f"cache: got one without the prompt that its {cache.copies} copies share, wanted a prefill first"
        )
    rows, heads, _, width = cache.keys.shape
    check_tensor("q", q, rank=4)
    tokens = q.shape[2]
    if divided((q, k, v)):
        raise TypeError(
            "q, k, v: got a DTensor, wanted torch.Tensor: each process decodes its heads with a cache of them"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, rank=4)
        grouped = name == "q" and q.shape[1] and q.shape[1] % heads == 0
        wanted = (rows, q.shape[1] if grouped else heads, max(tokens, 1), width)
        if tensor.shape != wanted:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted} to suit the cache")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("decode_attention has no backward: call it under torch.no_grad()")
    q, k, v = autocast(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        cache.check_token(name, tensor, q)
    check_scale(scale)
    softcap = check_softcap(softcap)
    where, known = _position(position, cache, tokens)
    scale = None if scale is None else float(scale)
    q, k, v = map(rows_contiguous, (q, k, v))
    out = _ENTRY(cache.inputs(q, k, v, where, scale, softcap), backend).out
    cache.count(known, tokens)
    return out


register(decode_attention, OPERATION)


def _position(position: int | torch.Tensor, cache: KVCache, tokens: int) -> tuple[int | torch.Tensor, int | None]:
    """`position` as backends are given it, on a GPU a tensor there, and as an int where the host knows it."""
    keys, length = cache.keys, cache.pattern.length
    if isinstance(position, torch.Tensor):
        rows = keys.shape[0]
        if position.dtype != torch.int64 or (position.numel() != 1 and position.shape != (rows,)):
            came = f"{position.dtype} of shape {tuple(position.shape)}"
            raise ValueError(f"position: got {came}, wanted one int64, or int64 of shape ({rows},)")
        if position.device != keys.device:
            raise ValueError(f"position: got a tensor on {position.device}, wanted {keys.device} where the cache is")
        return position.reshape(() if position.numel() == 1 else (rows,)), None
    start = as_int("position", position)
    if not 0 <= start <= length - tokens:
        what = "" if tokens == 1 else f" for {tokens} tokens"
        raise ValueError(f"position: got {start}{what}, wanted an int from 0 to {length - tokens}")
    cache.expect(start)
    return (start if keys.is_cpu else torch.full((), start, dtype=torch.int64, device=keys.device)), start


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    position, lengths = inputs.position, inputs.lengths
    # On the CPU a position tensor can be looked at without waiting for anything, so it is checked here.
    if isinstance(position, torch.Tensor) and position.is_cpu:
        check_position(position, inputs.q.shape[2], inputs.pattern.length)
    if lengths is not None:
        check_next(lengths, position)
    _check_apart(inputs.keys, inputs.values)
    outputs = backend.forward(inputs)
    if lengths is not None:
        lengths += inputs.q.shape[2]
    return outputs


def _check_apart(keys: torch.Tensor, values: torch.Tensor) -> None:
    if keys.numel() and keys.data_ptr() == values.data_ptr():
        raise ValueError("cache.values: got the memory of cache.keys, wanted its own")


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    return Outputs(torch.empty_like(inputs.q))


_ENTRY = Entry("decode_forward", OPERATION, Inputs, Outputs, call_of, _forward, _forward_fake, (), writes=WRITTEN)


def _prefill(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor | None,
    scales: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    pattern: str,
    prompt: int,
    rewind: int,
) -> None:
    tokens = k.shape[2]
    if lengths is not None:
        check_empty(lengths)
    _check_apart(keys, values)
    slot, token = _places(Pattern.parse(pattern), tokens, prompt, rewind, k.device)
    for part, (held, new) in enumerate(((keys, k), (values, v))):
        if scales is None:
            held[:, :, slot] = new[:, :, token]
        else:
            held[:, :, slot], scales[:, :, slot, part] = quantize(new[:, :, token])
    if hidden is not None:
        hidden[:, slot] = False if key_padding_mask is None else key_padding_mask[:, token]
    if lengths is not None:
        lengths.fill_(tokens)


@remembered(maxsize=64)
def _places(
    pattern: Pattern, tokens: int, prompt: int, rewind: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots that a prompt of `tokens` tokens fills, and the tokens that they then hold."""
    table = decode_table_for(pattern, "cpu", prompt, rewind)
    slots = (table if table.shared is None else table.shared).slot[:tokens].tolist()
    last = {slot: token for token, slot in enumerate(slots) if slot >= 0}  # a later token takes over the slot
    places = torch.tensor([list(last), list(last.values())], dtype=torch.int64)
    slot, token = settled(device, lambda: places.to(device))
    return slot, token


define(
    "decode_prefill(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? hidden,"
    " Tensor(d!)? scales, Tensor? key_padding_mask, Tensor(e!)? lengths, str pattern, int prompt, int rewind) -> ()",
    _prefill,
    lambda *_: None,
)
