"""The process of one measurement: a job as JSON on standard input, one line of JSON as the answer.

    {"cost": ..., ...}             measured
    {"not_offered": reason}        the peer has no such operation
    {"missing": reason}            the peer is not installed
    {"failed": reason}             anything else

A fresh process each time: no cache, no heap and no thread of an earlier measurement is left.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from typing import Any

from bench.peers import PEERS, NotOffered
from bench.tasks import TASKS, Job

__all__ = ["main"]


def main() -> None:
    """Do the job."""
    job = Job.from_json(json.load(sys.stdin))
    answer: dict[str, Any]
    try:
        PEERS[job.peer].version()
    except ImportError as error:
        answer = {"missing": str(error)}
    else:
        try:
            answer = asdict(TASKS[job.task](job))
        except NotOffered as error:
            answer = {"not_offered": str(error)}
        except Exception as error:  # noqa: BLE001 - the parent reports it
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
