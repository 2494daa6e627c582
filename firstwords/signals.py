"""Signals, and files in the run folder -> a wish to stop or to cool down, met where that loses nothing.

    wish = StopWish(Path("runs/chat"))    # SIGTERM, SIGINT and SIGHUP are caught from here on
    ...                                   # start-up: a signal ends it at once, there is nothing to save
    wish.defer()
    ...                                   # training: `wish.reason` says what came; the step goes on

A second SIGINT stops at once, whatever is going on. With several processes a signal reaches one or all of
them, at any moment, and the files are looked for by the first alone: what counts is what they agree on once
in a step (`list_signs` of all, of each the highest, to `settle`). Invariant: a signal that the process was
started to ignore (`nohup` does that to SIGHUP) stays ignored.
"""

import signal
from pathlib import Path

from firstwords.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Made in the run folder, these ask for something: `touch runs/chat/STOP`.
STOP, COOLDOWN = "STOP", "COOLDOWN"


class StopWish:
    """What was asked for.

    Args:
        run_dir: the run, for the line that says what was stopped.
        is_shared: there are other processes, with which `received` is agreed upon.

    Attributes:
        received: the last signal that counts, None before the first.
        noted: the last that came to this process.
        found: the files, `STOP` or `COOLDOWN`, that were there in the last step.
        reason: what was found at the last look, in a word: `SIGTERM`, `STOP`; None before.
    """

    def __init__(self, run_dir: Path, *, is_shared: bool = False):
        self.received: signal.Signals | None = None
        self.reason: str | None = None
        self.noted: signal.Signals | None = None
        self.found: set[str] = set()
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

    def list_signs(self, *, is_first: bool) -> list[int]:
        """Return what asks for something in this process: a signal's number, and which of the files is there.

        Args:
            is_first: this process looks for the files.
        """
        return [self.noted or 0, *(is_first and (self._run_dir / name).exists() for name in (STOP, COOLDOWN))]

    def settle(self, signs: list[float]) -> None:
        """Take over what asks for something in any process."""
        number, *are_there = signs
        if number:
            self.received = signal.Signals(int(number))
        self.found = {name for name, is_there in zip((STOP, COOLDOWN), are_there, strict=True) if is_there}

    def look(self) -> str | None:
        """Return what asks for a stop: a signal, or the file STOP; that goes, it is obeyed."""
        if self.received:
            self.reason = self.received.name
        elif STOP in self.found:
            (self._run_dir / STOP).unlink(missing_ok=True)
            self.reason = STOP
        return self.reason

    def _receive(self, number, frame) -> None:
        if number == signal.SIGINT and self.noted:
            raise KeyboardInterrupt
        self.noted = signal.Signals(number)
        if not self._is_shared:
            self.received = self.noted
        self.check_startup()
