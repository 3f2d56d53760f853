"""The worker, with the periods that nobody can set shortened by `FACTOR`, as the rules are in the test.

Whatever a worker does every few minutes (snapshots, archive) or seconds (a look at its vitals), it does
60 times as often; nothing else differs from `agent-reconciler worker`.
"""

from __future__ import annotations

import sys

from reconciler import housekeeping, schedule, vitals, worker
from reconciler.cli import main
from tests.monitoring.prometheus import FACTOR


def hurry() -> None:
    """Shortens the periods."""
    for function, name in (
        (housekeeping.Housekeeping.__init__, "snapshot_seconds"),
        (worker.run_worker, "archive_seconds"),
    ):
        defaults = function.__kwdefaults__
        assert defaults is not None
        defaults[name] /= FACTOR
    schedule.SNAPSHOT_CHECK_SECONDS /= FACTOR
    vitals.LOOK_SECONDS = 0.25


if __name__ == "__main__":
    hurry()
    main(["worker", *sys.argv[1:]])
