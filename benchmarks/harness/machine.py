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


def machine_name(device: torch.device) -> str:
    """The processor's or the GPU's name, as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if platform.system() == "Linux":
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {"name": machine_name(device), "cores": len(os.sched_getaffinity(0))}
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
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text()
        for name in ("vendor_id", "cpu family", "model", "cpu MHz"):
            if found := re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE):
                facts[name] = found[1].strip()
    facts["last_level_cache_bytes"] = cache_bytes(device)
    return facts


def label(machine: dict[str, Any]) -> str:
    """The machine's name, of a processor with the instruction set that the kernels use: clouds call different
    processors by one name."""
    return ", ".join(filter(None, (machine["name"], machine.get("instruction_set"))))


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
