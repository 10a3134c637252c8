"""The one door to the machine: files, directories, locks, clocks and random bytes.

Everything above this layer talks to the `Files`, `Directory` and `File` protocols and to nothing else, so that
the crash tests can put a simulated disk in their place.
"""

from kvwal.files.failures import is_full, is_of_medium, start_thread
from kvwal.files.fork import call_in_forked_child, process_id, program_name
from kvwal.files.protocol import (
    Buffer,
    Directory,
    EntryKind,
    File,
    Files,
    end_recovery,
    inside,
    is_recovering,
    opened_again,
)
from kvwal.files.system import PathArgument, outwards, parent_and_name, path_text, rooted, system_files

__all__ = [
    "Buffer",
    "Directory",
    "EntryKind",
    "File",
    "Files",
    "PathArgument",
    "call_in_forked_child",
    "end_recovery",
    "inside",
    "is_full",
    "is_of_medium",
    "is_recovering",
    "opened_again",
    "outwards",
    "parent_and_name",
    "path_text",
    "process_id",
    "program_name",
    "rooted",
    "start_thread",
    "system_files",
]
