"""Units as a destination has them: read in no other way than here.

Invariant: of an object no more is read than its header allows, so that another file under its name does not fill the
memory.
"""

from __future__ import annotations

from typing import Final

from kvwal.backup.names import UnitName
from kvwal.backup.port import Destination
from kvwal.backup.units import HEADER_BYTES, Unit, UnitHeader, decode_header, decode_unit

__all__ = ["FIRST_BYTES", "fetch_header", "fetch_stored", "fetch_unit"]

#: A unit of usual size comes by one request.
FIRST_BYTES: Final = 9 << 20


def fetch_header(destination: Destination, name: UnitName | str) -> UnitHeader:
    """The header of a unit. Raises as `decode_header`, and ObjectMissing."""
    return decode_header(str(name), destination.get(str(name), size=HEADER_BYTES))


def fetch_stored(destination: Destination, name: UnitName | str) -> bytes:
    """A unit as it is stored, and one byte more if the object has more. Only its header is looked at, if it is large.

    Raises as `decode_header`, and ObjectMissing.
    """
    data = destination.get(str(name), size=FIRST_BYTES)
    if len(data) < FIRST_BYTES:
        return data
    most = HEADER_BYTES + decode_header(str(name), data).stored_size + 1
    if most > FIRST_BYTES:
        data += destination.get(str(name), start=FIRST_BYTES, size=most - FIRST_BYTES)
    return data


def fetch_unit(destination: Destination, name: UnitName | str) -> Unit:
    """A unit. Raises as `decode_unit`, and ObjectMissing."""
    return decode_unit(str(name), fetch_stored(destination, name))
