"""Parts: in order, whole or not there, made once, by any number of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firstwords.errors import CannotCreate, IOFailed
from firstwords.parts import finish_work, make_parts, open_work

PLAN = {"flags": {"seed": 0}, "sources": ["a"]}


class Square:
    """A job with a state: notes each call, and squares."""

    def __init__(self, log):
        self.log = log

    def __call__(self, unit, folder):
        with open(self.log, "a") as log:
            log.write(f"{unit}\n")
        if unit == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == "full":
            raise OSError(28, "No space left on device", str(folder))
        (folder / "square").write_text(str(unit * unit))


def run(tmp_path, units, num_proc=2, plan=PLAN, keep=True):
    with open_work(tmp_path / "out", plan) as work:
        parts = list(make_parts(Square(tmp_path / "log"), units, work, num_proc=num_proc))
        read = [(part / "square").read_text() for part in parts]
        if not keep:
            finish_work(work)
    return read, work


def read_log(tmp_path):
    lines = (tmp_path / "log").read_text().split()
    (tmp_path / "log").unlink()
    return sorted(lines)


@pytest.mark.parametrize("num_proc", [1, 3])
def test_parts_come_in_the_order_of_the_units(tmp_path, num_proc):
    read, work = run(tmp_path, range(20), num_proc)
    assert read == [str(n * n) for n in range(20)]
    assert len(list(work.folder.glob("part-*"))) == 20


def test_units_are_read_as_they_are_needed(tmp_path):
    taken = []
    units = (taken.append(n) or n for n in range(50))
    with open_work(tmp_path / "out", PLAN) as work:
        parts = make_parts(Square(tmp_path / "log"), units, work, num_proc=2)
        next(parts)
        assert len(taken) <= 6
        parts.close()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_parts_that_are_there_are_not_made_again(tmp_path, num_proc):
    with pytest.raises(IOFailed, match="No space left"):
        run(tmp_path, [1, 2, "full", 3], num_proc)
    read_log(tmp_path)
    read, work = run(tmp_path, [1, 2, 5, 3], num_proc)
    assert read == ["1", "4", "25", "9"]
    assert not {"1", "2"} & set(read_log(tmp_path))
    assert work.changed is None


def test_another_plan_starts_anew_and_says_in_what(tmp_path):
    run(tmp_path, [1, 2])
    read_log(tmp_path)
    _, work = run(tmp_path, [1, 2], plan=PLAN | {"sources": ["b"]})
    assert work.changed == "sources"
    assert read_log(tmp_path) == ["1", "2"]


def test_nothing_stays_of_work_that_is_finished_or_has_no_part(tmp_path):
    run(tmp_path, [1, 2], keep=False)
    with pytest.raises(IOFailed):
        run(tmp_path, ["full", 1], num_proc=1)
    assert os.listdir(tmp_path) == ["log"]


def test_a_process_that_dies_is_an_error_and_the_rest_stays(tmp_path):
    with pytest.raises(IOFailed, match="a process died.*--num_proc than 2"):
        run(tmp_path, [*range(9), "die"])
    read_log(tmp_path)
    read, _ = run(tmp_path, range(10))
    assert read[-1] == "81"
    assert len(read_log(tmp_path)) < 10


def test_one_work_folder_has_one_owner(tmp_path):
    with open_work(tmp_path / "out", PLAN), pytest.raises(CannotCreate, match="is writing here"):
        run(tmp_path, [1])


SLOW = """
import os, sys, time
from pathlib import Path
from firstwords.parts import make_parts, open_work

def job(unit, folder):
    (folder / "pid").write_text(str(os.getpid()))
    if unit > 3:
        Path(sys.argv[1], "begun").touch()
        time.sleep(600)

if __name__ == "__main__":
    with open_work(Path(sys.argv[1], "out"), {}) as work:
        list(make_parts(job, range(9), work, num_proc=2))
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except OSError:
        return False


def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    run = subprocess.Popen(
        [sys.executable, tmp_path / "slow.py", tmp_path], env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    pids = {path.read_text() for path in tmp_path.glob(".work-out/*/pid")}
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids
    assert not any(map(is_alive, pids))
