"""What ends a run: steps, hours by a clock that the test turns, the files STOP and COOLDOWN."""

import json
import re
from types import SimpleNamespace

import pytest
from tiny import build_flags, hash_files, hash_results, invent_talks, run_script, write_chats, write_config

import train
from firstwords import checkpoint, pace
from firstwords.checkpoint import is_complete, list_checkpoints, read_manifest
from firstwords.errors import IOFailed
from firstwords.pace import HORIZON, Cooldown, Pace
from firstwords.trainer import StopOnSignal

pytestmark = pytest.mark.usefixtures("no_matmul")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_config(home / "c.json", resid_pdrop=0.1)
    write_chats(home / "chats", invent_talks(20))
    return home


def go(home, run, **flags):
    """Run train.py with the rate constant after one step, unless `flags` say otherwise."""
    quick = {"log_steps": 1, "lr_scheduler_type": "constant", "min_lr_ratio": None, "save_steps": 5}
    return run_script(train, build_flags(home / "chats", run, home / "c.json", **quick | flags))


def touch_at(monkeypatch, run, *, interrupt=None, **files):
    """Make each file just before the step (from 1) that is given with it; interrupt the run before one."""

    def on_step_begin(self, args, state, control, **kwargs):
        for name, step in files.items():
            if state.global_step + 1 == step:
                (run / name).touch()
        if state.global_step + 1 == interrupt:
            raise KeyboardInterrupt

    monkeypatch.setattr(StopOnSignal, "on_step_begin", on_step_begin)


def read_rates(run):
    """Return the rate of each step as train.log tells it."""
    lines = [line for line in (run / "train.log").read_text().splitlines() if "  lr " in line]
    return [float(line.split("  lr ")[1].split()[0]) for line in lines]


# --- STOP


