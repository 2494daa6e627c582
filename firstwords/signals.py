"""Signals, and the file STOP -> a wish to stop, met where stopping loses nothing.

    wish = StopWish(Path("runs/chat"))    # SIGTERM, SIGINT and SIGHUP are caught from here on
    ...                                   # start-up: a signal ends it at once, there is nothing to save
    wish.defer()
    ...                                   # training: `wish.reason` says what came; the step goes on

A second SIGINT stops at once, whatever is going on. With several processes a signal reaches one or all of
them, at any moment: each notes its own, and what counts is what they agree on once in a step. Invariant: a
signal that the process was started to ignore (`nohup` does that to SIGHUP) stays ignored.
"""

import signal
from pathlib import Path

from firstwords.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP = "STOP"


class StopWish:
    """What was asked for.

    Args:
        run_dir: the run, for the line that says what was stopped.
        is_shared: there are other processes, with which `received` is agreed upon.

    Attributes:
        received: the last signal that counts, None before the first.
        noted: the last that came to this process.
        reason: what was found at the last look, in a word: `SIGTERM`, `STOP`; None before.
    """

    def __init__(self, run_dir: Path, *, is_shared: bool = False):
        self.received: signal.Signals | None = None
        self.reason: str | None = None
        self.noted: signal.Signals | None = None
        self._run_dir, self._is_shared, self._is_deferred = run_dir, is_shared, False
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def defer(self) -> None:
        """From now on only note a signal: there are steps that would be lost."""
        self._is_deferred = True

    def check_startup(self) -> None:
        """Raise `Stopped` when a signal came before `defer`: a library may have swallowed what it raised."""
        if self.noted and not self._is_deferred:
            raise Stopped(
                f"{self._run_dir}: stopped by {self.noted.name} before the first step, nothing is lost; "
                "the same command goes on"
            )

    def look(self) -> str | None:
        """Return what asks for a stop: a signal, or `touch <run>/STOP`; that file goes, it is obeyed."""
        path = self._run_dir / STOP
        if self.received:
            self.reason = self.received.name
        elif path.exists():
            path.unlink(missing_ok=True)
            self.reason = STOP
        return self.reason

    def _receive(self, number, frame) -> None:
        if number == signal.SIGINT and self.noted:
            raise KeyboardInterrupt
        self.noted = signal.Signals(number)
        if not self._is_shared:
            self.received = self.noted
        self.check_startup()
