"""What Linux says of this process; 0 where the system does not tell."""

from __future__ import annotations

from pathlib import Path

__all__ = ["memory_mib", "peak_mib", "reads", "written_bytes"]


def memory_mib() -> int:
    """Resident memory."""
    return _field("/proc/self/status", "VmRSS:") >> 10


def peak_mib() -> int:
    """The most resident memory that there was."""
    return _field("/proc/self/status", "VmHWM:") >> 10


def reads() -> int:
    """How many read calls were made, of any kind. Asking is one of them."""
    return _field("/proc/self/io", "syscr:")


def written_bytes() -> int:
    """How many bytes were given to write calls of any kind."""
    return _field("/proc/self/io", "wchar:")


def _field(path: str, name: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
