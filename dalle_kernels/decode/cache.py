"""The rolling cache of keys and values that decoding reads."""

from __future__ import annotations

import operator
from typing import TypeAlias

import numpy as np
import torch

from dalle_kernels.checks import FLOATS, as_int, autocast, check_alike, check_tensor
from dalle_kernels.decode.contract import Inputs
from dalle_kernels.patterns.decode_table import DecodeTable, decode_table_for
from dalle_kernels.patterns.patterns import Pattern

_Past: TypeAlias = tuple[int, np.ndarray | None]


class KVCache:
    """Keys and values of the tokens so far, no more of them than `pattern` can still see.

    A row pattern keeps text_length + columns + 1 entries, an 11 x 11 convolution text_length + 5 columns + 6; a
    column pattern keeps its columns. `prefill` takes a prompt at once, `decode_attention` writes the tokens after it.

    With `copies`, each of `batch` prompts has that many continuations: the prompt's keys and values are kept once, and
    only what comes after them for each continuation. The rows are then B = batch * copies, row p * copies + c being
    continuation c of prompt p, and the cache begins with a `prefill` of `batch` rows.

    A cache knows how many tokens each row holds, and decoding goes on from there; going back takes `truncate`. On a CPU
    every call is checked, under torch.compile too. On a GPU the host checks positions that are ints, outside of
    torch.compile; a position tensor there is not looked at, so that a CUDA graph can be replayed, and from then on the
    cache does not know its length, until an int position or `truncate` says it.

    Args:
        pattern: the layer's pattern; no query of it may see a later key.
        batch, heads, head_dim: prompts, H and D of the layer; H of its keys, where queries have more.
        dtype, device: of the tensors to come; torch's defaults where None. torch.int8 keeps tokens of any
            floating-point dtype in eight bits, with a float32 scale for each head and slot of keys and of values.
        copies: continuations of each prompt.
        rewind: by how many tokens more than one `truncate` can always go back; each may cost a slot.

    In eight bits, each row of D numbers is rounded to whole multiples of its greatest magnitude / 127, so that a number
    is off by at most 1 / 254 of that magnitude. With K the greatest magnitude among the keys that a query q sees, and
    V among the values, an output of `decode_attention` is off by at most V (1 + |scale| |q|_1 K) / 254, and by
    float32's rounding: scores are off by at most e = |scale| |q|_1 K / 254, which moves the weights by
    2 tanh(e / 2) <= e in sum. What is below 1.5e-36 counts as 0, and an infinity or a NaN makes its whole row NaN.

    Attributes:
        keys, values: [B, H, L, D], L slots, contiguous. Others of that shape may take their place.
        shared_keys, shared_values: [batch, H, M, D], the prompt's, where copies share it, else None.
        scales, shared_scales: float32 [B, H, L, 2] and [batch, H, M, 2], of keys and of values, where dtype is int8.
        lengths: int64 [B] on the CPU, the tokens that each row holds; None where a GPU cache does not know. Whoever
            writes keys and values by hand sets it, after `truncate(0)` where tokens were there: `truncate` refuses what
            it does not know to be there.

    Raises:
        ValueError: for sizes below 1, a dtype that is neither floating point nor int8, or a pattern that is not causal.

    Example:
        >>> KVCache(Row(TokenLayout(256, (32, 32))), batch=1, heads=2, head_dim=64).keys.shape
        torch.Size([1, 2, 289, 64])
        >>> cache = KVCache(Row(TokenLayout(256, (32, 32))), batch=1, heads=2, head_dim=64, copies=8)
        >>> cache.prefill(torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64))
        >>> cache.shared_keys.shape, cache.keys.shape
        (torch.Size([1, 2, 256, 64]), torch.Size([8, 2, 33, 64]))
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        copies: int = 1,
        rewind: int = 0,
    ) -> None:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern: got {type(pattern).__name__}, wanted a Pattern")
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "copies": copies, "rewind": rewind}
        for name, value in sizes.items():
            least = 0 if name == "rewind" else 1
            sizes[name] = as_int(name, value)
            if sizes[name] < least:
                raise ValueError(f"{name}: got {value!r}, wanted an int >= {least}")
        batch, heads, head_dim, copies, rewind = sizes.values()
        if dtype is not None and dtype not in (*FLOATS, torch.int8):
            raise ValueError(f"dtype: got {dtype}, wanted a floating-point dtype or torch.int8")
        self.pattern = pattern
        self.copies = copies
        self.rewind = rewind
        slots = _slots(pattern.spec, 0, rewind)
        self.keys = torch.zeros(
            (batch * copies, heads, slots if copies == 1 else 0, head_dim), dtype=dtype, device=device
        )
        self.values = torch.zeros_like(self.keys)
        self.scales = self._new_scales(self.keys)
        self._forget_prompt()
        self._checked: tuple[torch.Tensor | None, ...] = (None,)  # the tensors that `check` has looked at
        self.lengths: torch.Tensor | None = torch.zeros(batch * copies, dtype=torch.int64, device="cpu")
        # By row: where it last went back to, and the latest token of each slot at that time. Rows of one past share it.
        self._past: list[_Past] = [(0, None)] * (batch * copies)

    def _new_scales(self, keys: torch.Tensor) -> torch.Tensor | None:
        if keys.dtype != torch.int8:
            return None
        return torch.zeros((*keys.shape[:3], 2), dtype=torch.float32, device=keys.device)

    def _forget_prompt(self) -> None:
        self.shared_keys: torch.Tensor | None = None
        self.shared_values: torch.Tensor | None = None
        self.shared_scales: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None
        self.shared_hidden: torch.Tensor | None = None
        self._prompt = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors if tensor is not None)

    @property
    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        prompt = self.shared_keys, self.shared_values, self.shared_hidden, self.shared_scales
        return self.keys, self.values, self.hidden, self.scales, *prompt

    def inputs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: int | torch.Tensor,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Inputs:
        """What backends are given of it, with the tokens at `position`."""
        shared: tuple[torch.Tensor | None, ...] = (None, None, None, None)
        if self._prompt:  # of a prompt without tokens nothing is shared
            shared = self.shared_keys, self.shared_values, self.shared_hidden, self.shared_scales
        shared_keys, shared_values, shared_hidden, shared_scales = shared
        return Inputs(
            q,
            k,
            v,
            self.keys,
            self.values,
            position,
            self.pattern,
            scale,
            softcap,
            shared_keys,
            shared_values,
            self.hidden,
            shared_hidden,
            self.scales,
            shared_scales,
            self.lengths_to_check(),
            self._prompt,
            self.rewind,
        )

    def check(self) -> None:
        """Keys and values are still a pair that `pattern` can use.

        Raises:
            TypeError, ValueError: if tensors in their place differ in shape, dtype or device, lack slots, or are not
                contiguous, as an expanded tensor is not.
        """
        keys, values = self.keys, self.values
        if self.copies > 1 and self.shared_keys is None:
            return  # nothing is written before the prefill
        held = (*self._tensors, self.lengths)
        if not torch.compiler.is_compiling() and all(map(operator.is_, held, self._checked)):
            return
        slots = _slots(self.pattern.spec, self._prompt, self.rewind)
        if keys.dim() != 4 or keys.shape[2] != slots:
            raise ValueError(f"cache.keys: got shape {tuple(keys.shape)}, wanted [B, H, {slots}, D]")
        if values.shape != keys.shape:
            raise ValueError(f"cache.values: got shape {tuple(values.shape)}, wanted {tuple(keys.shape)} as keys has")
        check_alike("cache.values", values, "cache.keys", keys)
        shared = {}
        scales: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {"scales": (self.scales, keys)}
        if self.shared_keys is not None and self.shared_values is not None:
            kept = _slots(self.pattern.spec, self._prompt, self.rewind, shared=True)
            wanted = (keys.shape[0] // self.copies, keys.shape[1], kept, keys.shape[3])
            shared = {"shared_keys": self.shared_keys, "shared_values": self.shared_values}
            for name, tensor in shared.items():
                if tensor.shape != wanted:
                    raise ValueError(f"cache.{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
                check_alike(f"cache.{name}", tensor, "cache.keys", keys)
            scales["shared_scales"] = (self.shared_scales, self.shared_keys)
        given = {}
        for name, (its, scaled) in scales.items():
            if (its is None) != (keys.dtype != torch.int8):
                raise TypeError(f"cache.keys: got {keys.dtype}, wanted int8 just where cache.{name} is there")
            if its is None:
                continue
            wanted = (*scaled.shape[:3], 2)
            if its.shape != wanted or its.dtype != torch.float32:
                came = f"{its.dtype} of shape {tuple(its.shape)}"
                raise ValueError(f"cache.{name}: got {came}, wanted torch.float32 of shape {wanted}")
            given[name] = its
        for name, tensor in {"keys": keys, "values": values, **shared, **given}.items():
            if not tensor.is_contiguous():
                came = f"strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}"
                raise ValueError(f"cache.{name}: got {came}, wanted a contiguous tensor")
        if self.lengths is not None and self.lengths.shape != keys.shape[:1]:
            raise ValueError(
                f"cache.keys: got {keys.shape[0]} rows, wanted {len(self.lengths)}, as many as lengths; "
                "`reorder` makes others"
            )
        if not torch.compiler.is_compiling():
            self._checked = held

    def check_token(self, name: str, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """A token's tensor suits the cache's dtype and device; an int8 cache takes what is like `other` in dtype."""
        if self.keys.dtype != torch.int8:
            check_alike(name, tensor, "the cache", self.keys)
        elif tensor.device != self.keys.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted {self.keys.device} where the cache is")
        elif tensor.dtype != other.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted {other.dtype} as the others have")

    def prefill(self, k: torch.Tensor, v: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> None:
        """Takes the keys and values of positions 0 to n - 1: what decoding those tokens one by one would leave.

        Args:
            k, v: [batch, H, n, D], dtype (one of floating point for int8) and device of the cache, which must be empty;
                autocast casts them first.
            key_padding_mask: bool [batch, n], True at keys that no later token shall see.

        Raises:
            TypeError, ValueError: for wrong shapes, dtypes or devices, too many tokens, or a cache that holds some.
        """
        self.check()
        rows, heads, _, width = self.keys.shape
        batch = rows // self.copies
        for name, tensor in (("k", k), ("v", v)):
            check_tensor(name, tensor, rank=4)
        k, v = autocast(k, v)
        for name, tensor in (("k", k), ("v", v)):
            self.check_token(name, tensor, k)
            if tensor.shape[:2] != (batch, heads) or tensor.shape[3] != width or tensor.shape[2] != k.shape[2]:
                wanted = f"({batch}, {heads}, n, {width}), n alike for k and v"
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
        tokens = k.shape[2]
        if tokens > self.pattern.length:
            raise ValueError(f"k: got {tokens} tokens, wanted at most {self.pattern.length}")
        if key_padding_mask is not None:
            check_padding(key_padding_mask, (batch, tokens), k.device)
        if self.lengths is not None and not torch.compiler.is_compiling():
            check_empty(self.lengths)
        if self.copies > 1:
            self._share(tokens, key_padding_mask is not None)
        elif key_padding_mask is not None and self.hidden is None:
            self.hidden = torch.zeros(self.keys.shape[::2], dtype=torch.bool, device=self.keys.device)
        shared = self.shared_keys is not None
        torch.ops.dalle_kernels.decode_prefill(
            k.detach(),
            v.detach(),
            self.shared_keys if shared else self.keys,
            self.shared_values if shared else self.values,
            self.shared_hidden if shared else self.hidden,
            self.shared_scales if shared else self.scales,
            key_padding_mask,
            self.lengths_to_check(),
            self.pattern.spec,
            tokens if shared else 0,
            self.rewind,
        )
        self.count(0, tokens)

    def _share(self, tokens: int, padded: bool) -> None:
        """Makes room for a prompt of `tokens` tokens, once a prompt, and for what each of its copies adds."""
        if self.shared_keys is not None:
            raise ValueError(f"k: the cache holds a prompt of {self._prompt} tokens already; truncate(0) forgets it")
        rows, heads, _, width = self.keys.shape
        kept = _slots(self.pattern.spec, tokens, self.rewind, shared=True)
        slots = _slots(self.pattern.spec, tokens, self.rewind)
        self._prompt = tokens
        self.shared_keys = self.keys.new_zeros(rows // self.copies, heads, kept, width)
        self.shared_values = torch.zeros_like(self.shared_keys)
        self.keys = self.keys.new_zeros(rows, heads, slots, width)
        self.values = torch.zeros_like(self.keys)
        self.scales, self.shared_scales = self._new_scales(self.keys), self._new_scales(self.shared_keys)
        if padded:
            self.shared_hidden = torch.zeros(self.shared_keys.shape[::2], dtype=torch.bool, device=self.keys.device)

    def truncate(self, position: int | torch.Tensor) -> None:
        """Goes back: the tokens from `position` on are forgotten, and decoding goes on from there.

        From the furthest token that was ever there it can always go back by one, and by `rewind` more; further where
        the slots still hold what the tokens from `position` on see. 0 empties the cache and forgets the prompt that
        copies share.

        Args:
            position: int, or int64 [B], one a row.

        Raises:
            ValueError: for a position beyond what the cache holds, inside a shared prompt, or before keys that are
                gone; the cache is then as it was.
        """
        wanted, slots = self._gone_back(position)
        self._past = [
            (target, row) if target else (0, None) for target, row in zip(wanted.tolist(), slots, strict=True)
        ]
        if self.copies > 1 and not wanted.any():
            self.keys, self.values = (tensor[:, :, :0].contiguous() for tensor in (self.keys, self.values))
            self.scales = self._new_scales(self.keys)
            self._forget_prompt()
        self.lengths = wanted.clone() if self.lengths is None else self.lengths.copy_(wanted)

    def check_truncate(self, position: int | torch.Tensor) -> None:
        """Raises as `truncate` does, and changes nothing."""
        self._gone_back(position)

    def _gone_back(self, position: int | torch.Tensor) -> tuple[torch.Tensor, list[np.ndarray]]:
        """`position` as int64 [B], where `truncate` can go back to it, and the latest token of each slot by row."""
        rows = self.keys.shape[0]
        if isinstance(position, torch.Tensor):
            if position.shape != (rows,) or position.dtype != torch.int64:
                came = f"{position.dtype} of shape {tuple(position.shape)}"
                raise ValueError(f"position: got {came}, wanted an int or int64 of shape ({rows},)")
            wanted = position.cpu()
        else:
            wanted = torch.full((rows,), as_int("position", position), dtype=torch.int64, device="cpu")
        lengths = self.lengths
        table = decode_table_for(self.pattern, "cpu", self._prompt, self.rewind)
        known = wanted if lengths is None else lengths
        made: dict[tuple[int, int, int, int], np.ndarray] = {}
        slots = []
        pasts = self._past if lengths is not None else [(0, None)] * rows
        for target, length, (start, before) in zip(wanted.tolist(), known.tolist(), pasts, strict=True):
            kind = (target, length, start, id(before))
            if kind not in made:
                made[kind] = table.written(before, start, length)
                self._check_target(target, length, bool(wanted.any()), table, made[kind])
            slots.append(made[kind])
        return wanted, slots

    def _check_target(self, target: int, length: int, some: bool, table: DecodeTable, latest: np.ndarray) -> None:
        """A row of `length` tokens can go back to `target`; `some` where not all go back to 0."""
        if not 0 <= target <= min(length, self.pattern.length):
            raise ValueError(f"position: got {target}, wanted 0 to {length}, the tokens that the cache holds")
        if 0 < target < self._prompt or (target == 0 < self._prompt and some):
            raise ValueError(f"position: got {target}, wanted at least the {self._prompt} tokens of the prompt, or 0")
        if target and not table.holds(target, latest):
            raise ValueError(
                f"position: got {target}, which sees keys whose slots later tokens took; "
                f"a cache made with rewind={latest.max() - target} could go back so far"
            )

    def reorder(self, index: torch.Tensor) -> None:
        """Row b becomes what row index[b] was, as beam search wants it; the batch may grow or shrink.

        Where the number of rows stays, so do the tensors. With copies, each prompt's rows must come from the rows of
        one prompt, which on a GPU makes the host wait.

        Args:
            index: int64 [n], rows of the cache; n a multiple of `copies`.

        Raises:
            ValueError: for another shape or dtype, rows that the cache does not have, or prompts that are mixed.
        """
        rows, copies = self.keys.shape[0], self.copies
        if index.dim() != 1 or index.dtype != torch.int64 or not len(index) or len(index) % copies:
            came = f"{index.dtype} of shape {tuple(index.shape)}"
            raise ValueError(f"index: got {came}, wanted int64 of shape (n,), n a positive multiple of {copies}")
        if index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise ValueError(f"index: got {int(index.min())} to {int(index.max())}, wanted rows from 0 to {rows - 1}")
        index = index.to(self.keys.device)
        self.check()
        if self.shared_keys is not None:
            prompts = (index // copies).unflatten(0, (-1, copies))
            if not bool((prompts == prompts[:, :1]).all()):
                raise ValueError("index: got rows of several prompts in the place of one's copies, wanted one's alone")
            for name in ("shared_keys", "shared_values", "shared_hidden", "shared_scales"):
                self._take(name, prompts[:, 0])
        for name in ("keys", "values", "hidden", "scales"):
            self._take(name, index)
        if self.lengths is not None:
            index = index.cpu()
            self.lengths = self.lengths[index]
            self._past = [self._past[row] for row in index.tolist()]

    def _take(self, name: str, index: torch.Tensor) -> None:
        tensor = getattr(self, name)
        if tensor is None:
            return
        taken = tensor.index_select(0, index)
        if taken.shape == tensor.shape:
            tensor.copy_(taken)
        else:
            setattr(self, name, taken)
            self._checked = (None,)  # which would keep the old ones in memory

    def lengths_to_check(self) -> torch.Tensor | None:
        """`lengths` where an operation checks and counts them: on a CPU, where looking at them waits for nothing."""
        return self.lengths if self.keys.is_cpu else None

    def expect(self, position: int) -> None:
        """On a GPU, where no operation looks at lengths, the host checks that `position` is the next, if it can."""
        if self.lengths_to_check() is None and self.lengths is not None and not torch.compiler.is_compiling():
            check_next(self.lengths, position)

    def count(self, position: int | None, tokens: int) -> None:
        """On a GPU, the host counts `tokens` tokens from `position` on; None is where it does not know."""
        if self.keys.is_cpu:
            return
        if position is None or torch.compiler.is_compiling():
            self.lengths = None
        else:
            self.lengths = torch.full((self.keys.shape[0],), position + tokens, dtype=torch.int64, device="cpu")


def check_position(position: torch.Tensor, tokens: int, length: int) -> None:
    """`tokens` tokens from `position` on, int64 of 0 or 1 dimensions on the CPU, lie in a pattern of `length`."""
    least, most = (int(position),) * 2 if position.dim() == 0 else (int(position.min()), int(position.max()))
    if least < 0 or most > length - tokens:
        what = "" if tokens == 1 else f" for {tokens} tokens"
        raise ValueError(f"position: got {least if least < 0 else most}{what}, wanted 0 to {length - tokens}")


def check_next(lengths: torch.Tensor, position: int | torch.Tensor) -> None:
    """`position`, an int or int64 of 0 or 1 dimensions, is where rows of these lengths go on."""
    if isinstance(position, int) and lengths.tolist().count(position) == len(lengths):  # quicker than three operations
        return
    wrong = lengths != position
    if not wrong.any():
        return
    row = int(wrong.nonzero()[0])
    came, held = int((wrong.long() * 0 + position)[row]), int(lengths[row])
    where = "" if wrong.all() and bool((lengths == held).all()) else f" for row {row}"
    hint = f"; truncate({came}) goes back" if came < held else ""
    raise ValueError(f"position: got {came}{where}, wanted {held}, the tokens that the cache holds{hint}")


def check_empty(lengths: torch.Tensor) -> None:
    if lengths.any():
        held = int(lengths.max())
        raise ValueError(
            f"k: the cache holds {held} tokens already; decode_attention takes the next ones, truncate(0) forgets them"
        )


def check_padding(mask: torch.Tensor, wanted: tuple[int, int], device: torch.device) -> None:
    if mask.dtype != torch.bool or mask.shape != wanted:
        came = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"key_padding_mask: got {came}, wanted torch.bool of shape {wanted}")
    if mask.device != device:
        raise ValueError(f"key_padding_mask: got a tensor on {mask.device}, wanted {device}")


@torch.compiler.assume_constant_result  # how long a cache is depends on no tensor: to torch.compile it is a number
def _slots(spec: str, prompt: int, rewind: int, shared: bool = False) -> int:
    table = decode_table_for(Pattern.parse(spec), "cpu", prompt, rewind)
    if not shared:
        return table.cache_length
    return 0 if table.shared is None else table.shared.cache_length
