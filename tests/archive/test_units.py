"""A unit gives back the commits it was made of, or says what is wrong with it; whatever its bytes are."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from hashlib import sha256
from typing import Any

import pytest
from crc32c import crc32c

from kvwal.backup import units
from kvwal.backup.names import BaseName, UnitName, line_name, parse_name
from kvwal.backup.port import is_object_name
from kvwal.backup.units import UnitCommit, commit_digest, decode_unit, encode_unit, line_digest
from kvwal.errors import CorruptionError, Error, FormatError
from kvwal.keys import Seqno

STORE, LINE = bytes(range(16)), b"\xaa" * 8
START = line_digest(STORE, LINE)


def some_commits(n: int, first: int = 7, seed: int = 0) -> list[UnitCommit]:
    draw = random.Random(seed)
    return [
        UnitCommit(draw.choice([1, 1 | 1 << 8, 1 | 1 << 9]), Seqno(first + 1 + i), 1000 + i // 2, draw.randbytes(i * 9))
        for i in range(n)
    ]


def unit_of(commits: list[UnitCommit], **options: Any) -> tuple[str, bytes]:
    first = Seqno(commits[0].seqno - 1)
    data = encode_unit(STORE, LINE, first, START, commits, **options)
    level, revision = options.get("level", 0), options.get("revision", 0)
    return str(UnitName(LINE, level, first, commits[-1].seqno, revision)), data


@pytest.mark.parametrize("codec", ["none", "zlib"])
@pytest.mark.parametrize("n", [1, 2, 60, 1024, 1025])
def test_a_unit_has_the_commits_that_were_put_into_it(codec: str, n: int) -> None:
    commits = some_commits(n)
    name, data = unit_of(commits, codec=codec, epoch=3, level=2, revision=1)
    unit = decode_unit(name, data)
    assert list(unit.commits()) == list(unit.commits()) == commits
    header = unit.header
    assert (header.epoch, header.level, header.revision, str(header.name)) == (3, 2, 1, name)
    assert (header.first_time_us, header.last_time_us) == (commits[0].time_us, commits[-1].time_us)
    digest = START
    for commit in commits:
        digest = commit_digest(digest, commit.kind, commit.time_us, commit.body)
    assert (header.before, header.after) == (START, digest)


def test_the_bytes_of_a_unit_are_for_ever() -> None:
    name, data = unit_of([UnitCommit(1, Seqno(1), 1_700_000_000_000_000, b"body")], codec="none")
    assert name == "aaaaaaaaaaaaaaaa/unit/0/00000000000000000000-00000000000000000001.r0"
    assert sha256(data).hexdigest() == GOLDEN
    assert data[256:] == struct.pack("<IIQ", 4, 1, 1_700_000_000_000_000) + b"body"


GOLDEN = "47ed76a66578c55ac75fb64b1eb8fcf53f3ea69eba43ca83a8354b1603caa8eb"


def test_a_body_that_does_not_shrink_is_stored_plain() -> None:
    _, data = unit_of([UnitCommit(1, Seqno(8), 1, random.Random(1).randbytes(5000))])
    assert data[168] == units.CODECS["none"]
    _, data = unit_of([UnitCommit(1, Seqno(8), 1, bytes(5000))])
    assert data[168] == units.CODECS["zlib"]
    assert len(data) < 400


def test_digests_do_not_depend_on_where_units_are_cut() -> None:
    commits = some_commits(30)
    whole = decode_unit(*unit_of(commits)).header
    for cut in (1, 13, 29):
        left = decode_unit(*unit_of(commits[:cut])).header
        data = encode_unit(STORE, LINE, left.last, left.after, commits[cut:])
        right = decode_unit(str(UnitName(LINE, 0, left.last, whole.last)), data).header
        assert right.after == whole.after


@pytest.mark.parametrize("codec", ["none", "zlib"])
def test_every_flipped_bit_and_every_cut_is_found(codec: str) -> None:
    commits = some_commits(8)
    name, data = unit_of(commits, codec=codec)
    for at in range(len(data)):
        for bit in (0, 3, 7) if at > 256 else range(8):
            bad = bytearray(data)
            bad[at] ^= 1 << bit
            with pytest.raises(CorruptionError, match="unit/0/"):
                decode_unit(name, bytes(bad))
    for size in range(len(data)):
        with pytest.raises(CorruptionError, match="unit/0/"):
            decode_unit(name, data[:size])
    with pytest.raises(CorruptionError, match="instead of"):
        decode_unit(name, data + b"\0")


def altered(data: bytes, at: int, new: bytes) -> bytes:
    """With other bytes in the header, and a CRC that matches again."""
    data = data[:at] + new + data[at + len(new) :]
    return data[:252] + struct.pack("<I", crc32c(data[:252])) + data[256:]


@pytest.mark.parametrize(
    ("at", "new", "says"),
    [
        (8, struct.pack("<I", 2), "version 2"),
        (12, b"\1", "fields"),
        (16, struct.pack("<Q", 1 << 40), "features"),
        (168, b"\2", "codec 2"),
        (169, b"\1", "fields"),
        (224, b"\1", "fields"),
    ],
)
def test_what_a_newer_version_writes_is_refused_as_such(at: int, new: bytes, says: str) -> None:
    name, data = unit_of(some_commits(3))
    with pytest.raises(FormatError, match=says):
        decode_unit(name, altered(data, at, new))
    assert decode_unit(name, altered(data, 24, struct.pack("<Q", 1 << 40))), "an optional bit is passed over"


def rebuilt(commits: list[UnitCommit], body: bytes, codec: int = 0, **fields: Any) -> tuple[str, bytes]:
    """A unit that says of these bytes what a valid one of the commits would."""
    name, data = unit_of(commits, codec="none")
    good = decode_unit(name, data).header
    stored = zlib.compress(body) if codec else body
    for at, form, value in (
        (88, "<Q", fields.get("first_us", good.first_time_us)),
        (96, "<Q", fields.get("last_us", good.last_time_us)),
        (136, "<32s", fields.get("after", good.after)),
        (168, "<B", codec),
        (176, "<Q", fields.get("plain", len(body))),
        (184, "<Q", len(stored)),
        (192, "<32s", sha256(stored).digest()),
    ):
        data = altered(data, at, struct.pack(form, value))
    return name, data[:256] + stored


def test_bytes_of_a_writer_that_lies_are_found() -> None:
    commits = some_commits(4)
    plain = unit_of(commits, codec="none")[1][256:]
    two = [UnitCommit(1, Seqno(8), 5, b""), UnitCommit(1, Seqno(9), 4, b"")]
    back = b"".join(struct.pack("<IIQ", 0, 1, commit.time_us) for commit in two)
    watermark = struct.pack("<IIQ", 0, 2, 5)
    unknown = struct.pack("<IIQ", 0, 1 | 1 << 30, 5)
    for case, says in [
        (rebuilt(commits, plain[:-1]), "cut short"),
        (rebuilt(commits, plain + b"\0"), "more than"),
        (rebuilt(commits, plain[: plain.index(commits[-1].body) - 17]), "instead of 4|cut short"),
        (rebuilt(commits, plain, first_us=999), "times"),
        (rebuilt(commits, plain, last_us=2000), "times"),
        (rebuilt(commits, plain, first_us=1001), "goes back"),
        (rebuilt(commits, plain, after=START), "digest"),
        (rebuilt(commits, plain, plain=len(plain) + 1), "size"),
        (rebuilt(commits, plain, codec=1, plain=len(plain) - 1), "end|size"),
        (rebuilt([two[0], two[1]._replace(time_us=5)], back, last_us=4), "goes back"),
        (rebuilt(two[:1], watermark), "is none"),
    ]:
        with pytest.raises(CorruptionError, match=says):
            decode_unit(*case)
    with pytest.raises(FormatError, match="kind"):
        decode_unit(*rebuilt(two[:1], unknown))


def stretches(draw: random.Random, n: int) -> list[UnitCommit]:
    """Commits of which many in a row are of one size and kind."""
    found: list[UnitCommit] = []
    while len(found) < n:
        kind, size = draw.choice([1, 1, 1 | 1 << 8]), draw.randrange(80)
        for _ in range(draw.choice([1, 3, 15, 16, 40, 1100])):
            seqno = Seqno(8 + len(found))
            found.append(UnitCommit(kind, seqno, 1000 + seqno // 5, draw.randbytes(size)))
    return found[:n]


@pytest.mark.parametrize("seed_of", range(6))
def test_commits_of_one_size_are_cut_as_others_are(seed_of: int) -> None:
    draw = random.Random(seed_of)
    commits = stretches(draw, draw.choice([17, 300, 2500]))
    unit = decode_unit(*unit_of(commits))
    assert list(unit.commits()) == commits
    assert {seqno: unit.digest_at(seqno) for seqno in (Seqno(7), Seqno(12), commits[-1].seqno)} == {
        Seqno(7): START,
        Seqno(12): decode_unit(*unit_of(commits[:5])).header.after,
        commits[-1].seqno: unit.header.after,
    }


@pytest.mark.parametrize("seed_of", range(20))
def test_one_wrong_commit_among_many_of_one_size_is_found_and_named(seed_of: int) -> None:
    draw = random.Random(seed_of)
    commits = [UnitCommit(1, Seqno(8 + i), 1000 + i // 5, draw.randbytes(30)) for i in range(2100)]
    plain = unit_of(commits, codec="none")[1][256:]
    n = draw.randrange(1, 2099)
    at, seqno = n * 46, commits[n].seqno
    strange = b"".join(struct.pack("<IIQ", 0, 1 | 1 << 30, commit.time_us) for commit in commits)
    with pytest.raises(FormatError, match="commit 8 is of a kind"):
        decode_unit(*rebuilt(commits, strange))
    for place, form, value, error, says in [
        (0, "<I", 31, CorruptionError, "cut short|none|kind|goes back|commits instead of|more than"),
        (0, "<I", 1 << 31, CorruptionError, f"commit {seqno} is cut short"),
        (4, "<I", 2, CorruptionError, f"commit {seqno} is none"),
        (4, "<I", 1 | 1 << 30, FormatError, f"commit {seqno} is of a kind"),
        (8, "<Q", 999, CorruptionError, f"the time of commit {seqno} goes back"),
        (16 + draw.randrange(30), "<B", None, CorruptionError, "digest"),
    ]:
        new = struct.pack(form, plain[at + place] ^ 1 if value is None else value)
        with pytest.raises(error, match=says):
            decode_unit(*rebuilt(commits, plain[: at + place] + new + plain[at + place + len(new) :]))


def test_a_time_that_goes_back_between_commits_of_one_size_is_found() -> None:
    # Behind the first 1,024 they are cut by the other way.
    commits = [UnitCommit(1, Seqno(8 + i), 1000 if i < 1024 else 999, b"body") for i in range(1100)]
    plain = b"".join(struct.pack("<IIQ", 4, 1, each.time_us) + each.body for each in commits)
    with pytest.raises(CorruptionError, match="the time of commit 1032 goes back"):
        decode_unit(*rebuilt(commits, plain))


def test_a_body_that_unpacks_to_much_more_than_it_says_takes_no_memory() -> None:
    name, data = rebuilt(some_commits(1), bytes(48 << 20), codec=1, plain=50_000)
    tracemalloc.start()
    with pytest.raises(CorruptionError, match="end|size"):
        decode_unit(name, data)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("codec", [0, 1])
@pytest.mark.parametrize("size", [(33 << 20) + (1 << 32), (1 << 63) - 1, (1 << 64) - 1])
def test_a_body_that_is_said_to_be_larger_than_any_is_damage(size: int, codec: int) -> None:
    with pytest.raises(CorruptionError, match="are the most"):
        decode_unit(*rebuilt(some_commits(1), bytes(9), codec=codec, plain=size))


def test_a_body_of_one_large_commit_and_what_was_merged_before_it_is_not() -> None:
    with pytest.raises(CorruptionError, match="does not have the size"):
        decode_unit(*rebuilt(some_commits(1), bytes(9), plain=(32 << 20) + 16 + (1 << 32) - 1))


def test_a_unit_under_a_name_of_another_is_refused() -> None:
    name, data = unit_of(some_commits(3))
    for other in (name.replace("/unit/0/", "/unit/1/"), name[:-1] + "1", name.replace("aa", "ab", 1), "x"):
        with pytest.raises(CorruptionError, match="header is that of"):
            decode_unit(other, data)


def test_random_bytes_are_no_unit() -> None:
    draw = random.Random(8)
    for _ in range(300):
        data = (b"kvwunit1" if draw.random() < 0.5 else b"") + draw.randbytes(draw.randrange(600))
        with pytest.raises(Error):
            decode_unit("x", data)


def test_names_are_parsed_as_they_are_made_and_sort_by_their_numbers() -> None:
    draw = random.Random(3)
    names: list[Any] = []
    for _ in range(200):
        low, high = sorted({draw.getrandbits(draw.randrange(3, 64)) | 1, draw.getrandbits(62) & ~1})
        names.append(UnitName(LINE, draw.randrange(4), Seqno(low), Seqno(high), draw.randrange(1 << 32)))
        names.append(BaseName(LINE, Seqno(low), high, draw.choice([0, low]), draw.randrange(3)))
    for name in names:
        assert parse_name(str(name)) == name
        assert is_object_name(str(name))
    level_0 = [name for name in names if isinstance(name, UnitName) and not name.level]
    assert sorted(level_0, key=str) == sorted(level_0, key=lambda name: (name.first, name.last, str(name.revision)))
    assert is_object_name(line_name(LINE))


@pytest.mark.parametrize(
    "name",
    [
        "aaaaaaaaaaaaaaaa/unit/0/00000000000000000002-00000000000000000002.r0",
        "aaaaaaaaaaaaaaaa/unit/0/00000000000000000002-99999999999999999999.r0",
        "aaaaaaaaaaaaaaaa/unit/4/00000000000000000000-00000000000000000001.r0",
        "aaaaaaaaaaaaaaaa/unit/0/0-1.r0",
        "aaaaaaaaaaaaaaaa/unit/0/00000000000000000000-00000000000000000001.r00",
        "aaaaaaaaaaaaaaaa/unit/0/00000000000000000000-00000000000000000001.r9999999999",
        "aaaaaaaaaaaaaaaa/unit/0/00000000000000000000-00000000000000000001",
        "aaaaaaaaaaaaaaaa/base/00000000000000000000-00000000000000000001-00000000000000000001.r0",
        "aaaaaaaaaaaaaaaa/base/00000000000000000000-00000000000000000001.r0",
        "lines/aaaaaaaaaaaaaaaa",
        "kvwal-archive",
        "",
    ],
)
def test_a_name_that_says_what_cannot_be_is_foreign(name: str) -> None:
    assert parse_name(name) is None
