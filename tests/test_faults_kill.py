"""Real processes that are really killed: the same command goes on, to the same bytes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import broken
import pytest
import torch
from broken import kill_at_write, kill_before, ours, wait_at_step
from faults import beside
from nursery import ALONE, ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_flags, hash_results, invent_talks, write_chats, write_config

from firstwords.checkpoint import is_complete, list_checkpoints, verify

NUM_STEPS = 40  # of a run that is killed again and again
LINE = re.compile(r"step (\d+)/\d+  (loss .*?)  tok/s .*  left \S+")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that gives the words of a run with dropout, logged at every step."""
    home = tmp_path_factory.mktemp("home")
    data = write_chats(home / "data", invent_talks(40, seed=1))
    cfg = write_config(home / "c.json", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)

    def build(run, **flags):
        return build_flags(
            data, run, **{"cfg": cfg, "save_steps": 2, "log_steps": 1, "grad_accum": 2, **flags}
        )

    return build


def is_good(folder):
    """Tell whether every part of a checkpoint can be read: what any trainer needs to go on."""
    try:
        load_file(folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(folder / name, weights_only=False)
        return (folder / "trainer_state.json").read_text().rstrip().endswith("}")
    except Exception:
        return False


def list_good(run):
    """Return the steps of the good checkpoints."""
    names = run.glob("checkpoint-*") if run.is_dir() else []
    return sorted(int(p.name.split("-")[1]) for p in names if p.name.split("-")[1].isdigit() and is_good(p))


def check_log(run):
    """No step was ever logged with two different figures, over all lives."""
    figures = defaultdict(set)
    for line in (run / "train.log").read_text().splitlines():
        if match := LINE.fullmatch(line):
            figures[int(match[1])].add(match[2])
    assert figures
    assert {step: found for step, found in figures.items() if len(found) > 1} == {}


# --- 1: at random moments


def start_whole(words):
    """Start train.py as a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ALONE, **quiet)


def kill_whole(words, run, pick):
    """Let a process of its own come to its first step, kill it a moment later."""
    log = run / "train.log"
    before = log.stat().st_size if log.is_file() else 0
    process = start_whole(words)
    while process.poll() is None and not (log.is_file() and log.stat().st_size > before):
        time.sleep(0.005)
    time.sleep(pick.uniform(0, 0.5))
    process.kill()
    return process.wait() == -signal.SIGKILL


def kill_forked(nursery, words, implementation, pick, seconds):
    """Start a child and kill it a random moment later, in its start-up or in training."""
    child = nursery.start(words, implementation)
    time.sleep(pick.uniform(0.02, seconds))
    child.send(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


def check_random_kills(nursery, build, folder, implementation, lanes, seed):
    """Kill the runs of a folder again and again; each ends in the bytes of the one that nobody killed.

    Args:
        lanes: the forked and the whole processes that are killed, of each line of runs side by side.
    """
    begin = time.monotonic()
    assert nursery.run(build(folder / "whole", max_steps=NUM_STEPS), implementation) == (0, "")
    seconds = (time.monotonic() - begin) / 2
    expected = hash_results(folder / "whole")

    def kill_in(lane):
        """Kill the runs of one line, until as many kills as asked for have hit."""
        pick, (num_forked, num_whole) = random.Random(seed + lane), lanes[lane]
        plan, kills, count = [True] * num_whole + [False] * num_forked, 0, 0
        pick.shuffle(plan)
        while plan:
            run, count = folder / f"run-{lane}-{count}", count + 1
            words = build(run, max_steps=NUM_STEPS)
            while plan and not is_complete(run):
                is_whole = plan.pop()
                killed = (
                    kill_whole(words, run, pick)
                    if is_whole
                    else kill_forked(nursery, words, implementation, pick, seconds)
                )
                kills += killed
                plan += [] if killed else [is_whole]  # it had come to its end before
                for checkpoint in list_checkpoints(run):
                    verify(checkpoint)
            assert nursery.run(words, implementation)[0] == 0, "it needs a human"
            assert hash_results(run) == expected
            check_log(run)
        return kills

    with ThreadPoolExecutor(len(lanes)) as pool:
        kills = list(pool.map(kill_in, range(len(lanes))))
    assert kills == [sum(lane) for lane in lanes]


@beside(ours, broken.chance_forgotten, broken.stock_trainer)
def test_random_kills_end_in_the_same_bytes(nursery, build, tmp_path, implementation):
    lanes = [(20, 5), (20, 5)] if implementation is ours else [(8, 0)]
    check_random_kills(nursery, build, tmp_path, implementation, lanes, seed=5)


@pytest.mark.slow
def test_500_random_kills(nursery, build, tmp_path):
    check_random_kills(nursery, build, tmp_path, ours, [(225, 25), (225, 25)], seed=6)


# --- 2: at every write


def check_kills_at_writes(nursery, build, folder, implementation):
    """Each life is killed one write later in its save; two checkpoints are good all the time.

    Returns:
        the writes of a save, and in how many lives the save had landed.
    """
    run, words = folder / "run", build(folder / "run", max_steps=200, save_steps=1, grad_accum=1)
    newest, landed, code, number, num_saves = 0, 0, -signal.SIGKILL, 0, 2
    while code == -signal.SIGKILL:
        number += 1
        code, errors = nursery.run(words, implementation, (kill_at_write, number, num_saves))
        good, num_saves = list_good(run), 0
        assert code in (-signal.SIGKILL, 42), errors
        assert len(good) >= 2, f"write {number}: {good}"
        assert good[-1] >= newest, f"write {number}: {newest} is gone, {good}"
        landed += good[-1] > newest
        newest = good[-1]
    return number, landed


@beside(ours, broken.stock_trainer)
def test_a_kill_at_any_write_loses_no_checkpoint(nursery, build, tmp_path, implementation):
    number, landed = check_kills_at_writes(nursery, build, tmp_path, implementation)
    assert number > 15
    assert landed > 3


# --- 12: two at once


@beside(ours, broken.no_lock)
def test_two_runs_in_one_folder(nursery, build, tmp_path, implementation):
    words, marker = build(tmp_path / "run", max_steps=6), tmp_path / "marker"
    first = nursery.start(words, implementation, (wait_at_step, 4, marker))
    while not marker.exists():
        time.sleep(0.01)
    try:
        code, errors = nursery.run(words, implementation)
        assert code == 73
        assert f"process {first.pid} is writing here; wait for it" in errors
    finally:
        first.send(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert nursery.run(words, implementation) == (0, ""), "the lock died with its owner"
    assert not (tmp_path / "run" / ".lock").exists()


# --- 23: TensorBoard


@beside(ours, broken.events_not_purged)
def test_tensorboard_has_every_step_once(nursery, build, tmp_path, implementation):
    words = build(tmp_path / "run", max_steps=12, save_steps=3)
    for step in (5, 8, 11):
        marker = tmp_path / f"marker-{step}"
        child = nursery.start(words, implementation, (wait_at_step, step, marker))
        while not marker.exists():
            time.sleep(0.01)
        child.send(signal.SIGKILL)
        child.wait()
    assert nursery.run(words, implementation) == (0, "")
    events = EventAccumulator(str(tmp_path / "run" / "runs"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


# --- 24: between the last step and the finished model


@beside(ours, broken.model_in_place)
def test_a_kill_before_the_model_is_published(nursery, build, tmp_path, implementation):
    assert nursery.run(build(tmp_path / "whole", max_steps=4)) == (0, "")
    run, words = tmp_path / "run", build(tmp_path / "run", max_steps=4)
    ends = [("checkpoint", "publish_final"), ("checkpoint", "write_manifest"), ("atomic", "sync_folder")]
    for number, (module, name) in enumerate([*ends, ("atomic", "write_text")]):
        shutil.rmtree(run, ignore_errors=True)
        arm = (arm_at_the_end, module, name)
        assert nursery.run(words, implementation, arm)[0] == -signal.SIGKILL
        init = build(tmp_path / f"chat-{number}", cfg=None, init_model_dir=run, max_steps=1)
        code, errors = nursery.run(init)
        assert code == 78
        assert "has not reached its end" in errors
        assert nursery.run(words, implementation) == (0, "")
        assert hash_results(run) == hash_results(tmp_path / "whole")


def arm_at_the_end(module, name):
    """Kill this process at a call of a function of ours after the last step was saved."""
    from firstwords import checkpoint

    if name == "publish_final":
        kill_before(module, name)
    else:
        publish = checkpoint.publish_final

        def publish_and_die(*args):
            kill_before(module, name)
            publish(*args)

        checkpoint.publish_final = publish_and_die