def test_the_file_stop_saves_and_ends_with_75(home, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert go(home, tmp_path / "whole", max_steps=6) == (0, "")
    touch_at(monkeypatch, run, STOP=3)
    code, errors = go(home, run, max_steps=6)
    assert (code, "stopped by STOP and saved at step 3 of 6" in errors) == (75, True)
    assert not (run / "STOP").exists()
    monkeypatch.undo()
    assert go(home, run, max_steps=6) == (0, "")
    assert hash_results(run) == hash_results(tmp_path / "whole")


def test_a_file_in_the_last_step_is_cleared_away(home, tmp_path, monkeypatch):
    touch_at(monkeypatch, tmp_path / "run", COOLDOWN=3, STOP=3)
    assert go(home, tmp_path / "run", max_steps=3) == (0, "")
    assert is_complete(tmp_path / "run")
    assert not {"STOP", "COOLDOWN"} & {path.name for path in (tmp_path / "run").iterdir()}


# --- COOLDOWN


def test_a_cooldown_falls_in_a_straight_line_and_completes_the_run(home, tmp_path, monkeypatch):
    run = tmp_path / "run"
    touch_at(monkeypatch, run, COOLDOWN=6)
    assert go(home, run, max_steps=99, decay_steps=0.5, lr=0.001) == (0, "")
    assert read_rates(run) == pytest.approx([0.001] * 7 + [0.001 * 2 / 3, 0.001 / 3], rel=1e-2)
    assert is_complete(run)
    assert not (run / "COOLDOWN").exists()
    manifest = read_manifest(run)
    assert (manifest["step"], manifest["max_steps"]) == (9, 9)
    assert manifest["cooldown"] == {"begin": 6, "steps": 3, "top": 1.0}
    assert "COOLDOWN: the rate falls from here on, the run ends at step 9" in (run / "train.log").read_text()
    before = hash_files(run)
    assert go(home, run, max_steps=99, decay_steps=0.5, lr=0.001) == (0, "")
    assert hash_files(run) == before


@pytest.mark.parametrize("stop", [7, 6])
def test_a_cooldown_goes_on_after_a_stop_bit_for_bit(home, tmp_path, monkeypatch, stop):
    flags = {"max_steps": 99, "decay_steps": 0.5, "lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}
    touch_at(monkeypatch, tmp_path / "whole", COOLDOWN=6)
    assert go(home, tmp_path / "whole", **flags) == (0, "")
    run = tmp_path / "run"
    touch_at(monkeypatch, run, COOLDOWN=6, STOP=stop)
    assert go(home, run, **flags)[0] == 75
    monkeypatch.undo()
    assert go(home, run, **flags) == (0, "")
    ours, theirs = hash_results(run), hash_results(tmp_path / "whole")
    names = [name for name in theirs if "/" not in name or name.startswith("checkpoint-9")]
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert read_rates(run) == read_rates(tmp_path / "whole")


def test_a_kill_right_after_a_cooldown_began_does_not_undo_it(home, tmp_path, monkeypatch):
    run = tmp_path / "run"
    touch_at(monkeypatch, run, interrupt=8, COOLDOWN=6)
    assert go(home, run, max_steps=99, decay_steps=4, save_steps=50)[0] == 130
    monkeypatch.undo()
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-6"]
    assert go(home, run, max_steps=99, decay_steps=4, save_steps=50) == (0, "")
    assert read_manifest(run)["step"] == 10


def test_a_cooldown_whose_save_failed_is_still_asked_for_after_a_kill(home, tmp_path, monkeypatch):
    run = tmp_path / "run"
    publish = checkpoint.publish

    def fail_at_6(staging, *args, **kwargs):
        if staging.name == "checkpoint-6":
            raise IOFailed("no space left on device")
        publish(staging, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "publish", fail_at_6)
    touch_at(monkeypatch, run, interrupt=8, COOLDOWN=6)
    assert go(home, run, max_steps=99, decay_steps=4)[0] == 130
    monkeypatch.undo()
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-5"]
    assert (run / "COOLDOWN").exists()
    assert go(home, run, max_steps=99, decay_steps=4) == (0, "")
    assert read_manifest(run)["step"] == 10
    assert not (run / "COOLDOWN").exists()


@pytest.mark.parametrize(
    ("decay", "step", "steps"), [(0.2, 100, 20), (0.2, 1, 1), (30, 100, 30), (0.9, 100, 60), (500, 100, 60)]
)
def test_a_cooldown_never_ends_behind_the_end_there_was(decay, step, steps):
    ours = Pace(160, decay_steps=decay)
    ours.bend(lambda step: 0.5)
    assert ours.begin_cooldown(step) == Cooldown(step, min(steps, 160 - step), 0.5)
    assert ours.find_end(step) == step + min(steps, 160 - step)


def test_what_is_foreseen_of_a_resumed_run_ends_with_its_cooldown(home, tmp_path, monkeypatch, capsys):
    run, flags = tmp_path / "run", {"max_steps": 99, "decay_steps": 4}
    touch_at(monkeypatch, run, COOLDOWN=6, STOP=8)
    assert go(home, run, **flags)[0] == 75
    monkeypatch.undo()
    capsys.readouterr()
    assert go(home, run, preflight=True, **flags) == (0, "")
    assert "  steps       10, 8 of them done\n" in capsys.readouterr().out
    assert go(home, run, **flags) == (0, "")
    assert "; 10 steps of " in capsys.readouterr().out


# --- hours


class Clock:
    """A clock that each step turns on by 0.1 hours."""

    def __init__(self, monkeypatch):
        self.hours = 5.0
        monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: self.hours * 3600))
        monkeypatch.setattr(
            StopOnSignal, "on_step_begin", lambda _, *args, **kwargs: self.turn(*args, **kwargs)
        )

    def turn(self, args, state, control, **kwargs):
        self.hours += 0.1


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


HOURS = {"max_steps": None, "hours": 0.999, "lr": 0.001, "warmup_steps": 0.2, "lr_scheduler_type": "linear"}


