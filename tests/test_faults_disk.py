"""A limit on the size of files, in the middle of a run: a save that fails costs nothing that was saved."""

import resource

import pytest
import transformers
from broken import train_by_stock
from faults import beside
from tiny import build_flags, hash_files, invent_talks, run_script, write_chats, write_config

import train
from firstwords.checkpoint import list_checkpoints, verify


class Stock:
    """The stock Trainer as a script."""

    __name__ = "stock_trainer"
    main = staticmethod(train_by_stock)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_chats(home / "data", invent_talks(40))
    write_config(home / "c.json")
    return home


def words(home, run):
    return build_flags(home / "data", run, home / "c.json", max_steps=8, save_steps=2, log_steps=1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@beside(train, Stock())
def test_a_limit_on_file_size_keeps_what_was_saved(home, tmp_path, monkeypatch, implementation, share):
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    step = transformers.Trainer.training_step

    def fill(self, *args, **options):
        if self.state.global_step == 4:
            whole = (run / "checkpoint-4" / "optimizer.pt").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(int(share * whole), 20_000), limits[1]))
        return step(self, *args, **options)

    monkeypatch.setattr(transformers.Trainer, "training_step", fill)
    try:
        code, errors = run_script(implementation, words(home, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 74
    assert "saving failed" in errors
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-4", "checkpoint-2"]
    for folder in list_checkpoints(run):
        verify(folder)
    log = (run / "train.log").read_text()
    assert "step 6: saving failed" in log
    assert "step 8/8  loss" in log
    monkeypatch.undo()
    assert run_script(implementation, words(home, run)) == (0, "")
    assert list(run.glob(".*")) == []


@beside(train, Stock())
def test_a_limit_that_is_there_from_the_start_is_refused(home, tmp_path, implementation):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        code, errors = run_script(implementation, words(home, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 74
    assert "this process may write 100,000 (ulimit -f)" in errors
    assert hash_files(tmp_path) == {}
