"""What is said before a run, what is refused, and that neither touches the run."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import build_flags, hash_files, invent_talks, run_script, write_chats, write_config, write_store
from transformers import GPT2Config, TrainerCallback

import train
from firstwords import fit, opening, preflight
from firstwords.args import TrainFlags
from firstwords.checkpoint import list_checkpoints, read_manifest, verify
from firstwords.errors import OutOfMemory
from firstwords.fit import Limit, Room, Setting, choose_setting, find_limit
from firstwords.memory import Memory
from firstwords.model import GPT2LMHeadModel
from firstwords.preflight import Forecast, Probe, Speed, format_table, warn_epochs
from firstwords.trainer import RunTrainer, StopOnSignal

GB = 10**9


pytestmark = pytest.mark.usefixtures("no_matmul")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_config(home / "c.json", resid_pdrop=0.1)
    write_chats(home / "chats", invent_talks(30))
    write_store(home / "store", ["tea and birds " * 30] * 5, ["birds and tea " * 9])
    return home


def go(home, run, **flags):
    """Run train.py on the conversations."""
    quick = {"data_dir": home / "chats", "model_dir": run, "cfg": home / "c.json", "max_steps": 6}
    return run_script(train, build_flags(**quick | flags))


def read_lines(capsys):
    """Return the table on stdout: name of a line -> the rest."""
    return dict(line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)


# --- --preflight


def test_preflight_prints_trains_nothing_and_leaves_nothing(home, tmp_path, capsys):
    before = hash_files(home)
    assert go(home, tmp_path / "run", max_steps=50, preflight=True) == (0, "")
    table = read_lines(capsys)
    assert list(table)[1:] == [
        "parameters",
        "memory",
        "a",
        "steps",
        "speed",
        "time",
        "disk",
        "data",
        "warning:",
    ]
    assert table["parameters"] == "29,152"
    assert table["steps"] == "50"
    assert "weights 0.000117, " in table["memory"]
    assert "free on this machine" in table["memory"]
    assert list(tmp_path.iterdir()) == []
    assert hash_files(home) == before


def test_preflight_of_a_run_half_done_counts_what_is_left_and_touches_nothing(home, tmp_path, capsys):
    run = tmp_path / "run"
    assert go(home, run, save_steps=2, save_total_limit=9) == (0, "")
    for name in ("COMPLETE", "checkpoint-6"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = hash_files(run)
    capsys.readouterr()
    assert go(home, run, save_steps=2, save_total_limit=9, preflight=True) == (0, "")
    assert read_lines(capsys)["steps"] == "6, 4 of them done"
    assert hash_files(run) == before


def test_a_run_after_a_preflight_and_one_without_a_probe_are_the_same_run(home, tmp_path, monkeypatch):
    assert go(home, tmp_path / "run", max_steps=14, preflight=True) == (0, "")
    assert go(home, tmp_path / "run", max_steps=14) == (0, "")
    monkeypatch.setattr(preflight, "Probe", lambda tell: TrainerCallback())
    assert go(home, tmp_path / "plain", max_steps=14) == (0, "")
    ours, theirs = (
        {n: h for n, h in hash_files(tmp_path / x).items() if "log" not in n and "runs/" not in n}
        for x in ("run", "plain")
    )
    assert ours == theirs


def test_hours_are_turned_into_steps(home, tmp_path, capsys):
    assert go(home, tmp_path / "run", max_steps=None, hours=0.1, preflight=True) == (0, "")
    table = read_lines(capsys)
    steps, rate = table["steps"], float(table["speed"].split()[0])
    assert steps.endswith(" in 0.1 hours")
    assert int(steps.split()[1].replace(",", "")) == pytest.approx(360 * rate, rel=0.01)
    assert table["time"].startswith("6m00s")


def test_every_run_says_it_in_short(home, tmp_path, capsys):
    assert go(home, tmp_path / "run", max_steps=14) == (0, "")
    out = capsys.readouterr().out
    for line in ("  memory: ", "  disk: ", "  data: ", "  speed: "):
        assert out.count(line) == 1
    assert out.index("  memory: ") < out.index("  speed: ") < out.index("finished")


def test_a_run_by_the_clock_warns_of_data_read_too_often_when_it_knows_its_speed(
    home, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(preflight, "WARM_UP", 0)
    monkeypatch.setattr(preflight, "PROBED", 1)
    monkeypatch.setitem(preflight.MANY_EPOCHS, "conversations", 0)
    assert go(home, tmp_path / "run", max_steps=None, hours=0.0005) == (0, "")
    out = capsys.readouterr().out
    for line in ("  speed: ", "  data: ", "  warning: the same conversations would be read "):
        assert out.count(line) == 1
    assert out.index("  speed: ") < out.index("  data: ") < out.index("  warning: ")


# --- words


@pytest.fixture
def forecast():
    return Forecast(
        parameters=1000,
        memory=Memory(weights=3 * GB, activations=5 * GB),
        limit=Limit(10 * GB, "free on this machine"),
        setting=Setting(8, 2, "none"),
        steps=1000,
        steps_done=200,
        hours=None,
        tokens_per_step=100.0,
        tokens_per_epoch=20_000.0,
        kind="conversations",
        eval_steps=300,
        checkpoint_bytes=2 * GB,
        disk_bytes=5 * GB,
        disk_free=9 * GB,
        speed=Speed(step=2.0, evaluation=10.0),
    )


def test_the_table_by_hand(forecast):
    assert format_table(forecast) == [
        "  parameters  1,000",
        "  memory      8 GB (weights 3, activations 5) of 10 GB free on this machine",
        "  a step      100 tokens; --batch_size 8 --grad_accum 2",
        "  steps       1,000, 200 of them done",
        "  speed       0.5 steps/s, 50 tokens/s; val loss 10 s every 300 steps",
        "  time        27m10s to the end, but for saves and samples",
        "  disk        5 GB in checkpoints of 2 GB, of 9 GB free",
        "  data        100,000 tokens, 100 for each parameter (about 20 use the compute best, "
        "Hoffmann et al. 2022), 5 epochs of 20,000",
    ]


def test_fsdp_keeps_its_own_weights_on_the_disk_too(home, tmp_path):
    flags = TrainFlags(save_steps=5)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=64))
    alone, cut = (
        preflight.count_saves(
            flags, SimpleNamespace(model=model, max_steps=9, room=SimpleNamespace(is_sharded=sharded))
        )
        for sharded in (False, True)
    )
    assert cut["state_bytes"] - alone["state_bytes"] == alone["model_bytes"] == cut["model_bytes"]


@pytest.mark.parametrize(
    ("kind", "steps", "text"),
    [
        ("conversations", 1000, None),
        ("conversations", 1001, "would be read 5 times"),
        (
            "conversations",
            54_000,
            "would be read 270 times. 3 to 5 times are usual; dozens of times, and the",
        ),
        ("text", 800, None),
        ("text", 8000, "would be read 40 times. Up to 4 times it teaches nearly as much"),
    ],
)
def test_data_read_too_often_are_warned_of(forecast, kind, steps, text):
    warning = warn_epochs(dataclasses.replace(forecast, kind=kind, steps=steps))
    assert len(warning) == (text is not None)
    if text:
        assert text in warning[0]
        assert warning[0].endswith("3 times are --max_steps 600")


def test_the_probe_leaves_out_what_lies_between_two_steps(monkeypatch):
    now = SimpleNamespace(t=0.0)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(monotonic=lambda: now.t))
    told = []
    probe = Probe(lambda seconds, state, control: told.append(seconds))
    probe.on_train_begin(None, None, None)
    for step in range(20):
        now.t += 9.0 if step < 2 else 0.5
        probe.on_step_end(None, None, None)
        now.t += 100.0
        probe.on_evaluate(None, None, None)
    assert told == [0.5]


# --- memory


def predict(setting):
    """A model of 1 GB with 1 GB for each row, a third of it when recomputed in part, a tenth when in full."""
    share = {"none": 1.0, "selective": 1 / 3, "full": 0.1}[setting.recompute]
    return Memory(weights=GB, activations=int(setting.batch_size * share * GB))


@pytest.mark.parametrize(
    ("limit", "world_size", "expected"),
    [
        (99, 1, (16, 2, "none")),
        (9, 1, (8, 4, "none")),
        (5.5, 1, (8, 4, "selective")),
        (2.5, 1, (4, 8, "selective")),
        (1.2, 1, (2, 16, "full")),
        (99, 4, (8, 4, "none")),
        (1.05, 1, None),
    ],
)
def test_the_largest_micro_batch_that_fits_and_is_of_use(limit, world_size, expected):
    found = choose_setting(
        predict, rows=32, seq_len=1024, limit=int(limit * GB), device="cuda", world_size=world_size
    )
    assert found == (expected and Setting(*expected))


def test_a_cpu_is_given_no_more_than_it_can_use():
    found = choose_setting(predict, rows=32, seq_len=256, limit=99 * GB, device="cpu")
    assert found == Setting(8, 4, "none")


def build_room(monkeypatch, limit, **flags):
    monkeypatch.setattr(fit, "find_limit", lambda *args: Limit(int(limit), "free on this machine"))
    config = GPT2Config(n_layer=24, n_head=16, n_embd=1024, vocab_size=50_304)
    return Room(TrainFlags(**{"device": "cuda", "bf16": True, **flags}), config)


def take_advice(room, text):
    """Set the flags that the last part of a refusal names, and return them."""
    words = text.rsplit("; ", 1)[1].split()
    named = {word[2:]: words[place + 1] for place, word in enumerate(words) if word.startswith("--")}
    for name, value in named.items():
        setattr(room.flags, name, value if name == "recompute" else int(value))
    return named


def test_what_does_not_fit_is_refused_with_a_setting_that_does(monkeypatch):
    room = build_room(monkeypatch, 16.1e9, batch_size=64, seq_len=1024)
    with pytest.raises(OutOfMemory) as caught:
        room.check()
    text = str(caught.value)
    assert text.startswith("--batch_size 64 --grad_accum 1: needs ")
    for term in ("weights 1.4", "activations", "but 16.1 GB are free on this machine; --batch_size "):
        assert term in text
    take_advice(room, text)
    assert room.flags.batch_size * room.flags.grad_accum == 64
    room.check()


def test_a_setting_of_before_that_no_longer_fits_is_chosen_anew(monkeypatch):
    room = build_room(monkeypatch, 16.1e9, batch_tokens=65_536, seq_len=1024)
    room.choose(Setting(2, 32, "none"))
    assert room.setting == Setting(2, 32, "none")
    room.choose(Setting(64, 1, "none"))
    assert room.setting.batch_size < 64
    room.check()


@pytest.mark.parametrize(("device", "share"), [("cuda", 0.95), ("cpu", 1.0)])
def test_of_a_gpu_a_part_is_left_where_there_is_a_choice(monkeypatch, device, share):
    flags = {"batch_tokens": 2048, "seq_len": 1024, "device": device}
    full = build_room(monkeypatch, 0, **flags).predict(Setting(2, 1, "none")).total / share
    for limit, expected in ((full + 2, Setting(2, 1, "none")), (full - 2, Setting(1, 2, "none"))):
        room = build_room(monkeypatch, limit, **flags)
        room.choose(None)
        assert room.setting == expected


def test_what_fits_to_the_last_byte_is_not_refused(monkeypatch):
    flags = {"batch_tokens": 1024, "seq_len": 1024}
    least = build_room(monkeypatch, 0, **flags).predict(Setting(1, 1, "full")).total
    room = build_room(monkeypatch, least, **flags)
    room.choose(None)
    room.check()


def test_where_no_micro_batch_fits_a_shorter_row_is_named(monkeypatch):
    predict = build_room(monkeypatch, 0).predict
    least = min(predict(Setting(size, 2 // size, "full"), 1024).total for size in (1, 2))
    room = build_room(monkeypatch, least - 1, batch_size=2, seq_len=1024)
    with pytest.raises(OutOfMemory, match=r"of --seq_len 1024 fits; .* would fit$") as caught:
        room.check()
    assert take_advice(room, str(caught.value))["seq_len"] == "512"
    room.check()


def test_where_tokens_choose_a_shorter_row_is_named_with_tokens(monkeypatch):
    predict = build_room(monkeypatch, 0).predict
    least = min(predict(Setting(size, 2 // size, "full"), 1024).total for size in (1, 2))
    room = build_room(monkeypatch, least - 1, batch_tokens=2048, seq_len=1024)
    with pytest.raises(OutOfMemory, match=r"; --batch_tokens 1024 --seq_len 512 would fit$") as caught:
        room.choose(None)
    take_advice(room, str(caught.value))
    room.choose(None)
    room.check()


def test_where_no_row_fits_a_smaller_model_is_asked_for(monkeypatch):
    with pytest.raises(OutOfMemory, match="not one row fits, it needs .*; take a smaller --cfg$"):
        build_room(monkeypatch, 1e9).check()


def test_memory_of_a_control_group_is_the_limit(tmp_path, monkeypatch):
    groups = {"sub": {"memory.max": "max", "memory.current": "5"}, "sub/own": {"memory.max": "9000"}}
    groups["sub/own"] |= {"memory.current": "5000", "memory.stat": "anon 1\ninactive_file 700\n"}
    for name, files in groups.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    (tmp_path / "cgroup").write_text("12:cpuset:/x\n0::/sub/own\n")
    monkeypatch.setattr(fit, "CGROUPS", tmp_path)
    monkeypatch.setattr(fit, "OWN_CGROUP", tmp_path / "cgroup")
    assert find_limit("cpu") == Limit(9000 - 5000 + 700, "free on this machine")
    old = tmp_path / "memory" / "docker"
    old.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("4:memory:/docker\n")
    (old / "memory.limit_in_bytes").write_text("800")
    (old / "memory.usage_in_bytes").write_text("300")
    assert find_limit("cpu").num_bytes == 500


def test_a_card_of_16_gb_has_15_gib_for_the_run(monkeypatch):
    monkeypatch.setattr(fit, "_find_free", lambda device: (80 << 30, "free on the GPU"))
    assert find_limit("cuda", 16) == Limit(15 << 30, "allowed by --vram_gb 16")
    assert find_limit("cuda", 99) == Limit(80 << 30, "free on the GPU")


def test_what_a_rollback_leaves_with_torch_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: GB)
    assert find_limit("cuda") == Limit(71 * GB, "free on the GPU")


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(fit, "_list_cgroup_rooms", lambda: [9 * GB])
    monkeypatch.setattr(fit.psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * GB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert find_limit("cpu") == Limit(3 * GB, "free on this machine for each of 3 processes")


def test_a_model_that_only_fits_in_parts_is_not_refused(monkeypatch):
    monkeypatch.setattr(fit, "find_limit", lambda *args: Limit(5 * GB, "free on the GPU"))
    config = GPT2Config(n_layer=24, n_head=16, n_embd=1024, vocab_size=50_304)
    flags = TrainFlags(device="cuda", bf16=True, batch_size=1, grad_accum=8)
    Room(flags, config, world_size=8, is_sharded=True).check()
    with pytest.raises(OutOfMemory):
        Room(flags, config, world_size=8).check()


def test_a_larger_card_is_held_to_the_limit(monkeypatch):
    card, held = SimpleNamespace(total_memory=80 << 30), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", held.append)
    fit.hold_to(Limit(15 << 30, "allowed by --vram_gb 16"))
    assert held == [15 / 80]


def test_a_run_that_cannot_fit_ends_with_71_before_any_work(home, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_model", None)
    code, errors = go(home, tmp_path / "run", batch_size=10**9)
    assert (code, len(errors.splitlines())) == (71, 1)
    assert "takes the same steps with" in errors
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_in_a_step_leaves_the_last_checkpoint_and_the_table(
    home, tmp_path, monkeypatch, capsys
):
    step = RunTrainer.training_step

    def run_out(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", run_out)
    code, errors = go(home, tmp_path / "run", save_steps=2)
    assert (code, len(errors.splitlines())) == (71, 1)
    assert (
        "--batch_size 2 --grad_accum 1 with --seq_len 64: there was no memory left; --batch_size " in errors
    )
    out = capsys.readouterr().out
    assert "  parameters  29,152\n" in out
    assert "  memory      " in (tmp_path / "run" / "train.log").read_text()
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    verify(tmp_path / "run" / "checkpoint-2")
    monkeypatch.undo()
    smaller = {"batch_size": 1, "grad_accum": 2, "allow_change": "batch_size,grad_accum"}
    assert go(home, tmp_path / "run", save_steps=2, **smaller) == (0, "")


def test_where_shorter_rows_would_fit_a_saved_run_goes_on_with_them(home, tmp_path, monkeypatch):
    step = RunTrainer.training_step

    def run_out(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    def predict(config, *, batch_size, seq_len, **rest):
        return Memory(activations=1000 * batch_size * seq_len)

    monkeypatch.setattr(RunTrainer, "training_step", run_out)
    monkeypatch.setattr(fit, "predict_memory", predict)
    flags = {"data_dir": home / "store", "no_assistant_only_loss": True, "save_steps": 2, "batch_size": 1}
    code, errors = go(home, tmp_path / "run", **flags)
    assert code == 71
    assert "--batch_size 1 --grad_accum 1 --seq_len 32 would fit. What was saved is there" in errors
    allowed = errors.strip().rpartition(" --allow_change ")[2]
    assert allowed == "batch_size,grad_accum,seq_len"
    monkeypatch.undo()
    assert go(home, tmp_path / "run", **flags, seq_len=32, allow_change=allowed) == (0, "")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory"), MemoryError()],
)
def test_memory_that_runs_out_in_the_probe_is_told_as_in_a_run(home, tmp_path, monkeypatch, capsys, error):
    def run_out(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(RunTrainer, "training_step", run_out)
    code, errors = go(home, tmp_path / "run", preflight=True)
    assert (code, len(errors.splitlines())) == (71, 1)
    assert "there was no memory left; --batch_size 1 --grad_accum 2 --recompute " in errors
    assert "What was saved" not in errors
    assert "  memory      " in capsys.readouterr().out


# --- --batch_tokens


def test_tokens_on_the_command_line_beat_the_recipes_micro_batch(home, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("batch_size: 3\ngrad_accum: 5\nrecompute: full\n")
    flags = {"batch_size": None, "batch_tokens": 128, "recipe": tmp_path / "r.yaml", "explain": True}
    assert go(home, tmp_path / "run", **flags) == (0, "")
    assert "--batch_size 2  (chosen for --batch_tokens)" in capsys.readouterr().out
    (tmp_path / "r.yaml").write_text("batch_size: 3\nbatch_tokens: 128\n")
    code, errors = go(home, tmp_path / "run", **flags | {"batch_tokens": None})
    assert (code, "--batch_size: is 3, but --batch_tokens 128 chooses it" in errors) == (2, True)


def test_tokens_in_a_step_choose_the_batch_and_a_resumed_run_keeps_it(home, tmp_path, monkeypatch):
    run, flags = tmp_path / "run", {"batch_size": None, "batch_tokens": 256, "save_steps": 3}
    monkeypatch.setitem(fit.ENOUGH, "cpu", 128)
    monkeypatch.setattr(StopOnSignal, "on_step_begin", stop_at_3(run))
    assert go(home, run, **flags)[0] == 75
    theirs = read_manifest(list_checkpoints(run)[0])["flags"]
    assert (theirs["batch_size"], theirs["grad_accum"]) == ("2", "2")
    monkeypatch.undo()  # now there would be more room
    assert go(home, run, **flags) == (0, "")
    assert read_manifest(run)["flags"]["batch_size"] == "2"
    assert go(home, run, **flags | {"batch_tokens": 512})[0] == 78


def test_a_checkpoint_that_cannot_be_read_is_passed_over(home, tmp_path):
    run, flags = tmp_path / "run", {"batch_size": None, "batch_tokens": 128, "save_steps": 3}
    assert go(home, run, **flags) == (0, "")
    (run / "COMPLETE").unlink()
    (run / "checkpoint-6" / "manifest.json").write_text("{")
    assert go(home, run, **flags, preflight=True) == (0, "")
    code, errors = go(home, run, **flags)
    assert (code, "passed over: " in errors) == (0, True)


def stop_at_3(run: Path):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            (run / "STOP").touch()

    return on_step_begin


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        ({"batch_tokens": 128}, 2, "--batch_size: is 2, but --batch_tokens 128 chooses it"),
        ({"batch_size": None, "batch_tokens": 128, "grad_accum": 1}, 2, "--grad_accum: is 1, but --batch_t"),
        (
            {"batch_size": None, "batch_tokens": 100},
            2,
            "is no whole number of rows of --seq_len 64; give 128",
        ),
        ({"batch_size": None, "batch_tokens": 10}, 2, "is no whole number of rows of --seq_len 64; give 64"),
        (
            {"batch_size": None, "batch_tokens": 128, "vram_gb": 1.00001},
            71,
            "not one row fits, it needs 0.00",
        ),
        ({"vram_gb": "inf"}, 2, "--vram_gb: is inf; give the size of the card in GB"),
        ({"vram_gb": 1}, 2, "--vram_gb: is 1; give the size of the card in GB"),
    ],
)
def test_contradictions_are_refused(home, tmp_path, flags, code, why):
    found, errors = go(home, tmp_path / "run", **flags)
    assert (found, why in errors) == (code, True), errors
    assert not (tmp_path / "run").exists()
