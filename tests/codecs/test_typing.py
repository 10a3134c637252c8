"""What checkers make of codecs, and of what is popped: of the type `str` a codec of `str`, and errors if wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Each line that ends with "# is" has a type that is revealed; each with "# wrong", an error.
PROGRAM = '''
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import kvwal
import kvwal.aio
from kvwal import codecs
from kvwal.codecs import KeyCodec, Float32, SEQNO, TupleCodec, Versionstamp, key_codec, value_codec

@dataclass
class User:
    name: str

class Names:
    """A key codec that a user writes."""
    name = "names"
    version = 1
    ordered = True
    def encode(self, value: list[str]) -> bytes:
        return ".".join(value).encode()
    def decode(self, data: bytes) -> list[str]:
        return data.decode().split(".")

reveal_type(key_codec(str))  # is KeyCodec[str]
reveal_type(key_codec(int))  # is KeyCodec[int]
reveal_type(key_codec(float))  # is KeyCodec[float]
reveal_type(key_codec(UUID))  # is KeyCodec[UUID]
reveal_type(key_codec(datetime))  # is KeyCodec[datetime]
reveal_type(key_codec(codecs.int64))  # is KeyCodec[int]
reveal_type(key_codec(Names()))  # is KeyCodec[list[str]]
reveal_type(key_codec(tuple[str, int]))  # is TupleCodec[tuple[str, int]]
reveal_type(key_codec(tuple[str, ...]))  # is TupleCodec[tuple[str, ...]]
reveal_type(key_codec(tuple[str, tuple[int | None, Float32]]))  # is TupleCodec[tuple[str, tuple[int | None, Float32]]]
reveal_type(key_codec(tuple[str, int]).decode(b""))  # is tuple[str, int]
reveal_type(key_codec(tuple[str, int]).prefix("a").start)  # is bytes
reveal_type(key_codec(tuple[str, Versionstamp]).place(("a", SEQNO)))  # is tuple[bytes, int | None]
reveal_type(value_codec(bytes))  # is Codec[bytes]
reveal_type(value_codec(int))  # is Codec[int]
reveal_type(value_codec(User))  # is Codec[User]
reveal_type(value_codec(dict[str, User]))  # is Codec[dict[str, User]]
reveal_type(value_codec(key_codec(str)))  # is Codec[str]
reveal_type(codecs.json())  # is Codec[Any]
reveal_type(codecs.json(User, name="user"))  # is Codec[User]
reveal_type(codecs.msgpack(User))  # is Codec[User]
reveal_type(codecs.compressed(codecs.json(User), level=9))  # is Codec[User]
reveal_type(codecs.versioned(User, version=1))  # is Versioned[User]
reveal_type(codecs.versioned(codecs.msgpack(User), version=1).decode(b""))  # is User

db = kvwal.open("a.kv")
users = db.table("users", str, User)
reveal_type(users.index("i", key=lambda user: user.name, codec=str))  # is Index[str, str, User]
pairs = users.index("i", key=lambda user: (user.name, 1), codec=tuple[str, int])
reveal_type(pairs.within(db.snapshot()))  # is IndexWithin[tuple[str, int], str, User]
reveal_type(users.index("i", key=lambda user: [1], codec=int, many=True).get(1))  # is list[tuple[str, User]]
reveal_type(next(users.index("i", key=lambda user: None, codec=str).scan()).index_key)  # is str
users.index("i", key=lambda user: user.nothing, codec=str)  # wrong
users.index("i", key=lambda user: 1, codec=int, many=True)  # wrong

reveal_type(users.pop("ada"))  # is User
reveal_type(users.pop("ada", None))  # is User | None
reveal_type(users.pop("ada", default="none"))  # is User | str
reveal_type(users.within(db.transaction()).pop("ada"))  # is User
reveal_type(db.pop(b"n"))  # is bytes
reveal_type(db.pop(b"n", None))  # is bytes | None
reveal_type(db.pop(b"n", b""))  # is bytes
users.pop("ada").nothing  # wrong
users.pop(1)  # wrong

async def pop_awaited(tasks: kvwal.aio.AsyncStore) -> None:
    reveal_type(await tasks.pop(b"n"))  # is bytes
    reveal_type(await tasks.pop(b"n", None))  # is bytes | None
    reveal_type(await tasks.table("users", str, User).pop("ada"))  # is User
    reveal_type(await tasks.table("users", str, User).pop("ada", None))  # is User | None
    (await tasks.pop(b"n")).nothing  # wrong

as_key: KeyCodec[tuple[str, int]] = key_codec(tuple[str, int])
key_codec(str).encode(1)  # wrong
key_codec(tuple[str, int]).encode(("a", "b"))  # wrong
key_codec(codecs.json())  # wrong
key_codec(value_codec(str))  # wrong
value_codec("json")  # wrong
value_codec(User).encode("a")  # wrong
codecs.compressed(User)  # wrong
codecs.compressed(codecs.json(), method="lzma")  # wrong
codecs.versioned(User, version="1")  # wrong
'''

MYPY = re.compile(r'^.*?:(\d+): (note|error): (?:Revealed type is "(.*)")?', re.MULTILINE)
PYRIGHT = re.compile(r'Type of ".*" is "(.*)"', re.DOTALL)


def by_mypy(program: Path) -> list[tuple[int, str]]:
    """Line, and type or "wrong"."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", program.name]
    result = subprocess.run(
        command,
        cwd=program.parent,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = MYPY.findall(result.stdout)
    assert found, result.stdout + result.stderr
    # It names types with their modules.
    return [
        (int(line), "wrong" if kind == "error" else re.sub(r"\b\w+\.(?=\w)", "", revealed))
        for line, kind, revealed in found
        if kind == "error" or revealed
    ]


def by_pyright(program: Path) -> list[tuple[int, str]]:
    """The same."""
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (program.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, program.name]
    result = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, timeout=240)
    assert result.stdout, result.stderr
    lines = []
    for found in json.loads(result.stdout)["generalDiagnostics"]:
        revealed = PYRIGHT.search(found["message"])
        if revealed or found["severity"] == "error":
            lines.append((found["range"]["start"]["line"] + 1, revealed[1] if revealed else "wrong"))
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("check", [by_mypy, by_pyright])
def test_a_type_checker_knows_what_a_codec_takes_and_gives(
    check: Callable[[Path], list[tuple[int, str]]], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    expected = [
        (number, text.strip().removeprefix("is "))
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        for _, mark, text in [line.partition("  # ")]
        if mark
    ]
    assert len(expected) > 30
    assert sorted(set(check(program))) == expected
