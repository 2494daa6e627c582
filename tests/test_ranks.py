"""Several processes of one run: the same losses, rows and files as one, one voice, one end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from broken import signal_in
from nursery import ALONE, ROOT
from safetensors.torch import load_file
from team import (
    fsdp_on_cpu,
    kill_in_step,
    lose_at_start,
    lose_data,
    lose_memory,
    note_exchanges,
    note_rows,
    poison_batch,
    run_team,
    share_number,
    start_team,
    touch_in_step,
    turn_own_clock,
    wait_for,
)
from tiny import BYTES, SHAPE, build_flags, invent_talks, run_script, write_chats, write_config
from torch import distributed

import train
from firstwords import atomic, ranks
from firstwords.args import TrainFlags
from firstwords.checkpoint import (
    is_complete,
    list_checkpoints,
    read_manifest,
    read_step,
    verify,
)
from firstwords.dataset import open_train
from firstwords.errors import BadFlag
from firstwords.opening import choose_device
from firstwords.ranks import Ranks
from firstwords.trainer import share_micro_batches

TERM = str(int(signal.SIGTERM))
ROWS_PER_STEP = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data with a val set of 7 rows or fewer, which no two processes share evenly, and a config."""
    home = tmp_path_factory.mktemp("home")
    write_chats(home / "data", invent_talks(60), invent_talks(21, seed=3))
    (home / "data" / "val.jsonl").unlink()  # no samples and no health: they are not what is looked at
    write_config(home / "c.json")
    write_config(home / "dropout.json", **{name: 0.2 for name in SHAPE if name.endswith("_pdrop")})
    return home


def words(home, run, **flags):
    """Return the words of a run of 6 steps of 8 rows, logged at each, saved and evaluated at every second."""
    quick = {
        "max_steps": 6,
        "batch_size": 2,
        "grad_accum": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "log_steps": 1,
    }
    return build_flags(home / "data", run, flags.pop("cfg", home / "c.json"), **quick | flags)


