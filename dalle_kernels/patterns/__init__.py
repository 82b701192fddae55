"""Who may attend to whom: layouts, patterns, and what is derived from them: tile schedules and decode tables."""

from dalle_kernels.patterns.composed import Intersection, Packed, Shifted, Union
from dalle_kernels.patterns.drawing import Diagonal
from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.neighborhood import Neighborhood
from dalle_kernels.patterns.patterns import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Fixed,
    MaskPattern,
    Pattern,
    Row,
    Strided,
    dalle_pattern_schedule,
)
from dalle_kernels.patterns.schedule import Schedule, schedule_for

__all__ = [
    "AxialRow",
    "Causal",
    "Column",
    "Convolution",
    "Diagonal",
    "Fixed",
    "Intersection",
    "MaskPattern",
    "Neighborhood",
    "Packed",
    "Pattern",
    "Row",
    "Schedule",
    "Shifted",
    "Strided",
    "TokenLayout",
    "Union",
    "dalle_pattern_schedule",
    "schedule_for",
]
