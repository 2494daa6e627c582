"""What a run meets in the middle, and what may not have changed when it is gone on with."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from broken import train_by_stock
from faults import beside
from safetensors.torch import load_file
from tiny import build_flags, hash_files, hash_results, invent_talks, run_script, write_chats, write_config

import train
from firstwords import resume
from firstwords.checkpoint import list_checkpoints, read_manifest, verify
from firstwords.model import GPT2LMHeadModel


class Stock:
    """The stock Trainer as a script."""

    __name__ = "stock_trainer"
    main = staticmethod(train_by_stock)


class LastStepsAgain:
    """A version that trains a finished run's last steps once more."""

    __name__ = "last_steps_again"

    @staticmethod
    def main(argv):
        run = Path(argv[argv.index("--model_dir") + 1])
        if (run / "COMPLETE").is_file():
            (run / "COMPLETE").unlink()
            (run / "manifest.json").unlink()
            shutil.rmtree(list_checkpoints(run)[0])
        train.main(argv)


STOCK = Stock()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a config, and a finished run of 8 steps."""
    home = tmp_path_factory.mktemp("home")
    write_chats(home / "data", invent_talks(40))
    write_config(home / "c.json")
    assert run_script(train, words(home, home / "done")) == (0, "")
    return home


def words(home, run, **flags):
    quick = {"max_steps": 8, "save_steps": 2, "log_steps": 1}
    return build_flags(flags.pop("data_dir", home / "data"), run, home / "c.json", **quick | flags)


@beside(train, LastStepsAgain())
def test_a_finished_run_started_again_changes_nothing(home, tmp_path, implementation):
    run = tmp_path / "run"
    assert run_script(implementation, words(home, run))[0] == 0
    before = hash_files(run)
    assert run_script(implementation, words(home, run)) == (0, "")
    assert hash_files(run) == before


def poison_at(patch, step, what):
    """Spoil the weights, as a broken memory would, at each pass of the batch that step `step` trains on."""
    forward = transformers.GPT2LMHeadModel.forward
    seen = []

    def call(self, input_ids=None, **inputs):
        if self.training and len(seen) < step and not any(torch.equal(input_ids, ids) for ids in seen):
            seen.append(input_ids.clone())
        result = forward(self, input_ids=input_ids, **inputs)
        if self.training and len(seen) == step and torch.equal(input_ids, seen[-1]):
            result.loss = result.loss * what
        return result

    patch.setattr(transformers.GPT2LMHeadModel, "forward", call)
    own = GPT2LMHeadModel.__dict__.get("forward")
    if own is not None:

        def call_own(self, input_ids=None, **inputs):
            if self.training and len(seen) < step and not any(torch.equal(input_ids, ids) for ids in seen):
                seen.append(input_ids.clone())
            result = own(self, input_ids=input_ids, **inputs)
            if self.training and len(seen) == step and torch.equal(input_ids, seen[-1]):
                result.loss = result.loss * what
            return result

        patch.setattr(GPT2LMHeadModel, "forward", call_own)


@pytest.mark.parametrize("what", [math.nan, math.inf])
@beside(train, STOCK)
def test_nan_is_seen_at_its_step_and_never_saved(home, tmp_path, monkeypatch, implementation, what):
    run = tmp_path / "run"
    poison_at(monkeypatch, 6, what)
    code, errors = run_script(implementation, words(home, run))
    assert code == 70
    assert errors.startswith("error: step 6: ")
    assert (run / "bad-batch-6.json").is_file()
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-4", "checkpoint-2"]
    for folder in list_checkpoints(run):
        verify(folder)
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


@beside(train, STOCK)
def test_a_rollback_leaves_the_batch_out_and_is_gone_on_with(home, tmp_path, monkeypatch, implementation):
    run = tmp_path / "run"
    poison_at(monkeypatch, 6, math.nan)
    code, errors = run_script(implementation, words(home, run, on_nan="rollback"))
    assert code == 0
    assert errors.startswith("rollback 1 of 3: step 6: ")
    assert read_manifest(run)["skipped"] == [5]
    monkeypatch.undo()
    again = tmp_path / "again"
    for name in ("checkpoint-6",):
        shutil.copytree(run / name, again / name)
    assert run_script(implementation, words(home, again, on_nan="rollback")) == (0, "")
    whole, ours = hash_results(run), hash_results(again)
    assert {n: h for n, h in ours.items() if n != "bad-batch-6.json"} == {
        n: h for n, h in whole.items() if n != "bad-batch-6.json"
    }


@beside(train, STOCK)
def test_out_of_memory_ends_with_advice(home, tmp_path, monkeypatch, implementation):
    run, step = tmp_path / "run", transformers.Trainer.training_step

    def fail(self, *args, **options):
        if self.state.global_step == 4:
            torch.empty(1 << 60)
        return step(self, *args, **options)

    monkeypatch.setattr(transformers.Trainer, "training_step", fail)
    code, errors = run_script(implementation, words(home, run))
    assert code == 71
    assert "takes the same steps with" in errors
    assert list_checkpoints(run)[0].name == "checkpoint-4"
    monkeypatch.undo()
    assert run_script(implementation, words(home, run)) == (0, "")
    assert hash_results(run) == hash_results(home / "done")


def go_on(implementation, home, tmp_path, **flags):
    """Go on from step 4 of the finished run with other words."""
    run = tmp_path / "run"
    shutil.copytree(home / "done" / "checkpoint-6", run / "checkpoint-6")
    return run_script(implementation, words(home, run, **flags))


@beside(train, STOCK)
def test_changed_flags_are_named(home, tmp_path, implementation):
    code, errors = go_on(implementation, home, tmp_path, lr=0.5)
    assert code == 78
    assert "lr was 0.0006, is 0.5" in errors


@pytest.mark.parametrize("split", ["train", "val"])
@beside(train, STOCK)
def test_changed_data_are_named(home, tmp_path, implementation, split):
    shutil.copytree(home / "data", tmp_path / "data")
    path = tmp_path / "data" / f"{split}_tokenized.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    code, errors = go_on(implementation, home, tmp_path, data_dir=tmp_path / "data")
    assert code == 78
    assert ("val_data was" if split == "val" else " (data was") in errors


@beside(train, STOCK)
def test_changed_versions_and_tokenizers_are_named(home, tmp_path, monkeypatch, implementation):
    monkeypatch.setattr(resume, "version", lambda name: "1.0")
    code, errors = go_on(implementation, home, tmp_path)
    assert code == 78
    assert f"torch was {torch.__version__.split('+')[0]}" in errors
    assert "is 1.0" in errors
