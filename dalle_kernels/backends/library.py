"""The torch.library namespace `dalle_kernels::`, and how a room adds an operation to it.

An operation is stated by its room's NamedTuples (contract.py); here they are flattened, once, to what torch's schemas
can say. What a call passes:

- on plain CPU tensors, with no mode and no transform on, the backend's function directly, under an autograd.Function
  where a gradient is wanted;
- otherwise torch's dispatcher and `dalle_kernels::name`, which torch.compile, torch.export, torch.func, FakeTensorMode
  and every other mode see as one node.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from types import NoneType
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from dalle_kernels.backends.choice import Operation
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.sharding import Axis, Choice, Merge, divided, locally
from dalle_kernels.checks import outside_autocast
from dalle_kernels.device import remembered
from dalle_kernels.patterns.patterns import Pattern

_LIBRARY = torch.library.Library("dalle_kernels", "FRAGMENT")

In = TypeVar("In", bound=tuple[Any, ...])
Out = TypeVar("Out", bound=tuple[Any, ...])


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the operation of `schema`, served on every device by `kernel` and on fake tensors by `fake`."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _where_the_tensors_are(kernel), "CUDA")
    torch.library.register_fake(f"dalle_kernels::{name}", fake, lib=_LIBRARY)


def _where_the_tensors_are(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` with its first CUDA tensor's device current: that is where launches go, whatever they are given."""

    @functools.wraps(kernel)
    def guarded(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.device.type == "cuda")
        if device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    return guarded


