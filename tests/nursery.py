"""Runs of train.py as children of one warmed process: real processes that start in a tenth of the time.

    with Nursery() as nursery:
        child = nursery.start(words, patch=broken.no_chance)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL

The warmed process imports everything, builds a trainer and saves its model, but starts no thread and trains
nothing, so that a fork of it is a process like any other. Children of several threads of the test run side by
side. As a script this file is that process: requests are lines of JSON.
"""

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ALONE = {
    **{
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    },
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Child:
    """A run that was started; `out` and `err` are the files of what it says."""

    def __init__(self, nursery, pid: int, out: Path, err: Path):
        self.nursery, self.pid, self.out, self.err = nursery, pid, out, err

    def wait(self) -> int:
        """Wait for its end and return the exit code, or minus the signal."""
        ended = os.pidfd_open(self.pid)
        select.select([ended], [], [])  # here and not in the nursery, which others ask meanwhile
        os.close(ended)
        return self.nursery.ask({"wait": self.pid})["code"]

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


class Nursery:
    """The warmed process; `start` forks it.

    Args:
        folder: where the children's words go.
        before: words of a command that starts the process, such as `unshare` with its flags.
    """

    def __init__(self, folder: Path, before: tuple = ()):
        self.folder, self.count, self.lock = folder, 0, threading.Lock()
        self.process = subprocess.Popen(
            [*before, sys.executable, str(Path(__file__)), str(folder)],
            cwd=ROOT,
            env=os.environ | ALONE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.threads = json.loads(self.process.stdout.readline())["threads"]

    def ask(self, request: dict) -> dict:
        """Send a request and return the answer."""
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(self, words: list, *patches, **files) -> Child:
        """Start train.py with these words.

        Args:
            words: of the command line.
            patches: each a function of a module in tests/, or one and its arguments in a tuple; called
                in the child before train.py's `main`. One that returns a function gives another `main`.
            files: `out` and `err`, where they are not to be files of their own.
        """
        with self.lock:
            self.count += 1
            name = self.folder / str(self.count)
        out = files.get("out", name.with_suffix(".out"))
        err = files.get("err", name.with_suffix(".err"))
        calls = [patch if isinstance(patch, tuple) else (patch,) for patch in patches]
        named = [[function.__module__, function.__name__, *map(str, rest)] for function, *rest in calls]
        request = {"words": [str(word) for word in words], "patches": named, "out": str(out), "err": str(err)}
        return Child(self, self.ask(request)["pid"], out, err)

    def run(self, words: list, *patches) -> tuple[int, str]:
        """Run train.py to its end; return the exit code and what it wrote to stderr."""
        child = self.start(words, *patches)
        code = child.wait()
        return code, child.err.read_text()

    def close(self) -> None:
        """End the warmed process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def warm_up(folder: Path) -> None:
    """Import what a run imports, build one without training it, and save its model.

    Measured: the first save takes 0.3 s longer than the others, the rate of matrix products that a run
    measures as it begins 0.3 s, and a collection of all that was imported 0.3 s.
    """
    import tiny
    import torch

    from firstwords.model import quiet_transformers

    torch.set_num_threads(1)
    quiet_transformers()  # a bar of progress is a thread
    data = tiny.write_chats(folder / "warm", tiny.invent_talks(5))
    tiny.build_trainer(data, folder / "warm-run").model.save_pretrained(folder / "warm-model")
    for name in ("train", "broken", "firstwords.callbacks", "firstwords.preflight", "firstwords.resume"):
        importlib.import_module(name)
    importlib.import_module("firstwords.monitor").measure_matmul_rate = lambda device, bf16: 1e9
    gc.collect()
    gc.freeze()


def bear(request: dict) -> int:
    """Fork a child that runs train.py, and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
        code = live(request)
    finally:
        os._exit(code)


def live(request: dict) -> int:
    """Patch what is asked for, run train.py, and return its exit code."""
    import traceback

    import train
    from firstwords.args import run_main

    main = train.main
    try:
        for module, name, *rest in request["patches"]:
            main = getattr(importlib.import_module(module), name)(*rest) or main
        run_main(main, request["words"])
    except SystemExit as ended:
        return ended.code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve(folder: Path) -> None:
    """Answer requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up(folder)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"threads": len(os.listdir("/proc/self/task"))})
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer({"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])})
        else:
            answer({"pid": bear(request)})


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(ROOT)]
    serve(Path(sys.argv[1]))
