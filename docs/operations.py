"""What an operation's backends are and refuse, read from the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import textwrap
from types import ModuleType
from typing import Any

import dalle_kernels
from dalle_kernels.backends.choice import _OPERATIONS, BACKENDS, Operation

_DEVICES = {
    "cpu": "CPU: C++ for AVX2, AVX-512, NEON",
    "triton": "NVIDIA GPUs, compute capability 8.0 and later",
    "cuda": "NVIDIA GPUs, CUDA C++; only when named",
    "reference": "every device: plain PyTorch, float64 too",
}


def operation(name: str) -> Operation[Any]:
    """The operation whose public function is `name`."""
    return _OPERATIONS[getattr(dalle_kernels, name)]


def backends(name: str) -> str:
    """A table: each backend, where it runs, and for what it answers that it cannot serve a call."""
    lines = ["| backend | where | refuses, with this message |", "|---|---|---|"]
    for backend in ("cpu", "triton", "cuda", "reference"):
        module = operation(name).modules.get(backend)
        if module is None:
            continue
        refusals = refused(module) or ["nothing"]
        lines.append(f"| `{backend}` | {_DEVICES[backend]} | {'<br>'.join(refusals)} |")
    without = [backend for backend in BACKENDS if backend not in operation(name).modules]
    if without:
        lines += ["", f"There is no {' and no '.join(f'`{backend}`' for backend in without)} kernel."]
    return "\n".join(lines)


def refused(module: str) -> list[str]:
    """The messages of a backend's `refuse`; what depends on the call is in braces."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"module: {module} has no source")
    return list(dict.fromkeys(_messages(importlib.import_module(module), "refuse")))


def _messages(module: ModuleType, function: str) -> list[str]:
    """The texts that `function` can return, those of the functions it asks first included."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(module, function))))
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Return(value=value) | ast.Assign(value=value) | ast.NamedExpr(value=value):
                found += _texts(value, module)
    return found


def _texts(value: ast.expr | None, module: ModuleType) -> list[str]:
    match value:
        case ast.Constant(value=str(text)):
            return [_escaped(text)]
        case ast.JoinedStr():
            return [_escaped("".join(_piece(part, module) for part in value.values))]
        case ast.IfExp():
            return _texts(value.body, module) + _texts(value.orelse, module)
        case ast.Call(func=ast.Name(id=name)) if name in vars(module) and name not in ("min", "max"):
            home = importlib.import_module(vars(module)[name].__module__)
            return _messages(home, name)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
            other = vars(module).get(owner)
            if isinstance(other, ModuleType) and name in vars(other) and name.startswith(("refuse", "obstacle")):
                return _with_dtypes(value, _messages(other, name))
    return []


def _with_dtypes(call: ast.Call, texts: list[str]) -> list[str]:
    """`it takes {...}` with the dtypes that this call of a shared question hands over."""
    given = [argument for argument in call.args if isinstance(argument, ast.Tuple)]
    if not given:
        return texts
    names = ", ".join(element.attr for element in given[0].elts if isinstance(element, ast.Attribute))
    return [text.replace("{', '.join((str(each).removeprefix('torch.') for each in dtypes))}", names) for text in texts]


def _piece(part: ast.expr, module: ModuleType) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    code = ast.unparse(part.value)
    if any(
        isinstance(node, ast.Name) and node.id.isupper() for node in ast.walk(part.value)
    ):  # a constant of the module
        return str(eval(code, vars(module)))
    return "{" + code.replace("call.", "") + "}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
