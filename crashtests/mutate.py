"""`python -m crashtests.mutate`: small mutants drawn by a seed, the tests that kill them, and those that survive.

    python -m crashtests.mutate --seed 1 --count 40 --module kvwal.log --module kvwal.pages.tree:Tree.get --jobs 2
    python -m crashtests.mutate --module kvwal.log.writer --only LogWriter.append:swap:2

`crashtests.mutations` has the defects that were thought of; this draws those that were not. Each mutant is one change
(`crashtests.small_mutants`) in a copy of the tree, and has to stand the tests, the nearest first: the file and the
folder that mirror its module, all the others but the slow ones and those of the harness (which notice any change of
a text), and a short crash run. It is dead at the first that fails, hangs or cannot be collected. Before all that, each
of these must pass without a mutant.

What is known stands in the file of `--out`, a line a mutant: run again, it goes on behind them. At the end it lists all
survivors. The exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import zip_longest
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Final

from crashtests.small_mutants import KINDS, Change, changes

__all__ = ["Drawn", "Outcome", "Stage", "draw", "main", "stages"]

_ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A mutant may take this many times as long as the tests without it, and so much more.
_SLOWER: Final = 4
_GRACE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A mutant of one module."""

    module: str
    path: str
    change: Change

    @property
    def name(self) -> str:
        return f"{self.module}:{self.change.name}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A command that a mutant has to stand, in the root of the tree."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant. `killer` is empty if it survived."""

    mutant: str
    line: str
    killer: str
    seconds: float
    diff: str


def draw(tree: str, modules: list[str], seed: int, count: int) -> list[Drawn]:
    """`count` mutants, as many of each kind as there are; the same for the same seed and text.

    Args:
        modules: "package.module", or a package for all below it, or "package.module:Class.method" for a part.
    """
    kinds: dict[str, list[Drawn]] = {kind: [] for kind in KINDS}
    for module, path, functions in _files(tree, modules):
        with open(os.path.join(tree, path), encoding="utf-8") as file:
            for change in changes(file.read(), functions):
                kinds[change.kind].append(Drawn(module, path, change))
    rng = random.Random(seed)
    for drawn in kinds.values():
        rng.shuffle(drawn)
    mixed = (one for some in zip_longest(*kinds.values()) for one in some if one is not None and _compiles(one.change))
    return [one for one, _ in zip(mixed, range(count), strict=False)]


def _compiles(change: Change) -> bool:
    try:
        compile(change.source, "<mutant>", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def _files(tree: str, modules: list[str]) -> Iterator[tuple[str, str, str]]:
    """Module, file and the part that is meant, of each module that is named or lies in a package that is."""
    for module in modules:
        name, _, functions = module.partition(":")
        path = name.replace(".", "/")
        if os.path.isfile(os.path.join(tree, path + ".py")):
            yield name, path + ".py", functions
            continue
        if not os.path.isdir(os.path.join(tree, path)):
            raise SystemExit(f"there is no module {name} in {tree}")
        for folder, folders, files in os.walk(os.path.join(tree, path)):
            folders.sort()
            for file in sorted(files):
                if file.endswith(".py"):
                    below = os.path.relpath(os.path.join(folder, file), tree)
                    yield below.removesuffix(".py").removesuffix("/__init__").replace("/", "."), below, functions


def stages(tree: str, module: str, minutes: float) -> list[Stage]:
    """What a mutant of a module has to stand, the nearest first."""
    *folders, leaf = module.split(".")[1:] or ["__init__"]
    folder = "/".join(["tests", *folders])
    mirror = f"{folder}/test_{leaf}.py"
    found = []
    if os.path.isfile(os.path.join(tree, mirror)):
        found.append(_pytest(mirror))
    if folders and os.path.isdir(os.path.join(tree, folder)):
        found.append(_pytest(folder))
    found.append(_pytest("tests", "--ignore=tests/crashtests"))
    if minutes:
        parts = ("--part", "exhaustive", "--part", "faults", "--part", "isolation")
        settings = ("--minutes", f"{minutes:g}", "--jobs", "1", "--stop", "--quiet")
        found.append(Stage("crash run", (sys.executable, "-m", "crashtests", *parts, *settings)))
    return found


def _pytest(*arguments: str) -> Stage:
    options = ("-q", "-x", "-m", "not slow", "--timeout=120", "--hypothesis-seed=1", "-p", "no:cacheprovider")
    return Stage(arguments[0], (sys.executable, "-m", "pytest", *options, *arguments))


def _copy(tree: str, target: str) -> None:
    ignore = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__")
    shutil.copytree(tree, target, ignore=ignore)


def _run(stage: Stage, copy: str, limit_s: float) -> str:
    """Why the stage failed, or nothing."""
    environment = {**os.environ, "PYTHONPATH": copy, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONOPTIMIZE", None)
    process = subprocess.Popen(
        stage.command,
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"took more than {limit_s:.0f} s"
    finally:
        # Its own children as well: a program under test may have started some.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    if process.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)|^VIOLATION in (.*)", output, re.MULTILINE)
    if found:
        return found[1] or found[2][:120]
    return f"exit status {process.returncode}: {' '.join(output.split())[-120:]}"


@dataclass(frozen=True, slots=True)
class _Judge:
    """Knows how long each stage takes without a mutant, and tries mutants in its copies."""

    stages: dict[str, list[Stage]]
    limits_s: dict[Stage, float]
    copies: SimpleQueue[str]

    def judge(self, mutant: Drawn, original: str) -> Outcome:
        copy = self.copies.get()
        path = os.path.join(copy, mutant.path)
        begun = time.monotonic()
        try:
            _write(path, mutant.change.source)
            killer = ""
            for stage in self.stages[mutant.module]:
                killer = _run(stage, copy, self.limits_s[stage])
                if killer:
                    killer = f"{stage.name}: {killer}"
                    break
        finally:
            _write(path, original)
            self.copies.put(copy)
        seconds = round(time.monotonic() - begun, 1)
        diff = mutant.change.diff(original, mutant.path)
        return Outcome(mutant.name, f"{mutant.path}:{mutant.change.line}", killer, seconds, diff)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _limits_s(wanted: list[Stage], copy: str) -> dict[Stage, float]:
    limits_s = {}
    for stage in wanted:
        begun = time.monotonic()
        failure = _run(stage, copy, 3600.0)
        if failure:
            raise SystemExit(f"{stage.name} fails without a mutant: {failure}")
        limits_s[stage] = _GRACE_S + _SLOWER * (time.monotonic() - begun)
        print(f"without a mutant: {stage.name} passes in {time.monotonic() - begun:.0f} s", flush=True)
    return limits_s


def _known(path: str, about: dict[str, Any]) -> dict[str, Outcome]:
    """The outcomes of an earlier run with the same modules and texts; a new file begins with what it is about."""
    if not os.path.exists(path):
        _append(path, about)
        return {}
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    if lines[0] != about:
        raise SystemExit(f"{path} is of other modules or another text of them; remove it, or name another --out")
    return {line["mutant"]: Outcome(**line) for line in lines[1:]}


def _append(path: str, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    tree = os.path.abspath(options.tree)
    drawn = draw(tree, options.module, options.seed, sys.maxsize if options.only else options.count)
    if options.only:
        drawn = [one for one in drawn if one.change.name in options.only]
    if not drawn:
        print("there is nothing to change")
        return 2
    originals = {}
    for _, path, _ in _files(tree, options.module):
        with open(os.path.join(tree, path), encoding="utf-8") as file:
            originals[path] = file.read()
    if options.list:
        for one in drawn:
            print(f"{one.name}\n{one.change.diff(originals[one.path], one.path)}\n")
        return 0
    text = hashlib.sha256("".join(originals[path] for path in sorted(originals)).encode()).hexdigest()
    known = _known(options.out, {"modules": options.module, "text": text})
    left = [one for one in drawn if one.name not in known]
    print(f"{len(drawn)} mutants, {len(drawn) - len(left)} of them known from {options.out}", flush=True)
    for outcome in _outcomes(tree, left, originals, options):
        _append(options.out, asdict(outcome))
        known[outcome.mutant] = outcome
        print(f"{outcome.mutant:<60} {outcome.seconds:>6.1f} s  {outcome.killer or 'SURVIVED'}", flush=True)
    survivors = [known[one.name] for one in drawn if not known[one.name].killer]
    for outcome in survivors:
        print(f"\nsurvived: {outcome.mutant} ({outcome.line})\n{outcome.diff}")
    print(f"\n{len(drawn) - len(survivors)} of {len(drawn)} mutants were killed, {len(survivors)} survived")
    return 1 if survivors else 0


def _outcomes(
    tree: str, mutants: list[Drawn], originals: dict[str, str], options: argparse.Namespace
) -> Iterator[Outcome]:
    """Each as soon as it is known."""
    if not mutants:
        return
    by_module = {
        module: [_pytest(*options.tests)] if options.tests else stages(tree, module, options.minutes)
        for module in sorted({one.module for one in mutants})
    }
    wanted = list(dict.fromkeys(stage for some in by_module.values() for stage in some))
    with TemporaryDirectory(prefix="mutate-") as folder:
        copies: SimpleQueue[str] = SimpleQueue()
        for number in range(options.jobs):
            copy = os.path.join(folder, str(number))
            _copy(tree, copy)
            copies.put(copy)
        judge = _Judge(by_module, _limits_s(wanted, copy), copies)
        done: SimpleQueue[Outcome | BaseException] = SimpleQueue()

        def try_one(mutant: Drawn) -> None:
            try:
                done.put(judge.judge(mutant, originals[mutant.path]))
            except BaseException as error:  # noqa: BLE001 - raised again by the main thread
                done.put(error)

        pool = ThreadPoolExecutor(options.jobs)
        try:
            for mutant in mutants:
                pool.submit(try_one, mutant)
            for _ in mutants:
                outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            pool.shutdown(cancel_futures=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m crashtests.mutate", description="Small mutants, drawn by a seed.")
    parser.add_argument(
        "--module", action="append", required=True, help="module or package, with :Class.method for a part; repeatable"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: one per core)"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant, as in LogWriter.append:swap:2")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    parser.add_argument(
        "--tests", action="append", metavar="PATH", help="these tests instead of the stages; repeatable"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="of the crash run, 0 for none (default 1)")
    parser.add_argument("--out", default="mutants.jsonl", help="what is known, a line a mutant (default %(default)s)")
    parser.add_argument("--tree", default=_ROOT, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
