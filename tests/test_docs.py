"""The documents say what the code does."""

from __future__ import annotations

import ast
import importlib
import re
import struct
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("document", "more_than"),
    [
        ("README.md", 10),
        ("docs/archive.md", 4),
        ("docs/backups.md", 10),
        ("docs/eventsourcing.md", 10),
        ("docs/tables.md", 10),
    ],
)
def test_the_code_in_a_document_runs(tmp_path: Path, document: str, more_than: int) -> None:
    """As one program, in an empty directory, with every assert in it holding."""
    source = "\n".join(blocks(ROOT / document, "python"))
    assert source.count("assert") > more_than
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the shell lines are for a POSIX shell")
@pytest.mark.parametrize(("document", "says"), [("README.md", "hello"), ("docs/archive.md", "moments")])
def test_the_shell_lines_in_a_document_run(tmp_path: Path, document: str, says: str) -> None:
    script = [block for block in blocks(ROOT / document, "sh") if block.startswith("kvwal ")]
    assert len(script) == 1
    function = f'kvwal() {{ "{sys.executable}" -m kvwal "$@"; }}\n'
    result = subprocess.run(
        ["sh", "-e", "-c", function + script[0]], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert says in result.stdout
    assert "everything holds" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="the shell lines are for a POSIX shell")
