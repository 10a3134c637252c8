#!/usr/bin/env python
"""Which public attributes of each class are used from other modules: no more than 12, so that a class hides something.

Records (dataclasses and named tuples) are left out, since their fields are all they are, and the classes that users
call. No module uses another object's private attributes: ruff (SLF001) sees to that. With --all the whole list is
printed.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from mypy import build
from mypy.config_parser import parse_config_file
from mypy.find_sources import create_source_list
from mypy.nodes import SymbolTable, TypeInfo
from mypy.options import Options
from mypy.server.deps import get_dependencies

MOST = 12
OF_USERS = {
    "kvwal.aio.reading.AsyncReading",
    "kvwal.aio.remembering.AsyncRemembering",
    "kvwal.aio.store.AsyncStore",
    "kvwal.aio.typed.AsyncTypedReading",
    "kvwal.api.follower.Follower",
    "kvwal.api.recalling.Recalling",
    "kvwal.api.remembering.Remembering",
    "kvwal.batch.WriteBatch",
    "kvwal.api.store.Store",
    "kvwal.tables.reading.TypedReading",
    "kvwal.tables.table.WritableTable",
}


def classes_in(names: SymbolTable, module: str) -> dict[str, TypeInfo]:
    found: dict[str, TypeInfo] = {}
    for entry in names.values():
        if isinstance(entry.node, TypeInfo) and entry.node.fullname.startswith(module + "."):
            found[entry.node.fullname] = entry.node
            found |= classes_in(entry.node.names, module)
    return found


def used_from_elsewhere() -> dict[str, set[str]]:
    """By class: the public attributes that other modules use, by what mypy knows of types."""
    options = Options()
    parse_config_file(options, lambda: None, "pyproject.toml", sys.stdout, sys.stderr)
    options.export_types = options.preserve_asts = True
    options.incremental = False
    result = build.build(create_source_list(["kvwal"], options), options)
    files = {module: file for module, file in result.files.items() if module.split(".")[0] == "kvwal"}
    classes: dict[str, TypeInfo] = {}
    for module, file in files.items():
        classes |= classes_in(file.names, module)
    used: dict[str, set[str]] = defaultdict(set)
    for module, file in files.items():
        for trigger, users in get_dependencies(file, result.types, (3, 11), options).items():
            if all(user.startswith("<") for user in users):
                # A class of the module inherits it, and nothing there uses it.
                continue
            name, _, attribute = trigger.strip("<>").rpartition(".")
            info = classes.get(name)
            if info is None or info.module_name == module or attribute.startswith("_") or attribute not in info.names:
                continue
            if "dataclass" not in info.metadata and not info.is_named_tuple and name not in OF_USERS:
                used[name].add(attribute)
    return used


def main() -> int:
    used = sorted(used_from_elsewhere().items(), key=lambda item: (-len(item[1]), item[0]))
    assert len(used) > 50, f"mypy tells only of {len(used)} classes"
    wrong = [f"{name} has {len(names)}, and {MOST} is the limit" for name, names in used if len(names) > MOST]
    for name, attributes in used:
        if len(attributes) > MOST or "--all" in sys.argv:
            sys.stdout.write(f"{len(attributes):3} {name}: {', '.join(sorted(attributes))}\n")
    sys.stdout.writelines(f"{line}\n" for line in wrong)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
