"""What memory and how many cores there are, and the refusal of what does not fit before hours are spent on it."""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from fedmerge.errors import ResourceError

CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30


def usable_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this process and its children may still take: free memory, and what its container has left."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, taken = read(cgroup / limit), read(cgroup / used)
        if most.isdigit() and taken.isdigit():
            free = min(free, max(0, int(most) - int(taken)))
    return free


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use: its affinity, and the quota of its container, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = [*read(cgroup / "cpu.max").split(), "", ""][:2]
    if not quota:  # version 1 of control groups
        quota = read(cgroup / "cpu" / "cpu.cfs_quota_us")
        period = read(cgroup / "cpu" / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def read(file: Path) -> str:
    """The text of a small system file, ``""`` where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def give_back() -> None:
    """Hand freed memory back to the system, where the C library keeps it: glibc holds on to large freed blocks.

    Without this the process of a long merge grows to several times of what it uses, by fragmentation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def check_room(sizes: Mapping[str, int], matrices: int, method: str, device: torch.device | str = "cpu") -> None:
    """Refuse a method that holds so many float64 matrices ``(n, n)`` of every group, where they do not fit.

    Raises:
        ResourceError: Names the widest group, what is needed, what there is, and what needs less.
    """
    needed = 8 * matrices * sum(n * n for n in sizes.values())
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else usable_memory()
    if needed > free:
        widest = max(sizes, key=sizes.__getitem__)
        raise ResourceError(
            f"{method} holds {matrices} matrices (units, units) a group and needs {needed / _GIB:.3g} GiB, most of it "
            f"for group {widest!r} of {sizes[widest]} units; {free / _GIB:.3g} GiB are free; use 'weight-matching', "
            "which solves wide groups among candidates, or a narrower network"
        )
