"""Checkpoints that are damaged, foreign, old or torn: only whole ones are chosen, counted and kept.

And stage B from stage A: a parent that is not there, not finished, or not of one piece is refused.
"""

import os
import re
import shutil

import pytest
import transformers
from faults import beside
from test_checkpoint import damage, stage
from tiny import (
    BYTES,
    build_flags,
    invent_talks,
    run_script,
    write_chats,
    write_config,
    write_store,
)
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

import train
from firstwords import atomic, checkpoint, opening
from firstwords.checkpoint import MANIFEST, find_checkpoint, find_resumable, list_checkpoints, publish, verify
from firstwords.errors import Damaged
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer

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


# --- 41, 42: stage B from stage A


def by_stock_loader(folder):
    """Take whatever the stock loader makes a model of, as a script of a few lines does."""
    return transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)


class StockInit:
    """A version of train.py that starts from what `by_stock_loader` gives, and asks nothing else."""

    __name__ = "stock_init"

    @staticmethod
    def main(argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "find_init", lambda folder, *_: folder)
            patch.setattr(checkpoint, "load_model", by_stock_loader)
            patch.setattr(opening, "check_parent", lambda *_: {})
            try:
                train.main(argv)
            except (OSError, ValueError, RuntimeError) as error:
                raise Damaged(str(error)) from None


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Data of both stages, and a finished run of stage A; beside it one of other weights and depth."""
    home = tmp_path_factory.mktemp("stages")
    store = write_store(home / "store", ["tea and birds " * 30] * 5, ["birds and tea " * 9])
    write_chats(home / "chats", invent_talks(20))
    for name, shape, seed in (("base", {}, 1), ("other", {}, 2), ("deep", {"n_layer": 2}, 1)):
        cfg = write_config(home / f"{name}.json", **shape)
        flags = {"max_steps": 2, "seed": seed, "no_assistant_only_loss": True}
        assert run_script(train, build_flags(store, home / name, cfg, **flags)) == (0, "")
    return home


def start_stage_b(implementation, stages, init, tmp_path):
    """Start stage B; return the exit code and what is said."""
    words = build_flags(stages / "chats", tmp_path / "run", None, init_model_dir=init, max_steps=1)
    return run_script(implementation, words)


def read_sha(folder):
    return checkpoint.read_manifest(folder)["files"]["model.safetensors"]["sha256"][:8]


def swap_tokenizer(base, stages):
    """Another tokenizer of the same size: two of its bytes have changed places."""
    values = [bytes([value]) for value in range(256)]
    values[65], values[66] = values[66], values[65]
    other = Tokenizer(BYTE_LEVEL, values)
    assert len(other) == len(BYTES)
    (base / checkpoint.MANIFEST).unlink()
    (base / checkpoint.COMPLETE).unlink()
    shutil.rmtree(base / "checkpoint-2")
    other.save(base, chat_template=CHAT_TEMPLATE)
    return 78, [other.hash[:8], BYTES.hash[:8]]


def swap_depth(base, stages):
    """The configuration of a deeper model, in a folder that has no manifest."""
    (base / checkpoint.MANIFEST).unlink()
    (base / checkpoint.COMPLETE).unlink()
    shutil.rmtree(base / "checkpoint-2")
    shutil.copyfile(stages / "deep" / "config.json", base / "config.json")
    return 78, ["it has 1 layers, not 2"]


def swap_sealed_depth(base, stages):
    """The same, where the manifest knows the configuration that was written."""
    shutil.copyfile(stages / "deep" / "config.json", base / "config.json")
    return 76, [f"{base}/config.json: is not the file that was written"]


def swap_weights(base, stages):
    """The weights of another run, of the same shape."""
    shutil.copyfile(stages / "other" / "model.safetensors", base / "model.safetensors")
    return 76, [read_sha(stages / "other"), read_sha(stages / "base")]


SWAPS = (swap_tokenizer, swap_depth, swap_sealed_depth, swap_weights)


@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.__name__)
@beside(train, StockInit())
def test_an_init_whose_parts_do_not_belong_together_is_refused(stages, tmp_path, implementation, swap):
    base = shutil.copytree(stages / "base", tmp_path / "base")
    expected, values = swap(base, stages)
    code, errors = start_stage_b(implementation, stages, base, tmp_path)
    assert code == expected
    assert [value for value in values if value not in errors] == []
    assert not (tmp_path / "run").exists()


def leave_unfinished(base):
    """A run that was stopped before its last step."""
    (base / checkpoint.COMPLETE).unlink()
    (base / checkpoint.MANIFEST).unlink()
    return base, 78, f"this run has not reached its end; let it finish, or name {base / 'checkpoint-2'}"


def mistype(base):
    return base.with_name("bsae"), 66, f"{base.with_name('bsae')}: is no folder; did you mean 'base'"


def leave_empty(base):
    folder = base.with_name("empty")
    folder.mkdir()
    return folder, 66, f"{folder}: holds no model"


def name_a_file(base):
    return base / "config.json", 66, "config.json: is no folder"


def link_to_itself(base):
    link = base.with_name("link")
    link.symlink_to(link)
    return link, 66, f"{link}: is no folder"


def name_of_the_hub(base):
    return "gpt2", 66, "gpt2: is no folder"


CASES = (leave_unfinished, mistype, leave_empty, name_a_file, link_to_itself, name_of_the_hub)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@beside(train, StockInit())
def test_an_init_that_is_no_finished_model_is_refused(stages, tmp_path, implementation, case):
    base = shutil.copytree(stages / "base", tmp_path / "base")
    init, expected, why = case(base)
    code, errors = start_stage_b(implementation, stages, init, tmp_path)
    assert (code, len(errors.splitlines())) == (expected, 1)
    assert why in errors
    assert not (tmp_path / "run").exists()
