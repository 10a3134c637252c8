"""The figures of the running process, for other processes that ask for them.

Who wants them writes the time into `readers/ask`. While that is younger than ten seconds, the process that writes the
store writes `readers/status` once a second: a line with the CRC-32C of what follows, as 8 hex digits, and JSON. Neither
is flushed. Both are read as hostile: what does not verify, or is no object of the form that a status has, is not there.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Final

from crc32c import crc32c

from kvwal.files import Directory, Files, inside
from kvwal.files.names import ASK, READERS, STATUS, temporary_name

__all__ = ["ask", "decode_status", "encode_status", "is_asked", "read_status", "write_status"]

_ASKED_US: Final = 10_000_000
_ASK_BYTES: Final = 21
_MOST_BYTES: Final = 16 << 20
_CRC_BYTES: Final = 9
# What those who read a status rely on: types, lists of one form, pairs, and objects with at least these members.
_FORMS: Final[dict[str, Any]] = {
    "stats": {"archives": [{"destination": str, "gaps": [(int, int)]}]},
    "pins": [
        {
            "purpose": str,
            "seqno": int,
            "since_us": int,
            "held_bytes": int,
            "name": str,
            "generation": int,
            "thread_name": str,
            "pid": int,
        }
    ],
    "consumers": [{"name": str}],
    "recovery": {},
}
# As a time in microseconds the years 1 to 9999; of other numbers far more than there are.
_NUMBERS: Final = range(-62_135_596_800_000_000, 253_402_300_800_000_000)


def encode_status(said: dict[str, Any]) -> bytes:
    """The bytes of the file."""
    text = json.dumps(said, ensure_ascii=True).encode()
    return b"%08x\n" % crc32c(text) + text


def decode_status(raw: bytes) -> dict[str, Any] | None:
    """What was said; None for bytes that do not verify, or are no status."""
    text = raw[_CRC_BYTES:]
    if raw[:_CRC_BYTES] != b"%08x\n" % crc32c(text):
        return None
    try:
        said = json.loads(text, parse_int=_number)
    except (ValueError, RecursionError):
        return None
    if type(said) is not dict or not all(_fits(said[name], form) for name, form in _FORMS.items() if name in said):
        return None
    return said


def _number(text: str) -> int:
    number = int(text)
    if number not in _NUMBERS:
        raise ValueError("no number of a status")
    return number


def _fits(value: Any, form: Any) -> bool:
    if type(form) is list:
        return type(value) is list and all(_fits(each, form[0]) for each in value)
    if type(form) is tuple:
        return type(value) is list and len(value) == len(form) and all(map(_fits, value, form))
    if type(form) is dict:
        return type(value) is dict and all(name in value and _fits(value[name], each) for name, each in form.items())
    return type(value) is form


def ask(files: Files, directory: Directory) -> None:
    """Ask for the status, for ten seconds. OSError where that cannot be done."""
    readers = inside(directory, READERS, make=True)
    try:
        try:
            file = readers.open(ASK, write=True)
        except FileNotFoundError:
            file = readers.open(ASK, create=True, mode=0o644)
        try:
            file.pwrite(b"%020d\n" % files.now_us(), 0)
        finally:
            file.close()
    finally:
        readers.close()


def is_asked(files: Files, directory: Directory) -> bool:
    """Whether the status was asked for in the last ten seconds."""
    raw = _read(directory, ASK, _ASK_BYTES)
    text = raw[:-1]
    return text.isdigit() and len(raw) == _ASK_BYTES and abs(files.now_us() - int(text)) < _ASKED_US


def write_status(directory: Directory, said: dict[str, Any], mode: int) -> None:
    """Say this in place of what was said before. OSError if it cannot be written."""
    readers = inside(directory, READERS)
    temporary = temporary_name(STATUS)
    try:
        try:
            readers.unlink(temporary)
        except FileNotFoundError:
            pass
        file = readers.open(temporary, create=True, mode=mode)
        try:
            file.pwrite(encode_status(said), 0)
        finally:
            file.close()
        readers.rename(temporary, STATUS)
    finally:
        readers.close()


def read_status(directory: Directory) -> dict[str, Any] | None:
    """What the running process said last, whenever that was; None if it said nothing."""
    raw = _read(directory, STATUS, _MOST_BYTES)
    return decode_status(raw) if raw else None


def _read(directory: Directory, name: str, size: int) -> bytes:
    if directory.kind(READERS) != "directory":
        return b""
    try:
        readers = inside(directory, READERS)
        try:
            file = readers.open(name)
            try:
                return file.pread(size, 0)
            finally:
                file.close()
        finally:
            readers.close()
    except FileNotFoundError:
        return b""
    except OSError as error:
        logging.getLogger("kvwal").debug("%s cannot be read: %s", name, error)
        return b""
