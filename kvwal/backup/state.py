"""Small objects of a destination: JSON with a version and a checksum; and the one that says whose destination it is.

| name | members beside `v` and `crc` |
|---|---|
| `kvwal-archive` | `store`: its id in hex; `required`, `optional`: feature bits |
| `state/mark` | `epoch`, `claim`: see claims.py; `line`; `seqno`: all up to it was read back; `digest`: after it |
| `state/gaps` | `lost` and `accepted`: lists of `line`, `first`, `last`, `reason`, `wall_us` |
| `state/kept` | `line`: for each, the seqno below which only bases are kept |
| `state/began` | `line`: for each, the seqno at which its first archiver began |
| `state/verified` | `units` and `damaged`: see proofs.py |

`crc` is the CRC-32C of the JSON without it, with sorted keys and no spaces. Members that are not known are kept.

One of `state/` that is damaged stops no archive. A mark is as one that is lost, and is put over it. `state/verified` is
found again by `verify`; nothing is thinned until it is. Of the others nothing is known then, which tells of more gaps
than there are, and they are not changed. Only of `state/kept` the version before it counts, where the destination has
one: the seqnos in it are no greater. What an older one of the other two lacks is just what is known no longer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from crc32c import crc32c

from kvwal.backup.names import IDENTITY, STATE
from kvwal.backup.port import Destination
from kvwal.errors import BackupDestinationError, CorruptionError, Finding, FormatError, ObjectMissing
from kvwal.features import unknown_bits
from kvwal.keys import Seqno

__all__ = [
    "BEGAN",
    "GAPS",
    "KEPT",
    "LINE_BYTES",
    "MARK",
    "VERIFIED",
    "before",
    "began_at",
    "change",
    "claim",
    "dump",
    "fetch",
    "findings",
    "gaps_in",
    "identity_of",
    "line_in",
    "load",
    "mark_in",
    "mark_of",
    "other_store",
    "read",
    "read_or_empty",
    "record_beginning",
    "record_gap",
]

# On disk: never change.
MARK: Final = STATE + "mark"
GAPS: Final = STATE + "gaps"
KEPT: Final = STATE + "kept"
BEGAN: Final = STATE + "began"
VERIFIED: Final = STATE + "verified"
_VERSION: Final = 1
_ATTEMPTS: Final = 100
# What is larger is none of these objects: `state/verified` takes 100 bytes a unit.
_MOST_BYTES: Final = 64 << 20
_IDENTITY_ADVICE: Final = (
    "A restore does without it where the objects tell of which store they are; a backup of that store, or of one that "
    "was restored from here, puts it there anew"
)
_GAPS_ADVICE: Final = (
    "Bring it back from a copy of the destination, or remove it, with the versions before it, and accept again the "
    "gaps that status names; it then names none that only this told of"
)
_ADVICE: Final = {
    IDENTITY: _IDENTITY_ADVICE,
    MARK: "It counts as lost: an archive of the store puts it there anew",
    VERIFIED: "kvwal archive verify finds again what it said, and puts it there anew; until then nothing is pruned",
    GAPS: _GAPS_ADVICE,
    BEGAN: "Bring it back from a copy of the destination, or remove it: what backups lacked is then told as a gap",
    KEPT: "Bring it back from a copy of the destination, or remove it: what was pruned is then a gap, to be accepted",
}
#: Of a line's id.
LINE_BYTES: Final = 8


def dump(members: dict[str, Any]) -> bytes:
    """The object as bytes."""
    members = {"v": _VERSION, **members}
    members.pop("crc", None)
    return _json({**members, "crc": crc32c(_json(members))})


def _json(members: dict[str, Any]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


def load(name: str, data: bytes) -> dict[str, Any]:
    """What `dump` was given. CorruptionError for what it never makes, FormatError for a newer version's."""
    try:
        members = json.loads(data)
        crc = members.pop("crc")
        version = members.pop("v")
        whole = {**members, "v": version}
        valid = crc == crc32c(_json(whole)) and isinstance(version, int)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(name, "is not the JSON object that kvwal writes there") from None
    if not valid:
        raise _damaged(name, "the checksum is wrong")
    if version != _VERSION:
        raise FormatError(f"{name} is of version {version}, which this kvwal does not know")
    return dict(members)


def _damaged(name: str, reason: str) -> CorruptionError:
    return CorruptionError(name, None, reason, advice=_ADVICE.get(name))


