"""A small compiler for patterns: from the visible pairs to the lists of tiles that kernels walk.

Kernels read only the arrays of a `Schedule`, so a new pattern needs no kernel work. A schedule groups the tokens into
tiles of Bq queries by Bk keys in the order that touches the fewest tiles; Column attention, for one, touches every
causal tile in raster order and fewer than half of them in column order. Nothing here is ever S x S: the work is
proportional to the visible pairs that `Pattern.pairs` yields, plus one flag a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch

from dalle_kernels.device import OnDevice, remembered
from dalle_kernels.patterns.patterns import IntArray, Pattern, check_length

WORD_BITS = 32


@dataclass(frozen=True, eq=False)
class Schedule(OnDevice):
    """What kernels walk, for one pattern, tile and length. All tensors are int32 on one device.

    Attributes:
        tile: (Bq, Bk), queries and keys a tile.
        length: tokens S of the sequence; the last tiles may be cut short.
        order: [S], the token at each position; tile t holds positions t * B to (t + 1) * B - 1.
        query_start, query_order: the queries are a run of tokens, from this one on; [L], the row among them at each
            position of a query, in the same order as the tokens'. L is S where all ask.
        key_offsets: [query tiles + 1]; query tile t visits entries key_offsets[t] to key_offsets[t + 1] - 1 of
        key_tiles, mask_ids: [entries], first those with mask id 0 (every pair visible), then the masked ones,
            each ascending by tile.
        full_counts: [query tiles], how many of a tile's entries are of the first kind.
        query_offsets, query_tiles, query_mask_ids, query_full_counts: the same lists by key tile, for the backward.
        masks: [n, Bq, Bk / 32] bit words, deduplicated: bit k % 32 of word k // 32 says that the row's query sees
            key k of the tile. masks[0] is all ones. Keys past S have no bits; query rows past L repeat the last row.
        masks_transposed: [n, Bk, Bq / 32], the same by key.
        visible_pairs, executed_pairs: pairs that the pattern wants, and that whole tiles compute.

    Example:
        >>> schedule = Schedule.build(Row(TokenLayout(256, (32, 32))), tile=(64, 64))
        >>> schedule.visible_pairs, schedule.executed_pairs
        (328304, 430080)
    """

    pattern: Pattern
    tile: tuple[int, int]
    length: int
    order: torch.Tensor
    query_start: int
    query_order: torch.Tensor
    key_offsets: torch.Tensor
    key_tiles: torch.Tensor
    mask_ids: torch.Tensor
    full_counts: torch.Tensor
    query_offsets: torch.Tensor
    query_tiles: torch.Tensor
    query_mask_ids: torch.Tensor
    query_full_counts: torch.Tensor
    masks: torch.Tensor
    masks_transposed: torch.Tensor
    visible_pairs: int
    executed_pairs: int

    def __repr__(self) -> str:
        tiles = self.key_tiles.numel()
        asked = "" if len(self.query_order) == self.length else f"{len(self.query_order)} queries, "
        return (
            f"Schedule({self.pattern}, {self.length} tokens, {asked}{tiles} tiles of {self.tile[0]} x {self.tile[1]}, "
            f"{self.visible_pairs:,} visible of {self.executed_pairs:,} executed pairs)"
        )

    @staticmethod
    def build(
        pattern: Pattern,
        tile: tuple[int, int] = (64, 64),
        length: int | None = None,
        order: np.ndarray | None = None,
        queries: tuple[int, int] | None = None,
    ) -> Schedule:
        """Compiles `pattern` for `tile` = (Bq, Bk), both multiples of 32.

        `length` cuts the sequence to a prefix. `order` [length] overrides the choice of order; it must leave the
        leading keys of every query (the text) in place. `queries` = (first, stop) leaves only these tokens' rows; the
        work stays that of the whole pattern's pairs.

        Raises:
            ValueError: for a tile that is no multiple of 32, a length beyond the pattern's, a bad order or bad queries.

        Example:
            >>> Schedule.build(Row(TokenLayout()), tile=(64, 64)).executed_pairs // 64**2
            105
        """
        length = check_length(pattern, length)
        if len(tile) != 2 or any(side < WORD_BITS or side % WORD_BITS for side in tile):
            raise ValueError(f"tile: got {tile}, wanted two positive multiples of {WORD_BITS}")
        leading, pairs = pattern.leading(length), list(pattern.pairs(length))
        first, stop = queries or (0, length)
        if not 0 <= first < stop <= length:
            raise ValueError(f"queries: got {queries}, wanted first and stop of a run of the {length} tokens")
        if stop - first < length:
            asked = [(query >= first) & (query < stop) for query, _ in pairs]
            pairs = [(query[some], key[some]) for (query, key), some in zip(pairs, asked, strict=True)]
        rows = slice(first, stop)
        fixed = int(leading.max())
        if order is None:
            orders = _orders(pattern, length, tile)
            candidates = [_Grid.over(candidate, leading, pairs, tile, rows) for candidate in orders]
            grid = min(candidates, key=lambda candidate: int(candidate.touched.sum()))
        else:
            order = np.asarray(order, np.int32)
            if not np.array_equal(np.sort(order), np.arange(length)):
                raise ValueError(f"order: wanted a permutation of the {length} tokens")
            if not np.array_equal(order[:fixed], np.arange(fixed)):
                raise ValueError(f"order: the first {fixed} tokens, leading keys of some query, must stay in place")
            grid = _Grid.over(order, leading, pairs, tile, rows)
        return _compile(pattern, grid, leading, pairs)


@remembered(maxsize=256)
def schedule_for(
    pattern: Pattern,
    tile: tuple[int, int],
    length: int | None = None,
    device: torch.device | str = "cpu",
    queries: tuple[int, int] | None = None,
) -> Schedule:
    """`Schedule.build`, remembered per (pattern, tile, length, device, queries)."""
    if length is None:
        return schedule_for(pattern, tile, check_length(pattern, length), device, queries)
    if device == "cpu":
        return Schedule.build(pattern, tile, length, queries=queries)
    return schedule_for(pattern, tile, length, "cpu", queries).to(device)


def _orders(pattern: Pattern, length: int, tile: tuple[int, int]) -> Iterator[IntArray]:
    """Orders worth trying, raster first so that it wins a tie: columns, and blocks about as wide as high (and deep).

    Both go remainder by remainder where the pattern is dilated."""
    raster = np.arange(length, dtype=np.int32)
    yield raster
    grid = pattern.grid_or_none
    if grid is None or int(pattern.leading(length).max()) > grid.text_length:
        return
    image = raster[grid.text_length :]
    if not image.size:
        return
    cells = np.unravel_index(image - grid.text_length, grid.shape)
    place = [cell // step for cell, step in zip(cells, grid.dilation, strict=True)]
    remainder = [cell % step for cell, step in zip(cells, grid.dilation, strict=True)]
    text = raster[: grid.text_length]

    def sorted_by(*keys: np.ndarray) -> IntArray:  # the most significant first
        return np.concatenate([text, image[np.lexsort(tuple(reversed([*remainder, *keys])))]])

    if len(grid.shape) == 2:
        yield sorted_by(place[1], place[0])
    sides = _block(tile[0], len(grid.shape))
    blocks = [axis // side for axis, side in zip(place, sides, strict=True)]
    within = [axis % side for axis, side in zip(place, sides, strict=True)]
    yield sorted_by(*blocks, *within)


def _block(tokens: int, axes: int) -> list[int]:
    """Sides of a block of `tokens` tokens, as alike as powers of two and the first side's root allow."""
    sides = []
    for left in range(axes, 0, -1):
        side = isqrt(tokens) if left == 2 else max(1, round(tokens ** (1 / left)))
        sides.append(side)
        tokens //= side
    return sides


