"""What the library asks for recorders. The environment that it reads:

- `KVWAL_PATH`: the directory of the store, which is made if it is missing.
- `KVWAL_DURABILITY`: when a commit returns: "commit" (the default), "interval" or "os", as of `kvwal.open`.

Each may begin with the application's name, as in `ORDERS_KVWAL_PATH`. The tables of an application have its name, so
that several applications may share a store.
"""

from __future__ import annotations

from typing import TypeVar, cast, get_args

from eventsourcing.dcb.api import DCBRecorder
from eventsourcing.dcb.persistence import DCBInfrastructureFactory
from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    InfrastructureFactory,
    InterfaceError,
    ProcessRecorder,
    ProgrammingError,
)
from eventsourcing.utils import Environment, EnvType, resolve_topic

from kvwal.api.shared import shared
from kvwal.api.store import Store
from kvwal.errors import StoreNotFoundError
from kvwal.eventsourcing.datastore import Datastore, EventTable
from kvwal.eventsourcing.dcb import KvwalDCBRecorder
from kvwal.eventsourcing.failures import raising_persistence_errors
from kvwal.eventsourcing.recorders import (
    KvwalAggregateRecorder,
    KvwalApplicationRecorder,
    KvwalProcessRecorder,
    KvwalTrackingRecorder,
)
from kvwal.files import path_text
from kvwal.options import Durability

__all__ = ["KvwalFactory"]

_R = TypeVar("_R")


class KvwalFactory(InfrastructureFactory[KvwalTrackingRecorder], DCBInfrastructureFactory[KvwalTrackingRecorder]):
    """Makes recorders over one store, which it holds by `kvwal.shared` until it is closed."""

    KVWAL_PATH = "KVWAL_PATH"
    KVWAL_DURABILITY = "KVWAL_DURABILITY"

    def __init__(self, env: Environment | EnvType | None) -> None:
        """Open the store. OSError if the environment says nothing of it, or what there is not; the library's errors."""
        super().__init__(env)
        path = self.env.get(self.KVWAL_PATH)
        if not path:
            names = ", ".join(self.env.create_keys(self.KVWAL_PATH))
            raise OSError(f"the environment does not say where the store is; set one of {names} to its directory")
        try:
            path = path_text(path)
        except TypeError:
            raise OSError(f"{self.KVWAL_PATH} is the path of a directory, not {path!r}") from None
        durability = self.env.get(self.KVWAL_DURABILITY) or "commit"
        if durability not in get_args(Durability):
            allowed = ", ".join(get_args(Durability))
            raise OSError(f"{self.KVWAL_DURABILITY} is one of {allowed}, not {durability!r}")
        #: The store, and what waits for its commits.
        self.datastore = Datastore(_opened(path, cast(Durability, durability)))

    def _events(self, purpose: str = "events") -> EventTable:
        # The purpose first, and without the separator: so two applications never have one table.
        if "/" in purpose:
            raise ProgrammingError(f"the purpose of a recorder has no slash, and {purpose!r} has one")
        return self.datastore.table(f"eventsourcing/{purpose}/{self.env.name}")

    def _class(self, topic: str, default: type[_R]) -> type[_R]:
        named = self.env.get(topic)
        return _checked(resolve_topic(named), default) if named else default

    def aggregate_recorder(self, purpose: str = "events") -> AggregateRecorder:
        """For the events of aggregates, or what else they are for, "snapshots" for one."""
        return KvwalAggregateRecorder(self._events(purpose))

    def application_recorder(self) -> ApplicationRecorder:
        """For the events of an application. The environment may name a subclass."""
        return self._class(self.APPLICATION_RECORDER_TOPIC, KvwalApplicationRecorder)(self._events())

    def tracking_recorder(
        self, tracking_recorder_class: type[KvwalTrackingRecorder] | None = None
    ) -> KvwalTrackingRecorder:
        """For what was processed, by this class, or by one that the environment names."""
        if tracking_recorder_class is None:
            tracking_recorder_class = self._class(self.TRACKING_RECORDER_TOPIC, KvwalTrackingRecorder)
        return _checked(tracking_recorder_class, KvwalTrackingRecorder)(self._events())

    def process_recorder(self) -> ProcessRecorder:
        """For events, and what they came of. The environment may name a subclass."""
        return self._class(self.PROCESS_RECORDER_TOPIC, KvwalProcessRecorder)(self._events())

    def dcb_recorder(self) -> DCBRecorder:
        """For events with tags."""
        return KvwalDCBRecorder(self._events("dcb"))

    def close(self) -> None:
        """Let go of the store; the last factory that does closes it. Idempotent."""
        self.datastore.close()


@raising_persistence_errors
def _opened(path: str, durability: Durability) -> Store:
    try:
        return shared(path, durability=durability)
    except StoreNotFoundError as error:
        reason = "the directory in which the store is to be does not exist; make that first"
        raise InterfaceError(f"KVWAL_PATH is {path!r}: {reason}") from error


def _checked(found: object, expected: type[_R]) -> type[_R]:
    if not (isinstance(found, type) and issubclass(found, expected)):
        raise ProgrammingError(f"{found!r} is no subclass of {expected.__name__}")
    return found
