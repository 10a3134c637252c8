"""Older commits of kvwal as peers, each built in a virtual environment of its own.

    python -m bench --against REV --peers kvwal --only 'put.*'

The child of an older commit runs today's measuring loops and today's driver (`bench.peers.kvwal_store`, which calls
the public API only) with the interpreter of that environment. So the two versions may have different modules; what
the older one does not offer is said and not measured. Its dependencies have the versions that today's has.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Final

__all__ = ["AgainstError", "Older", "built", "environment_of"]

_ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class AgainstError(Exception):
    """The older commit could not be built."""


@dataclass(frozen=True)
class Older:
    """An older commit, installed.

    Attributes:
        name: among the peers, as in "kvwal@cce60a5".
        version: commit, its day and its subject.
        python: the interpreter of its environment.
        folder: holds today's `bench` and no `kvwal`; its children run there.
    """

    name: str
    version: str
    python: str
    folder: str


@contextmanager
def built(revision: str, directory: str, repository: str = _ROOT) -> Iterator[Older]:
    """Build the commit below `directory`, and remove it at the end.

    Raises: AgainstError: the revision is unknown, or does not install.
    """
    commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
    short, day, subject = _git(repository, "show", "-s", "--format=%h%n%cs%n%s", commit).decode().splitlines()[:3]
    with TemporaryDirectory(prefix="against-", dir=directory) as whole:
        source, environment, folder = (os.path.join(whole, name) for name in ("source", "venv", "run"))
        with zipfile.ZipFile(io.BytesIO(_git(repository, "archive", "--format=zip", commit))) as archive:
            archive.extractall(source)
        python = os.path.join(environment, "bin", "python")
        constraints = os.path.join(whole, "constraints.txt")
        with open(constraints, "w", encoding="utf-8") as file:
            file.writelines(f"{name}=={version}\n" for name, version in sorted(_installed().items()))
        _run([sys.executable, "-m", "venv", environment], whole)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        _run([*pip, "--constraint", constraints, source], whole)
        os.mkdir(folder)
        os.symlink(os.path.join(_ROOT, "bench"), os.path.join(folder, "bench"))
        older = Older(f"kvwal@{short}", f"{short} of {day}: {subject}", python, folder)
        found = _run([python, "-c", "import kvwal; print(kvwal.__file__)"], folder, environment_of(older)).strip()
        if not found.startswith(environment + os.sep):
            raise AgainstError(f"{older.name} would measure {found}, which is not in its environment")
        yield older


def environment_of(older: Older) -> dict[str, str]:
    """The variables of its children: theirs alone says where modules are, lest they import today's kvwal."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    return {**kept, "PYTHONPATH": older.folder}


def _installed() -> dict[str, str]:
    """Name and version of every distribution of this environment but kvwal."""
    found = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    return {name: version for name, version in found.items() if name not in ("kvwal", "pip", "setuptools")}


def _git(repository: str, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or "no such commit"
        raise AgainstError(f"git {' '.join(arguments)}: {said}")
    return done.stdout


def _run(command: list[str], folder: str, environment: dict[str, str] | None = None) -> str:
    """The output of a command. One that hangs for ten minutes ends with TimeoutExpired."""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise AgainstError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
