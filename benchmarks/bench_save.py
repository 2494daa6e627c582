#!/usr/bin/env python
"""Measure what it costs to make the checkpoints of a 124M run safe, on this disk.

  python -m benchmarks.bench_save --folder runs/bench-save

A run saves every ten minutes and keeps two checkpoints. Files of the sizes of a 124M model with AdamW's state
(random bytes: a disk may not make them small) are written as a run writes them, without a sync, and then our
own functions are timed, which the stock Trainer has not:

hash      sha256 of every file, for the manifest
sync      fsync of every file and of the folder: what was written has to reach the disk
publish   the rename, and the pruning: nobody has written into the checkpoints before, the oldest goes
verify    every byte of a checkpoint read again, as a run does once for each that it finds when it is gone on
          with; told beside the others, and no part of a save

The row is the share of ten minutes that hash, sync and publish take, in percent, of saves in a steady state.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

from benchmarks.record import write_result
from firstwords import atomic, checkpoint

MODEL_BYTES, KEEP, INTERVAL = 124_439_808 * 4, 2, 600
SIZES = {"model.safetensors": MODEL_BYTES, "optimizer.pt": 2 * MODEL_BYTES, "rng_state.pth": 14_000}


def write_files(folder: Path) -> float:
    """Write the files of a checkpoint and return the seconds; they may still be in memory."""
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    for name, size in SIZES.items():
        piece = os.urandom(16 << 20)
        with open(folder / name, "wb") as file:
            for place in range(0, size, len(piece)):
                file.write(piece[: size - place])
    return time.perf_counter() - begin


def save(run: Path, step: int, verified: dict) -> dict[str, float]:
    """Save once as a run does; return the seconds of each part."""
    folder = run / f"{atomic.STAGING}{os.getpid()}" / f"checkpoint-{step}"
    seconds = {"write": write_files(folder)}
    for name, do in (
        ("hash", lambda: checkpoint.write_manifest(folder, {"step": step})),
        ("sync", lambda: atomic.sync_folder(folder)),
        ("publish", lambda: checkpoint.publish(folder, run, keep=KEEP, verified=verified)),
        ("verify", lambda: checkpoint.verify(run / folder.name)),
    ):
        begin = time.perf_counter()
        do()
        seconds[name] = time.perf_counter() - begin
    return seconds


def main() -> None:
    """Save several times, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to be measured")
    parser.add_argument("--saves", type=int, default=6)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    verified = {}
    try:
        saves = [save(args.folder, step, verified) for step in range(1, args.saves + 1)]
    finally:
        shutil.rmtree(args.folder)
    steady = saves[KEEP:]  # the first ones have none before them to check and to prune
    shares = sorted(100 * sum(s[name] for name in ("hash", "sync", "publish")) / INTERVAL for s in steady)
    total = sum(SIZES.values()) / 1e6
    rates = {f"{name}_mb_per_s": total / statistics.median(s[name] for s in steady) for name in steady[0]}
    result = {"median": statistics.median(shares), "low": shares[0], "high": shares[-1]}
    settings = {"bytes": SIZES, "keep": KEEP, "interval_s": INTERVAL, "cores": os.cpu_count()}
    write_result("save_cost", {**result, "seconds": saves, **rates}, settings)
    for seconds in saves:
        print("  ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    print(f"{result['median']:.2f} % of ten minutes ({result['low']:.2f} to {result['high']:.2f})")


if __name__ == "__main__":
    main()
