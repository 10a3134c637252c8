"""Values of types as JSON and MessagePack, by msgspec: dataclasses, attrs classes, Structs, TypedDicts and the rest.

msgspec is imported when a codec is made, since it is an extra. It checks each field when a value is read. When one is
written, only the class of the whole is checked; a value of another class than the type's own is read once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from datetime import UTC, datetime
from importlib import import_module
from math import isnan
from typing import Any, get_origin, is_typeddict

from kvwal.codecs.codec import TypedFunctions, ValueFunctions, members_of, refused, spelled
from kvwal.errors import CodecError

__all__ = ["msgpack_functions", "typed_functions"]


def _msgspec() -> Any:
    try:
        return import_module("msgspec")
    except ImportError:
        raise ImportError(
            "msgspec reads types and MessagePack; install it with: pip install 'kvwal[msgspec]'"
        ) from None


def _writer(module: Any) -> Callable[[Any], bytes]:
    """What `msgspec.json` or `msgspec.msgpack` writes, the same for equal values if keys are str."""
    in_order, as_it_is = module.Encoder(order="deterministic").encode, module.Encoder().encode

    def write(value: Any) -> bytes:
        try:
            try:
                return in_order(value)  # type: ignore[no-any-return]  # bytes, of a C extension
            except TypeError:
                # Of dicts with other keys than str; of what cannot be written it is raised again.
                return as_it_is(value)  # type: ignore[no-any-return]  # as above
        except RecursionError:
            raise ValueError("the value is nested too deep, or holds itself") from None
        except OverflowError as error:
            # Of an int it is said by msgspec itself.
            if "date" not in str(error):
                raise
            raise ValueError(
                "MessagePack has a datetime in UTC, and there one in the value is not within the years 1 to 9999"
            ) from None

    return write


def _reader(name: str, read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return read(data)
        except (ValueError, RecursionError) as error:
            raise CodecError(name, data, str(error)) from None

    return decode


def msgpack_functions() -> ValueFunctions[Any]:
    """MessagePack of whatever it has. TypeError for what would be read again as something that it does not equal."""
    module = _msgspec().msgpack
    write, read = _writer(module), module.Decoder().decode

    def encode(value: Any) -> bytes:
        data = write(value)
        try:
            again = read(data)
            if again != value:
                _refuse_others(value, again)
        except RecursionError:
            raise ValueError("the value is nested too deep") from None
        return data

    return ValueFunctions("msgpack", encode, _reader("msgpack", read))


def _refuse_others(value: Any, again: Any) -> None:
    """TypeError for a part of a value that is read again as something else, and not equal; tuples are read as lists."""
    if isinstance(value, list | tuple) and isinstance(again, list | tuple) and len(value) == len(again):
        for part, of in zip(value, again, strict=True):
            _refuse_others(part, of)
    elif isinstance(value, dict) and isinstance(again, dict):
        if len(again) < len(value):
            raise TypeError("two keys of a dict are one in MessagePack, as datetimes of one moment are")
        for key, part in value.items():
            as_read = _in_utc(key)
            if as_read in again:
                _refuse_others(part, again[as_read])
            elif not _has_nan(key):
                raise _not_of_msgpack(key, "another key")
    elif _in_utc(value) != again and (value == value or again == again):  # both may be NaN
        raise _not_of_msgpack(value, type(again).__name__)


def _has_nan(key: Any) -> bool:
    """Whether a key of a dict is NaN, or a tuple with one: it is not found in a dict that was read."""
    return any(map(_has_nan, key)) if isinstance(key, tuple) else isinstance(key, float) and isnan(key)


def _in_utc(value: Any) -> Any:
    """An aware datetime in UTC, also in a tuple that is a key.

    In an hour that a clock has twice, it equals no datetime of another zone as it is.
    """
    if isinstance(value, tuple):
        return tuple(map(_in_utc, value))
    return value.astimezone(UTC) if isinstance(value, datetime) and value.utcoffset() is not None else value


def _not_of_msgpack(value: object, read: str) -> TypeError:
    return TypeError(
        f"MessagePack has no {type(value).__name__}, and it would be read again as {read}; say the type, as in "
        "msgpack(User), which has it in a field, or store something that MessagePack has"
    )


def typed_functions(form: str, kind: Any, called: str | None, plain: Callable[[bytes], Any]) -> TypedFunctions[Any]:
    """A type as JSON or MessagePack, which `plain` reads without the type. TypeError if msgspec does not know it."""
    msgspec = _msgspec()
    info = msgspec.inspect.type_info(kind)
    if isinstance(info, msgspec.inspect.CustomType):
        raise TypeError(
            f"{spelled(kind)} is no type that msgspec reads, as a dataclass is; make a codec of your own for it"
        )
    _refuse_left_out(msgspec.inspect, info)
    module = getattr(msgspec, form)
    name = f"{form}[{called or spelled(kind)}]"
    read, write = module.Decoder(kind).decode, _writer(module)
    exact, others = _classes(kind)
    is_any = Any in members_of(kind)

    def encode(value: Any) -> bytes:
        is_exact = is_any or type(value) in exact
        if not is_exact and not isinstance(value, others):
            raise refused(value, spelled(kind))
        data = write(value)
        # Not every value of a subclass is one of its type: a bool is an int, and a datetime a date. NaN is written as
        # null, which no float is read from. What is in the value is not looked at otherwise.
        if not is_exact or (form == "json" and b"null" in data):
            try:
                read(data)
            except ValueError as error:
                if is_exact:
                    why = f"{error}; JSON has no NaN" if _is_of_nan(value, str(error)) else str(error)
                    raise ValueError(f"{spelled(kind)} would not be read again: {why}") from None
                raise TypeError(f"{refused(value, spelled(kind))}: {error}") from None
        return data

    def _is_of_nan(value: Any, why: str) -> bool:
        """Whether it is not for a None that a value is refused: that is the same before it is written."""
        if "`null`" not in why:
            return False
        try:
            convert(msgspec.to_builtins(value, str_keys=True))
        except ValueError as error:
            return str(error) != why
        return True

    def convert(value: Any) -> Any:
        return msgspec.convert(value, kind, str_keys=form == "json")

    return TypedFunctions(name, encode, _reader(name, read), plain=plain, convert=convert)


def _refuse_left_out(inspect: Any, info: Any) -> None:
    """TypeError for an attribute of an attrs class, wherever it is in the type, that msgspec does not write."""
    seen: dict[int, Any] = {}
    found = [info]
    while found:
        node = found.pop()
        # A type may have itself in it.
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if isinstance(node, inspect.Field):
            found.append(node.type)
            continue
        for part in (getattr(node, name) for name in node.__struct_fields__):
            parts = part if isinstance(part, tuple) else (part,)
            found.extend(each for each in parts if isinstance(each, inspect.Type | inspect.Field))
        if isinstance(node, inspect.DataclassType) and hasattr(get_origin(node.cls) or node.cls, "__attrs_attrs__"):
            for field in node.fields:
                if field.name.startswith("_"):
                    raise TypeError(
                        f"{spelled(node.cls)} has the attribute {field.name}, and msgspec does not write what begins "
                        "with an underscore in an attrs class; name it without one, make a dataclass of the class, or "
                        "make a codec of your own for it"
                    )


def _classes(kind: Any) -> tuple[set[type], tuple[type, ...]]:
    """The classes of the values of a type, as far as they can be told, and those whose subclasses may be meant, too.

    An instance of a subclass of one with fields may have fields that would not be read again.
    """
    exact: set[type] = set()
    others: list[type] = []
    for member in members_of(kind):
        origin = dict if is_typeddict(member) else get_origin(member) or member
        if not isinstance(origin, type):
            others.append(object)
        elif is_dataclass(origin) or hasattr(origin, "__struct_fields__") or hasattr(origin, "__attrs_attrs__"):
            exact.add(origin)
        else:
            exact.add(origin)
            others.extend((int, float) if origin is float else (origin,))
    return exact, tuple(others)
