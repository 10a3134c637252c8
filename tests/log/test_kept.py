"""What was read and is kept, while others take it out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from collected import collected_everywhere
from log_rig import simulated_disk

from kvwal.log.kept import Kept, KeptFiles, Loaded


def test_a_finalizer_may_drop_one_for_a_newer_one() -> None:
    things: Kept[int, int] = Kept(20 * 1_000)
    keys = count()

    def put() -> None:
        things.put(next(keys), 0, 850)

    def dropping() -> Callable[[], object]:
        while len(things.keys()) < 20:
            put()
        newest = things.keys()[-1]
        return lambda: things.drop(newest)

    assert collected_everywhere(dropping, put, 60) >= 15
    assert 15 < len(things.keys()) <= 20


def test_a_finalizer_may_load_a_file_while_another_is_loaded() -> None:
    directory = simulated_disk().open_directory("/log")
    names = [f"f{n}" for n in range(100)]
    for name in names:
        directory.open(name, create=True).pwrite(b"x" * 10, 0)
    files, left, held = KeptFiles(directory), iter(names), list[Loaded | None]()
    held += [files.load(next(left), 10, 1) for _ in range(20)]

    def loading() -> Callable[[], object]:
        return lambda: held.append(files.load(next(left), 10, 1))

    assert collected_everywhere(loading, lambda: files.load(names[0], 10, 1), 50) >= 15
    assert None not in held
