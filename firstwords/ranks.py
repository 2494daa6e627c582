"""The processes of one run -> one run: one of them is the first, and all have the same end.

    with join_ranks() as ranks:                      # alone, or as torchrun and accelerate started us
        if ranks.is_first: ...                       # what happens once: the folder, the log, what is said
        step = ranks.ask_first(lambda: find_step())  # the first looks, the others are told

They meet at the store of `torch.distributed` (a server with keys and values, at MASTER_ADDR), which needs no
GPU and works while a collective waits for ever. Invariant: the first error of any process is the verdict on
all: each ends with its exit code, the first process alone says why, and none outlives it by more than
`GRACE` seconds, wherever it waits. Who is killed leaves no verdict: it is missed after `SILENCE` seconds.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from firstwords.args import describe_error, print_line
from firstwords.errors import BadFlag, FirstwordsError, IOFailed
from firstwords.signals import SIGNALS

# Seconds: for a process to come to its end by itself after the verdict; between two looks at the store; and
# for all to start, which on a cluster may lie minutes apart.
GRACE, INTERVAL, PATIENCE = 5.0, 0.1, timedelta(minutes=10)
# Seconds between two signs of life, and without one until a process is taken for dead. Torch itself waits 30
# minutes for one that has died before it came to a collective, with NCCL at any time. A disk that hangs can
# keep a whole process waiting, but hardly for so long.
PULSE, SILENCE = 5.0, 120.0

_SAVED = "what was saved is there, and the same command goes on"
_LOST_END = (IOFailed.exit_code, f"a process of the run is gone; {_SAVED}")
# What gloo, NCCL and the store say when the other side of a connection has gone.
_LOST = ("onnection closed", "onnection reset", "Broken pipe", "NCCL", "recvValue failed", "sendBytes failed")


class Ranks:
    """This process among those of the run; without a store it is alone.

    Attributes:
        rank: its number, from 0.
        size: processes in all, over all machines.
    """

    def __init__(self, rank: int = 0, size: int = 1, store=None):
        self.rank, self.size, self._store, self._num_asked = rank, size, store, 0
        self._beaten = -PULSE
        # Of each other process: how many signs it has given, and when that was last another number.
        self._heard: dict[int, tuple[int, float]] = {}

    @property
    def is_first(self) -> bool:
        """Whether this is the process that owns the folder and the words."""
        return self.rank == 0

    def ask_first(self, do: Callable):
        """Return what `do` returns in the first process, the only one that calls it; JSON holds it."""
        if self.size == 1:
            return do()
        self._num_asked += 1
        key = f"answer-{self._num_asked}"
        if self.is_first:
            self._store.set(key, json.dumps(do()))
        while not self._store.check([key]):
            self._check_verdict()
            time.sleep(INTERVAL)
        return json.loads(self._store.get(key))

    def _check_verdict(self) -> None:
        verdict = self.read_verdict()
        if verdict is not None:
            raise _build_error(*verdict)

    def read_verdict(self) -> tuple[int, str] | None:
        """Return exit code and line of the end that all have; None while there is none."""
        return tuple(json.loads(self._store.get("verdict"))) if self._store.check(["verdict"]) else None

    def beat(self) -> None:
        """Give a sign of life, when it is time for one; the first process looks for those of the others.

        Of one that has given none for `SILENCE` seconds it makes the verdict: nobody else could say so.
        """
        now = time.monotonic()
        if now - self._beaten < PULSE:
            return
        if now - self._beaten > SILENCE / 2:  # this process was stopped for a while, and others with it
            self._heard.clear()
        self._beaten = now
        self._store.add(f"beat-{self.rank}", 1)
        for rank in range(1, self.size) if self.is_first else ():
            count = self._count(f"beat-{rank}")
            if count != self._heard.get(rank, (None,))[0]:
                self._heard[rank] = count, now
            elif now - self._heard[rank][1] > SILENCE:
                why = f"process {rank}: has given no sign of life for {SILENCE:g} seconds; {_SAVED}"
                self._store.compare_set("verdict", "", json.dumps((IOFailed.exit_code, why)))

    def close(self, error: BaseException | None) -> None:
        """Agree on the end with the others, and wait for theirs.

        Args:
            error: what ended this process, None when it has done its work.

        Raises:
            FirstwordsError, KeyboardInterrupt: in the first process, as it came in any.
            SystemExit: in the others, when the run ended with any.
        """
        # From here on there is nothing to stop: a launcher terminates all when the first of them is gone.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        ours = None if error is None else _describe_end(error, self.rank)
        try:
            verdict = self._meet(ours)
        except RuntimeError:  # the store went with the process that held it
            verdict = ours or _LOST_END
        is_told_here = self.is_first or ours is not None and ours[0] == 1  # of a mistake the traceback
        if verdict is not None and verdict == ours != _LOST_END and is_told_here:
            raise error
        if verdict is not None:
            raise _build_error(*verdict) if self.is_first else SystemExit(verdict[0])

    def _meet(self, ours: tuple[int, str] | None) -> tuple[int, str] | None:
        """Hand in how this process ended, wait for the others, and return the verdict."""
        if ours is not None:
            self._store.compare_set("verdict", "", json.dumps(ours))
        self._store.add("ended", 1)
        has_all = self._wait(lambda: self._count("ended") == self.size)
        verdict = self.read_verdict()
        self._leave(has_all)
        return verdict

    def leave_by_force(self) -> None:
        """Let the others know that nobody has to wait for this process, which does not end by itself."""
        self._store.add("ended", 1)
        self._leave(has_all=True)

    def _leave(self, has_all: bool) -> None:
        """Leave; the first process as the last one, because the store may be in it."""
        if not self.is_first:
            self._store.add("left", 1)
        elif has_all:
            self._wait(lambda: self._count("left") == self.size - 1)
            time.sleep(INTERVAL)  # for the answers on their way

    def _count(self, key: str) -> int:
        return self._store.add(key, 0)

    def _wait(self, is_done: Callable[[], bool]) -> bool:
        """Wait for the others; from the verdict on no longer than those take that are ended by force.

        Returns:
            whether it is done.
        """
        until = None
        while not (done := is_done()) and (until is None or time.monotonic() < until):
            self.beat()
            if until is None and self._store.check(["verdict"]):
                until = time.monotonic() + 2 * GRACE
            time.sleep(INTERVAL)
        return done


def _describe_end(error: BaseException, rank: int) -> tuple[int, str]:
    if isinstance(error, FirstwordsError | KeyboardInterrupt | OSError):
        return describe_error(error)
    if any(sign in str(error) for sign in _LOST):
        return _LOST_END
    return 1, f"process {rank}: {type(error).__name__}: {error}"


def _build_error(code: int, text: str) -> BaseException:
    """Return what ends this process as it ended another: with its code and its line."""
    kinds = {kind.exit_code: kind for kind in (FirstwordsError, *FirstwordsError.__subclasses__())}
    return kinds[code](text) if code in kinds else KeyboardInterrupt()


def count_local() -> int:
    """Return how many processes of the run are on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def find_local() -> int | None:
    """Return the number of this process among them, from 0; None where no launcher has started it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other processes of the run, and end as they do.

    Whether there are any, the environment says, as torchrun sets it (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT). The standard output of all but the first is closed.

    Raises:
        BadFlag: for an environment that names no place to meet, or where nobody came.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ.get("RANK", -1)), size, _open_store())
    if not ranks.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ranks, ended), daemon=True)
    watch.start()
    error = None
    try:
        yield ranks
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    ended.set()
    watch.join()
    ranks.close(error)


def _open_store():
    from torch import distributed

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise BadFlag(f"{name}: is not set, but WORLD_SIZE is; start with torchrun or accelerate launch")
    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=PATIENCE))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = str(error).splitlines()[0]
        raise BadFlag(f"MASTER_ADDR {place}: the processes do not meet ({why}); see docs/cluster") from None
    return distributed.PrefixStore("firstwords", store)


def _watch(ranks: Ranks, ended: threading.Event) -> None:
    """Give signs of life; when the run has its verdict and this process hangs on, end it.

    It may be in a collective that nobody else is in.
    """
    verdict = None
    while verdict is None:
        if ended.wait(5 * INTERVAL):
            return
        try:
            ranks.beat()
            verdict = ranks.read_verdict()
        except RuntimeError:
            verdict = _LOST_END
    if ended.wait(GRACE):
        return
    if ranks.is_first:
        print_line(f"error: {verdict[1]}", sys.stderr)
    with suppress(RuntimeError):
        ranks.leave_by_force()
    os._exit(verdict[0])
