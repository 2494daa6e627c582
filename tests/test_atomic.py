"""Folders that are complete or not there, whatever kills the writer."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from firstwords import atomic
from firstwords.atomic import lock_folder, stage_folder, sweep_leftovers, write_text
from firstwords.errors import CannotCreate, IOFailed

ROOT = Path(atomic.__file__).parents[1]
OLD, NEW = {"a.txt": "old a", "b.txt": "old b"}, {"a.txt": "new a", "sub/c.txt": "new c"}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read_all(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(code, *words):
    """Start Python on `code` and wait for its first line."""
    command = [sys.executable, "-c", code, *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()


# --- stage


def test_a_folder_appears_whole_with_its_parents(tmp_path):
    target = tmp_path / "x" / "y"
    with stage_folder(target) as staging:
        fill(staging, NEW)
        assert staging.parent == target.parent
        assert not target.exists()
    assert read_all(target) == NEW
    assert os.listdir(target.parent) == ["y"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_leaves_nothing_but_what_was_there(tmp_path, error, overwrite):
    target = tmp_path / "x"
    if overwrite:
        fill(target, OLD)

    def break_off():
        with stage_folder(target, overwrite=overwrite) as staging:
            fill(staging, NEW)
            raise error

    with pytest.raises(error):
        break_off()
    assert os.listdir(tmp_path) == (["x"] if overwrite else [])
    assert not overwrite or read_all(target) == OLD


def test_a_used_folder_is_refused_unless_it_may_be_replaced(tmp_path):
    target = fill(tmp_path / "x", OLD)
    with pytest.raises(CannotCreate, match="x: is there already"), stage_folder(target):
        pytest.fail("went in")
    with stage_folder(target, overwrite=True) as staging:
        fill(staging, NEW)
        assert read_all(target) == OLD
    assert read_all(target) == NEW
    assert os.listdir(tmp_path) == ["x"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "x").mkdir()
    with stage_folder(tmp_path / "x") as staging:
        fill(staging, NEW)
    assert read_all(tmp_path / "x") == NEW


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["file", "file/below"])
def test_a_file_in_the_way_is_refused_and_stays(tmp_path, target, overwrite):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CannotCreate, match=target), stage_folder(tmp_path / target, overwrite=overwrite):
        pytest.fail("went in")
    assert read_all(tmp_path) == {"file": "mine"}


FULL_DISK = """
import resource, sys
from pathlib import Path
from firstwords.args import run_main
from firstwords.atomic import stage_folder, write_text
target = Path(sys.argv[1])
def main(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    if target.suffix:
        write_text(target, "x" * 5000)
    with stage_folder(target, overwrite=True) as staging:
        (staging / "small").write_text("x")
        (staging / "large").write_text("x" * 5000)
run_main(main, [])
"""


@pytest.mark.parametrize("name", ["x", "x.txt"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, name):
    if name == "x":
        fill(tmp_path / "x", OLD)
    else:
        (tmp_path / "x.txt").write_text("old")
    before = read_all(tmp_path)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / name)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == IOFailed.exit_code == 74
    assert ended.stderr.startswith(f"error: {tmp_path / name}: ")
    assert "File too large" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert read_all(tmp_path) == before
    assert os.listdir(tmp_path) == [name]


def test_all_is_on_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    events = []
    paths = {}
    open_, fsync, rename = os.open, os.fsync, Path.rename

    def note_open(path, *args, **options):
        descriptor = open_(path, *args, **options)
        paths[descriptor] = Path(path).name
        return descriptor

    def note_fsync(descriptor):
        events.append(("sync", paths[descriptor]))
        fsync(descriptor)

    def note_rename(self, target):
        events.append(("rename", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with stage_folder(tmp_path / "x") as staging:
        fill(staging, NEW)
    assert {name for _, name in events[:4]} == {"a.txt", "sub", "c.txt", staging.name}
    assert events[4:] == [("rename", "x"), ("sync", tmp_path.name)]


# --- killed

KILLED_INSIDE = """
import sys, time
from pathlib import Path
from firstwords.atomic import stage_folder
with stage_folder(Path(sys.argv[1]), overwrite=True) as staging:
    (staging / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""

KILLED_AT_STEP = """
import os, sys
from pathlib import Path
from firstwords import atomic
target, left = Path(sys.argv[1]), int(sys.argv[2])
def count(function):
    def step(*args, **options):
        global left
        left -= 1
        if not left:
            os._exit(9)
        return function(*args, **options)
    return step
Path.rename, os.unlink, os.rmdir = count(Path.rename), count(os.unlink), count(os.rmdir)
with atomic.stage_folder(target, overwrite=True) as staging:
    (staging / "a.txt").write_text("new a")
    (staging / "sub").mkdir()
    (staging / "sub" / "c.txt").write_text("new c")
"""


def test_a_killed_writer_leaves_one_leftover_that_the_next_sweeps(tmp_path):
    target = fill(tmp_path / "x", OLD)
    process = start(KILLED_INSIDE, target)
    leftover = f".staging-{process.pid}-x"
    assert sweep_leftovers(tmp_path) == []  # it lives
    kill(process)
    assert sorted(os.listdir(tmp_path)) == [leftover, "x"]
    assert read_all(target) == OLD
    assert sweep_leftovers(tmp_path) == [leftover]
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(("step", "expected"), [(1, OLD), (2, None), (3, NEW), (4, NEW), (5, NEW)])
def test_killed_at_any_step_it_is_old_or_new_or_absent(tmp_path, step, expected):
    target = fill(tmp_path / "x", OLD)
    ended = subprocess.run([sys.executable, "-c", KILLED_AT_STEP, target, str(step)], cwd=ROOT)
    assert ended.returncode == 9
    assert (read_all(target) if target.exists() else None) == expected
    sweep_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ([] if expected is None else ["x"])


def test_the_sweep_takes_the_dead_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    # A test run whose parent has ended is a child of process 1.
    theirs = {f".staging-{os.getppid()}-x", ".staging-1-x", f".trash-{os.getppid()}-x"}
    users = [".staging-area", ".trash-bin-x", "staging-9-x", ".git", "x"]
    swept = [
        f".staging-{dead.pid}-x",
        f".trash-{dead.pid}-a-b",
        f".staging-{dead.pid}",
        f".staging-{os.getpid()}-x",
        f".staging-{10**20}-x",
    ]
    for name in [*theirs, *users, *swept]:
        fill(tmp_path / name, OLD)
    (tmp_path / f".staging-{dead.pid}-report.json").write_text("half")  # of write_text: a file
    swept.append(f".staging-{dead.pid}-report.json")
    assert sweep_leftovers(tmp_path) == sorted(swept)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, *users])


