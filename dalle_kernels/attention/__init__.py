"""Sparse attention: layouts, patterns, schedules and the operation."""

from dalle_kernels.attention.layout import TokenLayout
from dalle_kernels.attention.patterns import (
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
from dalle_kernels.attention.schedule import Schedule, schedule_for

__all__ = [
    "AxialRow",
    "Causal",
    "Column",
    "Convolution",
    "Fixed",
    "MaskPattern",
    "Pattern",
    "Row",
    "Schedule",
    "Strided",
    "TokenLayout",
    "dalle_pattern_schedule",
    "schedule_for",
]
