"""For testing programs that use kvwal: a disk in memory whose power can be cut at any instant.

    from kvwal.testing import crash_every

    def program(disk, acknowledged):
        with kvwal.open("/kv", files=disk, background=False) as db:
            for number in range(3):
                db[b"%d" % number] = b"paid"
                acknowledged.append(number)

    def check(disk, acknowledged):
        with kvwal.open("/kv", files=disk, background=False) as db:
            for number in acknowledged:
                assert db[b"%d" % number] == b"paid"

    crash_every(program, check)

`kvwal.testing.disk` states what a power cut may leave, and which faults can be asked for.
`kvwal.testing.plugin` gives pytest the fixture `simulated_disk`.
"""

from kvwal.testing.cuts import CrashReport, crash_every
from kvwal.testing.disk import SimulatedDisk
from kvwal.testing.faults import Fault, Operation
from kvwal.testing.handle import SimulatedFile
from kvwal.testing.states import Choice, Piece, States

__all__ = [
    "Choice",
    "CrashReport",
    "Fault",
    "Operation",
    "Piece",
    "SimulatedDisk",
    "SimulatedFile",
    "States",
    "crash_every",
]
