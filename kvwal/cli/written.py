"""How keys and values are written: those of the store as bytes of a form, those of a table as what they are.

A table is known by the names of its codecs. Where one of them is no codec of kvwal's own, or pickle, which runs what it
reads, and with `--hex` and `--base64`, its bytes are shown as they are.

| codec | as text | in JSON |
|---|---|---|
| str, bytes | as those of the store | the same |
| int, int64, float, counter | a number | a number |
| bool | true, false | the same |
| UUID, datetime | its text | a string |
| tuple | as Python writes it, `('ada', 7)`; and `UUID('...')` and the like in it | an array |
| json, msgpack | JSON | what it is |

What JSON cannot hold, such as an infinite float, is the bytes there, as `"value_hex": "..."`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import click

import kvwal
from kvwal import codecs
from kvwal.cli.forms import Form, checked, of_option, parse, shortened, show, to_json
from kvwal.cli.terminal import complain, plain_json
from kvwal.codecs.named import key_codec_named, reader_named
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.tables import CodecName, TableRow, as_table_name, decode_row, row_key
from kvwal.errors import CodecError, TableNotFoundError
from kvwal.keys import KeyRange, as_key, as_value
from kvwal.tables.spec import TableSpec

__all__ = ["AsItIs", "TableNames", "TableWriting", "TypedWriting", "Writing", "as_name", "row_in", "table_option"]

_F = TypeVar("_F", bound=Callable[..., Any])


def table_option(command: _F) -> _F:
    """Give a command the option `--table`, as its argument `table`."""
    return click.option(
        "--table",
        metavar="NAME",
        help="Of this table, with keys and values as what they are. A negative number comes behind `--`: `-- -5`.",
    )(command)


class Writing:
    """How the keys and values of the store itself are written."""

    def __init__(self, form: Form) -> None:
        self.form = form

    @property
    def is_typed(self) -> bool:
        """Whether values are shown as what they are."""
        return False

    def key(self, text: str) -> bytes:
        """The key that a text stands for. click.BadParameter of KEY."""
        with of_option("KEY"):
            return self._key_of(text)

    def value(self, text: str) -> bytes:
        """The value that a text stands for. click.BadParameter of VALUE."""
        with of_option("VALUE"):
            return self._value_of(text)

    def range(self, start: str | None, stop: str | None, prefix: str | None) -> KeyRange:
        """The keys of a range. Not `prefix` with others. click.BadParameter of the option."""
        if prefix is not None:
            with of_option("--prefix"):
                return self._range_of(None, None, prefix)
        with of_option("--start"):
            first = self._range_of(start, None, None).start
        with of_option("--stop"):
            return KeyRange(first, self._range_of(None, stop, None).stop)

    def _key_of(self, text: str) -> bytes:
        return checked(as_key, parse(self.form, text))

    def _value_of(self, text: str) -> bytes:
        return checked(as_value, parse(self.form, text))

    def _range_of(self, start: str | None, stop: str | None, prefix: str | None) -> KeyRange:
        if prefix is not None:
            return KeyRange.of_prefix(self._key_of(prefix))
        return KeyRange(b"" if start is None else self._key_of(start), None if stop is None else self._key_of(stop))

    def show_key(self, data: bytes) -> str:
        """A key in one line."""
        return show(self.form, data)

    def show_value(self, data: bytes, width: int | None = None) -> str:
        """A value in one line, in about half of a terminal's width."""
        return shortened(self.form, data, width)

    def json_key(self, data: bytes) -> dict[str, Any]:
        """The member of a JSON object that stands for a key."""
        return to_json(self.form, "key", data)

    def json_value(self, data: bytes, name: str = "value") -> dict[str, Any]:
        """The same of a value."""
        return to_json(self.form, name, data)


class AsItIs:
    """A codec that says it is another one, and leaves the bytes as they are."""

    ordered = True

    def __init__(self, codec: CodecName) -> None:
        self.name = codec.name
        self.version = codec.version
        self.oldest = codec.oldest or codec.version

    def encode(self, value: bytes) -> bytes:
        return value

    def decode(self, data: bytes) -> bytes:
        return data

    def is_known(self) -> bool:
        # The version of a value with one is not that of its encoding.
        return self.version == 1 or self.name.startswith("versioned(")


def as_name(name: str, option: str = "--table") -> str:
    """The name of a table, given as `option`. click.BadParameter for what can be none."""
    try:
        return as_table_name(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"'{option}'") from None


