"""Questions that every operation asks of its arguments: one clear error each, naming what came and what was wanted."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Kernels compute in float32: the least number whose inverse it holds, and the largest that does not round to infinity.
LEAST, LARGEST = torch.finfo(torch.float32).tiny, math.nextafter(2.0**128 - 2.0**103, 0)
_HIGHEST = torch.finfo(torch.float32).max

LEAST_SAID = f"{LEAST:.2g}"  # once: torch.compile(dynamic=True) makes symbols of floats, which format as nothing


def check_tensor(name: str, value: object, rank: int | None = None) -> None:
    """`value` is a floating-point tensor, of `rank` dimensions where one is given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.Tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got {value.dtype}, wanted float16, bfloat16, float32 or float64")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {rank} dimensions")


def check_alike(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors share dtype and device."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: got {value.dtype}, wanted {other.dtype} as {other_name} has")
    if value.device != other.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, wanted {other.device} where {other_name} is")


def check_number(
    name: str, value: object, wanted: str, least: float = -LARGEST, most: float = LARGEST, or_zero: bool = False
) -> float:
    """`value` as a float: a real number of any type, NumPy's too, from `least` to `most`, or 0 if that is allowed.

    Where it would round to the largest float32 it is that float32: torch converts nothing beyond.
    """
    number = math.nan
    if isinstance(value, (float, numbers.Real)):  # float: an ABC is slow to ask
        try:
            number = float(value)
        except OverflowError:  # of an int or a fraction
            number = math.inf
    if not (least <= number <= most or (or_zero and number == 0)):
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
    return max(-_HIGHEST, min(number, _HIGHEST))


def as_int(name: str, value: object) -> int:
    """`value` as an int: any integral number, NumPy's too."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, wanted an int") from None


def check_scale(scale: float | None) -> None:
    if scale is not None:
        check_number("scale", scale, "a finite number in float32, or None")


def check_softcap(softcap: object) -> float | None:
    if softcap is None:
        return None
    check_number("softcap", softcap, "a number from 1e-20 to 1e20, or None", least=1e-20, most=1e20)
    return float(softcap)  # type: ignore[arg-type]


def check_temperature(temperature: object) -> float:
    return check_number("temperature", temperature, f"a finite number of at least {LEAST_SAID}", least=LEAST)


def positive_temperature(temperature: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
    """`temperature` as kernels on `device` are given it: a 0-dim float32 tensor on a GPU, on the CPU any number.

    A number must be above 0 in float32, and finite. A tensor is taken as it is: to look at one on a GPU, the host would
    have to wait; on the CPU `positive_there` looks.
    """
    if not isinstance(temperature, torch.Tensor):
        temperature = check_temperature(temperature)
        return temperature if device.type == "cpu" else torch.full((), temperature, dtype=torch.float32, device=device)
    if temperature.numel() != 1:
        raise ValueError(f"temperature: got shape {tuple(temperature.shape)}, wanted one number")
    return _scalar(temperature.detach()).to(device, torch.float32)


def positive_there(temperature: float | torch.Tensor) -> None:
    """Looks at a temperature on the CPU, which no door could where it came as a tensor."""
    if isinstance(temperature, torch.Tensor) and temperature.is_cpu:
        check_temperature(temperature.item())


def seed_and_row(
    seed: int | torch.Tensor | None, row_offset: int | torch.Tensor, device: torch.device
) -> tuple[int | torch.Tensor, int | torch.Tensor]:
    """Both as kernels on `device` are given them: 0-dim int64 tensors on a GPU, on the CPU ints too.

    A seed of None is drawn from torch's generator there. See `dalle_kernels.noise`.
    """
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    else:
        seed = _int64("seed", seed, -(2**63), "an int of 64 bits", device)
    return seed, _int64("row_offset", row_offset, 0, "an int from 0 to 2**63 - 1", device)


def _int64(name: str, value: object, least: int, wanted: str, device: torch.device) -> int | torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.dtype != torch.int64:
            raise ValueError(f"{name}: got {value.dtype} of shape {tuple(value.shape)}, wanted one int64")
        return _scalar(value).to(device)
    if not isinstance(value, (int, numbers.Integral)) or not least <= int(value) < 2**63:  # ABCs are slow
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
    return int(value) if device.type == "cpu" else torch.full((), int(value), dtype=torch.int64, device=device)


def _scalar(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(()) if tensor.dim() else tensor


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of `kind`; some, such as "meta", have none."""
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast would hand them to scaled_dot_product_attention: float32 and lower cast, float64 not."""
    if not torch._C._is_any_autocast_enabled() or not autocasts(kind := tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def autocast_to_float32(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast would hand them to torch's own losses: lower than float32 cast to it, others not."""
    if not torch._C._is_any_autocast_enabled() or not autocasts(tensors[0].device.type):
        return tensors
    return tuple(tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for tensor in tensors)


def outside_autocast(kind: str, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` with autocast off for devices of `kind`: what backends are given is cast already, and what they
    widen of it is not autocast's to narrow."""
    if not torch._C._is_any_autocast_enabled() or not autocasts(kind):
        return function(*args)
    with torch.autocast(kind, enabled=False):
        return function(*args)


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
