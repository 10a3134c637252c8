"""The test cases that the library `eventsourcing` ships for persistence modules, over kvwal's, as they are.

Of its module `eventsourcing.tests.persistence` all recorder and factory cases are here; of `tests.application`,
`tests.projection` and `dcb.tests` all cases. Not here, because no persistence module takes part in them:
`TranscoderTestCase` of `tests.persistence`. `tests.domain` has examples and no cases, `tests.postgres_utils` is about
servers. The library ships no cases of its module `system`; tests/recorders/test_recorders.py has one.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar, cast
from unittest import TestCase, mock

import eventsourcing.tests
from eventsourcing.dcb import tests as dcb_tests
from eventsourcing.dcb.api import DCBRecorder
from eventsourcing.persistence import Tracking
from eventsourcing.tests import application, persistence, projection
from eventsourcing.utils import Environment

from kvwal.db.transaction import Transaction
from kvwal.eventsourcing import (
    KvwalAggregateRecorder,
    KvwalApplicationRecorder,
    KvwalFactory,
    KvwalProcessRecorder,
    KvwalTrackingRecorder,
)


class OverKvwal(TestCase):
    """Its environment names a store of its own."""

    def setUp(self) -> None:
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path)
        variables = {"KVWAL_PATH": path, "PERSISTENCE_MODULE": "kvwal.eventsourcing"}
        patch = mock.patch.dict(os.environ, variables)
        patch.start()
        self.addCleanup(patch.stop)
        self.factory = KvwalFactory(Environment("Tried", dict(os.environ)))
        self.addCleanup(self.factory.close)
        super().setUp()


class TestAggregateRecorder(OverKvwal, persistence.AggregateRecorderTestCase):
    def create_recorder(self) -> KvwalAggregateRecorder:
        return cast(KvwalAggregateRecorder, self.factory.aggregate_recorder())


class TestApplicationRecorder(OverKvwal, persistence.ApplicationRecorderTestCase):
    def create_recorder(self) -> KvwalApplicationRecorder:
        return cast(KvwalApplicationRecorder, self.factory.application_recorder())

    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()


class TestProcessRecorder(OverKvwal, persistence.ProcessRecorderTestCase):
    def create_recorder(self) -> KvwalProcessRecorder:
        return cast(KvwalProcessRecorder, self.factory.process_recorder())


class TestProcessRecorderAsApplicationRecorder(TestApplicationRecorder):
    def create_recorder(self) -> KvwalProcessRecorder:
        return cast(KvwalProcessRecorder, self.factory.process_recorder())


class TestTrackingRecorder(OverKvwal, persistence.TrackingRecorderTestCase):
    def create_recorder(self) -> KvwalTrackingRecorder:
        return self.factory.tracking_recorder()


class TestNonInterleavingNotificationIDs(OverKvwal, persistence.NonInterleavingNotificationIDsBaseCase):
    def create_recorder(self) -> KvwalApplicationRecorder:
        return cast(KvwalApplicationRecorder, self.factory.application_recorder())


class Tracker(KvwalTrackingRecorder):
    """A subclass that the environment may name."""


class TestInfrastructureFactory(persistence.InfrastructureFactoryTestCase[KvwalFactory]):
    def setUp(self) -> None:
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path)
        self.env = Environment("Tried", {"KVWAL_PATH": path, "PERSISTENCE_MODULE": "kvwal.eventsourcing"})
        super().setUp()

    def expected_factory_class(self) -> type[KvwalFactory]:
        return KvwalFactory

    def expected_aggregate_recorder_class(self) -> type[KvwalAggregateRecorder]:
        return KvwalAggregateRecorder

    def expected_application_recorder_class(self) -> type[KvwalApplicationRecorder]:
        return KvwalApplicationRecorder

    def expected_tracking_recorder_class(self) -> type[KvwalTrackingRecorder]:
        return KvwalTrackingRecorder

    def tracking_recorder_subclass(self) -> type[KvwalTrackingRecorder]:
        return Tracker

    def expected_process_recorder_class(self) -> type[KvwalProcessRecorder]:
        return KvwalProcessRecorder


class TestExampleApplication(OverKvwal, application.ExampleApplicationTestCase):
    expected_factory_topic = "kvwal.eventsourcing.factory:KvwalFactory"


class TestApplication(OverKvwal, application.ApplicationTestCase):
    pass


class CountersView(KvwalTrackingRecorder, projection.EventCountersView):
    """The view of the library's projections."""

    def _count(self, name: str) -> int:
        return self.store.table("counters", str, int).get(name) or 0

    def _add(self, name: str, tracking: Tracking) -> None:
        counters = self.store.table("counters", str, int)

        def add(txn: Transaction) -> None:
            here = counters.within(txn)
            here[name] = (here.get(name) or 0) + 1

        self.record(tracking, add)

    def get_created_event_counter(self) -> int:
        return self._count("created")

    def get_subsequent_event_counter(self) -> int:
        return self._count("subsequent")

    def incr_created_event_counter(self, tracking: Tracking) -> None:
        self._add("created", tracking)

    def incr_subsequent_event_counter(self, tracking: Tracking) -> None:
        self._add("subsequent", tracking)


class TestEventCountersView(OverKvwal, projection.EventCountersViewTestCase):
    def construct_event_counters_view(self) -> CountersView:
        return cast(CountersView, self.factory.tracking_recorder(CountersView))


class TestAggregateEventCountersProjection(OverKvwal, projection.AggregateEventCountersProjectionTestCase):
    view_class = CountersView


class TestTaggedDecisionCountersProjection(OverKvwal, projection.TaggedDecisionCountersProjectionTestCase):
    view_class = CountersView
    env: ClassVar[dict[str, str]] = {"MAPPER_TOPIC": "eventsourcing.dcb.msgpack:MessagePackMapper"}


class TestEventSourcedProjection(OverKvwal, projection.EventSourcedProjectionTestCase):
    pass


class TestDCBRecorder(OverKvwal, dcb_tests.DCBRecorderTestCase):
    def create_recorder(self) -> DCBRecorder:
        return self.factory.dcb_recorder()

    def test_append_read(self) -> None:
        self._test_append_read(self.create_recorder())

    def test_append_subscribe(self) -> None:
        self._test_append_subscribe(self.create_recorder())


def shipped() -> Iterator[tuple[str, type[TestCase]]]:
    """The cases that the library ships."""
    modules: list[Any] = [dcb_tests]
    for found in pkgutil.iter_modules(eventsourcing.tests.__path__):
        if found.name != "postgres_utils":
            modules.append(importlib.import_module(f"eventsourcing.tests.{found.name}"))
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, TestCase) and value.__module__ == module.__name__:
                yield name, value


def test_every_case_that_is_shipped_is_run() -> None:
    run = {base for value in globals().values() if isinstance(value, type) for base in value.__mro__}
    left = {name for name, case in shipped() if case not in run}
    assert left == {"TranscoderTestCase"}