def row_in(snapshot: kvwal.Snapshot, name: str) -> TableRow | None:
    """The row of the table that has this name in a snapshot; None if there is none. click.BadParameter."""
    key = row_key(as_name(name))
    value = snapshot.part(SYSTEM_TABLE).get(key)
    return None if value is None else decode_row(key, value)


class TypedWriting(Writing):
    """How the keys and values of a table with these codecs are written."""

    def __init__(
        self, form: Form, name: str, key_codec: CodecName, value_codec: CodecName, *, quiet: bool = False
    ) -> None:
        """`quiet`: it is not said where they are shown as bytes."""
        super().__init__(form)
        key, value = AsItIs(key_codec), AsItIs(value_codec)
        self._key_name, self._value_name = key.name, value.name
        typed = form is Form.TEXT
        self._key = key_codec_named(key.name) if typed and key.is_known() and key.name != "bytes" else None
        self._read = reader_named(value.name) if typed and value.is_known() and value.name != "bytes" else None
        for what, codec, known in (("keys", key_codec, self._key), ("values", value_codec, self._read)):
            if typed and known is None and codec.name != "bytes" and not quiet:
                complain(f"the {what} of table {name!r} are shown as bytes: {_why_unknown(codec)}")

    @property
    def is_typed(self) -> bool:
        """See `Writing`."""
        return self._read is not None

    def _key_of(self, text: str) -> bytes:
        if self._key is None:
            return super()._key_of(text)
        return checked(as_key, _encoded(self._key, _meant(self._key_name, text)))

    def _value_of(self, text: str) -> bytes:
        if self._read is None:
            return super()._value_of(text)
        name = self._value_name
        codec: Any = codecs.counter if name == "counter" else codecs.json() if name == "json" else key_codec_named(name)
        if codec is None:
            raise click.UsageError(f"values of codec {name} cannot be written here as text; give --hex or --base64")
        return checked(as_value, _encoded(codec, _meant(name, text)))

    def _range_of(self, start: str | None, stop: str | None, prefix: str | None) -> KeyRange:
        if self._key is None:
            return super()._range_of(start, stop, prefix)
        name = self._key_name
        spec: TableSpec[Any, Any] = TableSpec("-", self._key, bytes)
        ends = [None if text is None else _meant(name, text) for text in (start, stop, prefix)]
        try:
            bounds = spec.bounds(ends[0], ends[1], ends[2], False, None)
        except (TypeError, ValueError) as error:
            raise click.BadParameter(str(error)) from None
        return KeyRange(bounds.start or b"", bounds.stop)

    def readable(self, data: bytes, option: str) -> bytes:
        """The bytes of a value, given as `option`. click.BadParameter if they are not what the codec makes."""
        if self._read is not None:
            try:
                self._read(data)
            except CodecError as error:
                what = f"it is no {self._value_name} as bytes: {error.reason}"
                raise click.BadParameter(what, param_hint=f"'{option}'") from None
        return data

    def show_key(self, data: bytes) -> str:
        """See `Writing`."""
        return super().show_key(data) if self._key is None else _shown(self._key_name, self._key.decode, data)

    def show_value(self, data: bytes, width: int | None = None) -> str:
        """See `Writing`."""
        if self._read is None:
            return super().show_value(data, width)
        text = _shown(self._value_name, self._read, data)
        return text if width is None or len(text) <= width // 2 else f"{text[: width // 2]}..."

    def json_key(self, data: bytes) -> dict[str, Any]:
        """See `Writing`."""
        return super().json_key(data) if self._key is None else _member("key", self._key.decode, data)

    def json_value(self, data: bytes, name: str = "value") -> dict[str, Any]:
        """See `Writing`."""
        return super().json_value(data, name) if self._read is None else _member(name, self._read, data)


def _why_unknown(codec: CodecName) -> str:
    if re.fullmatch(r"(?:\w+\()*pickle\)*", codec.name):
        return f"{codec} is not read here, since reading a pickle runs what it says"
    return f"{codec} is no codec of kvwal's own"


class TableWriting(TypedWriting):
    """How the keys and values of a table of a store are written. `read` has them as bytes."""

    def __init__(self, db: kvwal.Store | kvwal.Follower, name: str, form: Form, *, quiet: bool = False) -> None:
        """TableNotFoundError; click.BadParameter. `quiet`: see `TypedWriting`."""
        row = db.engine.tables.row(as_name(name))
        if row is None:
            raise TableNotFoundError(name)
        super().__init__(form, name, row.key, row.value, quiet=quiet)
        #: What the table remembers of the codecs of keys and values.
        self.codecs = row.key, row.value
        found: kvwal.Table[bytes, bytes] | kvwal.FollowedTable[bytes, bytes]
        found = db.table(name, AsItIs(row.key), AsItIs(row.value))
        #: The table, for reading.
        self.read = found

    @property
    def table(self) -> kvwal.Table[bytes, bytes]:
        """The same for writing. Requires: it is of a store, and not of a follower."""
        assert isinstance(self.read, kvwal.Table)
        return self.read