class _Kind(NamedTuple):
    """How a field's type passes through a schema.

    A float passes as a float64 tensor on the CPU: torch.compile guards the value of an argument of type float, so that
    each new temperature would compile anew. So do an int and a float in whose place a tensor may come.
    """

    schema: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def _encode_float(value: float | torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if torch.compiler.is_compiling():  # as a product it stays symbolic
        return torch.ones((), dtype=torch.float64, device="cpu") * value
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _encode_int(value: int | torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=torch.int64, device="cpu")


_KINDS: dict[Any, _Kind] = {
    torch.Tensor: _Kind("Tensor", lambda value: value, lambda value: value),
    bool: _Kind("bool", lambda value: value, lambda value: value),
    int: _Kind("int", lambda value: value, lambda value: value),
    str: _Kind("str", lambda value: value, lambda value: value),
    float: _Kind("Tensor", _encode_float, lambda value: value.item() if isinstance(value, torch.Tensor) else value),
    float | torch.Tensor: _Kind("Tensor", _encode_float, lambda value: value),
    int | torch.Tensor: _Kind("Tensor", _encode_int, lambda value: value),
    Pattern: _Kind(
        "str",
        lambda value: value.spec if isinstance(value, Pattern) else value,
        lambda value: Pattern.parse(value) if isinstance(value, str) else value,
    ),
}


def _kind(hint: Any) -> _Kind:
    """Of a field's type, or of what it is where it is not None."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    return _KINDS[functools.reduce(operator.or_, kinds)]


class _Form(Generic[In]):
    """A room's NamedTuple as part of a schema."""

    def __init__(self, record: type[In]) -> None:
        hints = get_type_hints(record)
        self.record = record
        self.fields: tuple[str, ...] = record._fields  # type: ignore[attr-defined]
        self.optional = [NoneType in get_args(hints[name]) for name in self.fields]
        self.kinds = [_kind(hints[name]) for name in self.fields]

    def schema(self, prefix: str = "", writes: tuple[str, ...] = ()) -> str:
        """The fields as arguments, of which an operation `writes` some."""
        marks = {name: f"({letter}!)" for name, letter in zip(writes, ascii_lowercase, strict=False)}
        return ", ".join(
            f"{kind.schema}{marks.get(name, '')}{'?' * optional} {prefix}{name}"
            for name, kind, optional in zip(self.fields, self.kinds, self.optional, strict=True)
        )

    def encode(self, values: Iterable[Any]) -> list[Any]:
        """What passes through the schema for `values`; what is encoded already stays."""
        return [None if value is None else kind.encode(value) for kind, value in zip(self.kinds, values, strict=True)]

    def decode(self, values: Iterable[Any]) -> In:
        """The record again."""
        return self.record._make(  # type: ignore[attr-defined]
            (None if value is None else kind.decode(value) for kind, value in zip(self.kinds, values, strict=True))
        )


@dataclass(frozen=True)
class Derivative:
    """What makes an operation differentiable.

    Attributes:
        name: of the operation that computes gradients.
        grads, kept, needs: the room's NamedTuples.
        backward: (backend, grads, kept, needs) -> the gradients in the order of `needs`.
        jvp: (tangents, kept) -> tangents of the outputs in the order of `grads`; tangents in the order of `needs`, None
            where there is none. Plain PyTorch, for any device.
        like: what a gradient looks like, by its input.
        fake: kept -> what all gradients look like, where their inputs are not kept.
    """

    name: str
    grads: type[tuple[Any, ...]]
    kept: type[tuple[Any, ...]]
    needs: type[tuple[Any, ...]]
    backward: Callable[[Any, Any, Any, Any], tuple[torch.Tensor | None, ...]]
    jvp: Callable[[Any, Any], tuple[torch.Tensor | None, ...]]
    like: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like
    fake: Callable[[Any], tuple[torch.Tensor, ...]] | None = None


class Entry(Generic[In, Out]):
    """An operation of the namespace, called with its room's `Inputs` and a backend's name.

    Args:
        name: in the namespace.
        operation: its backends.
        inputs, outputs: the room's NamedTuples.
        call: Inputs or Kept -> what a backend is chosen by.
        forward: (backend, inputs) -> outputs, with the checks that look at values.
        fake: (inputs, backend's name) -> outputs without their values; floats are tensors in it.
        axes: along which DTensors are served in parts.
        derivative: None for an operation that has none.
        writes: inputs that it changes in place. vmap does not know what that means for samples that share them.
        choice: what of DTensors it chooses among, or merges what comes of its parts.
    """

    def __init__(
        self,
        name: str,
        operation: Operation[Any],
        inputs: type[In],
        outputs: type[Out],
        call: Callable[[Any], Call],
        forward: Callable[[Any, In], Out],
        fake: Callable[[In, str], Out],
        axes: tuple[Axis, ...],
        derivative: Derivative | None = None,
        writes: tuple[str, ...] = (),
        choice: Choice | Merge | None = None,
    ) -> None:
        self._axes, self._choice = axes, choice
        self._operation, self._call, self._forward = operation, call, forward
        self._inputs, self._outputs = _Form(inputs), _Form(outputs)
        self._single = len(self._outputs.fields) == 1
        returns = "Tensor" if self._single else f"({', '.join(['Tensor'] * len(self._outputs.fields))})"

        def flat(outputs: Out) -> Any:
            return outputs[0] if self._single else tuple(outputs)

        define(
            f"{name}({self._inputs.schema(writes=writes)}, str backend) -> {returns}",
            lambda *args: flat(self._run(self._inputs.decode(args[:-1]), args[-1])),
            lambda *args: flat(fake(inputs(*args[:-1]), args[-1])),
        )
        self._op = getattr(torch.ops.dalle_kernels, name).default
        self._derivative = None if derivative is None else _Derived(self, name, derivative)
        if not writes:
            torch.library.register_vmap(f"dalle_kernels::{name}", _sample_by_sample(self._op), lib=_LIBRARY)

    def __call__(self, inputs: In, backend: str) -> Out:
        if plain(inputs):
            if self._derivative is None or not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
                return self._run(inputs, backend)
            return self._outputs.record(*self._derivative.apply_plain(inputs, backend))
        if divided(inputs):
            return locally(self, self._axes, inputs, backend, self._choice)
        result = self._op(*self._inputs.encode(inputs), backend)
        return self._outputs.record(result) if self._single else self._outputs.record(*result)

    @property
    def outputs(self) -> type[Out]:
        return self._outputs.record

    @property
    def needs(self) -> tuple[str, ...]:
        """The inputs that have a derivative."""
        return self._stated.needs._fields  # type: ignore[attr-defined]

    def keep(self, ctx: Any, values: Mapping[str, Any]) -> None:
        """Leaves in `ctx` what the backward wants of inputs and outputs, by name."""
        keep(ctx, [values[name] for name in self._stated.kept._fields])  # type: ignore[attr-defined]

    def gradients(self, ctx: Any, grads: tuple[torch.Tensor | None, ...], backend: str) -> tuple[Any, ...]:
        """Those that the last inputs of an autograd.Function's `ctx` ask for, of all outputs' gradients."""
        assert self._derivative is not None
        return self._derivative.gradients(grads, restored(ctx), list(ctx.needs_input_grad[-len(self.needs) :]), backend)

    @property
    def _stated(self) -> Derivative:
        assert self._derivative is not None
        return self._derivative.stated

    def _run(self, inputs: In, backend: str) -> Out:
        call = self._call(inputs)
        return outside_autocast(call.device.type, self._forward, self._operation.choose(backend, call), inputs)


class _Derived:
    """The derivative of an `Entry`: the operation for its gradients, and what autograd is told."""

    def __init__(self, entry: Entry[Any, Any], name: str, derivative: Derivative) -> None:
        self._entry, self._name, self.stated = entry, name, derivative
        self._grads, self._kept = _Form(derivative.grads), _Form(derivative.kept)
        inputs, outputs = entry._inputs.fields, entry._outputs.fields
        self._keeps = [(inputs + outputs).index(field) for field in self._kept.fields]
        self._needs = [inputs.index(field) for field in derivative.needs._fields]  # type: ignore[attr-defined]
        if derivative.fake is None:
            self._from = [self._kept.fields.index(inputs[place]) for place in self._needs]
        self._differentiable = [outputs.index(field) for field in self._grads.fields]
        self._constant = [place for place in range(len(outputs)) if place not in self._differentiable]
        define(
            f"{derivative.name}({self._grads.schema('grad_')}, {self._kept.schema()}, bool[] needs, str backend)"
            f" -> ({', '.join(['Tensor'] * len(self._needs))})",
            self._kernel,
            self._fake,
        )
        self._op = getattr(torch.ops.dalle_kernels, derivative.name).default
        self._function, self._plain_function = self._forward_function(), self._forward_of_plain()
        once = self._backward_function()
        torch.library.register_vmap(f"dalle_kernels::{derivative.name}", _sample_by_sample(self._op), lib=_LIBRARY)
        _differentiate(name, self._apply)
        _differentiate(derivative.name, once.apply)

    def _apply(self, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        outputs = self._function.apply(keyset, args[-1], *args[:-1])
        return outputs[0] if self._entry._single else outputs

    def apply_plain(self, inputs: tuple[Any, ...], backend: str) -> tuple[torch.Tensor, ...]:
        """The outputs on plain tensors; autograd is told of those alone that may have a derivative."""
        return self._plain_function.apply(backend, inputs, *[inputs[place] for place in self._needs])

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], list[bool]]:
        count = len(self._grads.fields)
        return args[:count], args[count:-2], args[-2]

    def _run(self, grads: Iterable[Any], kept: Iterable[Any], needs: Iterable[bool], backend: str) -> tuple[Any, ...]:
        record = self._kept.decode(kept)
        call = self._entry._call(record)
        module = self._entry._operation.choose(backend, call)
        asked: Any = self.stated
        given = module, asked.grads(*grads), record, asked.needs(*needs)
        gradients = outside_autocast(call.device.type, asked.backward, *given)
        return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))

    def _kernel(self, *args: Any) -> Any:
        grads, kept, needs = self._split(args)
        gradients = self._run(grads, kept, needs, args[-1])
        return self._flat([kept[0].new_empty(0) if gradient is None else gradient for gradient in gradients])

    def _fake(self, *args: Any) -> Any:
        _, kept, needs = self._split(args)
        if self.stated.fake is not None:
            likes = self.stated.fake(self.stated.kept(*kept))
            return self._flat([like if need else kept[0].new_empty(0) for like, need in zip(likes, needs, strict=True)])
        return self._flat(
            [
                self.stated.like(kept[place]) if need and kept[place] is not None else kept[0].new_empty(0)
                for place, need in zip(self._from, needs, strict=True)
            ]
        )

    def _flat(self, gradients: list[torch.Tensor]) -> Any:
        """A schema that returns one tensor returns it bare."""
        return tuple(gradients) if len(self._needs) > 1 else gradients[0]

    def gradients(
        self, grads: tuple[torch.Tensor | None, ...], kept: list[Any], needs: list[bool], backend: str
    ) -> tuple[Any, ...]:
        """In the order of `needs`."""
        wanted = [grads[place] for place in self._differentiable]
        if all(grad is None for grad in wanted):
            return (None,) * len(needs)
        if not torch.is_grad_enabled() and plain((*wanted, *kept)):
            return self._run(wanted, kept, needs, backend)
        made = self._op(*wanted, *self._kept.encode(kept), needs, backend)
        made = (made,) if len(self._needs) == 1 else made
        return tuple(gradient if need else None for gradient, need in zip(made, needs, strict=True))

    def _forward_of_plain(self) -> Any:
        derived, entry = self, self._entry

        class Plain(torch.autograd.function._SingleLevelFunction):
            @staticmethod
            def forward(ctx: Any, backend: str, inputs: tuple[Any, ...], *_: Any) -> tuple[torch.Tensor, ...]:
                outputs = entry._run(inputs, backend)
                derived._remember(ctx, backend, (*inputs, *outputs), outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
                needs = list(ctx.needs_input_grad[2:])
                return None, None, *derived.gradients(grads, restored(ctx), needs, ctx.backend)

        return Plain

    def _remember(
        self, ctx: Any, backend: str, values: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], for_jvp: bool = False
    ) -> None:
        ctx.backend = backend
        keep(ctx, [values[place] for place in self._keeps], for_jvp)
        if self._constant:
            ctx.mark_non_differentiable(*[outputs[place] for place in self._constant])
        ctx.set_materialize_grads(False)

    def _forward_function(self) -> Any:
        derived, entry = self, self._entry

        class Forward(torch.autograd.function._SingleLevelFunction):
            @staticmethod
            def forward(keyset: Any, backend: str, *values: Any) -> tuple[torch.Tensor, ...]:
                result = _below_autograd(entry._op, keyset, (*values, backend))
                return (result,) if entry._single else result

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
                derived._remember(ctx, inputs[1], (*inputs[2:], *output), output, for_jvp=True)

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
                needs = [ctx.needs_input_grad[2 + place] for place in derived._needs]
                gradients: list[torch.Tensor | None] = [None] * len(entry._inputs.fields)
                made = derived.gradients(grads, restored(ctx), needs, ctx.backend)
                for place, gradient in zip(derived._needs, made, strict=True):
                    gradients[place] = gradient
                return None, None, *gradients

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
                outputs: list[torch.Tensor | None] = [None] * len(entry._outputs.fields)
                wanted = tuple(tangents[2 + place] for place in derived._needs)
                kept = derived._kept.decode(restored(ctx))
                made = outside_autocast(kept[0].device.type, derived.stated.jvp, wanted, kept)
                for place, tangent in zip(derived._differentiable, made, strict=True):
                    outputs[place] = tangent
                return tuple(outputs)

        return Forward

    def _backward_function(self) -> Any:
        derived, message = self, f"{self._name}: asked for a second derivative, which it does not have"

        class Once(torch.autograd.function._SingleLevelFunction):
            @staticmethod
            def forward(keyset: Any, *args: Any) -> tuple[torch.Tensor, ...]:
                return _below_autograd(derived._op, keyset, args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
                pass

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                raise RuntimeError(message)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise RuntimeError(message)

        return Once


_SAVED = object()


def keep(ctx: Any, values: list[Any], for_jvp: bool = False) -> None:
    """Leaves values, tensors among them, in an autograd.Function's `ctx`."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    if for_jvp:
        ctx.save_for_forward(*tensors)
    ctx.kept = [_SAVED if isinstance(value, torch.Tensor) else value for value in values]


def restored(ctx: Any) -> list[Any]:
    """What `keep` has left there."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if value is _SAVED else value for value in ctx.kept]


def _differentiate(name: str, apply: Callable[..., Any]) -> None:
    """Has `apply(keyset, *args)` called where the operation would be differentiated."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        # Always: that no tensor has a tangent cannot be known. A graph of torch.compile enters levels that forward_ad
        # does not see.
        if not torch._C._are_functorch_transforms_active():
            return apply(keyset, *args)
        with enable_single_level_autograd_function():
            return apply(keyset, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _below_autograd(op: Any, keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
    """What `op` gives at this level. A transform of torch.func further out differentiates it anew at its own."""
    with torch._C._AutoDispatchBelowAutograd():
        keys = keyset & torch._C._after_autograd_keyset
        if not torch._C._are_functorch_transforms_active():
            return op.redispatch(keys, *args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op.redispatch(keys, *args)


def _sample_by_sample(op: Any) -> Callable[..., Any]:
    """How torch.func.vmap calls `op`: once a sample, so that each has the noise it would have alone."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def one(sample: int) -> Any:
            places = zip(args, in_dims, strict=True)  # a list's is a list
            return op(*(arg.select(dim, sample) if isinstance(dim, int) else arg for arg, dim in places))

        if not info.batch_size:
            raise ValueError(f"{op}: got a batch of no samples under vmap, wanted at least one")
        results = [one(sample) for sample in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return batched


@remembered(maxsize=1)
def _plain_sets() -> tuple[frozenset[int], frozenset[int]]:
    """The dispatch keys of plain CPU tensors, and those that a thread adds where no mode and no transform is on."""
    tensors = [torch.empty(0)]
    threads = [torch._C._dispatch_tls_local_include_set().raw_repr()]
    with torch.inference_mode():
        tensors.append(torch.empty(0))
        threads.append(torch._C._dispatch_tls_local_include_set().raw_repr())
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in tensors), frozenset(threads)


def plain(values: Iterable[Any]) -> bool:
    """Whether the dispatcher would do nothing with these values but call a CPU kernel, beside autograd."""
    if torch.compiler.is_compiling():
        return False
    tensors, threads = _plain_sets()
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() not in threads
        or forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack()
    ):
        return False
    keys = torch._C._dispatch_keys
    for value in values:  # noqa: SIM110 (a generator would double the time of the whole function)
        if isinstance(value, torch.Tensor) and keys(value).raw_repr() not in tensors:
            return False
    return True
