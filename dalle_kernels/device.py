"""Records of tensors that move to a device together."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Self

import torch


class OnDevice:
    """For dataclasses: the fields that are tensors, or such records, share a device."""

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (torch.Tensor, OnDevice)):
                moved[field.name] = value.to(device)
        return replace(self, **moved)  # type: ignore[type-var]