def test_the_shell_lines_of_backups_run(tmp_path: Path) -> None:
    document = ROOT / "docs" / "backups.md"
    (script,) = blocks(document, "sh")
    # In the directory in which the code before it ran.
    first = blocks(document, "python")[0]
    subprocess.run([sys.executable, "-c", first], cwd=tmp_path, check=True, timeout=60)
    function = f'kvwal() {{ "{sys.executable}" -m kvwal "$@"; }}\n'
    result = subprocess.run(
        ["sh", "-e", "-c", function + script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "before.kv is as after commit 1" in result.stdout
    assert "everything holds" in result.stdout


def test_the_exit_codes_are_the_same_wherever_they_are_listed() -> None:
    row = re.compile(r"^\| (\d+) \|", re.MULTILINE)
    from kvwal.cli import app

    readme = [int(code) for code in row.findall((ROOT / "README.md").read_text())]
    listed = [int(code) for code in row.findall(app.__doc__ or "")]
    # From 64 on they are those that the system gives a meaning.
    assert readme == listed == [*range(9), 69, 70, 130, 141]


def test_the_limits_in_the_readme_are_those_of_the_code() -> None:
    from kvwal import MAX_BATCH_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES

    text = (ROOT / "README.md").read_text()
    assert f"| key | 0 to {MAX_KEY_BYTES:,} bytes |" in text
    assert f"| value | 0 to {MAX_VALUE_BYTES >> 30} GiB |" in text
    assert f"| one commit | {MAX_BATCH_BYTES >> 30} GiB of keys and values" in text


def test_what_contributing_md_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:kvwal|tests|crashtests|docs|\.ci)(?:/[\w.-]+)+/?)`", text)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    folders = [ROOT / name for name in ("kvwal", "crashtests", "tests")]
    code = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    names = set(re.findall(r"`([A-Z_]{4,}|_[A-Za-z_]+|[a-z]+_[a-z_]+)(?:\(.*?\))?`", text))
    assert len(names) > 20
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_every_file_that_is_named_exists() -> None:
    """By its whole path, or by the end of it where that is enough to find it."""
    there = ["/" + str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.suffix]
    text = "".join(document.read_text() for document in DOCUMENTS)
    named = re.findall(r"`([\w/.-]+\.(?:py|md|toml|sh|txt))`", text)
    assert len(named) > 5
    assert not [name for name in named if not any(path.endswith("/" + name) for path in there)]


# docs/format.md against the code. A table's comment names the structs that pack what it describes; "next:" says that
# the code does not have this layout yet, "reserved:" that there is no code at all.

FORMAT = (ROOT / "docs" / "format.md").read_text()
TABLES = re.findall(r"<!-- (next: |)([\w.]+)\.(\w+)(?: \+ (\w+))?(?:, (\d+) B)? -->\n((?:\|.*\n)+)", FORMAT)
BUILT = {f"{module}.{name}": (module, [name, crc], text) for kind, module, name, crc, _, text in TABLES if not kind}
NEXT = {
    f"{module}.{name}": (module, [name, crc], text, int(size)) for kind, module, name, crc, size, text in TABLES if kind
}
RESERVED = {
    name: (int(size), text)
    for name, size, text in re.findall(r"<!-- reserved: ([\w ]+), (\d+) B -->\n((?:\|.*\n)+)", FORMAT)
}
ON_DISK = {
    "kvwal.log.segment.HEADER",
    "kvwal.log.segment.SLOT",
    "kvwal.log.record.RECORD_HEADER",
    "kvwal.log.index.HEADER",
    "kvwal.log.keys.HEADER",
    "kvwal.pages.meta._BODY",
    "kvwal.pages.node.POINTER",
    "kvwal.pages.node.NODE_HEADER",
    "kvwal.pages.node.OVERFLOW_REF",
    "kvwal.pages.catalogue.ENTRY",
    "kvwal.pages.bases.BASE",
    "kvwal.engine.consumers._FIXED",
    "kvwal.engine.parked._PARKED",
    "kvwal.backup.bases.HEADER",
    "kvwal.backup.units.HEADER",
    "kvwal.backup.units.COMMIT",
    "kvwal.readers.now.PAGE",
    "kvwal.readers.record.PIN",
}
TYPES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()[2:]]


def layout(table: str) -> tuple[str, int]:
    """The struct format and the size of a table, whose offsets must follow from its types."""
    documented, offset = "<", 0
    for at, kind, *_ in rows(table):
        assert int(at) == offset, f"{kind} at {at}: the fields before it end at {offset}"
        field = TYPES[kind] if kind in TYPES else f"{kind.split()[0]}s"
        documented += field
        offset += struct.calcsize("<" + field)
    return _spelled_out(documented), offset


def in_code(module_name: str, names: list[str]) -> tuple[str, int] | None:
    """The struct format and the size of these structs, one behind the other; None if they are not there."""
    try:
        module = importlib.import_module(module_name)
        structs = [getattr(module, name) for name in names if name]
    except (ImportError, AttributeError):
        return None
    return _spelled_out("<" + "".join(one.format.lstrip("<") for one in structs)), sum(one.size for one in structs)


def _spelled_out(layout: str) -> str:
    """A struct format without repeat counts, and with padding as the bytes it is."""
    layout = layout.replace("x", "s")
    return re.sub(r"(\d+)([BHIQ])", lambda match: match[2] * int(match[1]), layout)


@pytest.mark.parametrize("name", BUILT)
def test_format_md_has_the_fields_of_the_struct_in_the_code(name: str) -> None:
    module, names, text = BUILT[name]
    assert layout(text) == in_code(module, names)


@pytest.mark.parametrize("name", NEXT)
def test_a_layout_that_is_next_adds_up_and_is_not_in_the_code_yet(name: str) -> None:
    module, names, text, size = NEXT[name]
    assert layout(text)[1] == size
    assert layout(text) != in_code(module, names), "the code has it: take the old table and the word next: away"


@pytest.mark.parametrize("name", RESERVED)
def test_a_layout_that_is_reserved_adds_up(name: str) -> None:
    size, text = RESERVED[name]
    assert layout(text)[1] == size


def test_every_comment_before_a_table_of_format_md_is_understood() -> None:
    assert len(re.findall(r"^<!--.*-->$", FORMAT, re.MULTILINE)) == len(TABLES) + len(RESERVED)
    assert len(TABLES) == len(BUILT) + len(NEXT)


def test_every_struct_that_is_on_disk_has_its_table_in_format_md() -> None:
    assert BUILT.keys() | NEXT.keys() == ON_DISK


def test_format_md_says_the_numbers_of_the_code() -> None:
    from kvwal.backup import bases, units
    from kvwal.log import extension, index, intents, keys, record, segment
    from kvwal.pages import freelist, meta, node

    for magic in (segment.MAGIC, segment.SLOT_MAGIC, index.MAGIC, keys.MAGIC, meta._MAGIC, units.MAGIC, bases._MAGIC):
        assert f"| `{magic.decode()}` |" in FORMAT
    assert (segment.VERSION, index.VERSION, keys.VERSION, meta._VERSION) == (1, 1, 1, 1)
    assert f"Its first {segment.HEADER_PAGE_BYTES} bytes are the header page" in FORMAT
    assert f"at {segment.SLOT_OFFSET} the" in FORMAT
    assert f"A block has {keys.BLOCK_ROWS} rows" in FORMAT
    assert f"n order rows of {keys.ORDER_ROW_BYTES} bytes" in FORMAT
    assert f"k hash rows of {keys.HASH_ROW_BYTES} bytes" in FORMAT
    assert f"of this header: {segment.HEADER_BYTES}" in FORMAT
    assert f"of the meta: {meta.META_SIZE}" in FORMAT
    assert f"pages of {node.PAGE_SIZE} bytes" in FORMAT
    assert f"{record.COMMIT} commit, {record.WATERMARK} watermark, {record.CLOSED} closed" in FORMAT
    operations = (intents.PUT, intents.DELETE, intents.DELETE_RANGE, intents.DELETE_FROM)
    put, delete, delete_range, delete_from = operations
    assert f"{put} put, {delete} delete, {delete_range} delete a range with a stop, {delete_from} delete from" in FORMAT
    for bit, name in ((intents.EXTENDED, "extension"), (intents.TABLES, "tables"), (intents.SYSTEM, "system")):
        assert f"| {bit.bit_length() - 1} | {name} |" in FORMAT
    block = FORMAT.split("### Extension block")[1].split("\n###")[0]
    assert extension._ITEMS.keys() <= {int(item) for item in re.findall(r"^\| (\d+) [a-z]", block, re.MULTILINE)}
    assert f"from {extension._FIRST_SKIPPED_ITEM} on skipped" in FORMAT
    assert f"| {extension.MAX_META_BYTES:,} bytes, from 1 pair on |" in block
    assert f"{node.LEAF} leaf, {node.INNER} inner" in FORMAT
    assert f"{node._UNIFORM} uniform, {node._NARROW} narrow, {node._WIDE} wide" in FORMAT
    assert freelist._GROUPS.size == 4
    assert f"| {freelist._GROUP.size} each | group |" in FORMAT


def test_format_md_has_the_feature_bits_of_the_code() -> None:
    from kvwal import features

    table = FORMAT.split("## Features")[1].split("\n## ")[0]
    known = {"required": 0, "optional": 0}
    bits = re.findall(r"^\| (\d+) \| \w+ \| (\w+) \| [^|]+ \| (.*) \|$", table, re.MULTILINE)
    for bit, kind, meaning in bits:
        if not meaning.startswith("(reserved)"):
            known[kind] |= 1 << int(bit)
    assert known == {"required": features.KNOWN_REQUIRED, "optional": features.KNOWN_OPTIONAL}
    assert [int(bit) for bit, _, _ in bits] == list(range(len(bits)))


def test_a_store_has_no_file_that_format_md_does_not_name(tmp_path: Path) -> None:
    import kvwal

    path = tmp_path / "named.kv"
    with kvwal.open(str(path)) as db:
        db[b"a"] = b"b"
        db.checkpoint()
        db[b"a"] = b"c"
        present = {file.name for file in path.iterdir()}
    present |= {file.name for file in path.iterdir()}
    described = {re.sub(r"\d{20}", "00000000000000000001", name) for name in present}
    described = {"*.tmp" if name.endswith(".tmp") else name for name in described}
    assert described <= set(re.findall(r"^\| `([^`]+)` \|", FORMAT, re.MULTILINE)), described


# Words. The table says which are retired, and which files still have them.

RETIRED = tomllib.loads((ROOT / "tests" / "retired_words.toml").read_text())


def files_with_words() -> dict[str, str]:
    """The text of every file whose words are held, by its path."""
    found = [path for folder in ("kvwal", "tests", "crashtests", "docs") for path in (ROOT / folder).rglob("*.*")]
    found = [path for path in found if path.suffix in (".py", ".md")] + [ROOT / "README.md"]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(found)}


def findings_of(entry: dict[str, Any], files: dict[str, str]) -> tuple[list[str], list[str]]:
    """Where a retired word is and may not be, as path:line; and the exceptions that no file needs."""
    flags = 0 if entry.get("case") else re.IGNORECASE
    word = re.compile(rf"(?<![A-Za-z])(?:{entry['pattern']})(?![a-z])", flags)
    unused = dict.fromkeys([*entry["allowed"], *entry.get("kept", [])])
    excepted = list(unused)
    wrong = []
    for name, text in files.items():
        if not (match := word.search(text)):
            continue
        globs = [glob for glob in excepted if fnmatch(name, glob)]
        if not globs:
            wrong.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
        for glob in globs:
            unused.pop(glob, None)
    return wrong, list(unused)


def test_a_retired_word_is_nowhere_but_where_the_table_still_allows_it() -> None:
    files = files_with_words()
    wrong = {word: findings_of(entry, files)[0] for word, entry in RETIRED.items()}
    assert not [f"{place} (say: {RETIRED[word]['say']})" for word, places in wrong.items() for place in places]


# Not with the fast tests for as long as several branches take words out at the same time: two of them that are right by
# themselves may leave an exception that neither needs. CI runs it.
@pytest.mark.slow
def test_the_table_of_retired_words_allows_no_more_than_is_needed() -> None:
    files = files_with_words()
    unused = {word: findings_of(entry, files)[1] for word, entry in RETIRED.items()}
    assert not {word: globs for word, globs in unused.items() if globs}, "take them out of tests/retired_words.toml"


def test_a_retired_word_is_found_in_names_and_in_prose_but_not_inside_of_other_words() -> None:
    entry = {"pattern": "cats?", "allowed": ["kept/*", "gone/*"], "kept": ["good.md"]}
    files = {
        "a.py": "self._big_cat = None",
        "b.md": "Catalogues locate; a vocation.",
        "c.md": "one\nCats.",
        "kept/d.py": "cat",
        "good.md": "cat",
    }
    assert findings_of(entry, files) == (["a.py:1: cat", "c.md:2: Cats"], ["gone/*"])


def test_the_glossary_defines_no_word_twice() -> None:
    defined = re.findall(r"^\*\*([^*]+)\.?\*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [word.strip(" .").lower() for entry in defined for word in entry.split(",")]
    assert len(words) > 80
    assert len(words) == len(set(words))


# docs/architecture.md against the code.

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_architecture_md_has_the_layers_that_lint_imports_checks() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [[name.strip(" ()") for name in line.split("|")] for line in contract["layers"]]
    there = [[name for name in line if list((ROOT / "kvwal").glob(f"{name}*"))] for line in layers]
    expected = [" | ".join(line) for line in there if line and line not in (["testing"], ["__main__"])]
    assert blocks(ROOT / "docs" / "architecture.md", "")[0].splitlines() == expected


def members() -> dict[str, set[str]]:
    """What each class of the package defines, sets on itself or inherits from another one, by the name of the class."""
    found: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path in (ROOT / "kvwal").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names = found.setdefault(node.name, set())
                bases.setdefault(node.name, set()).update(ast.unparse(base).partition("[")[0] for base in node.bases)
                for inner in ast.walk(node):
                    if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        names.add(inner.name)
                    elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                        names.add(inner.attr)
                    elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                        names.add(inner.target.id)

    def of(name: str) -> set[str]:
        return found.get(name, set()).union(*map(of, bases.get(name, ())))

    return {name: of(name) for name in found}


def test_every_method_and_attribute_that_architecture_md_names_is_there() -> None:
    named = re.findall(r"`([A-Z]\w+)\.(\w+)`", ARCHITECTURE)
    assert len(named) > 10
    there = members()
    assert not [f"{owner}.{name}" for owner, name in named if name not in there.get(owner, ())]


# In CI, as what is left of retired words: a branch that makes a module need not stop for this document.
@pytest.mark.slow
def test_architecture_md_names_every_module_below_the_surface() -> None:
    modules = [
        path for folder in ("engine", "log", "pages", "files") for path in (ROOT / "kvwal" / folder).glob("*.py")
    ]
    names = [path.relative_to(ROOT).as_posix() for path in modules if path.stem != "__init__"]
    assert len(names) > 40
    assert not [name for name in sorted(names) if f"`{name}`" not in ARCHITECTURE]
