"""How much memory there is, asked before it is needed."""

from pathlib import Path

import torch

__all__ = ["room", "check_room"]

GIB = 2**30
UNASKED = 2**28  # bytes: below this, whatever asks is let through


def room(device: "torch.device | str" = "cpu") -> float:
    """Bytes that a new tensor on this device could take; infinite where the system
    doesn't say.

    On a GPU what CUDA reports as free. On Linux the memory that can be had without
    swapping, or what is left to the control group if that is less.

    Examples
    --------
    >>> room() > 0
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _left_to_group())


def _available() -> float:
    """Bytes, as Linux estimates them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(found[0]) if found else float("inf")


def _left_to_group() -> float:
    """Bytes to the limit of a container."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else max(0.0, int(limit) - used)


def check_room(what: str, size: int, device, remedy: str) -> None:
    """Raise MemoryError where ``size`` bytes for ``what`` exceed what there is.

    Examples
    --------
    >>> check_room("a number", 8, "cpu", "use fewer")
    """
    if size > UNASKED and size > (free := room(device)):
        raise MemoryError(
            f"{what} needs {size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free on"
            f" {device}: {remedy}"
        )
