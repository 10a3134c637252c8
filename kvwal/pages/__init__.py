"""The page file: a copy-on-write B+tree in one file, and what proves it sound.

    check | salvage > pagefile > tree | merge | compact > pager | writer > cache | freelist | meta > node
"""

from kvwal.pages.cache import NotCached
from kvwal.pages.check import Problem, check
from kvwal.pages.meta import Choice, Meta, Row
from kvwal.pages.pagefile import PageFile, PageStats
from kvwal.pages.salvage import salvage_pages
from kvwal.pages.tree import Tree

__all__ = ["Choice", "Meta", "NotCached", "PageFile", "PageStats", "Problem", "Row", "Tree", "check", "salvage_pages"]
