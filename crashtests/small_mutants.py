"""Small changes of a module's functions, found in its syntax tree: what `crashtests.mutate` draws from.

    negate     the condition of an if, a while or a conditional expression
    bound      < and <=, or > and >=, exchanged
    constant   a whole number, one more
    drop       a call that stands as a statement, left out
    swap       two statements, one behind the other, neither of which names what the other assigns; not in __init__
    return     before a statement of a function

A change is made in the text, so that comments and all other lines stay as they are, and its line is that of the file.
Asserts and docstrings are left alone.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["KINDS", "Change", "changes"]

KINDS: Final = ("negate", "bound", "constant", "drop", "swap", "return")
_BOUNDS: Final = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_LEAVES: Final = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_SIMPLE: Final = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one file.

    Attributes:
        function: dotted, as in "Class.method".
        number: among those of its kind in this function, from 1 on.
        line: where the change begins.
        source: the whole file with the change.
    """

    function: str
    kind: str
    number: int
    line: int
    source: str

    @property
    def name(self) -> str:
        """As in "LogWriter.append:swap:2"."""
        return f"{self.function}:{self.kind}:{self.number}"

    def diff(self, original: str, path: str) -> str:
        """What a reviewer reads."""
        before, after = original.splitlines(), self.source.splitlines()
        return "\n".join(difflib.unified_diff(before, after, path, path, n=2, lineterm=""))


def changes(source: str, functions: str = "") -> list[Change]:
    """All changes of a module's functions and methods; of those only whose dotted name begins with `functions`."""
    text = _Text(source)
    found = []
    for name, function in _functions(ast.parse(source), ""):
        if functions and name != functions and not name.startswith(functions + "."):
            continue
        counts = dict.fromkeys(KINDS, 0)
        for kind, line, changed in _of_function(text, function):
            counts[kind] += 1
            found.append(Change(name, kind, counts[kind], line, changed))
    return found


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    """Functions of a module and of its classes; one inside of another belongs to that."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _functions(child, prefix)


class _Text:
    """A source by the positions of its syntax tree, which count bytes of UTF-8."""

    def __init__(self, source: str) -> None:
        self._bytes = source.encode()
        self._starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def get(self, start: int, end: int) -> str:
        return self._bytes[start:end].decode()

    def before(self, node: ast.stmt) -> str:
        """What stands before a statement on its line."""
        return self.get(self._starts[node.lineno - 1], self.span(node)[0])

    def replaced(self, *pieces: tuple[int, int, str]) -> str:
        """The source with new texts in place of spans, which are in order and do not overlap."""
        parts, at = [], 0
        for start, end, new in pieces:
            parts += [self._bytes[at:start], new.encode()]
            at = end
        return b"".join([*parts, self._bytes[at:]]).decode()


def _of_function(text: _Text, function: _Function) -> Iterator[tuple[str, int, str]]:
    """Kind, line and changed source."""
    for node in _inside(function):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            start, end = text.span(node.test)
            yield "negate", node.test.lineno, text.replaced((start, end, f"(not ({text.get(start, end)}))"))
        elif isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                start, end = text.span(left)[1], text.span(right)[0]
                found = re.fullmatch(r"([\s)]*)([<>]=?)([\s(]*)", text.get(start, end))
                if found:
                    new = found[1] + _BOUNDS[found[2]] + found[3]
                    yield "bound", right.lineno, text.replaced((start, end, new))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield "constant", node.lineno, text.replaced((*text.span(node), str(node.value + 1)))
        for body in _bodies(node):
            yield from _of_body(text, body, function)


def _of_body(text: _Text, body: list[ast.stmt], function: _Function) -> Iterator[tuple[str, int, str]]:
    for index, one in enumerate(body):
        start, end = text.span(one)
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Call | ast.Await):
            yield "drop", one.lineno, text.replaced((start, end, "pass"))
        before = text.before(one)
        first = body is function.body and (index == 0 or (index == 1 and _is_docstring(body[0])))
        if not first and not before.strip() and not isinstance(one, (*_LEAVES, ast.Pass)):
            yield "return", one.lineno, text.replaced((start, start, f"return\n{before}"))
        if index + 1 < len(body) and function.name != "__init__" and _may_swap(one, body[index + 1]):
            other, stop = text.span(body[index + 1])
            yield (
                "swap",
                one.lineno,
                text.replaced((start, end, text.get(other, stop)), (other, stop, text.get(start, end))),
            )


def _inside(function: _Function) -> Iterator[ast.AST]:
    """The nodes of a function in the order of the text, without asserts, annotations and docstrings."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "args") and isinstance(node, ast.stmt):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.Assert | ast.JoinedStr):
                    yield from walk(child)

    return walk(function)


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        found = getattr(node, name, None)
        if isinstance(found, list) and found and isinstance(found[0], ast.stmt):
            yield found


def _is_docstring(one: ast.stmt) -> bool:
    return isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)


def _may_swap(one: ast.stmt, other: ast.stmt) -> bool:
    """Whether the order may matter, and neither names a variable that the other assigns."""
    if not isinstance(one, _SIMPLE) or not isinstance(other, _SIMPLE) or _is_docstring(one) or _is_docstring(other):
        return False
    if not any(_has_effect(node) for node in ast.walk(one)) or not any(_has_effect(node) for node in ast.walk(other)):
        return False
    return not (_assigned(one) & _named(other) or _assigned(other) & _named(one))


def _has_effect(node: ast.AST) -> bool:
    stored = isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load)
    return stored or isinstance(node, ast.Call | ast.Await | ast.Yield | ast.YieldFrom)


def _named(one: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(one) if isinstance(node, ast.Name)}


def _assigned(one: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(one) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
