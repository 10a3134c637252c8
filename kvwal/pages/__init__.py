"""The page file: a copy-on-write B+tree in one file, and what proves it sound.

    check > pagefile > merge | relocate | tree > updates > pager > freelist | meta > page
"""

from kvwal.pages.check import Problem, check, salvage_pages
from kvwal.pages.meta import Choice, Meta, Row
from kvwal.pages.pagefile import PageFile
from kvwal.pages.pager import NotCached
from kvwal.pages.tree import Tree

__all__ = ["Choice", "Meta", "NotCached", "PageFile", "Problem", "Row", "Tree", "check", "salvage_pages"]
