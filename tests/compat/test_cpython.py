"""CPython's own tests of `dbm`, `shelve` and mappings, unchanged, against kvwal.

They are in the running interpreter's package `test`, which Debian has as libpython3.X-testsuite.
"""

from __future__ import annotations

import functools
import pickle
import sys
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import kvwal
import kvwal.compat.dbm
import kvwal.compat.shelve

try:
    from test import mapping_tests, test_dbm, test_shelve
except ImportError as error:
    pytest.skip(f"CPython's own tests are not installed for {sys.executable}: {error}", allow_module_level=True)


def as_dbm() -> Any:
    """The module as the tests expect `dbm`: they set which of its modules makes new databases."""
    module = types.ModuleType("dbm")
    vars(module).update(vars(kvwal.compat.dbm), _defaultmod=None)
    return module


@pytest.fixture(autouse=True)
def kvwal_for_dbm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What they open has a relative name.
    monkeypatch.chdir(tmp_path)
    module = as_dbm()
    for tests in (test_dbm, test_shelve):
        monkeypatch.setattr(tests, "dbm", module)
    monkeypatch.setattr(test_dbm, "dbm_iterator", lambda: iter([kvwal.compat.dbm]))
    monkeypatch.setattr(test_shelve, "shelve", kvwal.compat.shelve)


class TestDbm(test_dbm.AnyDBMTestCase, unittest.TestCase):
    module = kvwal.compat.dbm

    def test_anydbm_reorganize_decreased_size(self) -> None:
        """From 3.15 on. What was deleted stays readable as the past, unless none is kept."""
        without_past = functools.partial(kvwal.compat.dbm.open, keep_history_s=0)
        with mock.patch.object(test_dbm.dbm, "open", without_past):
            getattr(super(), self._testMethodName, lambda: None)()


class TestWhichDb(test_dbm.WhichDBTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.dbm = kvwal.compat.dbm


class TestShelve(test_shelve.TestCase):
    pass


class FileShelve(test_shelve.TestShelveFileBase, mapping_tests.BasicTestMappingProtocol):
    dbm_mod = kvwal.compat.dbm
    protocol: int

    @property
    def _args(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "durability": "os"}


for number in range(pickle.HIGHEST_PROTOCOL + 1):
    globals()[f"TestFileShelveProtocol{number}"] = type("TestFileShelve", (FileShelve,), {"protocol": number})
del FileShelve


class OfBytes(mapping_tests.BasicTestMappingProtocol):
    """Mappings whose keys and values are bytes."""

    type2test = dict

    def _reference(self) -> dict[bytes, bytes]:
        return {b"1": b"2", b"key1": b"value1", b"key2": b"\0\xff"}


class TestStore(OfBytes):
    # They want a TypeError for `values(None)`, which says here that the values begin at the first key.
    test_items = test_values = None

    def _empty_mapping(self) -> Any:
        self.made = getattr(self, "made", 0) + 1
        store = kvwal.open(f"{self.made}.kv", background=False, durability="os")
        self.addCleanup(store.close)
        return store


class TestTransaction(TestStore):
    def _empty_mapping(self) -> Any:
        return super()._empty_mapping().transaction()


class TestDatabase(OfBytes):
    def _empty_mapping(self) -> Any:
        self.made = getattr(self, "made", 0) + 1
        database = kvwal.compat.dbm.open(f"{self.made}.kv", "c", background=False, durability="os")
        self.addCleanup(database.close)
        return database


del OfBytes


def test_the_tests_of_cpython_were_found() -> None:
    """Should they move, this says so: nothing else would notice that less is run."""
    loader = unittest.TestLoader()
    found = {kind: len(loader.getTestCaseNames(kind)) for kind in (TestDbm, TestWhichDb, TestShelve, TestStore)}
    assert found[TestDbm] >= 12
    assert found[TestWhichDb] >= 1
    assert found[TestShelve] >= 13
    assert found[TestStore] >= 12
