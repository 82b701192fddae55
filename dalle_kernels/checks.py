"""Questions that every operation asks of its arguments: one clear error each, naming what came and what was wanted."""

from __future__ import annotations

import math
import numbers
import operator

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Kernels compute in float32: the least number whose inverse it holds, and the largest that does not round to infinity.
LEAST, LARGEST = torch.finfo(torch.float32).tiny, math.nextafter(2.0**128 - 2.0**103, 0)

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
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:  # of an int or a fraction
            number = math.inf
    if not (least <= number <= most or (or_zero and number == 0)):
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
    highest = torch.finfo(torch.float32).max
    return max(-highest, min(number, highest))


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


def positive_temperature(temperature: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`temperature` as a 0-dim float32 tensor on `device`; a number must be above 0 there, and finite.

    A tensor is taken as it is: to look at one on a GPU, the host would have to wait.
    """
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature: got shape {tuple(temperature.shape)}, wanted one number")
        return temperature.detach().reshape(()).to(device, torch.float32)
    return torch.full((), check_temperature(temperature), dtype=torch.float32, device=device)


def seed_tensor(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """`seed` as a 0-dim int64 tensor on `device`; None draws one from torch's generator there."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed: got {seed.dtype} of shape {tuple(seed.shape)}, wanted one int64")
        return seed.reshape(()).to(device)
    if not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed!r}, wanted an int of 64 bits")
    return torch.full((), int(seed), dtype=torch.int64, device=device)


def noise_key(seed: int | torch.Tensor | None, row_offset: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """int64 [2] on `device`: `seed`, and which row of the noise the first row takes; see `dalle_kernels.noise`."""
    if isinstance(row_offset, torch.Tensor):
        if row_offset.numel() != 1 or row_offset.dtype != torch.int64:
            came = f"{row_offset.dtype} of shape {tuple(row_offset.shape)}"
            raise ValueError(f"row_offset: got {came}, wanted one int64")
        first = row_offset.reshape(()).to(device)
    elif not isinstance(row_offset, numbers.Integral) or not 0 <= row_offset < 2**63:
        raise ValueError(f"row_offset: got {row_offset!r}, wanted an int from 0 to 2**63 - 1")
    else:
        first = torch.full((), int(row_offset), dtype=torch.int64, device=device)
    return torch.stack((seed_tensor(seed, device), first))


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of `kind`; some, such as "meta", have none."""
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast would hand them to scaled_dot_product_attention: float32 and lower cast, float64 not."""
    kind = tensors[0].device.type
    if not autocasts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def autocast_to_float32(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast would hand them to torch's own losses: lower than float32 cast to it, others not."""
    if not autocasts(tensors[0].device.type):
        return tensors
    return tuple(tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for tensor in tensors)


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
