"""The page file: copy-on-write B+trees in one file, and what proves them sound.

Imports run one way: check | salvage | followed > pagefile > space > rebuild > bases > catalogue | deadlist > tree |
merge | compact > pager | writer > cache | freelist | slots | pins > meta > node.
"""

from kvwal.pages.bases import BEGINNING, WINDOW, Base, Keep
from kvwal.pages.cache import NotCached
from kvwal.pages.catalogue import Changes, table_beside
from kvwal.pages.check import check
from kvwal.pages.followed import FollowedPages
from kvwal.pages.merge import Columns
from kvwal.pages.meta import Choice, Meta, Row
from kvwal.pages.pagefile import PageFile
from kvwal.pages.salvage import Salvaged, salvage_pages
from kvwal.pages.slots import create_page_file
from kvwal.pages.tree import Tree

__all__ = [
    "BEGINNING",
    "WINDOW",
    "Base",
    "Changes",
    "Choice",
    "Columns",
    "FollowedPages",
    "Keep",
    "Meta",
    "NotCached",
    "PageFile",
    "Row",
    "Salvaged",
    "Tree",
    "check",
    "create_page_file",
    "salvage_pages",
    "table_beside",
]
