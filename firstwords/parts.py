"""Units of work -> parts on disk, in several processes; what was killed goes on.

    with open_work(Path("data/owt"), plan) as work:           # data/.work-owt
        for part in make_parts(job, units, work, num_proc=8):  # calls job(unit, folder) for each unit
            ...                                                # work.folder/part-000000 and so on, in order

Invariant: a part is whole or not there; the parts are the same, in the same order, for any number of
processes and any number of kills. A part that is there is not made again; a work folder whose plan is
another one is emptied first.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from firstwords.atomic import (
    format_json,
    lock_folder,
    remove_folder,
    stage_folder,
    sweep_leftovers,
    write_text,
)
from firstwords.errors import BadData, BadFlag, IOFailed, MissingInput

Unit = TypeVar("Unit")
# Writes the part of a unit into a folder. Pickled once for each process, so it may be large.
Job = Callable[[Unit, Path], None]

WORK, PLAN = ".work-", "plan.json"
AHEAD = 2  # units that wait for each process


@dataclass(frozen=True)
class Work:
    """The hidden folder in which parts wait until all are there.

    Attributes:
        changed: the first key of the plan in which an earlier, unfinished work differed.
    """

    folder: Path
    changed: str | None = None

    def part(self, number: int) -> Path:
        """Return where the part of a unit is or will be."""
        return self.folder / f"part-{number:06d}"

    def stage(self, name: str) -> "Work":
        """Return the place of the parts of another pass."""
        (self.folder / name).mkdir(exist_ok=True)
        return Work(self.folder / name)

    @property
    def state(self) -> str | None:
        """What a person may want to know of an earlier, unfinished work."""
        if self.changed:
            return f"unfinished work had other {self.changed}; starting anew"
        return None if self.is_empty() else "going on with unfinished work"

    def is_empty(self) -> bool:
        """Tell whether no part is there, nor any other folder."""
        return not any(path.is_dir() for path in self.folder.iterdir())


@contextmanager
def open_work(out_dir: Path, plan: dict) -> Iterator[Work]:
    """Open the work folder beside `out_dir`, locked.

    It stays until `finish_work`, unless it is empty or the same command would fail again: for bad data,
    flags or input.

    Args:
        plan: all that decides what is in the parts, as JSON can hold it: an unfinished work of another
            plan is thrown away.

    Raises:
        CannotCreate: when another process works there, or nothing can be made there.
    """
    folder = out_dir.parent / f"{WORK}{out_dir.name}"
    with lock_folder(folder):
        sweep_leftovers(folder)
        work = Work(folder, _clear_other(folder, plan))
        write_text(folder / PLAN, format_json(plan))
        try:
            yield work
        except (BadData, BadFlag, MissingInput):
            finish_work(work)
            raise
        finally:
            if folder.exists() and work.is_empty():
                finish_work(work)


def _clear_other(folder: Path, plan: dict) -> str | None:
    """Empty the folder unless its parts are of this plan; tell what is different."""
    found = None
    with suppress(OSError, ValueError):
        found = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if found == json.loads(json.dumps(plan)):
        return None
    for path in folder.glob("*"):
        if path.name != ".lock":
            remove_folder(path) if path.is_dir() else path.unlink()
    if not isinstance(found, dict):
        return None
    return next((key for key in plan if found.get(key) != plan[key]), "plan")


def finish_work(work: Work) -> None:
    """Delete the work folder; what it was for is done."""
    remove_folder(work.folder)


def sweep_work(out_dir: Path) -> None:
    """Delete the work folder that a process left which was killed when `out_dir` was finished."""
    folder = out_dir.parent / f"{WORK}{out_dir.name}"
    if folder.is_dir():
        with lock_folder(folder):
            remove_folder(folder)


def make_parts(job: Job, units: Iterable[Unit], work: Work, *, num_proc: int) -> Iterator[Path]:
    """Make the part of each unit that has none yet.

    Args:
        job: called as `job(unit, folder)` in some process.
        units: read lazily, at most `AHEAD` for each process before their turn.
        num_proc: processes; with 1, and for a single unit, all is done in this one.

    Yields:
        the folder of each part, in the order of the units.

    Raises:
        IOFailed: when a process dies, as the system kills one when memory is short.
    """
    units = iter(units)
    first = list(islice(units, 2))
    numbered = enumerate(chain(first, units))
    if num_proc == 1 or len(first) < 2:
        for number, unit in numbered:
            make_part(job, unit, work.part(number))
            yield work.part(number)
        return
    yield from _make_in_processes(job, numbered, work, num_proc)


def make_part(job: Job, unit: Unit, part: Path) -> None:
    """Make one part, unless it is there."""
    if not part.exists():
        with stage_folder(part) as staging:
            job(unit, staging)


def start_server(job: Job | type) -> None:
    """Start what starts the processes, unless it runs; the caller may do other things meanwhile.

    Args:
        job: of `make_parts`, or its class. What its module imports is imported once, by the server, and
            not by each process: half a second each.
    """
    modules = [__name__, type(job).__module__, getattr(job, "__module__", __name__)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    forkserver.ensure_running()


def _make_in_processes(job: Job, numbered, work: Work, num_proc: int) -> Iterator[Path]:
    start_server(job)
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start_process, initargs=(job,))
    waiting = deque()
    try:
        for number, unit in numbered:
            part = work.part(number)
            waiting.append((part, None if part.exists() else pool.submit(_make_here, unit, part)))
            if len(waiting) > AHEAD * num_proc:
                yield _wait_for(*waiting.popleft())
        while waiting:
            yield _wait_for(*waiting.popleft())
    except BrokenProcessPool:
        raise IOFailed(
            f"{work.folder}: a process died, perhaps for lack of memory; run it again with a smaller "
            f"--num_proc than {num_proc}, it goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _wait_for(part: Path, future) -> Path:
    if future:
        future.result()
    return part


_job: Job


def _start_process(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Of a parent that was killed the pool's processes know nothing and would wait for ever.
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make_here(unit: Unit, part: Path) -> None:
    make_part(_job, unit, part)
