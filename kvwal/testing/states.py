"""All the disks that one power cut may leave: the pieces, and which of them survive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import NamedTuple, TypeAlias

from kvwal.testing.inode import Directory, Inode

__all__ = ["Choice", "Piece", "States", "Survivors", "copy_tree", "tree_key", "walk"]


class Piece(NamedTuple):
    """Something that a power cut may take or leave on its own."""

    #: Number of the operation that made it.
    operation: int
    path: str
    #: "write" (up to 512 bytes, start to stop), "size" (the file's new size is start) or "entry" (of a directory).
    what: str
    start: int
    stop: int


Survivors: TypeAlias = int | Callable[[Piece], bool] | Random


class Choice(NamedTuple):
    """One outcome of a power cut: `disk.crash(choice.survivors, stale=choice.stale)`."""

    survivors: int
    stale: bool

    def __str__(self) -> str:
        return f"{self.survivors:x}{'s' if self.stale else ''}"

    @staticmethod
    def parse(text: str) -> Choice:
        """The inverse of `str`."""
        return Choice(int(text.rstrip("s"), 16), text.endswith("s"))


class States:
    """What is pending on a disk at one instant, and the outcomes that a power cut may have.

    Valid until the disk's next operation.

    Attributes:
        pieces: oldest first; bit i of a `Choice` stands for pieces[i].
    """

    __slots__ = ("_owners", "_places", "_root", "pieces")

    def __init__(self, root: Directory) -> None:
        self._root = root
        self._owners: list[Inode | Directory] = []
        pieces: list[tuple[int, int, int, Piece]] = []
        for path, node in walk(root):
            if isinstance(node, Directory):
                base = path.rstrip("/")
                own = [Piece(e.operation, f"{base}/{e.removed or e.added}", "entry", 0, 0) for e in node.pending]
            else:
                own = [Piece(operation, path, what, start, stop) for operation, what, start, stop in node.pieces()]
            if own:
                pieces += [(piece.operation, len(self._owners), index, piece) for index, piece in enumerate(own)]
                self._owners.append(node)
        pieces.sort()
        self._places = [(owner, index) for _, owner, index, _ in pieces]
        self.pieces = [piece for _, _, _, piece in pieces]

    def count(self) -> int:
        """How many subsets of the pieces there are."""
        return 1 << len(self.pieces)

    def choices(self, limit: int, random: Random) -> Iterator[Choice]:
        """All outcomes if there are at most `limit`, else a sample of them that is without duplicates.

        The sample begins with nothing and everything, then mixes prefixes, single pieces, all but one, whole files,
        whole operations and free subsets.
        """
        stale = self._stale_possible()
        total = self.count() << stale
        if total <= limit:
            for survivors in range(self.count()):
                yield Choice(survivors, False)
                if stale:
                    yield Choice(survivors, True)
            return
        seen: set[Choice] = set()
        everything = self.count() - 1
        for choice in (Choice(0, False), Choice(everything, False)):
            if len(seen) < limit:
                seen.add(choice)
                yield choice
        misses = 0
        while len(seen) < limit and misses < 50:
            choice = Choice(self._draw(random) & everything, bool(stale) and random.random() < 0.3)
            if choice in seen:
                misses += 1
                continue
            seen.add(choice)
            yield choice

    def _draw(self, random: Random) -> int:
        size = len(self.pieces)
        style = random.randrange(7)
        if style == 0:
            return (1 << random.randrange(size + 1)) - 1
        if style == 1:
            return 1 << random.randrange(size)
        if style == 2:
            return ~(1 << random.randrange(size))
        if style == 3:
            return self._mask_by([piece.path for piece in self.pieces], random)
        if style == 4:
            return self._mask_by([piece.operation for piece in self.pieces], random)
        if style == 5:
            # Names and sizes survive and data does not, or the reverse: what a journal of metadata alone does.
            return self._mask_by([piece.what for piece in self.pieces], random)
        return random.getrandbits(size)

    @staticmethod
    def _mask_by(labels: Iterable[object], random: Random) -> int:
        coins: dict[object, bool] = {}
        mask = 0
        for bit, label in enumerate(labels):
            if coins.setdefault(label, random.random() < 0.5):
                mask |= 1 << bit
        return mask

    def _stale_possible(self) -> int:
        return int(any(isinstance(node, Inode) and node.has_new_space() for node in self._owners))

    def found(self, survivors: Survivors, stale: dict[int, bytes] | None) -> Directory:
        """The root directory of the disk that this outcome leaves."""
        flags: list[list[bool]] = [[] for _ in self._owners]
        # The pieces of one owner are in its own order already, so appending them is enough.
        if isinstance(survivors, int):
            for owner, _ in self._places:
                flags[owner].append(bool(survivors & 1))
                survivors >>= 1
        else:
            decide = _coin(survivors) if isinstance(survivors, Random) else survivors
            for (owner, _), piece in zip(self._places, self.pieces, strict=True):
                flags[owner].append(decide(piece))
        chosen = {id(node): flags[owner] for owner, node in enumerate(self._owners)}
        return _outcome_of(self._root, chosen, stale, {})


def _coin(random: Random) -> Callable[[Piece], bool]:
    return lambda piece: random.random() < 0.5


def _outcome_of(
    directory: Directory,
    chosen: dict[int, list[bool]],
    stale: dict[int, bytes] | None,
    files: dict[int, Inode],
    parent: Directory | None = None,
) -> Directory:
    entries = directory.after(chosen.get(id(directory), []))
    found = Directory(parent)
    for name, node in entries.items():
        if isinstance(node, Directory):
            found.entries[name] = _outcome_of(node, chosen, stale, files, found)
            continue
        file = files.get(id(node))
        if file is None:
            file = files[id(node)] = node.found(chosen.get(id(node), []), stale)
        found.entries[name] = file
    found.medium = found.entries.copy()
    return found


def walk(root: Directory, *, shown: bool = False) -> Iterator[tuple[str, Inode | Directory]]:
    """Every file and directory, once: those that a name leads to now (`shown`), or could after a power cut."""
    seen: set[int] = set()
    waiting: list[tuple[str, Inode | Directory]] = [("/", root)]
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        if isinstance(node, Directory):
            below = list(node.entries.items())
            if not shown:
                below += node.medium.items()
                below += [(entry.added, entry.node) for entry in node.pending if entry.node is not None]
            waiting += [(f"{path.rstrip('/')}/{name}", child) for name, child in reversed(below)]


def copy_tree(directory: Directory, copies: dict[int, Inode | Directory]) -> Directory:
    """The same directory with everything in and below it, pending changes too."""
    parent = copies.get(id(directory.parent))
    other = Directory(parent if isinstance(parent, Directory) else None)
    copies[id(directory)] = other

    def copied(node: Inode | Directory) -> Inode | Directory:
        known = copies.get(id(node))
        if known is None:
            known = copies[id(node)] = copy_tree(node, copies) if isinstance(node, Directory) else node.copy()
        return known

    other.entries = {name: copied(node) for name, node in directory.entries.items()}
    other.medium = {name: copied(node) for name, node in directory.medium.items()}
    other.pending = [e._replace(node=None if e.node is None else copied(e.node)) for e in directory.pending]
    return other


def tree_key(directory: Directory) -> frozenset[object]:
    """Equal for equal names, sizes and bytes on the medium; pages of zeros count as missing ones."""
    return frozenset(
        (name, tree_key(node)) if isinstance(node, Directory) else (name, node.medium.size, node.medium.key())
        for name, node in directory.medium.items()
    )
