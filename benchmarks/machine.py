"""What a result has to say about where it comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def cpu_model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def commit() -> str:
    """Of the checkout this file lies in; "+" if it was changed since."""

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *command], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version() -> str:
    try:
        return importlib.metadata.version("normface_ext")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def load() -> float:
    """How many others want the processors; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def about(device: str) -> dict[str, object]:
    """The columns that all rows of a run share."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "version": version(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