class TableNames:
    """What tables are called now."""

    def __init__(self, db: kvwal.Store | kvwal.Follower) -> None:
        self._db = db
        self._found: dict[int, str | None] = {}

    def of(self, table: int) -> str | None:
        """The name of a table; None if it was dropped. Looked up once."""
        if table not in self._found:
            if isinstance(self._db, kvwal.Follower):
                # It may not show yet what it has told.
                self._db.refresh()
            self._found |= {info.id: info.name for info in self._db.tables()}
        return self._found.setdefault(table, None)


_MEANT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "int64": int,
    "counter": int,
    "float": float,
    "bool": {"true": True, "false": False}.__getitem__,
    "UUID": UUID,
    "datetime": datetime.fromisoformat,
    "json": json.loads,
}


def _meant(codec: str, text: str) -> Any:
    """What a text stands for. click.BadParameter."""
    try:
        return _MEANT[codec](text) if codec in _MEANT else _printed(codec, text)
    except (ValueError, KeyError, SyntaxError, RecursionError, MemoryError, TypeError, OverflowError):
        example = "; a tuple is written as in Python: \"('ada', 7)\"" if codec.startswith("tuple") else ""
        raise click.BadParameter(f"{text!r} is no {codec}{example}") from None


def _printed(codec: str, text: str) -> Any:
    """What `repr` of a tuple of this codec wrote. ValueError, and what a parser raises, for another text.

    Nothing in the text is run.
    """
    kinds = set(re.findall(r"\w+", codec))
    # Both are printed alike.
    number = codecs.Float32 if "Float32" in kinds and "float" not in kinds else float
    return _part(ast.parse(text.strip(), mode="eval").body, number)


def _part(node: ast.expr, number: type[float]) -> Any:
    match node:
        case ast.Constant(value=float() as value):
            return number(value)
        case ast.Constant(value=str() | bytes() | int() | None as value):
            return value
        case ast.Name(id="inf" | "nan" as name):
            return number(float(name))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name() as operand):
            value = -_part(operand, number)
            return number(value) if isinstance(value, float) else value
        case ast.Tuple(elts=parts):
            return tuple(_part(part, number) for part in parts)
        case ast.Call(func=ast.Name(id="UUID"), args=[ast.Constant(value=str(text))], keywords=[]):
            return UUID(text)
        case ast.Call(func=ast.Name(id="Versionstamp"), args=[], keywords=[seqno, ordinal]) if (
            [seqno.arg, ordinal.arg] == ["seqno", "ordinal"]
        ):
            return codecs.Versionstamp(_part(seqno.value, number), _part(ordinal.value, number))
        case ast.Call(args=args, keywords=[zone]) if (
            ast.unparse(node.func) == "datetime.datetime" and ast.unparse(zone) == "tzinfo=datetime.timezone.utc"
        ):
            return datetime(*(_part(part, number) for part in args)).replace(tzinfo=UTC)  # noqa: DTZ001  # it gets one
    raise ValueError(f"no part of a tuple: {type(node).__name__}")


def _encoded(codec: Any, value: Any) -> bytes:
    try:
        data: bytes = codec.encode(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise click.BadParameter(str(error)) from None
    return data


def _shown(codec: str, read: Callable[[bytes], Any], data: bytes) -> str:
    """A value in one line, with nothing in it that controls a terminal."""
    value = read(data)
    try:
        match value:
            case str() if codec == "str":
                text = value
            case datetime():
                text = value.isoformat()
            case UUID():
                text = str(value)
            case tuple():
                # Which has escaped what it must be. To escape that would be to give it back as another one.
                return repr(value)
            case _:
                text = plain_json(value)
        return show(Form.TEXT, text.encode("utf-8", "surrogateescape"))
    except ValueError:
        # A number of thousands of digits, which Python does not print, or half of a pair of surrogates.
        return show(Form.HEX, data)


def _member(name: str, read: Callable[[bytes], Any], data: bytes) -> dict[str, Any]:
    """The member of a JSON object that stands for a value."""
    value = read(data)
    try:
        # JSON has no infinity, and nothing that is no number.
        plain_json(value, finite=True).encode()
    except ValueError:
        return to_json(Form.HEX, name, data)
    return {name: value}
