"""Faults on demand: which operation fails, how often, and what is done of it all the same."""

from __future__ import annotations

import errno
import fnmatch
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from kvwal.files.failures import failed

if TYPE_CHECKING:
    from kvwal.testing.disk import SimulatedDisk

__all__ = ["FAMILIES", "Effect", "Fault", "Operation", "failure", "raise_after", "raise_before"]

Effect: TypeAlias = Literal["none", "part", "all", "lost", "misdirected"]
"""What a faulty operation does before it fails: nothing, a part, everything; or, without failing, its
bytes never reach the medium ("lost") or reach it at a wrong place ("misdirected")."""

#: Names that stand for several operations in `SimulatedDisk.fail`.
FAMILIES: Final[dict[str, tuple[str, ...]]] = {
    "read": ("pread",),
    "write": ("pwrite",),
    "fsync": ("datasync", "sync", "sync_directory"),
    "change": ("pwrite", "allocate", "truncate", "create", "rename", "unlink", "make_directory"),
    "any": (
        "open",
        "open_directory",
        "create",
        "pread",
        "pwrite",
        "datasync",
        "sync",
        "sync_directory",
        "allocate",
        "truncate",
        "rename",
        "unlink",
        "make_directory",
        "list_directory",
        "lock",
    ),
}


class Operation(NamedTuple):
    """One operation on the disk, as `SimulatedDisk.trace` lists it and `SimulatedDisk.watcher` sees it."""

    number: int
    name: str
    path: str
    offset: int = 0
    size: int = 0

    def __str__(self) -> str:
        where = f" {self.offset}+{self.size}" if self.size else ""
        return f"{self.number} {self.name} {self.path}{where}"


@dataclass(slots=True)
class Fault:
    """The nth operation that matches fails; with `forever`, so do all after it."""

    operations: tuple[str, ...]
    nth: int
    error: int = errno.EIO
    forever: bool = False
    path: str = "*"
    effect: Effect = "none"
    #: With "misdirected": how many bytes off the data lands.
    by: int = 0
    seen: int = field(default=0, init=False)
    #: How often it struck.
    struck: int = field(default=0, init=False)

    def strikes(self, name: str, path: str) -> bool:
        """Count this operation if it matches; True if it is to fail."""
        if name not in self.operations or (self.path != "*" and not fnmatch.fnmatchcase(path, self.path)):
            return False
        self.seen += 1
        if self.seen == self.nth or (self.forever and self.seen > self.nth):
            self.struck += 1
            return True
        return False

    def survivors(self, count: int, disk: SimulatedDisk) -> list[bool]:
        """Which of `count` pieces reach the medium although the sync fails."""
        if self.effect == "part":
            return [disk.random.random() < 0.5 for _ in range(count)]
        return [self.effect == "all"] * count


def raise_before(fault: Fault | None, path: str) -> None:
    """Raise what the fault says, unless the operation is to be done all the same."""
    if fault is not None and fault.effect != "all":
        raise failure(fault.error, path)


def raise_after(fault: Fault | None, path: str, during: Literal["", "write", "flush"] = "") -> None:
    """Raise what the fault says, if it is of a kind that the program is told about."""
    if fault is not None and fault.effect not in ("lost", "misdirected"):
        raise failure(fault.error, path, during)


def failure(code: int, path: str, during: Literal["", "write", "flush"] = "") -> OSError:
    """The error that `kvwal.files` would raise, such as FileNotFoundError for ENOENT."""
    return failed(OSError(code, f"{errno.errorcode[code]} on the simulated disk", path), path, during)
