"""Where text and image tokens stand in the one stream that the transformer models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """`text_length` text tokens, then a `grid` = (rows, columns) of image tokens in raster order.

    Raises:
        ValueError: if `text_length` is negative or a side of `grid` is less than 1.

    Example:
        >>> TokenLayout(text_length=256, grid=(32, 32)).length
        1280
    """

    text_length: int = 256
    grid: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        if not isinstance(self.text_length, int) or self.text_length < 0:
            raise ValueError(f"text_length: got {self.text_length!r}, wanted an int >= 0")
        grid = tuple(self.grid)
        if len(grid) != 2 or not all(isinstance(side, int) and side >= 1 for side in grid):
            raise ValueError(f"grid: got {self.grid!r}, wanted two ints (rows, columns), each >= 1")
        object.__setattr__(self, "grid", grid)

    @property
    def rows(self) -> int:
        return self.grid[0]

    @property
    def columns(self) -> int:
        return self.grid[1]

    @property
    def image_length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """Tokens in the whole stream."""
        return self.text_length + self.image_length
