"""Evaluates candidates on a Dask cluster of two worker processes, and prints what came of it as JSON: run by
test_search_workers.py with distributed on its path.

Usage: dask_cluster.py HOW FOLDER. HOW says what is wrong with the workers, each of which imports this file as well: they `die`
once, marked by a file in FOLDER, die `always`, have another `version`, `lack` planc, there are `none`, or they are slow and
`leave` while they work.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from threading import Timer
from typing import Any

HOW, FOLDER = sys.argv[1], Path(sys.argv[2])
if __name__ != "__main__" and HOW == "lack":
    sys.modules["planc"] = None  # type: ignore[assignment]
else:
    import planc
    from planc.search import workers
    from planc.search.evaluate import Evaluator, Outcome

    evaluated = Evaluator.outcome
    if __name__ != "__main__" and HOW == "version":
        planc.__version__ = "0.0.1"

    def dying(self: Evaluator, *candidate: Any, **options: Any) -> Outcome:
        """Evaluates, or kills its process."""
        mark = FOLDER / "died"
        if HOW == "leave":
            time.sleep(60)
        if HOW == "always" or not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluated(self, *candidate, **options)

    if __name__ != "__main__" and HOW in ("die", "always", "leave"):
        Evaluator.outcome = dying  # type: ignore[method-assign]


def main() -> None:
    from distributed import LocalCluster
    from search_workers import asked, rows, spec

    if HOW in ("none", "leave"):  # else workers may take a while to be replaced
        workers.STAFFED, workers.LOOK = 2.0, 1.0
    said: list[str] = []
    count = 0 if HOW == "none" else 2
    with LocalCluster(
        n_workers=count, threads_per_worker=2, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        if HOW == "leave":
            Timer(3.0, cluster.scale, [0]).start()
        try:
            with workers.evaluating(spec(), dask=cluster.scheduler_address, ttft=True, say=said.append) as evaluate:
                # a cluster without workers is refused before anything is asked of it
                found = [] if HOW == "none" else [rows(evaluate(asked())), rows(evaluate(asked()[:2], whole=True))]
                answer = {"found": found, "said": said}
        except planc.PlancError as error:
            fault = error.diagnostics[0]
            answer = {"code": fault.code, "message": fault.message, "related": fault.related, "said": said}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