class _Grid(NamedTuple):
    """The tiles that an order touches, between the queries that are asked for and all keys."""

    order: IntArray
    rank: IntArray  # rank[token] = position
    first: int  # token that is a query
    queries: IntArray  # their tokens in the order
    query_rank: IntArray  # query_rank[token] = position among them
    tile: tuple[int, int]
    touched: np.ndarray  # bool [query tiles, key tiles]

    @staticmethod
    def over(
        order: IntArray,
        leading: IntArray,
        pairs: list[tuple[IntArray, IntArray]],
        tile: tuple[int, int],
        rows: slice,
    ) -> _Grid:
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size, dtype=np.int32)
        queries, query_rank = order, rank
        if rows.stop - rows.start < order.size:
            queries = order[(order >= rows.start) & (order < rows.stop)]
            query_rank = np.zeros_like(order)
            query_rank[queries] = np.arange(queries.size, dtype=np.int32)
        columns = -(-order.size // tile[1])
        starts = np.arange(0, queries.size, tile[0])
        reach = -(-np.maximum.reduceat(leading[queries], starts) // tile[1])
        touched = np.arange(columns) < reach[:, None]
        query_tile, key_tile = query_rank // tile[0] * np.int32(columns), rank // tile[1]
        flat = touched.reshape(-1)
        for query, key in pairs:
            flat[query_tile[query] + key_tile[key]] = True
        return _Grid(order, rank, rows.start, queries, query_rank, tile, touched)


def _compile(pattern: Pattern, grid: _Grid, leading: IntArray, pairs: list[tuple[IntArray, IntArray]]) -> Schedule:
    (rows, columns), length = grid.tile, grid.order.size
    query_tile, key_tile = (index.astype(np.int32) for index in np.nonzero(grid.touched))
    starts = np.arange(0, grid.queries.size, rows)
    led = np.minimum.reduceat(leading[grid.queries], starts)
    # Tiles inside every query's leading run are full without looking at a bit: what makes long causal runs cheap.
    partial = np.flatnonzero(led[query_tile] < (key_tile + 1) * columns)
    words = _bits(grid, leading, pairs, query_tile[partial], key_tile[partial])
    masks, ids = _deduplicate(words)
    mask_id = np.zeros(query_tile.size, np.int32)
    mask_id[partial] = ids

    forward = np.lexsort((key_tile, mask_id != 0, query_tile))
    backward = np.lexsort((query_tile, mask_id != 0, key_tile))
    visible = int(leading[grid.queries].sum(dtype=np.int64)) + sum(query.size for query, _ in pairs)
    return Schedule(
        pattern=pattern,
        tile=grid.tile,
        length=length,
        order=torch.from_numpy(grid.order),
        query_start=grid.first,
        query_order=torch.from_numpy(grid.queries - np.int32(grid.first)),
        key_offsets=_offsets(query_tile, grid.touched.shape[0]),
        key_tiles=torch.from_numpy(key_tile[forward]),
        mask_ids=torch.from_numpy(mask_id[forward]),
        full_counts=_count(query_tile[mask_id == 0], grid.touched.shape[0]),
        query_offsets=_offsets(key_tile, grid.touched.shape[1]),
        query_tiles=torch.from_numpy(query_tile[backward]),
        query_mask_ids=torch.from_numpy(mask_id[backward]),
        query_full_counts=_count(key_tile[mask_id == 0], grid.touched.shape[1]),
        masks=torch.from_numpy(masks.view(np.int32)),
        masks_transposed=torch.from_numpy(_transpose_bits(masks).view(np.int32)),
        visible_pairs=visible,
        executed_pairs=query_tile.size * rows * columns,
    )


def _bits(
    grid: _Grid,
    leading: IntArray,
    pairs: list[tuple[IntArray, IntArray]],
    query_tile: IntArray,
    key_tile: IntArray,
) -> np.ndarray:
    """The bit words uint32 [tiles, Bq, Bk / 32] of the given tiles."""
    (rows, columns), queries = grid.tile, grid.queries.size
    per_row = columns // WORD_BITS

    # Leading keys: a run of low bits in each word.
    position = np.minimum(query_tile[:, None] * rows + np.arange(rows), queries - 1)
    first_key = key_tile[:, None] * columns + np.arange(per_row) * WORD_BITS
    run = leading[grid.queries[position]][:, :, None] - first_key[:, None, :]
    words = ((np.uint64(1) << np.clip(run, 0, WORD_BITS).astype(np.uint64)) - np.uint64(1)).astype(np.uint32)

    # The other pairs, one bit each. A query stands at most once in an array of pairs, so no word is written twice.
    index = np.full(grid.touched.shape, -1, np.int64)
    index[query_tile, key_tile] = np.arange(query_tile.size)
    row_of, bit_of = grid.query_rank % rows, np.uint32(1) << (grid.rank % WORD_BITS).astype(np.uint32)
    word_of = grid.rank % columns // WORD_BITS
    query_tile_of, key_tile_of = grid.query_rank // rows, grid.rank // columns
    flat = words.reshape(-1)
    for query, key in pairs:
        word = (index[query_tile_of[query], key_tile_of[key]] * rows + row_of[query]) * per_row + word_of[key]
        flat[word] |= bit_of[key]

    if queries % rows:
        last = query_tile == grid.touched.shape[0] - 1
        words[last, queries % rows :] = words[last, queries % rows - 1][:, None]
    return words


def _deduplicate(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct masks with the full one first, and each tile's index among them."""
    full = np.full((1, *words.shape[1:]), np.uint32(0xFFFFFFFF))
    rows = np.ascontiguousarray(words).reshape(len(words), words.shape[1] * words.shape[2])
    opaque = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(-1)
    _, first, inverse = np.unique(opaque, return_index=True, return_inverse=True)
    distinct = words[first]
    is_full = (distinct == full[0]).all(axis=(1, 2))
    new_id = np.where(is_full, 0, np.cumsum(~is_full))
    return np.concatenate([full, distinct[~is_full]]), new_id[inverse].astype(np.int32)


def _transpose_bits(masks: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")
    packed = np.packbits(bits.transpose(0, 2, 1), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view(np.uint32)


def _count(tiles: IntArray, number: int) -> torch.Tensor:
    return torch.from_numpy(np.bincount(tiles, minlength=number).astype(np.int32))


def _offsets(tiles: IntArray, number: int) -> torch.Tensor:
    return torch.nn.functional.pad(_count(tiles, number).cumsum(0, dtype=torch.int32), (1, 0))
