"""Putting a class of ours in front of one of another project's, for instances that exist already."""

from __future__ import annotations

from typing import Any


class Extension:
    """What is put in front of one of their classes, whose instances it leaves that; copied and pickled by its parts."""

    _parts: tuple[type, type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if "_parts" not in vars(type(self)):  # somebody extended the class further
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        return _remake, self._parts, self.__getstate__()  # type: ignore[attr-defined]


_MADE: dict[tuple[type, type], type] = {}


def extend(extension: type, base: type) -> type:
    """The class that has `extension` in front of `base`, one of theirs."""
    parts = (extension, base)
    if parts not in _MADE:
        names = {"__module__": base.__module__, "__doc__": base.__doc__, "_parts": parts}
        _MADE[parts] = type(base.__name__, parts, names)
    return _MADE[parts]


def _remake(extension: type, base: type) -> Any:
    kind: Any = extend(extension, base)
    return kind.__new__(kind)
