"""What the tests of followers have their writer do."""

from __future__ import annotations

from typing import Any

import kvwal


def all_durable(db: kvwal.Store) -> None:
    """Have the log say that all of it is on disk, as a writer does that has nothing else to do."""
    engine: Any = db.engine
    engine.queue.run(engine._log.mark_idle)


def rewrite(db: kvwal.Store, value: bytes) -> None:
    """Change every page, and bring it into the pages."""
    db.update({b"%04d" % n: value * 500 for n in range(2000)})
    db.checkpoint()
