"""Signals that are really sent, and readers that really go: the step ends, the state is saved, exit 75."""

import os
import select
import signal

import broken
import pytest
from broken import PHASES, ignore_hangup, ours, signal_in
from faults import beside
from tiny import build_flags, hash_weights, invent_talks, write_chats, write_config

from firstwords.checkpoint import is_complete, list_checkpoints, read_step, verify

TERM, INT, HUP = (str(int(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that gives the words of a run of 8 steps that saves and evaluates every second one."""
    home = tmp_path_factory.mktemp("home")
    data = write_chats(home / "data", invent_talks(20))
    cfg = write_config(home / "c.json", resid_pdrop=0.1)
    return lambda run: build_flags(data, run, cfg, max_steps=8, save_steps=2, eval_steps=2, log_steps=1)


@pytest.fixture(scope="module")
def whole(nursery, build, tmp_path_factory):
    """The files of the run that nobody stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert nursery.run(build(run)) == (0, "")
    return hash_weights(run, 8)


@pytest.mark.parametrize("phase", PHASES)
@beside(ours, broken.stock_trainer)
def test_a_signal_in_any_phase_saves_and_ends_with_75(nursery, build, whole, tmp_path, implementation, phase):
    for number in (TERM, INT, HUP):
        run = tmp_path / f"run-{number}"
        code, errors = nursery.run(build(run), implementation, (signal_in, phase, number))
        assert code == 75
        assert f"stopped by {signal.Signals(int(number)).name}" in errors
        assert "the same command goes on" in errors
        assert not is_complete(run)
        if phase == "start-up":
            assert not run.exists()
        else:
            newest = list_checkpoints(run)[0]
            verify(newest)
            logged = [line for line in (run / "train.log").read_text().splitlines() if "  loss " in line]
            assert len(logged) == read_step(newest), "not one step is lost"
        assert nursery.run(build(run), implementation) == (0, "")
        assert hash_weights(run, 8) == whole


@beside(ours, broken.second_signal_ends)
def test_a_second_sigterm_changes_nothing_and_a_kill_leaves_the_last(
    nursery, build, whole, tmp_path, implementation
):
    words = build(tmp_path / "run")
    assert nursery.run(words, implementation, (signal_in, "forward", TERM, TERM))[0] == 75
    newest = list_checkpoints(tmp_path / "run")[0]
    killed = (signal_in, "save", TERM, str(int(signal.SIGKILL)))
    assert nursery.run(words, implementation, killed)[0] == -signal.SIGKILL
    verify(newest)
    assert nursery.run(words, implementation) == (0, "")
    assert hash_weights(tmp_path / "run", 8) == whole


@beside(ours, broken.second_ctrl_c_waits)
def test_the_second_ctrl_c_stops_at_once(nursery, build, whole, tmp_path, implementation):
    words = build(tmp_path / "run")
    code, errors = nursery.run(words, implementation, (signal_in, "evaluation", INT, INT))
    assert (code, errors) == (130, "error: stopped by Ctrl-C\n")
    newest = list_checkpoints(tmp_path / "run")[0]
    assert newest.name == "checkpoint-2"
    verify(newest)
    assert nursery.run(words, implementation) == (0, "")
    assert hash_weights(tmp_path / "run", 8) == whole


@beside(ours, broken.hangup_always_caught)
def test_nohup_keeps_its_meaning(nursery, build, whole, tmp_path, implementation):
    ignored = (ignore_hangup, implementation, (signal_in, "forward", HUP))
    assert nursery.run(build(tmp_path / "run"), *ignored) == (0, "")
    assert hash_weights(tmp_path / "run", 8) == whole


@beside(ours, broken.prints_to_the_end)
def test_training_outlives_its_reader(nursery, build, whole, tmp_path, implementation):
    full = nursery.start(build(tmp_path / "full"), implementation, out="/dev/full", err="/dev/full")
    assert full.wait() == 0
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    piped = nursery.start(build(tmp_path / "piped"), implementation, out=pipe)
    select.select([reader], [], [])
    os.close(reader)
    assert piped.wait() == 0
    for name in ("full", "piped"):
        assert hash_weights(tmp_path / name, 8) == whole
        log = (tmp_path / name / "train.log").read_text()
        assert all(f"step {step}/8  loss" in log for step in range(1, 9))
