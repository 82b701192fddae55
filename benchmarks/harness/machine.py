"""On what a figure was measured, with what, and of which commit."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.memory import cache_bytes
from dalle_kernels.backends import native

ROOT = Path(__file__).resolve().parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else native.processor()
    facts: dict[str, Any] = {"name": name, "cores": len(os.sched_getaffinity(0))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory}
        fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
            facts |= dict(zip(fields, (part.strip() for part in answer.splitlines()[0].split(",")), strict=False))
        return facts
    facts |= {
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        text = cpuinfo.read_text()
        for name in ("vendor_id", "cpu family", "model", "cpu MHz"):
            if found := re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE):
                facts[name] = found[1].strip()
    facts["last_level_cache_bytes"] = cache_bytes(device)
    return facts


# Of x86 processors, by vendor, family and models: clouds call all of a maker's by one name.
MICROARCHITECTURES = (
    ("AuthenticAMD", 23, range(0x30), "Zen"),
    ("AuthenticAMD", 23, range(0x30, 0x100), "Zen 2"),
    ("AuthenticAMD", 25, (*range(0x10), *range(0x20, 0x60)), "Zen 3"),
    ("AuthenticAMD", 25, (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)), "Zen 4"),
    ("AuthenticAMD", 26, range(0x100), "Zen 5"),
    ("GenuineIntel", 6, (0x55,), "Skylake or Cascade Lake"),
    ("GenuineIntel", 6, (0x6A, 0x6C), "Ice Lake"),
    ("GenuineIntel", 6, (0x8F,), "Sapphire Rapids"),
    ("GenuineIntel", 6, (0xCF,), "Emerald Rapids"),
    ("GenuineIntel", 6, (0xAD, 0xAE), "Granite Rapids"),
)


def microarchitecture(machine: dict[str, Any]) -> str:
    """Of a machine's processor, "" where it is not known."""
    vendor, family, model = (machine.get(name) for name in ("vendor_id", "cpu family", "model"))
    if vendor is None or family is None or model is None:
        return ""
    found = (
        name for v, f, models, name in MICROARCHITECTURES if (v, f) == (vendor, int(family)) and int(model) in models
    )
    return next(found, "")


def label(machine: dict[str, Any]) -> str:
    """The machine's name, of a processor with what it is and the instruction set that the kernels use."""
    parts = (machine["name"], microarchitecture(machine), machine.get("instruction_set"))
    return ", ".join(filter(None, parts))


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    """Of everything whose version could change a figure."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "flash-attn", "natten", "dalle-pytorch", "cut-cross-entropy", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str:
    """The commit that is measured, with "+" where tracked files (results aside) differ; "unknown" if unversioned."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
