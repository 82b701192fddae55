"""The CUDA library's operations for CPU tensors: what they are given is copied to a device for a call, and back.

So the tests that the emulation serves put the compiled kernels to the same questions, where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import torch


class Elsewhere:
    """`operations`, run on `device`. Strides, offsets and what shares memory with what are kept."""

    def __init__(self, operations: Any, device: torch.device) -> None:
        self.operations = operations
        self.device = device

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.operations, name)
        if all(argument.type.kind() == "IntType" for argument in operation.default._schema.arguments):
            return operation  # what it says of its kernels
        return lambda *arguments: self._run(operation, arguments)

    def _run(self, operation: Any, arguments: tuple[Any, ...]) -> None:
        copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def there(argument: Any) -> Any:
            if not isinstance(argument, torch.Tensor):
                return argument
            here = argument.untyped_storage()
            if here.data_ptr() not in copies:
                copy = torch.UntypedStorage(here.nbytes(), device=self.device)
                copies[here.data_ptr()] = here, copy.copy_(here) if here.nbytes() else copy
            empty = torch.empty(0, dtype=argument.dtype, device=self.device)
            storage = copies[here.data_ptr()][1]
            return empty.set_(storage, argument.storage_offset(), argument.shape, argument.stride())

        operation(*map(there, arguments))
        for here, copy in copies.values():
            if here.nbytes():
                here.copy_(copy)