@pytest.fixture(scope="module")
def alone(nursery, home, tmp_path_factory):
    """The run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert nursery.run(words(home, run)) == (0, "")
    return run


def read_history(run):
    return json.loads((list_checkpoints(run)[0] / "trainer_state.json").read_text())["log_history"]


def check_equal(run, other):
    """Two runs logged the same figures at the same steps, and ended in the same weights, but for rounding."""
    ours, theirs = read_history(run), read_history(other)
    assert len(ours) == len(theirs) == 9
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, other))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


# --- the same run


def test_two_processes_compute_what_one_computes(nursery, home, alone, tmp_path):
    run = tmp_path / "run"
    assert run_team(nursery, words(home, run), 2, (note_rows, tmp_path)) == ([0, 0], ["", ""])
    check_equal(run, alone)
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert len((run / "train.log").read_text().splitlines()) == len(
        (alone / "train.log").read_text().splitlines()
    )
    files = set(read_manifest(list_checkpoints(run)[0])["files"])
    expected = set(read_manifest(list_checkpoints(alone)[0])["files"]) - {"rng_state.pth"}
    assert files == expected | {"rng_state_0.pth", "rng_state_1.pth"}
    check_rows(home, tmp_path, size=2)
    assert " in 2 processes; 6 steps of " in (run / "train.log").read_text()


def check_rows(home, folder, size, batch_size=2):
    """The rows of each process at each step are the share that its rank says, and together those of one."""
    data = open_train(home / "data", BYTES, 64, seed=0, assistant_only=True)
    data.num_rows = 6 * ROWS_PER_STEP
    for rank in range(size):
        seen = [json.loads(line) for line in (folder / str(rank)).read_text().splitlines()]
        expected = []
        for step in range(6):
            for begin in range(rank * batch_size, ROWS_PER_STEP, size * batch_size):
                rows = range(step * ROWS_PER_STEP + begin, step * ROWS_PER_STEP + begin + batch_size)
                expected.append([step, [data[row]["input_ids"].tolist() for row in rows]])
        assert seen == expected


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(nursery, home, alone, tmp_path, first, then):
    run = tmp_path / "run"
    codes, errors = run_team(nursery, words(home, run), first, (signal_in, "forward", TERM), at=[first - 1])
    assert codes == [75] * first
    assert sum("stopped by SIGTERM and saved at step" in error for error in errors) == 1
    assert errors[1:] == [""] * (first - 1)
    assert 0 < read_step(list_checkpoints(run)[0]) < 6
    assert run_team(nursery, words(home, run), then) == ([0] * then, [""] * then)
    check_equal(run, alone)


def test_a_run_with_dropout_goes_on_bit_for_bit(nursery, home, tmp_path):
    flags = {"cfg": home / "dropout.json"}
    for name, patches in {"whole": [], "stopped": [(signal_in, "forward", TERM)]}.items():
        codes, _ = run_team(nursery, words(home, tmp_path / name, **flags), 2, *patches, at=[0])
        assert codes == [75 if patches else 0] * 2
    assert run_team(nursery, words(home, tmp_path / "stopped", **flags), 2) == ([0, 0], ["", ""])
    for name in ("model.safetensors", "checkpoint-6/rng_state_0.pth", "checkpoint-6/rng_state_1.pth"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    states = [(tmp_path / "whole" / "checkpoint-6" / f"rng_state_{rank}.pth").read_bytes() for rank in (0, 1)]
    assert states[0] != states[1], "each process has a dropout of its own"


@pytest.mark.slow
def test_four_processes_and_every_number_in_turn(nursery, home, alone, tmp_path):
    flags = {"batch_size": 1, "grad_accum": 8}
    run = tmp_path / "four"
    assert run_team(nursery, words(home, run, **flags), 4, (note_rows, tmp_path))[0] == [0] * 4
    check_equal(run, alone)
    check_rows(home, tmp_path, size=4, batch_size=1)
    run = tmp_path / "turns"
    for size in (1, 2):  # stopped in their steps 1 and 3
        codes, _ = run_team(nursery, words(home, run, **flags), size, (signal_in, "forward", TERM), at=[0])
        assert codes == [75] * size
    assert run_team(nursery, words(home, run, **flags), 4)[0] == [0] * 4
    check_equal(run, alone)


# --- FSDP2, really run, on a CPU that accelerate takes for GPUs


def test_fsdp_computes_what_one_process_computes(nursery, home, alone, tmp_path):
    run = tmp_path / "run"
    codes, errors = run_team(nursery, words(home, run), 2, fsdp_on_cpu)
    assert codes == [0, 0], errors
    check_equal(run, alone)
    files = set(read_manifest(list_checkpoints(run)[0])["files"])
    assert {"optimizer.bin", "pytorch_model_fsdp.bin", "model.safetensors"} <= files, "it was FSDP"
    assert set(read_manifest(run)["files"]) == set(read_manifest(alone)["files"])
    assert json.loads((run / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_fsdp_has_a_preflight(nursery, home, tmp_path):
    team = start_team(nursery, words(home, tmp_path / "run", preflight=True), 2, fsdp_on_cpu)
    codes, errors = wait_for(team)
    assert codes == [0, 0], errors
    assert "; val loss " in team[0].out.read_text()


@pytest.mark.slow
def test_fsdp_goes_on_where_it_was_stopped_and_nowhere_else(nursery, home, alone, tmp_path):
    run, stop = tmp_path / "run", (signal_in, "forward", TERM)
    assert run_team(nursery, words(home, run), 2, fsdp_on_cpu, stop)[0] == [75, 75]
    codes, errors = run_team(nursery, words(home, run), 2)
    assert codes == [78, 78]
    assert "fsdp was True, is None" in errors[0]
    assert run_team(nursery, words(home, run), 2, fsdp_on_cpu)[0] == [0, 0]
    check_equal(run, alone)


def test_muon_and_fsdp_are_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadFlag, match="--optim muon: needs whole matrices, which FSDP cuts"):
        choose_device(TrainFlags(device="cuda", optim="muon"), {})


# --- one voice, one end


def test_one_lock_for_all(nursery, home, tmp_path):
    run = tmp_path / "run"
    with atomic.lock_folder(run):
        codes, errors = run_team(nursery, words(home, run), 2)
    assert codes == [73, 73]
    assert errors[0].count("\n") == 1
    assert "is writing here; wait for it" in errors[0]
    assert errors[1] == ""


def test_an_error_of_one_at_the_start_is_that_of_all(nursery, home, tmp_path):
    codes, errors = run_team(nursery, words(home, tmp_path / "run"), 2, lose_data, at=[1])
    assert codes == [66, 66]
    assert errors == [f"error: --data_dir {home / 'data'}: is not on this machine; copy it\n", ""]


def test_a_finished_run_is_told_once(nursery, home, alone):
    team = start_team(nursery, words(home, alone), 2)
    assert wait_for(team) == ([0, 0], ["", ""])
    assert [child.out.read_text().count("nothing to do") for child in team] == [1, 0]


def test_an_error_of_one_in_training_ends_all(nursery, home, tmp_path):
    codes, errors = run_team(nursery, words(home, tmp_path / "run"), 2, (lose_memory, 3), at=[1])
    assert codes == [71, 71]
    assert errors[0].startswith("error: --batch_size 2 --grad_accum ")
    assert "with --seq_len 64: there was no memory left; " in errors[0]
    assert errors[0].count("\n") == 1
    assert errors[1] == ""


def test_a_killed_process_leaves_nobody_waiting(nursery, home, alone, tmp_path):
    run = tmp_path / "run"
    codes, errors = run_team(nursery, words(home, run), 2, (kill_in_step, 3), at=[1])
    assert codes == [74, -signal.SIGKILL]
    assert errors[0] == (
        "error: a process of the run is gone; what was saved is there, and the same command goes on\n"
    )
    verify(list_checkpoints(run)[0])
    assert run_team(nursery, words(home, run), 2) == ([0, 0], ["", ""])
    check_equal(run, alone)


def test_a_killed_first_process_leaves_nobody_waiting(nursery, home, tmp_path):
    codes, _ = run_team(nursery, words(home, tmp_path / "run"), 2, (kill_in_step, 3), at=[0])
    assert codes == [-signal.SIGKILL, 74]


def test_a_process_that_is_killed_at_the_start_is_missed(nursery, home, tmp_path):
    codes, errors = run_team(nursery, words(home, tmp_path / "run"), 2, (lose_at_start, 1))
    assert codes == [74, -signal.SIGKILL]
    assert errors[0] == (
        "error: process 1: has given no sign of life for 3 seconds; what was saved is there, and the same "
        "command goes on\n"
    )


def test_a_process_is_missed_that_gives_no_sign_but_not_after_a_pause_of_all(monkeypatch):
    now, store = [100.0], distributed.HashStore()
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    first, second = (Ranks(rank, 2, store) for rank in range(2))

    def live(seconds, *processes):
        for _ in range(int(seconds / ranks.PULSE)):
            now[0] += ranks.PULSE
            for process in processes:
                process.beat()

    live(10 * ranks.SILENCE, first, second)
    now[0] += 10 * ranks.SILENCE  # as by Ctrl-Z
    live(ranks.SILENCE, first)
    assert first.read_verdict() is None
    live(2 * ranks.PULSE, first)
    code, why = second.read_verdict()
    assert (code, why.partition(";")[0]) == (74, "process 1: has given no sign of life for 120 seconds")


def test_processes_of_one_number_on_two_machines_do_not_meet_on_the_disk(nursery, home, alone, tmp_path):
    run = tmp_path / "run"
    codes, errors = run_team(nursery, words(home, run), 2, (share_number, tmp_path / "seen"))
    assert (codes, errors) == ([0, 0], ["", ""])
    check_equal(run, alone)


def test_a_loss_that_breaks_in_one_breaks_the_step_in_all(nursery, home, tmp_path):
    run = tmp_path / "run"
    codes, errors = run_team(nursery, words(home, run), 2, (poison_batch, tmp_path / "seen"), at=[1])
    assert codes == [70, 70]
    assert errors[0].startswith("error: step 3: the loss is inf; nothing of it was kept")
    assert errors[1] == ""
    record = json.loads((run / "bad-batch-3.json").read_text())
    data = open_train(home / "data", BYTES, 64, seed=0, assistant_only=True)
    data.num_rows = 99
    rows = range(record["first_row"], record["first_row"] + ROWS_PER_STEP)
    assert record["input_ids"] == [data[row]["input_ids"].tolist() for row in rows]
    assert [loss == "inf" for loss in record["losses"]] == [False, True, False, False]
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-2"]


def test_all_go_back_together(nursery, home, tmp_path):
    run = tmp_path / "run"
    flags = {"on_nan": "rollback"}
    codes, errors = run_team(nursery, words(home, run, **flags), 2, (poison_batch, tmp_path / "seen"), at=[1])
    assert codes == [0, 0]
    assert errors[0].startswith("rollback 1 of 3: step 3: the loss is inf")
    assert errors[1] == ""
    assert is_complete(run)
    assert read_manifest(run)["skipped"] == [2]


@pytest.mark.parametrize(("name", "code", "last"), [("STOP", 75, 3), ("COOLDOWN", 0, 4)])
def test_a_file_asks_all(nursery, home, tmp_path, name, code, last):
    run = tmp_path / "run"
    flags, patch = {"decay_steps": 1}, (touch_in_step, 2, run / name)
    codes, errors = run_team(nursery, words(home, run, **flags), 2, patch, at=[0])
    assert codes == [code, code], errors
    assert read_step(list_checkpoints(run)[0]) == last
    assert is_complete(run) == (name == "COOLDOWN")
    assert not (run / name).exists()


def test_all_go_by_the_clock_of_the_first(nursery, home, tmp_path):
    run, hours = tmp_path / "run", {"max_steps": None, "hours": 0.399, "warmup_steps": 0}
    codes, errors = run_team(nursery, words(home, run, **hours), 2, turn_own_clock)
    assert codes == [0, 0], errors
    assert read_step(run) == 4


def test_a_step_exchanges_once_and_reads_once(nursery, home, tmp_path):
    """Beside the gradients and, by Trainer, the numbers of labels."""
    patch, flags = (note_exchanges, tmp_path / "seen"), {"log_steps": 100, "hours": None}
    assert run_team(nursery, words(home, tmp_path / "run", **flags), 2, patch, at=[1]) == ([0, 0], ["", ""])
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert [name for step, name in seen if step == "2"] == ["all_reduce", "tolist"]


# --- how many


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "size", "share"),
    [(8, 64, 1, 64), (8, 64, 8, 8), (8, 64, 64, 1), (8, 6, 3, 2)],
)
def test_the_micro_batches_of_a_step_are_shared(batch_size, grad_accum, size, share):
    assert share_micro_batches(TrainFlags(batch_size=batch_size, grad_accum=grad_accum), size) == share


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "size", "would"),
    [
        (8, 1, 2, "--batch_size 4 --grad_accum 2 has the same rows in a step"),
        (8, 6, 4, "--batch_size 6 --grad_accum 8 has the same rows in a step"),
        (3, 1, 2, "give --grad_accum 2"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_can(batch_size, grad_accum, size, would):
    with pytest.raises(BadFlag, match=f"--grad_accum {grad_accum}: .* among {size} processes; {would}$"):
        share_micro_batches(TrainFlags(batch_size=batch_size, grad_accum=grad_accum), size)


def test_fsdp_on_a_cpu_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, errors = run_script(train, words(home, tmp_path / "run"))
    assert code == 2
    assert errors.startswith("error: --device cpu: FSDP needs GPUs")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    code, errors = run_script(train, words(home, tmp_path / "run", fsdp=True))
    assert (code, errors.partition(";")[0]) == (2, "error: --device cpu: FSDP needs GPUs")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        BadFlag, match="--device cuda: 2 processes were started on this machine, and its GPUs are 1;"
    ):
        choose_device(TrainFlags(device="cuda"), {})


def test_each_process_looks_at_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device(TrainFlags(device="cuda"), {}) == "cuda"
    assert taken == []
    monkeypatch.setenv("LOCAL_RANK", "3")
    choose_device(TrainFlags(device="cuda"), {})
    assert taken == [3]


# --- by the launchers


def launch(launcher, run_words, **options):
    command = [sys.executable, "-m", *launcher, str(ROOT / "train.py"), *run_words]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ALONE, text=True, **options)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DDP = ROOT / "configs" / "accelerate" / "ddp.yaml"
ACCELERATE = ["accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "0"]


def test_torchrun_starts_it(home, alone, tmp_path):
    run = tmp_path / "run"
    assert launch(TORCHRUN, words(home, run), stdout=subprocess.DEVNULL).wait() == 0
    check_equal(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_signal_to_the_launcher_saves_once(home, alone, tmp_path, launcher):
    run = tmp_path / "run"
    process = launch(
        launcher,
        words(home, run, max_steps=2000, save_steps=1000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert errors.count("stopped by SIGTERM and saved at step") == 1
    assert len(list_checkpoints(run)) == 1
    verify(list_checkpoints(run)[0])


@pytest.mark.slow
def test_accelerate_starts_it(home, alone, tmp_path):
    run = tmp_path / "run"
    assert launch(ACCELERATE, words(home, run), stdout=subprocess.DEVNULL).wait() == 0
    check_equal(run, alone)


@pytest.mark.slow
def test_accelerate_with_fsdp_on_a_cpu_is_refused(home, tmp_path):
    fsdp = [*ACCELERATE[:2], str(Path(DDP).with_name("fsdp.yaml")), *ACCELERATE[3:]]
    process = launch(fsdp, words(home, tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert errors.count("error: --device cpu: FSDP needs GPUs") == 1
    assert not (tmp_path / "run").exists()
