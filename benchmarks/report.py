"""What the benchmarks share: the machine in words, numbers and tables as Markdown, arguments of the command
line.
"""

import argparse
import os
import platform
from collections.abc import Iterable, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

import torch

from atoplib.training import compute_dtype


def machine_facts(device: torch.device) -> dict[str, str]:
    """What the numbers depend on: processor, threads, torch, and the instructions that decide which dtype is
    fast.
    """
    abilities = torch.cpu.get_capabilities()
    relevant = ("avx", "amx", "bf16", "fp16", "sve")
    present = [
        name for name, there in abilities.items() if there is True and any(part in name for part in relevant)
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    native = ["float32"] + (["bfloat16"] if compute_dtype("auto", device) == torch.bfloat16 else [])
    facts = {
        "processor": f"{processor_name(abilities)}, cores usable: {cores}",
        "instructions": ", ".join(sorted(present)) or "unknown",
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        "torch": f"{torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        "device": str(device),
        "native dtypes": ", ".join(native),
    }
    if device.type == "cuda":
        tf32 = "TF32" if torch.backends.cudnn.allow_tf32 else "no TF32"
        facts["device"] = f"{torch.cuda.get_device_name(device)}, float32 convolutions with {tf32}"
    return facts


def processor_name(abilities: dict[str, Any]) -> str:
    """The processor's name as the system gives it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*names, abilities.get("cpu_name"), platform.processor()]), platform.machine())


def number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    value = float(f"{value:.3g}")
    return f"{value:.{max(0, 2 - floor(log10(value))) if value > 0 else 0}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