# --- lock

HOLD = """
import sys, time
from pathlib import Path
from firstwords.atomic import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_by_name_until_the_first_dies(tmp_path):
    run = tmp_path / "runs" / "a"
    process = start(HOLD, run)
    try:
        with (
            pytest.raises(CannotCreate, match=rf"a: process {process.pid} is writing here"),
            lock_folder(run),
        ):
            pytest.fail("went in")
        with pytest.raises(CannotCreate, match=str(process.pid)), lock_folder(run):
            pytest.fail("the refused one wiped out the name")
    finally:
        kill(process)
    with lock_folder(run):
        assert (run / ".lock").read_text() == str(os.getpid())


def test_a_lock_is_freed_at_the_end_of_its_block(tmp_path):
    with pytest.raises(ValueError, match="x"), lock_folder(tmp_path):
        raise ValueError("x")
    with (
        lock_folder(tmp_path),
        pytest.raises(CannotCreate, match=str(os.getpid())),
        lock_folder(tmp_path),
    ):
        pytest.fail("went in")


def test_a_folder_that_cannot_be_made_is_not_locked(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CannotCreate, match=r"file.*: cannot be written"), lock_folder(path):
            pytest.fail("went in")


# --- small files


def test_a_text_is_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_text(path, "old é\n")
    seen = []
    rename = Path.rename

    def look(self, target):
        seen.append((path.read_text(encoding="utf-8"), self.read_text(encoding="utf-8")))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", look)
    write_text(path, "new\n")
    assert seen == [("old é\n", "new\n")]
    assert read_all(tmp_path) == {"report.json": "new\n"}


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(IOFailed, match=r"report.json: writing failed \(No space left on device\)"):
        write_text(path, "new")
    assert read_all(tmp_path) == {"report.json": "old"}
    with pytest.raises(IOFailed, match="No such file or directory"):
        write_text(tmp_path / "nowhere" / "x", "new")


def test_json_for_people_reads_back():
    value = {"b": ["é", 1.5, None], "a": {}}
    text = atomic.format_json(value)
    assert json.loads(text) == value
    assert text.startswith('{\n  "b": [')
    assert "é" in text
    assert text.endswith("}\n")


def test_hash_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert (
        atomic.hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