def fetch(destination: Destination, name: str) -> bytes:
    """The bytes of an object that `load` takes. CorruptionError where it is larger than any, and ObjectMissing."""
    data = destination.get(name, size=_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise _damaged(name, f"has more than {_MOST_BYTES} bytes")
    return data


def read(destination: Destination, name: str) -> tuple[bytes | None, dict[str, Any]]:
    """The bytes of an object of `state/`, for `Destination.swap`, and its members; None and none if there is none."""
    try:
        data = fetch(destination, name)
    except ObjectMissing:
        return None, {}
    try:
        return data, load(name, data)
    except CorruptionError:
        if name == KEPT:
            for members in before(destination, name):
                return data, members
        raise


def before(destination: Destination, name: str) -> Iterator[dict[str, Any]]:
    """The members that an object of `state/` had before, the newest first, as far as the destination can tell."""
    for older in getattr(destination, "older", lambda name: ())(name):
        with suppress(CorruptionError):
            yield load(name, older)


def read_or_empty(destination: Destination, name: str) -> tuple[bytes | None, dict[str, Any]]:
    """As `read`; no members where it is damaged."""
    try:
        return read(destination, name)
    except CorruptionError:
        return fetch(destination, name), {}


def findings(destination: Destination) -> Iterator[Finding]:
    """Which objects of `state/` are damaged, and what that means."""
    for name in (MARK, GAPS, KEPT, BEGAN, VERIFIED):
        try:
            load(name, fetch(destination, name))
        except ObjectMissing:
            continue
        except CorruptionError as error:
            yield Finding(name, None, f"{error.reason}. {_ADVICE[name]}")


def change(destination: Destination, name: str, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Replace the members of an object of `state/` by what `changed` makes of them; what others wrote is not lost.

    CorruptionError if it is damaged; `state/verified` is begun anew.
    """
    for _ in range(_ATTEMPTS):
        old, members = (read_or_empty if name == VERIFIED else read)(destination, name)
        members = changed(members)
        if destination.swap(name, old, dump(members)):
            return members
    raise BackupDestinationError(f"{name} is changed by others all the time")


def line_in(members: dict[str, Any]) -> bytes | None:
    """The line that an object names; None if it names none."""
    try:
        line = bytes.fromhex(members["line"])
    except (LookupError, TypeError, ValueError):
        return None
    return line if len(line) == LINE_BYTES else None


def mark_in(members: dict[str, Any]) -> tuple[bytes, Seqno] | None:
    """The line and the seqno that a mark names; None if it names none."""
    line, seqno = line_in(members), members.get("seqno")
    return (line, Seqno(seqno)) if line is not None and isinstance(seqno, int) else None


def mark_of(destination: Destination) -> tuple[bytes, Seqno] | None:
    """What the mark says; None where there is none, or it is damaged, as the status says."""
    return mark_in(read_or_empty(destination, MARK)[1])


def gaps_in(members: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The entries of `state/gaps` of a kind. What has another form is none."""
    entries = members.get(kind)
    return [each for each in entries if _is_gap(each)] if isinstance(entries, list) else []


def _is_gap(entry: object) -> bool:
    match entry:
        case {"line": str(), "first": int(), "last": int()}:
            return True
    return False


def record_gap(
    destination: Destination,
    line: bytes,
    first: int,
    last: int,
    wall_us: int,
    reason: str = "the log was not kept long enough",
) -> None:
    """Say once that these commits are lost, and why."""
    entry = {
        "line": line.hex(),
        "first": first,
        "last": last,
        "reason": reason,
        "wall_us": wall_us,
    }

    def with_entry(members: dict[str, Any]) -> dict[str, Any]:
        before = gaps_in(members, "lost")
        is_there = any({**each, "wall_us": wall_us} == entry for each in before)
        return members if is_there else {**members, "lost": [*before, entry]}

    change(destination, GAPS, with_entry)


def began_at(destination: Destination, line: bytes) -> Seqno:
    """Where the first archiver of a line began; 0 where nothing says so: as if it had put all from there on."""
    seqno = read_or_empty(destination, BEGAN)[1].get(line.hex(), 0)
    return Seqno(seqno) if isinstance(seqno, int) else Seqno(0)


def record_beginning(destination: Destination, line: bytes, seqno: Seqno) -> None:
    """Say where the first archiver of a line begins, unless that is said, or was said by what is damaged."""
    with suppress(CorruptionError):
        if line.hex() not in read(destination, BEGAN)[1]:
            change(destination, BEGAN, lambda members: {line.hex(): seqno, **members})


def claim(destination: Destination, store_id: bytes) -> None:
    """Make the destination this store's, or see that it is. BackupDestinationError if it is another one's."""
    members = {"store": store_id.hex(), "required": 0, "optional": 0}
    if not destination.put_new(IDENTITY, dump(members)) and (found := identity_of(destination)) != store_id:
        raise other_store(found, store_id)


def other_store(found: bytes, store_id: bytes) -> BackupDestinationError:
    """Of a destination that is another store's."""
    return BackupDestinationError(
        f"the destination holds the store {found.hex()}, and this one is {store_id.hex()}; each needs its own"
    )


def identity_of(destination: Destination) -> bytes:
    """The id of the store whose destination it is. BackupDestinationError if it is of none."""
    try:
        data = fetch(destination, IDENTITY)
    except ObjectMissing as error:
        text = f"{error.place} holds no backup: it does not exist, or there is no {IDENTITY} in it"
        raise BackupDestinationError(text) from None
    members = load(IDENTITY, data)
    unknown = unknown_bits(members["required"], 0) if isinstance(members.get("required"), int) else None
    if unknown:
        raise FormatError(f"{IDENTITY} has features {unknown} that this version of kvwal does not know")
    try:
        store_id = bytes.fromhex(members["store"])
    except (KeyError, ValueError, TypeError):
        store_id = b""
    if len(store_id) != 16 or unknown is None:
        raise _damaged(IDENTITY, "does not say which store it is of")
    return store_id
