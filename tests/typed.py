"""Programs on a pseudo terminal of their own, so that 0x03 typed there is a real Ctrl-C.

terminal = Terminal("inference.py", "--model_dir", folder)
terminal.wait_for(PROMPT_READY)
terminal.type("Hi\\r")
"""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROMPT_READY, PROMPT_DONE = b"\x1b[?2004h", b"\x1b[?2004l"  # prompt_toolkit's bracketed paste, on and off


def take_terminal():
    """Make the terminal that stdin is the one of this process, which has just been forked."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it


class Terminal:
    """A program of Python and its terminal; `seen` is what was written there and not yet waited for."""

    def __init__(self, *words, **environment):
        self.master, slave = pty.openpty()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            **{"stdin": slave, "stdout": slave, "stderr": slave, "cwd": ROOT},
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)

    def type(self, text):
        """Type a text, or bytes."""
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def answer(self, text):
        """Type a line, and return what stands between it and the next prompt."""
        self.type(text)
        return self.wait_for(PROMPT_READY)[0]

    def read(self, seconds=60.0):
        """Read what comes next."""
        assert select.select([self.master], [], [], seconds)[0], f"nothing came after {self.seen[-500:]!r}"
        self.seen += os.read(self.master, 65536)

    def wait_for(self, mark, seconds=60.0):
        """Read up to and including `mark`; return what came before, and the seconds it took."""
        start = time.monotonic()
        while mark not in self.seen:
            self.read(max(0.0, start + seconds - time.monotonic()))
        before, _, self.seen = self.seen.partition(mark)
        return before, time.monotonic() - start

    def end(self):
        """Return the exit code of a program that ends by itself."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError:  # the other side is closed
                    break
        return self.process.wait(5)

    def close(self):
        """Kill the program, if it still runs, and close its terminal."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
