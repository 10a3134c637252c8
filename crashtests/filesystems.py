"""Part 5: real file systems whose power is cut: ext4, xfs and btrfs on loop devices.

A writer commits on a file system in an image. In the middle of it ext4 and xfs are shut down without flushing anything
(the ioctl that xfstests use: the journal stops where it is); for btrfs, which has no such call, the writer is stopped
and the image copied as it is. Mounted again, which replays the journal, the store must hold all that was acknowledged.

Needs root, loop devices and the mkfs programs. What is missing is said in one line, and skipped.

Nothing stays mounted: SIGTERM ends the run as an exception does, and what a killed run has left behind (its process
number is in the directory's name) the next one takes away.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from random import Random

from crashtests.console import Result
from crashtests.history import Violation
from crashtests.processes import Witness, judge_found, start
from crashtests.workers import Run

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, the same number for ext4, xfs and f2fs
_NO_LOG_FLUSH = 2
_PREFIX = "kvwal-filesystems-"

#: mkfs and its options, size of the image, and whether it can be shut down.
KINDS: dict[str, tuple[list[str], int, bool]] = {
    "ext4": (["mkfs.ext4", "-q", "-F"], 64 << 20, True),
    "xfs": (["mkfs.xfs", "-q", "-f"], 320 << 20, True),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], 160 << 20, False),
}


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


class _Image:
    """A file system in a file, mounted."""

    def __init__(self, kind: str, directory: str) -> None:
        self.kind = kind
        self.file = os.path.join(directory, f"{kind}.img")
        self.mount_point = os.path.join(directory, kind)
        make, size, self.can_shut_down = KINDS[kind]
        with open(self.file, "wb") as file:
            file.truncate(size)
        os.makedirs(self.mount_point, exist_ok=True)
        _run(*make, self.file)
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", self.file, self.mount_point)

    def unmount(self) -> None:
        _run("umount", self.mount_point)

    def cut(self, writer: subprocess.Popen[bytes]) -> bytes:
        """Cut the power, kill the writer, return what it had said before the cut."""
        if self.can_shut_down:
            handle = os.open(self.mount_point, os.O_RDONLY)
            try:
                fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
            finally:
                os.close(handle)
            # From here on nothing can become durable, and the writer acknowledges nothing: every write fails.
            writer.send_signal(signal.SIGKILL)
            said = writer.communicate()[0]
            self.unmount()
        else:
            writer.send_signal(signal.SIGSTOP)
            time.sleep(0.02)
            copy = self.file + ".cut"
            subprocess.run(["cp", "--sparse=always", self.file, copy], check=True)
            writer.send_signal(signal.SIGKILL)
            said = writer.communicate()[0]
            self.unmount()
            os.replace(copy, self.file)
        self.mount()
        return said


def missing() -> dict[str, str]:
    """Kind to the reason why it cannot be tried here."""
    if os.geteuid() != 0:
        return dict.fromkeys(KINDS, "needs root")
    if not os.path.exists("/dev/loop-control"):
        return dict.fromkeys(KINDS, "no loop devices")
    return {kind: f"no {make[0]}" for kind, (make, _, _) in KINDS.items() if shutil.which(make[0]) is None}


def sweep() -> list[str]:
    """Unmount and remove what runs left behind that are no more."""
    found: list[str] = []
    for directory in glob.glob(os.path.join(tempfile.gettempdir(), f"{_PREFIX}*")):
        number = os.path.basename(directory).removeprefix(_PREFIX).partition("-")[0]
        if number.isdecimal() and not os.path.exists(f"/proc/{number}"):
            for mount_point in KINDS:
                _unmount_lazily(os.path.join(directory, mount_point))
            shutil.rmtree(directory, ignore_errors=True)
            found.append(directory)
    return found


def _unmount_lazily(mount_point: str) -> None:
    if os.path.ismount(mount_point):
        subprocess.run(["umount", "-l", mount_point], capture_output=True, check=False)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def run(run: Run) -> Result:
    """Run the part: the file systems in turn, until the time is over."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return _run_all(run)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(run: Run) -> Result:
    started_s = time.monotonic()
    result = Result("filesystems")
    absent = missing()
    result.notes += [f"filesystems: {kind} skipped: {reason}" for kind, reason in absent.items()]
    if len(absent) < len(KINDS):
        result.notes += [f"filesystems: {left} was left behind, and is removed" for left in sweep()]
    directory = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
    images: list[tuple[_Image, Witness]] = []
    try:
        for kind in KINDS:
            if kind in absent:
                continue
            try:
                images.append((_Image(kind, directory), Witness()))
            except OSError as error:
                result.notes.append(f"filesystems: {kind} skipped: {error}")
        if not images:
            result.skipped = "no file system could be mounted"
            return result
        random = Random(run.seed)
        counts = dict.fromkeys((image.kind for image, _ in images), 0)
        while not run.over() and not result.violations:
            for image, witness in images:
                seed = random.randrange(1 << 30)
                try:
                    _one_cut(image, witness, seed, random)
                except Exception as error:  # noqa: BLE001  # every exception is a violation
                    result.violations.append(f"{image.kind}: {type(error).__name__}: {error}")
                    break
                counts[image.kind] += 1
                result.states += 1
                result.faults += 1
                elapsed_s = time.monotonic() - started_s
                run.progress.show("filesystems", elapsed_s / run.seconds, result.states, elapsed_s, 0)
        result.notes.append(f"filesystems: power cuts: {counts}")
    finally:
        # By name: an image may be mounted and not be in the list yet.
        for kind in KINDS:
            _unmount_lazily(os.path.join(directory, kind))
        shutil.rmtree(directory, ignore_errors=True)
        result.seconds = time.monotonic() - started_s
    return result


def _one_cut(image: _Image, witness: Witness, seed: int, random: Random) -> None:
    path = os.path.join(image.mount_point, "kv")
    # Its messages are dropped, because all its writes are meant to fail in the end.
    preallocate = random.choice(("allocate", "zeros"))
    writer = start(path, witness, seed, commits=100_000, quiet=True, preallocate=preallocate)
    try:
        time.sleep(random.uniform(0.25, 0.8))
        if writer.poll() is not None:
            raise Violation(f"the writer ended with {writer.returncode}")
        witness.hear(image.cut(writer))
    finally:
        writer.kill()
    judge_found(path, witness)
    # A full image says nothing about power cuts.
    if shutil.disk_usage(image.mount_point).free < 16 << 20:
        shutil.rmtree(path)
        os.sync()
        witness.begun = [0] * witness.threads
        witness.done = [0] * witness.threads