def test_hours_are_trained_and_the_schedule_ends_with_them(home, tmp_path, clock):
    assert go(home, tmp_path / "run", **HOURS) == (0, "")
    falling = [0.001 * (0.999 - 0.1 * step) / 0.999 / 0.8 for step in range(2, 10)]
    assert read_rates(tmp_path / "run") == pytest.approx([0, 0.001 * 0.1 / 0.999 / 0.2, *falling], rel=1e-2)
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["step"], manifest["max_steps"]) == (10, 10)
    assert manifest["hours_spent"] == pytest.approx(1.0)
    assert is_complete(tmp_path / "run")
    assert "hours_spent" not in manifest["compare"]


def test_hours_of_earlier_lives_count_and_the_time_between_does_not(home, tmp_path, clock, capsys):
    assert go(home, tmp_path / "whole", **HOURS) == (0, "")
    run = tmp_path / "run"
    turn = clock.turn

    def stop_too(args, state, control, **kwargs):
        turn(args, state, control)
        if state.global_step + 1 == 4:
            (run / "STOP").touch()

    clock.turn = stop_too
    assert go(home, run, **HOURS)[0] == 75
    clock.turn = turn
    clock.hours += 700
    capsys.readouterr()
    assert go(home, run, preflight=True, **HOURS) == (0, "")
    assert re.search(r"  steps       about [\d,]+ in 0.599 hours after 4\n", capsys.readouterr().out)
    assert read_manifest(list_checkpoints(run)[0])["hours_spent"] == pytest.approx(0.4)
    assert go(home, run, **HOURS) == (0, "")
    assert read_rates(run) == read_rates(tmp_path / "whole")
    ours, theirs = hash_results(run), hash_results(tmp_path / "whole")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    before = hash_files(run)
    assert go(home, run, **HOURS) == (0, "")
    assert hash_files(run) == before
    assert go(home, run, **HOURS | {"hours": 2.0})[0] == 78
    code, errors = go(home, run, **HOURS | {"hours": 2.0, "allow_change": "hours"})
    assert (code, f"--hours 2: the run in {run} is finished at step 10" in errors) == (78, True), errors
    assert hash_files(run) == before


def test_a_cooldown_within_hours_goes_by_steps(home, tmp_path, clock):
    run, turn = tmp_path / "run", clock.turn

    def cool_too(args, state, control, **kwargs):
        turn(args, state, control)
        if state.global_step + 1 == 4:
            (run / "COOLDOWN").touch()

    clock.turn = cool_too
    assert go(home, run, **HOURS | {"decay_steps": 0.5, "lr_scheduler_type": "constant"}) == (0, "")
    assert read_rates(run) == pytest.approx([0.001] * 5 + [0.0005])


def test_the_last_step_is_an_estimate_until_it_is_there():
    ours = Pace(HORIZON, hours=2.0)
    assert ours.find_end(0) == HORIZON
    ours.hours_spent = 0.5
    assert ours.find_end(100) == 400
    ours.hours_spent = 1.999
    assert ours.find_end(100) == 101
    ours.hours_spent = 2.0
    assert ours.find_end(100) == 100


def test_hours_that_are_spent_are_spent_after_a_resume_too():
    ours, again = Pace(HORIZON, hours=1e-7), Pace(HORIZON, hours=1e-7)
    ours.hours_spent = 1e-7
    again.resume(json.loads(json.dumps(ours.describe())))
    assert ours.find_end(3) == again.find_end(3) == 3


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"hours": 0}, "--hours: is 0.0; give hours"),
        ({"hours": "nan"}, "--hours: is nan; give hours"),
        ({"hours": 1, "max_steps": 5}, "give either --max_steps or --epochs or --hours"),
        ({"hours": 1, "warmup_steps": 100}, "--warmup_steps: is 100 steps, but --hours does not know"),
        (
            {"hours": 1, "decay_steps": 9, "lr_scheduler_type": "warmup_stable_decay"},
            "--decay_steps: is 9 st",
        ),
        ({"max_steps": 5, "lr_scheduler_type": "greedy"}, "is no function of the step"),
    ],
)
def test_what_hours_cannot_mean_is_refused(home, tmp_path, flags, why):
    code, errors = go(home, tmp_path / "run", **{"max_steps": None, **flags})
    assert (code, why in errors) == (2, True), errors
    assert not (tmp_path / "run").exists()
