"""The unit: the commits of one stretch of a line, `(first, last]`, as bytes. It is made once and never changed.

A header of 256 bytes, little-endian, without padding, and then the stored body:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwunit1` |
| 8 | 4 | version | 1 |
| 12 | 4 | - | zeros |
| 16 | 8 | required | feature bits |
| 24 | 8 | optional | feature bits |
| 32 | 16 | store id | |
| 48 | 8 | line | |
| 56 | 8 | epoch | which claim on the archive wrote it; 0: a backup did |
| 64 | 4 | revision | |
| 68 | 4 | level | 0: cut by the archiver; 1 to 3: merged |
| 72 | 8 | first | exclusive |
| 80 | 8 | last | inclusive |
| 88 | 8 | first time | of commit first + 1, in us |
| 96 | 8 | last time | of commit last |
| 104 | 32 | digest before | of the commits up to first |
| 136 | 32 | digest after | of the commits up to last |
| 168 | 1 | codec | 0 plain, 1 zlib |
| 169 | 7 | - | zeros |
| 176 | 8 | plain size | of the body |
| 184 | 8 | stored size | of the body as it is stored |
| 192 | 32 | SHA-256 | of the stored body |
| 224 | 28 | - | zeros |
| 252 | 4 | crc | CRC-32C of the 252 bytes before |

The plain body has for each commit: body length u32, kind u32, time_us u64, and the body, as in the log's record. The
seqnos follow from `first`.

The digest goes on from commit to commit: SHA-256 of the digest before, those 16 bytes, and the body. It begins with
`line_digest` at the first commit that is archived, and again behind a gap. That names the commit which the line left
another one behind, if it left one (see lines.py). So units can be merged and cut.

A unit is valid when
1. its CRC matches, its numbers are those of its name, the plain size is at most that of 32 MiB and a commit, and the
   stored size at most 1 KiB and 1/256 of the plain size more,
2. the stored body has the size and the SHA-256 that the header says, and unpacks to the plain size,
3. the plain body has last - first commits and ends with the last one; their kinds are those of commits, their times do
   not decrease, and are the header's at both ends,
4. the digest after them is the header's.
A version, a codec or a required bit that is not known here is refused as `FormatError`. Every version has the checksum
of its header in this place, so that damage is told from another version.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import chain, pairwise
from typing import Final, NamedTuple, cast

from crc32c import crc32c

from kvwal.backup.names import UnitName, parse_name
from kvwal.errors import CorruptionError, FormatError
from kvwal.features import EXTENSIONS, KEYSPACES, KNOWN_REQUIRED, unknown_bits
from kvwal.keys import Seqno
from kvwal.log.commits import Commit, Commits
from kvwal.log.intents import EXTENDED, MAX_BODY_BYTES, TABLES
from kvwal.log.record import is_commit

__all__ = [
    "CODECS",
    "HEADER_BYTES",
    "Unit",
    "UnitBuilder",
    "UnitCommit",
    "UnitHeader",
    "commit_digest",
    "decode_header",
    "decode_unit",
    "encode_unit",
    "line_digest",
    "lone_digest",
    "open_unit",
]

# On disk: never change.
MAGIC: Final = b"kvwunit1"
_VERSION: Final = 1
HEADER = struct.Struct("<8sI4sQQ16s8sQIIQQQQ32s32sB7sQQ32s28s")
CRC = struct.Struct("<I")
HEADER_BYTES: Final = 256
assert HEADER.size + CRC.size == HEADER_BYTES
COMMIT = struct.Struct("<IIQ")
_COMMIT_BYTES: Final = COMMIT.size
_RUN: Final = 1024
# Where body length and kind are: the same in commits that are cut together. Fewer gain nothing.
_SAME_BYTES: Final = 8
_ZEROS: Final = bytes(32)
_LEAST_ALIKE: Final = 16
# On disk: never lessen. Units are cut at 8 MiB and merged up to 32, but for a last commit, which may be the largest.
_MOST_PLAIN_BYTES: Final = (32 << 20) + _COMMIT_BYTES + MAX_BODY_BYTES
# On disk: never lessen. So much, and 1/256, a stored body may be longer than the plain one; zlib's is by 1/3000.
_STORED_MORE: Final = 1024
#: By name: how a body is stored.
CODECS: Final = {"none": 0, "zlib": 1}
_PLAIN: Final = 0
_ZLIB: Final = 1


class UnitCommit(NamedTuple):
    """One commit. `kind` and `body` are those of its record in the log."""

    kind: int
    seqno: Seqno
    time_us: int
    body: bytes


@dataclass(frozen=True, slots=True)
class UnitHeader:
    """What the header says; the fields are those of the table above."""

    store_id: bytes
    line: bytes
    first: Seqno
    last: Seqno
    first_time_us: int
    last_time_us: int
    before: bytes
    after: bytes
    plain_size: int
    stored_size: int
    sha256: bytes
    codec: int = _PLAIN
    level: int = 0
    revision: int = 0
    epoch: int = 0
    required: int = 0
    optional: int = 0

    @property
    def name(self) -> UnitName:
        """What its object is called."""
        return UnitName(self.line, self.level, self.first, self.last, self.revision)


def line_digest(store_id: bytes, line: bytes, fork: bytes | None = None) -> bytes:
    """The digest before the first commit that is archived of a line, and before the first one behind a gap.

    `fork`: the digest of the commit behind which the line left another; None if it left none, or it is not known.
    """
    return sha256(b"kvwal line" + store_id + line + (fork or b"")).digest()


def lone_digest(kind: int, time_us: int, body: bytes) -> bytes:
    """The digest of a commit alone, by which a base names its last one, and a line the one at its fork."""
    return commit_digest(_ZEROS, kind, time_us, body)


def commit_digest(before: bytes, kind: int, time_us: int, body: bytes) -> bytes:
    """The digest after a commit, from the one before it."""
    return sha256(before + COMMIT.pack(len(body), kind, time_us) + body).digest()


class Unit:
    """A unit that was decoded, and is valid; one that `open_unit` gave is once its runs were proved."""

    __slots__ = ("_plain", "header")

    def __init__(self, header: UnitHeader, plain: bytes) -> None:
        self.header = header
        self._plain = plain

    def commits(self) -> Iterator[UnitCommit]:
        """Its commits, in order."""
        return map(UnitCommit._make, chain.from_iterable(self.runs()))

    def runs(self) -> Iterator[Commits]:
        """The same, many at a time: what that costs matters where all commits of an archive are read."""
        return (run for run, _ in _cut(str(self.header.name), self.header, self._plain))

    def proved_runs(self) -> Iterator[Commits]:
        """The same of a unit that `open_unit` gave: all of it is proved once this has come to its end. Raises as that.

        CorruptionError, FormatError: conditions 3 and 4.
        """
        header, plain = self.header, self._plain
        digest, empty = header.before, sha256()
        for run, places in _cut(str(header.name), header, plain):
            for at, stop in pairwise(places):
                # As `commit_digest`. A copy costs less than a new one.
                hashed = empty.copy()
                hashed.update(digest + plain[at:stop])
                digest = hashed.digest()
            yield run
        if digest != header.after:
            raise CorruptionError(str(header.name), HEADER_BYTES, "the digest of its commits is not that of the header")

    def commit(self, seqno: Seqno) -> UnitCommit:
        """One of its commits. O(the unit)."""
        return next(commit for commit in self.commits() if commit.seqno == seqno)

    def digest_at(self, seqno: Seqno) -> bytes:
        """The digest after one of its commits, or before its first one. O(the unit)."""
        header = self.header
        ends = {header.first: header.before, header.last: header.after}
        return ends[seqno] if seqno in ends else self.digests({seqno})[seqno]

    def digests(self, seqnos: Set[Seqno]) -> dict[Seqno, bytes]:
        """The same for several, in one pass."""
        digest = self.header.before
        found = {self.header.first: digest}
        for commit in self.commits():
            digest = commit_digest(digest, commit.kind, commit.time_us, commit.body)
            if commit.seqno in seqnos:
                found[commit.seqno] = digest
        return found


class UnitBuilder:
    """A unit in the making: commits are added, one after the other, and then it is encoded."""

    def __init__(self, store_id: bytes, line: bytes, first: Seqno, before: bytes) -> None:
        """
        Args:
            first: the commit before the first one that is added. before: the digest after that.
        """
        self._identity = store_id, line
        self._first = first
        self._before = before
        self._parts: list[bytes] = []
        self._times: tuple[int, int] | None = None
        self._required = 0
        #: The last commit that was added, and the digest after it.
        self.last = first
        self.digest = before
        #: Bytes of the body.
        self.size = 0

    def add(self, kind: int, time_us: int, body: bytes) -> None:
        """Add the next commit."""
        head = COMMIT.pack(len(body), kind, time_us)
        self.digest = sha256(self.digest + head + body).digest()
        self._parts += (head, body)
        self.size += len(head) + len(body)
        self.last = Seqno(self.last + 1)
        self._times = (time_us if self._times is None else self._times[0]), time_us
        if kind & TABLES:
            self._required |= KEYSPACES
        if kind & EXTENDED:
            self._required |= EXTENSIONS

    def encode(self, *, epoch: int = 0, level: int = 0, revision: int = 0, codec: str = "zlib") -> tuple[Unit, bytes]:
        """The unit, and its bytes. There is at least one commit. A body that does not shrink is stored plain."""
        assert self._times is not None, "a unit has commits"
        plain = b"".join(self._parts)
        kind, stored = _PLAIN, plain
        if CODECS[codec] == _ZLIB:
            packed = zlib.compress(plain, 6 if level else 1)
            if len(packed) < len(plain):
                kind, stored = _ZLIB, packed
        header = UnitHeader(
            *self._identity,
            first=self._first,
            last=self.last,
            first_time_us=self._times[0],
            last_time_us=self._times[1],
            before=self._before,
            after=self.digest,
            plain_size=len(plain),
            stored_size=len(stored),
            sha256=sha256(stored).digest(),
            codec=kind,
            level=level,
            revision=revision,
            epoch=epoch,
            required=self._required,
        )
        return Unit(header, plain), _encode_header(header) + stored


def encode_unit(
    store_id: bytes,
    line: bytes,
    first: Seqno,
    before: bytes,
    commits: Iterable[UnitCommit],
    *,
    epoch: int = 0,
    level: int = 0,
    revision: int = 0,
    codec: str = "zlib",
) -> bytes:
    """The bytes of a unit of these commits, which follow `first` without a gap; there is at least one."""
    builder = UnitBuilder(store_id, line, first, before)
    for commit in commits:
        assert commit.seqno == builder.last + 1, "a unit has no gap"
        builder.add(commit.kind, commit.time_us, commit.body)
    return builder.encode(epoch=epoch, level=level, revision=revision, codec=codec)[1]


def _encode_header(header: UnitHeader) -> bytes:
    fixed = HEADER.pack(
        MAGIC,
        _VERSION,
        b"",
        header.required,
        header.optional,
        header.store_id,
        header.line,
        header.epoch,
        header.revision,
        header.level,
        header.first,
        header.last,
        header.first_time_us,
        header.last_time_us,
        header.before,
        header.after,
        header.codec,
        b"",
        header.plain_size,
        header.stored_size,
        header.sha256,
        b"",
    )
    return fixed + CRC.pack(crc32c(fixed))


def decode_header(name: str, data: bytes) -> UnitHeader:
    """The header of the unit of this name. Raises as `decode_unit`; at the body it does not look."""
    if len(data) < HEADER_BYTES or data[:8] != MAGIC:
        raise CorruptionError(name, 0, "is no unit")
    # Every version has this checksum here: a flipped bit is not taken for another version.
    if CRC.unpack_from(data, HEADER.size)[0] != crc32c(data[: HEADER.size]):
        raise CorruptionError(name, 0, "the checksum of the header is wrong")
    version, zeros = struct.unpack_from("<I4s", data, 8)
    if version > _VERSION:
        raise FormatError(f"{name} is a unit of version {version}, which this kvwal does not know")
    _, _, _, required, optional, *rest = HEADER.unpack_from(data)
    unknown = unknown_bits(required, KNOWN_REQUIRED)
    store_id, line, epoch, revision, level, first, last, first_us, last_us, before, after, codec, *rest = rest
    zeros_too, plain_size, stored_size, digest, more_zeros = rest
    if unknown or version != _VERSION or (zeros + zeros_too + more_zeros).strip(b"\0") or codec not in CODECS.values():
        what = f"features {unknown}" if unknown else f"codec {codec}" if codec not in CODECS.values() else "fields"
        raise FormatError(f"{name} has {what} that this version of kvwal does not know")
    header = UnitHeader(
        store_id,
        line,
        Seqno(first),
        Seqno(last),
        first_us,
        last_us,
        before,
        after,
        plain_size,
        stored_size,
        digest,
        codec,
        level,
        revision,
        epoch,
        required,
        optional,
    )
    if parse_name(name) != header.name:
        raise CorruptionError(name, 0, f"the header is that of {header.name}")
    if plain_size > _MOST_PLAIN_BYTES:
        raise CorruptionError(name, 176, f"the body would have {plain_size} bytes; {_MOST_PLAIN_BYTES} are the most")
    if stored_size > (most := plain_size + plain_size // 256 + _STORED_MORE):
        raise CorruptionError(name, 184, f"the body would be stored in {stored_size} bytes; {most} are the most")
    return header


def decode_unit(name: str, data: bytes) -> Unit:
    """The unit that an object of this name has. CorruptionError, FormatError: see the rules above; they name it."""
    unit = open_unit(name, data)
    deque(unit.proved_runs(), maxlen=0)
    return unit


def open_unit(name: str, data: bytes) -> Unit:
    """The same, by conditions 1 and 2. Its commits are to be read by `Unit.proved_runs`, which proves the others."""
    header = decode_header(name, data)
    stored = memoryview(data)[HEADER_BYTES:]
    if len(stored) != header.stored_size:
        raise CorruptionError(name, None, f"has {len(stored)} bytes behind its header, instead of {header.stored_size}")
    if sha256(stored).digest() != header.sha256:
        raise CorruptionError(name, HEADER_BYTES, "the SHA-256 of the body is wrong")
    plain = bytes(stored) if header.codec == _PLAIN else _unpacked(name, stored, header.plain_size)
    if len(plain) != header.plain_size:
        raise CorruptionError(name, HEADER_BYTES, "the body does not have the size that the header says")
    return Unit(header, plain)


def _unpacked(name: str, stored: memoryview, size: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        # One byte more than it is to be: bytes of a bad writer do not fill the memory.
        plain = unpacker.decompress(stored, size + 1)
    except (zlib.error, OverflowError) as error:
        raise CorruptionError(name, HEADER_BYTES, f"the body cannot be unpacked: {error}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise CorruptionError(name, HEADER_BYTES, "the body does not end where it unpacks to an end")
    return plain


def _cut(name: str, header: UnitHeader, plain: bytes) -> Iterator[tuple[Commits, Sequence[int]]]:
    """The commits of a body, many at a time, with the places where they begin, and that where the last one ends.

    Raises for the first one that is not as condition 3 says, and at the end for what is behind the last one.
    """
    at, count, last_us = 0, header.last - header.first, header.first_time_us
    kinds: set[int] = set()
    unpack, end, n = COMMIT.unpack_from, len(plain), 0
    while n < count:
        alike = _alike(plain, at, min(_RUN, count - n), Seqno(header.first + n + 1), last_us, kinds)
        if alike is not None:
            yield alike
            run, places = alike
            n, at, last_us = n + len(run), places[-1], run.times_us[-1]
            continue
        found: list[Commit] = []
        passed = [at]
        while n < count and len(found) < _RUN:
            if end - at < _COMMIT_BYTES:
                raise CorruptionError(name, HEADER_BYTES, f"has {n} commits instead of {count}")
            size, kind, time_us = unpack(plain, at)
            body_at = at + _COMMIT_BYTES
            at = body_at + size
            seqno = Seqno(header.first + n + 1)
            if at > end:
                raise CorruptionError(name, HEADER_BYTES, f"commit {seqno} is cut short")
            if kind not in kinds:
                known = is_commit(kind)
                if known is None:
                    raise FormatError(f"{name}: commit {seqno} is of a kind that this kvwal does not know")
                if not known:
                    raise CorruptionError(name, HEADER_BYTES, f"commit {seqno} is none")
                kinds.add(kind)
            if time_us < last_us:
                raise CorruptionError(name, HEADER_BYTES, f"the time of commit {seqno} goes back")
            last_us = time_us
            found.append((kind, seqno, time_us, plain[body_at:at]))
            passed.append(at)
            n += 1
        yield Commits.of(found), passed
    if at != end:
        raise CorruptionError(name, HEADER_BYTES, f"has more than its {count} commits")
    # There is one: a name has a last commit beyond its first.
    if (unpack(plain, 0)[2], last_us) != (header.first_time_us, header.last_time_us):
        raise CorruptionError(name, HEADER_BYTES, "the times of its commits are not those of the header")


def _alike(
    plain: bytes, at: int, most: int, seqno: Seqno, last_us: int, kinds: set[int]
) -> tuple[Commits, range] | None:
    """Commits of one size and kind, by a few calls in C. None: too few, or not as they should be."""
    if len(plain) - at < _COMMIT_BYTES:
        return None
    size, kind, _ = COMMIT.unpack_from(plain, at)
    step = _COMMIT_BYTES + size
    n = min(most, (len(plain) - at) // step)
    for i in range(_SAME_BYTES):
        if n < _LEAST_ALIKE:
            return None
        # This byte of each commit.
        column = plain[at + i : at + n * step : step]
        same = column[:1]
        if column.count(same) != n:
            n -= len(column.lstrip(same))
    if n < _LEAST_ALIKE or kind not in kinds:
        return None
    # A power of two, since each format is compiled.
    n = 1 << n.bit_length() - 1
    fields = _cutter(n, size).unpack_from(plain, at)
    times_us = fields[::2]
    if times_us[0] < last_us or times_us != tuple(sorted(times_us)):
        return None
    seqnos = cast("Sequence[Seqno]", range(seqno, seqno + n))
    return Commits((kind,) * n, seqnos, times_us, fields[1::2]), range(at, at + n * step + 1, step)


@lru_cache(maxsize=32)
def _cutter(n: int, size: int) -> struct.Struct:
    """What cuts n commits with bodies of one size."""
    return struct.Struct("<" + n * f"8xQ{size}s")
