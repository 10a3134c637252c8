"""How bytes are written on a command line, in a line of text and in JSON.

| form | on the command line | in a line of output | in JSON |
|---|---|---|---|
| text | the argument's own bytes | UTF-8, escaped where it must be | `"key": "..."` |
| hex | two digits a byte | the same | `"key_hex": "..."` |
| base64 | the standard alphabet | the same | `"key_base64": "..."` |

Escaped in a line: a backslash, control characters, and bytes that are not UTF-8 (`\\xff`).

In JSON a text that is not UTF-8 is written as base64 under the other name, so that a dump never loses
or guesses a byte, and a load needs no option to read it.
"""

from __future__ import annotations

import base64
import binascii
import enum
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from kvwal.keys import as_key
from kvwal.log import extension_of

__all__ = [
    "Form",
    "checked",
    "form_options",
    "from_json",
    "meta_option",
    "of_option",
    "parse",
    "parse_key",
    "show",
    "shortened",
    "show_meta",
    "to_json",
]

_F = TypeVar("_F", bound=Callable[..., Any])


class Form(enum.Enum):
    """How bytes are written where only text can be."""

    TEXT = "text"
    HEX = "hex"
    BASE64 = "base64"


def form_options(command: _F) -> _F:
    """Give a command the options `--hex` and `--base64`, as its argument `form`."""
    for form in (Form.BASE64, Form.HEX):
        command = click.option(
            f"--{form.value}", "form", flag_value=form, help=f"Keys and values are {form.value}, in and out."
        )(command)
    return click.option(
        "--text", "form", flag_value=Form.TEXT, default=Form.TEXT, help="Keys and values are UTF-8 text (default)."
    )(command)


@contextmanager
def of_option(name: str) -> Iterator[None]:
    """What is wrong with a value is said of this option or argument."""
    try:
        yield
    except click.BadParameter as error:
        error.param_hint = f"'{name}'"
        raise


def meta_option(what: str) -> Callable[[_F], _F]:
    """Give a command the option `--meta KEY=VALUE`, as its argument `meta`, a dict."""
    return click.option("--meta", multiple=True, metavar="KEY=VALUE", callback=_as_meta, help=what)


def _as_meta(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    del context, option
    meta: dict[str, str] = {}
    for text in texts:
        key, found, value = text.partition("=")
        if not found:
            raise click.BadParameter(f"{text!r} has no '=' in it")
        if key in meta:
            raise click.BadParameter(f"{key!r} is given twice")
        meta[key] = value
    try:
        extension_of(meta)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return meta


def show_meta(meta: Mapping[str, str]) -> list[str]:
    """Each pair in one line, as `show` writes text."""
    return [show(Form.TEXT, f"{key}={value}".encode()) for key, value in meta.items()]


def parse(form: Form, text: str) -> bytes:
    """The bytes that an argument stands for. click.BadParameter if it is not of that form."""
    if form is Form.TEXT:
        # What the shell passed, byte for byte, even where it is not UTF-8.
        return text.encode("utf-8", "surrogateescape")
    try:
        return bytes.fromhex(text) if form is Form.HEX else base64.b64decode(text, validate=True)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not {form.value}: {error}") from None


def parse_key(form: Form, text: str) -> bytes:
    """A key that an argument stands for. click.BadParameter if it is not of that form, or too long."""
    return checked(as_key, parse(form, text))


def checked(check: Callable[[bytes], bytes], data: bytes) -> bytes:
    """The data if `check`, `as_key` or `as_value`, lets it through; click.BadParameter with the limit if not."""
    try:
        return check(data)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_ESCAPED = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escape(match: re.Match[str]) -> str:
    char = match.group()
    if char in _SHORT:
        return _SHORT[char]
    # A byte that is not UTF-8 was decoded to a lone surrogate 0xdc00 + byte; what else is escaped keeps its bytes.
    raw = char.encode("utf-8", "surrogateescape")
    return "".join(f"\\x{byte:02x}" for byte in raw)


def show(form: Form, data: bytes) -> str:
    """`data` in one line without a tab in it, and without anything that controls a terminal."""
    if form is Form.HEX:
        return data.hex()
    if form is Form.BASE64:
        return base64.b64encode(data).decode("ascii")
    return _ESCAPED.sub(_escape, data.decode("utf-8", "surrogateescape"))


def to_json(form: Form, name: str, data: bytes) -> dict[str, str]:
    """The JSON member that stands for `data`."""
    if form is Form.HEX:
        return {f"{name}_hex": data.hex()}
    if form is Form.TEXT:
        try:
            return {name: data.decode("utf-8")}
        except UnicodeDecodeError:
            pass
    return {f"{name}_base64": base64.b64encode(data).decode("ascii")}


def from_json(name: str, members: dict[str, Any]) -> bytes:
    """The bytes of `name` in an object made by `to_json`. ValueError says what is wrong with it."""
    found = [(suffix, members[name + suffix]) for suffix in ("", "_hex", "_base64") if name + suffix in members]
    if len(found) != 1:
        raise ValueError(f'it needs exactly one of "{name}", "{name}_hex" and "{name}_base64"')
    suffix, text = found[0]
    if not isinstance(text, str):
        raise ValueError(f'"{name}{suffix}" is not a string')
    try:
        if suffix == "_hex":
            return bytes.fromhex(text)
        if suffix == "_base64":
            return base64.b64decode(text, validate=True)
        return text.encode("utf-8")
    except (ValueError, binascii.Error) as error:
        raise ValueError(f'"{name}{suffix}": {error}') from None


def shortened(form: Form, value: bytes, width: int | None) -> str:
    """The value in one line, in about half of a terminal's width."""
    if width is None:
        return show(form, value)
    most = width // 2
    text = show(form, value[:most])
    if len(value) <= most and len(text) <= most:
        return text
    return f"{text[:most]}... ({len(value):,} bytes)"
