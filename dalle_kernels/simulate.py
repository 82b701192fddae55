"""What a pattern costs, before anything runs: `python -m dalle_kernels.simulate 'Neighborhood((64, 64), 13)'`.

Prints visible and executed pairs, tiles, the order that tokens are walked in, the keys of a query, and the best
speed-up over dense attention that arithmetic allows.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dalle_kernels import patterns
from dalle_kernels.patterns import Pattern, Schedule, picture

_NAMES: dict[str, Callable[..., object]] = {
    name: getattr(patterns, name)
    for name in patterns.__all__
    if name in ("TokenLayout", "dalle_pattern_schedule")
    or (isinstance(getattr(patterns, name), type) and issubclass(getattr(patterns, name), Pattern))
}


def parse(expression: str) -> Pattern:
    """The pattern that `expression` makes: constructors of `dalle_kernels`, numbers, tuples, | and &, nothing else.

    Raises:
        ValueError: for anything else, or where a constructor refuses its arguments.

    Example:
        >>> parse("Row(TokenLayout(256, (32, 32))) | Column(TokenLayout(256, (32, 32)))").length
        1280
    """
    try:
        made = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"pattern: got {expression!r}, which does not parse: {error.msg}") from error
    except TypeError as error:
        raise ValueError(f"pattern: {error}") from error
    if not isinstance(made, Pattern):
        raise ValueError(f"pattern: got {expression!r}, wanted an expression that makes a pattern")
    return made


def _evaluate(node: ast.expr) -> object:
    match node:
        case ast.Constant():
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
        case ast.Tuple() | ast.List():
            return tuple(_evaluate(element) for element in node.elts)
        case ast.BinOp(op=ast.BitOr() | ast.BitAnd()):
            left, right = _evaluate(node.left), _evaluate(node.right)
            if isinstance(left, Pattern) and isinstance(right, Pattern):
                return left | right if isinstance(node.op, ast.BitOr) else left & right
        case ast.Call(func=ast.Name(id=name)) if name in _NAMES:
            named = {each.arg: _evaluate(each.value) for each in node.keywords if each.arg}
            return _NAMES[name](*map(_evaluate, node.args), **named)
        case ast.Call(func=ast.Attribute(value=value, attr="shifted")):
            moved = _evaluate(value)
            if isinstance(moved, Pattern):
                return moved.shifted(*map(_evaluate, node.args))  # type: ignore[arg-type]
    known = ", ".join(sorted(_NAMES))
    raise ValueError(f"pattern: got {ast.unparse(node)!r}, wanted constructors of {known}, numbers, tuples, | and &")


def report(pattern: Pattern, tile: tuple[int, int] = (64, 64)) -> list[str]:
    """The figures, a line each."""
    schedule = Schedule.build(pattern, tile)
    length, visible = pattern.length, pattern.visible_pairs
    causal = all(bool((key <= query).all()) for query, key in pattern.pairs(length))
    causal = causal and bool((pattern.leading(length) <= np.arange(1, length + 1)).all())
    dense = length * (length + 1) // 2 if causal else length**2
    tiles, full = schedule.key_tiles.numel(), int((schedule.mask_ids == 0).sum())
    raster = bool((schedule.order == schedule.order.sort().values).all())
    share, kind = visible / schedule.executed_pairs, "causal " if causal else ""
    return [
        f"{pattern!r}",
        f"tokens            {length:,}",
        f"visible pairs     {visible:,} of {dense:,} {kind}ones",
        f"executed pairs    {schedule.executed_pairs:,} in whole tiles ({share:.0%} of them visible)",
        f"tiles             {tiles:,} of {tile[0]} x {tile[1]}: {full:,} full, {tiles - full:,} masked by "
        f"{schedule.masks.shape[0] - 1:,} distinct masks",
        f"order             {'raster' if raster else 'not raster: tokens are walked as ' + _walk(schedule)}",
        f"best speed-up     {dense / visible:.2f}x over dense {kind}attention by arithmetic alone, "
        f"{dense / schedule.executed_pairs:.2f}x by whole tiles",
    ]


def _walk(schedule: Schedule) -> str:
    grid = schedule.pattern.grid_or_none
    front = 0 if grid is None else grid.text_length
    return ", ".join(map(str, schedule.order[front : front + 10].tolist())) + ", ..."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dalle_kernels.simulate", description=__doc__.splitlines()[0])
    parser.add_argument("pattern", help="such as 'Row(TokenLayout(256, (32, 32)))'")
    parser.add_argument("--tile", type=int, nargs=2, default=(64, 64), metavar=("QUERIES", "KEYS"))
    parser.add_argument("--query", type=int, help="show the keys of this token; the middle of the grid if not given")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the mask, its tiles and the query's keys")
    asked = parser.parse_args(arguments)
    try:
        pattern = parse(asked.pattern)
        print("\n".join(report(pattern, tuple(asked.tile))))
        if pattern.length <= picture.LARGEST_MASK or asked.query is not None:
            print(pattern.show(asked.query))
        if asked.plot:
            print(f"drawn: {pattern.plot(asked.plot, asked.query)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"--plot: {error}; pip install matplotlib", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
