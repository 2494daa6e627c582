"""Disks that are full, limited or read-only, for real: a save that fails costs nothing that was saved.

The small disk is a tmpfs in a mount namespace of the nursery's. Where the system gives none, a limit on the
size of files stands for it.
"""

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import broken
import pytest
from broken import before_publishing, fill_disk, in_step, limit_files, ours, take_writing
from faults import beside
from nursery import Nursery
from tiny import build_flags, hash_files, hash_weights, invent_talks, write_chats, write_config

from firstwords.checkpoint import list_checkpoints, verify

SIZES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97)  # shares of a checkpoint
OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")
DISK_MB = 48


def has_mounts(folder):
    """Tell whether a process may have a disk of its own here."""
    command = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A nursery whose children see a small disk; the disk as they name it, and as it is seen from here."""
    folder, words = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("nursery")
    mount = f'mount -t tmpfs -o size={DISK_MB}m tmpfs {folder} && exec "$@"'
    is_own = has_mounts(folder)
    nursery = Nursery(words, (*OWN_MOUNTS, "sh", "-c", mount, "sh") if is_own else ())
    yield nursery, folder, Path(f"/proc/{nursery.process.pid}/root{folder}") if is_own else folder
    nursery.close()


@pytest.fixture(scope="module")
def nursery(disk):
    return disk[0]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that gives the words of a run of 8 steps that saves every second one."""
    home = tmp_path_factory.mktemp("home")
    data, cfg = write_chats(home / "data", invent_talks(40)), write_config(home / "c.json")
    return lambda run, **flags: build_flags(
        data, run, cfg, **{"max_steps": 8, "save_steps": 2, "log_steps": 1, **flags}
    )


@pytest.fixture(scope="module")
def whole(nursery, build, tmp_path_factory):
    """Of the run that nothing happened to: the hashes, the bytes of a checkpoint and of its largest file."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert nursery.run(build(run)) == (0, "")
    sizes = [path.stat().st_size for path in (run / "checkpoint-8").iterdir()]
    return hash_weights(run, 8), sum(sizes), max(sizes)


def check_what_was_saved(run, steps):
    """These checkpoints are there, each whole, and no half of another."""
    assert [folder.name for folder in list_checkpoints(run)] == [f"checkpoint-{step}" for step in steps]
    for folder in list_checkpoints(run):
        verify(folder)
    assert list(run.glob(".staging*")) == []


def check_goes_on(disk, words, run, implementation, whole):
    """When there is room again, the run ends as the one that nothing happened to."""
    nursery, _, seen = disk
    (seen / "of-others").unlink(missing_ok=True)
    assert nursery.run(words, implementation) == (0, "")
    assert hash_weights(seen / run, 8) == whole[0]


@contextmanager
def given_back(seen, run):
    """Leave the small disk empty for the next test."""
    try:
        yield
    finally:
        (seen / "of-others").unlink(missing_ok=True)
        shutil.rmtree(seen / run, ignore_errors=True)


# --- 9: the disk is full


@pytest.mark.parametrize("share", SIZES)
@beside(ours, broken.stock_trainer)
def test_a_disk_of_any_size_keeps_what_was_saved(disk, build, whole, implementation, share):
    nursery, inside, seen = disk
    left, run = int(share * whole[1]), f"run-{implementation.__name__}-{share}"
    fill = ("fill_disk", inside, left) if inside != seen else ("limit_files", max(left // 2, 20_000))
    with given_back(seen, run):
        code, errors = nursery.run(build(inside / run), implementation, (in_step, 4, *fill))
        assert code == 74
        assert "saving failed" in errors
        check_what_was_saved(seen / run, (4, 2))
        check_goes_on(disk, build(inside / run), run, implementation, whole)


@beside(ours, broken.stock_trainer)
def test_a_disk_that_fills_after_the_last_save_ends_with_74(disk, build, whole, implementation):
    nursery, inside, seen = disk
    run = f"last-{implementation.__name__}"
    fill = ("fill_disk", inside, 20_000) if inside != seen else ("limit_files", 20_000)
    after = (before_publishing, *fill)
    with given_back(seen, run):
        code, errors = nursery.run(build(inside / run), implementation, after)
        assert (code, errors.count("\n")) == (74, 1)
        check_what_was_saved(seen / run, (8, 6))
        check_goes_on(disk, build(inside / run), run, implementation, whole)


@beside(ours, broken.stock_trainer)
def test_a_disk_that_is_full_from_the_start_is_refused(disk, build, implementation):
    nursery, inside, seen = disk
    run = f"full-{implementation.__name__}"
    fill = (fill_disk, inside, 1_000_000) if inside != seen else (limit_files, 100_000)
    try:
        code, errors = nursery.run(build(inside / run), implementation, fill)
    finally:
        (seen / "of-others").unlink(missing_ok=True)
    assert code == 74
    assert (" are free; free some" if inside != seen else "may write 100,000 (ulimit -f)") in errors
    assert not (seen / run).exists()


# --- 10: a limit on the size of files


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
@beside(ours, broken.stock_trainer)
def test_a_limit_on_file_size_keeps_what_was_saved(nursery, build, whole, tmp_path, implementation, share):
    run, limit = tmp_path / "run", (in_step, 4, "limit_files", max(int(share * whole[2]), 20_000))
    code, errors = nursery.run(build(run), implementation, limit)
    assert code == 74
    assert "saving failed" in errors
    check_what_was_saved(run, (4, 2))
    log = (run / "train.log").read_text()
    assert "step 6: saving failed" in log
    assert "step 8/8  loss" in log
    assert nursery.run(build(run), implementation) == (0, "")
    assert list(run.glob(".*")) == []


@beside(ours, broken.stock_trainer)
def test_a_limit_that_is_there_from_the_start_is_refused(nursery, build, tmp_path, implementation):
    code, errors = nursery.run(build(tmp_path / "run"), implementation, (limit_files, 100_000))
    assert code == 74
    assert "this process may write 100,000 (ulimit -f)" in errors
    assert hash_files(tmp_path) == {}


# --- 11: a folder that cannot be written


@beside(ours, broken.stock_trainer)
def test_a_folder_that_cannot_be_written_ends_the_run(nursery, build, whole, tmp_path, implementation):
    run = tmp_path / "run"
    for folder in (tmp_path, run):  # where the run is not there yet, and where it is
        folder.mkdir(exist_ok=True)
        code, errors = nursery.run(build(run), implementation, (take_writing, folder))
        folder.chmod(0o755)
        assert code == 73
        assert f"{run}: cannot be written (Permission denied); name another" in errors
        assert hash_files(tmp_path) == {}
    code, errors = nursery.run(build(run), implementation, (in_step, 4, "take_writing", run))
    run.chmod(0o755)
    assert code == 74
    assert "saving failed" in errors
    check_what_was_saved(run, (4, 2))
    assert nursery.run(build(run), implementation) == (0, "")
    assert hash_weights(run, 8) == whole[0]
