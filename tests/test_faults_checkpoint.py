"""Checkpoints that are damaged, foreign, old or torn: only whole ones are chosen, counted and kept."""

import os
import re
import shutil

import pytest
from faults import beside
from test_checkpoint import damage, stage
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from firstwords import atomic, checkpoint
from firstwords.checkpoint import MANIFEST, find_checkpoint, find_resumable, list_checkpoints, publish, verify
from firstwords.errors import Damaged

FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"),
    *("config.json", "tokenizer.json", MANIFEST),
)
DAMAGES = ("missing", "empty", "cut", "zeroed", "flipped")


@pytest.fixture
def run(tmp_path):
    """A run with whole checkpoints of the steps 5, 9 and 10."""
    for step in (9, 10, 5):
        stage(tmp_path / "run" / f"checkpoint-{step}", step)
    return tmp_path / "run"


def by_sizes(run):
    """Look for the newest whose files have the right sizes: what a bad disk changes is not seen."""
    for folder in list_checkpoints(run):
        files = checkpoint._read_json(folder / MANIFEST)["files"]
        if all((folder / name).stat().st_size == file["bytes"] for name, file in files.items()):
            return folder, []
    return None, []


def by_highest_number(run):
    """Take the highest number, as the stock Trainer does."""
    return get_last_checkpoint(run), []


@beside(find_resumable, by_sizes, by_highest_number)
def test_damage_of_every_kind_is_seen_in_every_file(run, implementation):
    for name in FILES:
        for how in DAMAGES:
            shutil.rmtree(run / "checkpoint-10")
            damage(stage(run / "checkpoint-10", 10) / name, how)
            folder, passed_over = implementation(run)
            assert folder == run / "checkpoint-9", f"{name} {how}"
            assert str(run / "checkpoint-10") in passed_over[0]


@beside(find_checkpoint, by_highest_number)
def test_a_damaged_checkpoint_is_no_chat(run, implementation):
    for name in FILES:
        damage(run / "checkpoint-10" / name, "flipped")
        assert implementation(run) == run / "checkpoint-9"
    damage(run / "checkpoint-9" / "model.safetensors", "flipped")
    with pytest.raises(Damaged, match="checkpoint-9/model.safetensors: is not the file that was written"):
        implementation(run / "checkpoint-9")


def by_file_time(staging, run, *, keep):
    """Prune as the stock Trainer does."""
    staging.rename(run / staging.name)
    rotate_checkpoints(output_dir=run, save_total_limit=keep, use_mtime=True)


@beside(publish, by_file_time)
def test_pruning_goes_by_step_whatever_the_clock_says(run, implementation):
    for place, jump in enumerate((0, 4e9, -2 * 86400, 1e9)):
        step = 11 + place
        for folder in list_checkpoints(run):
            os.utime(folder, (2e9 - jump - checkpoint.read_step(folder),) * 2)
        implementation(stage(run / ".staging-1" / f"checkpoint-{step}", step), run, keep=2)
        assert [checkpoint.read_step(folder) for folder in list_checkpoints(run)] == [step, step - 1]


@beside(find_resumable, by_highest_number)
def test_what_only_looks_like_a_checkpoint(run, tmp_path, implementation):
    (run / "checkpoint-99").mkdir()
    stage(run / "checkpoint-abc", 98)
    (run / "checkpoint-97").write_text("a file")
    (run / "checkpoint-96").symlink_to(stage(tmp_path / "elsewhere", 96))
    before = sorted(path.name for path in run.iterdir())
    folder, passed_over = implementation(run)
    assert folder == run / "checkpoint-10"
    assert [re.findall(r"-(\d+):", reason)[0] for reason in passed_over] == ["99", "97", "96"]
    publish(stage(run / ".staging-1" / "checkpoint-11", 11), run, keep=2)
    gone = {"checkpoint-5", "checkpoint-9"}
    assert {path.name for path in run.iterdir()} - {".staging-1"} == {*before, "checkpoint-11"} - gone


class Killed(BaseException):
    """Stands for a kill between two calls."""


def kill_at(patch, number):
    """Raise `Killed` at the call `number` (from 1) of what changes names on the disk."""
    left = [number]
    for owner, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "replace")):
        original = getattr(owner, name)

        def call(*args, original=original, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*args, **options)

        patch.setattr(owner, name, call)


def file_by_file(staging, run, *, keep):
    """Save over what is there, and delete in place."""
    target = run / staging.name
    target.mkdir(exist_ok=True)
    for path in sorted(staging.iterdir(), reverse=True):
        os.rename(path, target / path.name)
    for folder in list_checkpoints(run)[keep:]:
        shutil.rmtree(folder)


def check_publishing_killed(implementation, run, step):
    """Kill a save of a step at each of its calls: whatever has a manifest is whole, two are good."""
    for number in range(1, 40):
        staging = stage(run / f".staging-1-{number}" / f"checkpoint-{step}", step)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                implementation(staging, run, keep=2)
            except Killed:
                pass
            else:
                return number
        for folder in list_checkpoints(run):
            verify(folder)
        assert len(list_checkpoints(run)) >= 2
        atomic.sweep_leftovers(run)
    raise AssertionError("it never ended")


@beside(publish, file_by_file)
def test_a_step_saved_again_is_never_a_mixture(run, implementation):
    (run / "checkpoint-10" / "model.safetensors").write_text("of another life")
    checkpoint.write_manifest(run / "checkpoint-10", {"step": 10})
    check_publishing_killed(implementation, run, 10)
    assert (run / "checkpoint-10" / "model.safetensors").read_text() != "of another life"


@beside(publish, file_by_file)
def test_pruning_killed_anywhere_leaves_whole_checkpoints(run, implementation):
    assert check_publishing_killed(implementation, run, 11) >= 3
