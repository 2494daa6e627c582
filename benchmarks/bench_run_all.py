#!/usr/bin/env python
"""Run run_all.sh without a terminal, and record its time, its memory and what the model answers.

python -m benchmarks.bench_run_all          # in a fresh clone, after ./make_env.sh requirements.txt
"""

import json
import resource
import subprocess
import time
from pathlib import Path

from benchmarks.record import write_result

EVALUATION = Path("runs/pydocs_chat/evaluation.json")
FIGURES = ("exact_match", "exact_match_all", "stop_rate", "followup_match", "unknown_match", "false_unknown")


def measure() -> tuple[float, float]:
    """Run it; return seconds, and GB of the largest process."""
    begin = time.monotonic()
    subprocess.run(["./run_all.sh"], stdin=subprocess.DEVNULL, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.monotonic() - begin, peak / 1e6


def write_rows(seconds: float, peak_gb: float) -> None:
    """Write a row for each figure of one run."""
    figures = json.loads(EVALUATION.read_text(encoding="utf-8"))
    values = {"run_all_minutes": seconds / 60, "run_all_peak_gb": peak_gb}
    values |= {name: figures[name] for name in FIGURES}
    for row, value in values.items():
        write_result(row, {"median": value, "runs": 1}, {"evaluation": figures})


if __name__ == "__main__":
    write_rows(*measure())
