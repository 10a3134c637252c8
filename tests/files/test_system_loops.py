"""The system's file hides short reads, short writes and interrupted calls from everything above it."""

import errno

import pytest

from kvwal.files import file as module


class FakeOs:
    """Serves one file from memory, a few bytes at a call."""

    def __init__(self, step):
        self.content = bytearray()
        self.step = step
        self.calls = 0

    def pread(self, fd, size, offset):
        self.calls += 1
        return bytes(self.content[offset : offset + min(size, self.step)])

    def pwrite(self, fd, data, offset):
        self.calls += 1
        data = bytes(data)[: self.step]
        self.content.extend(bytes(max(0, offset + len(data) - len(self.content))))
        self.content[offset : offset + len(data)] = data
        return len(data)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeOs(step=3)
    monkeypatch.setattr(module.os, "pread", fake.pread)
    monkeypatch.setattr(module.os, "pwrite", fake.pwrite)
    return fake


def file():
    return module.SystemFile(-1, 'f')


def test_short_writes_are_continued_until_all_is_written(fake):
    file().pwrite(b"0123456789", 2)
    assert fake.content == b"\0\x000123456789"
    assert fake.calls == 4


def test_short_writes_of_views_and_chunks_are_continued(fake):
    file().pwrite_all([memoryview(b"01234"), bytearray(b"56789"), b""], 0)
    assert fake.content == b"0123456789"


def test_short_reads_are_continued_until_the_end_of_the_file(fake):
    fake.content += b"0123456789"
    assert file().pread(8, 1) == b"12345678"
    assert file().pread(100, 4) == b"456789"
    assert file().pread(5, 10) == b""


def test_a_write_that_makes_no_progress_is_an_error_and_not_a_loop(fake):
    fake.step = 0
    with pytest.raises(OSError, match="wrote nothing") as caught:
        file().pwrite(b"x", 0)
    assert caught.value.errno == errno.EIO


def test_an_error_in_the_middle_of_a_write_is_raised(fake, monkeypatch):
    def fails_later(fd, data, offset):
        if fake.calls == 2:
            raise OSError(errno.ENOSPC, "full")
        return fake.pwrite(fd, data, offset)

    monkeypatch.setattr(module.os, "pwrite", fails_later)
    with pytest.raises(OSError, match="full"):
        file().pwrite(b"0123456789", 0)
    assert fake.content == b"012345"


def test_an_error_in_the_middle_of_a_read_is_not_the_end_of_the_file(fake, monkeypatch):
    fake.content += b"0123456789"

    def fails_later(fd, size, offset):
        if fake.calls == 1:
            raise OSError(errno.EIO, "unreadable")
        return fake.pread(fd, size, offset)

    monkeypatch.setattr(module.os, "pread", fails_later)
    with pytest.raises(OSError, match="unreadable"):
        file().pread(10, 0)


def test_interrupted_calls_are_retried_by_python_itself():
    # PEP 475: os.pread and os.pwrite retry EINTR. What reaches us with EINTR came from a handler that raised.
    import os
    import signal
    import threading

    if not hasattr(signal, "pthread_kill"):
        pytest.skip("needs pthread_kill")
    read_end, write_end = os.pipe()
    caught = []
    before = signal.signal(signal.SIGUSR1, lambda *_: caught.append(1))
    try:
        main = threading.main_thread().ident

        def poke():
            signal.pthread_kill(main, signal.SIGUSR1)
            os.write(write_end, b"x")

        timer = threading.Timer(0.05, poke)
        timer.start()
        assert os.read(read_end, 1) == b"x"
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.close(read_end)
        os.close(write_end)
    assert caught == [1]
