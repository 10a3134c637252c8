"""Tables that a feed is asked for: by id, by name, or as what stands for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from kvwal.engine.engine import Engine
from kvwal.engine.tables import as_table_name
from kvwal.errors import TableNotFoundError
from kvwal.tables.spec import OfTable

__all__ = ["AnyTable", "AnyTables", "table_ids"]

AnyTable: TypeAlias = int | str | OfTable[Any, Any]
"""A table: its id, its name, or a `Table`."""

AnyTables: TypeAlias = AnyTable | Iterable[AnyTable]
"""One table, or several."""


def table_ids(engine: Engine, tables: AnyTables | None) -> list[int] | None:
    """The ids of tables now; None for None. TableNotFoundError for a name without a table; TypeError, ValueError."""
    if tables is None:
        return None
    if isinstance(tables, int | str | OfTable):
        tables = [tables]
    # Iterating over bytes would give ids.
    given: object = tables
    if isinstance(given, bytes | bytearray | memoryview) or not isinstance(given, Iterable):
        raise TypeError(f"tables is an id, a name (a str), a Table, or several of these, not {type(tables).__name__}")
    return [_id(engine, each) for each in tables]


def _id(engine: Engine, table: AnyTable) -> int:
    if isinstance(table, OfTable):
        if table.is_default:
            raise ValueError(f"{table.name} is a part of the default table: give 0, and the part as prefix")
        table = table.name
    if not isinstance(table, str):
        return table
    row = engine.tables.row(as_table_name(table))
    if row is None:
        raise TableNotFoundError(table)
    return row.id
