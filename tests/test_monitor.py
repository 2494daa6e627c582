"""What watches over a run: it changes nothing, writes each step once, and says what it was asked for."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import (
    BYTES,
    build_flags,
    build_trainer,
    hash_files,
    invent_talks,
    run_script,
    talk,
    write_chats,
    write_config,
    write_store,
)

import train
from firstwords import monitor
from firstwords.checkpoint import list_checkpoints, load_model
from firstwords.dataset import TokenWindows
from firstwords.errors import BadFlag
from firstwords.log import RunLog
from firstwords.loss import evaluate_loss
from firstwords.samples import build_speaker, parse_samples
from firstwords.schema import mask_control
from firstwords.tokenstore import open_store
from firstwords.trainer import StopOnSignal

WEIGHTS = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of both stages, a finished run of stage A, and HellaSwag items."""
    folder = tmp_path_factory.mktemp("monitor")
    write_chats(folder / "chats", invent_talks(20), [talk("word " * 40, "much"), talk("two\nlines", "yes")])
    write_store(folder / "text", ["tea and birds " * 30] * 5, ["birds and tea " * 9, "seven teas and a bird"])
    cfg = write_config(folder / "c.json")
    words = build_flags(folder / "text", folder / "a", cfg, max_steps=2, no_assistant_only_loss=True)
    assert run_script(train, [*words, "--eval_steps", "1"]) == (0, "")
    item = {
        "activity_label": "Tea",
        "ctx_a": "A bird sits.",
        "ctx_b": "it",
        "endings": ["a", "b"],
        "label": 1,
    }
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for _ in range(3)))
    return folder


def read_events(run):
    events = EventAccumulator(str(run / "runs"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def list_steps(events):
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Killed(BaseException):
    """Ends a life of a run as a kill does: nothing is saved or closed."""


def kill_at(step, monkeypatch):
    def die(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(StopOnSignal, "on_step_begin", die)


def run_and_kill(words, steps, monkeypatch):
    """Run train.py, killed before each of the steps in turn, then to its end."""
    for step in steps:
        kill_at(step, monkeypatch)
        with pytest.raises(Killed):
            run_script(train, words)
    monkeypatch.undo()
    assert run_script(train, words) == (0, "")


def stage_b(folder, run, **flags):
    quick = {"init_model_dir": folder / "a", "max_steps": 6, "save_steps": 3, "eval_steps": 1, "log_steps": 1}
    data_dir = flags.pop("data_dir", folder / "chats")
    return build_flags(data_dir, run, None, **{**quick, **flags})


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Stage B, killed before its first checkpoint and after it."""
    run = tmp_path_factory.mktemp("runs") / "b"
    words = stage_b(folder, run, eval_tasks="hellaswag:2", hellaswag_data=folder / "items.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        run_and_kill(words, [2, 5], patch)
    return run


def test_tensorboard_is_one_stream_with_each_step_once(finished):
    steps = list_steps(read_events(finished))
    assert {tag.split("/")[0] for tag in steps} == {"train", "eval", "health"}
    for tag, found in steps.items():
        assert found == [1, 2, 3, 4, 5, 6], tag
    wanted = {"eval/kept_text_loss", "eval/hellaswag_acc", "eval/hellaswag_acc_norm", "health/stop_rate"}
    assert wanted | {"train/share_of_matmul", "train/peak_memory_gb", "eval/accuracy"} <= set(steps)


def test_samples_stand_in_the_file_once_a_step(finished):
    text = (finished / "samples.md").read_text()
    assert re.findall(r"^## step (\d+)$", text, re.MULTILINE) == list("123456")
    sections = parse_samples(text)
    for samples in sections.values():
        assert list(samples) == [("word " * 40).strip(), "two lines"]
        assert list(samples["two lines"]) == ["greedy", "sampled"]
        assert list(samples[("word " * 40).strip()]) == ["not asked"]


def test_the_last_samples_are_what_the_model_says(finished):
    last = parse_samples((finished / "samples.md").read_text())[6]["two lines"]
    speak = build_speaker(BYTES, context=64, chat=True)
    from firstwords.samples import KINDS

    model = load_model(finished)
    said = {kind: speak(model, "two\nlines", sampling) for kind, sampling in KINDS.items()}
    assert {kind: text.splitlines() for kind, text in last.items()} == {
        kind: [mask_control(line) for line in text.splitlines()] for kind, text in said.items()
    }


def test_what_is_forgotten_is_the_loss_on_the_text_of_stage_a(folder, finished):
    rows = TokenWindows(open_store(folder / "text", "val").tokens, BYTES, 64)
    loss = evaluate_loss(load_model(finished), rows, BYTES, batch_size=2)
    events = read_events(finished)
    assert events.Scalars("eval/kept_text_loss")[-1].value == pytest.approx(loss.mean, rel=1e-5)
    assert events.Scalars("eval/kept_text_bits_per_byte")[-1].value == pytest.approx(
        loss.bits_per_byte, rel=1e-5
    )


def test_watching_changes_no_bit_of_the_run(folder, finished, tmp_path):
    """The same run, never killed, without a val.jsonl, a kept text or a test."""
    bare = tmp_path / "chats"
    bare.mkdir()
    for path in (folder / "chats").iterdir():
        if path.name != "val.jsonl":
            (bare / path.name).write_bytes(path.read_bytes())
    words = stage_b(folder, tmp_path / "b", data_dir=bare)
    assert run_script(train, words) == (0, "")
    both = [hash_files(list_checkpoints(run)[0]) for run in (finished, tmp_path / "b")]
    assert all(both[0][name] == both[1][name] for name in WEIGHTS)


def test_stage_a_goes_on_with_the_texts_of_its_val_split(folder):
    sections = parse_samples((folder / "a" / "samples.md").read_text())
    assert list(sections) == [1, 2]
    assert list(sections[2]) == ["birds and te", "seven teas a"]
    assert set(sections[2]["birds and te"]) == {"greedy", "sampled"}


def test_it_says_when_the_text_of_stage_a_is_gone(folder, tmp_path):
    moved = folder / "moved"
    (folder / "text").rename(moved)
    try:
        assert run_script(train, stage_b(folder, tmp_path / "b", max_steps=1)) == (0, "")
        log = (tmp_path / "b" / "train.log").read_text()
        assert f"stage A's text ({folder / 'text'}) is not there: what is forgotten is not measured" in log
        words = stage_b(folder, tmp_path / "c", max_steps=1, keep_text=moved)
        assert run_script(train, words) == (0, "")
    finally:
        moved.rename(folder / "text")
    assert "stage A's text: loss" in (tmp_path / "c" / "train.log").read_text()


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        ({"report_to": "wand"}, 2, "--report_to wand: is not known; give wandb or trackio"),
        ({"report_to": "trackio"}, 2, "trackio is not installed; pip install trackio"),
        (
            {"eval_tasks": "piqa"},
            2,
            "--eval_tasks piqa: within training there is hellaswag; others by evaluate.py --tasks",
        ),
        ({"eval_tasks": "hellaswag:0"}, 2, "--eval_tasks hellaswag:0: how many items?"),
        (
            {"eval_tasks": "hellaswag", "hellaswag_data": "{folder}/none.jsonl"},
            66,
            "none.jsonl: no such file",
        ),
        (
            {"eval_tasks": "hellaswag", "hellaswag_data": "{folder}/chats/val.jsonl"},
            65,
            "is no item of Hella",
        ),
        ({"keep_text": "{folder}/chats"}, 66, "--keep_text {folder}/chats: is no token store"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_a_file_is_made(folder, tmp_path, flags, code, why):
    flags = {name: value.format(folder=folder) for name, value in flags.items()}
    found, errors = run_script(train, stage_b(folder, tmp_path / "b", **flags))
    assert (found, len(errors.splitlines())) == (code, 1), errors
    assert why.format(folder=folder) in errors
    assert not (tmp_path / "b").exists()


def test_a_machine_without_tensorboard_and_tiktoken_trains_when_told_so(folder, tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard", "tiktoken"):
        monkeypatch.setitem(sys.modules, name, None)
    run = tmp_path / "a"
    words = build_flags(folder / "text", run, folder / "c.json", max_steps=1, no_assistant_only_loss=True)
    words += ["--eval_steps", "1"]
    why = "tensorboard is not installed; pip install tensorboard, or give --report_to none"
    assert run_script(train, words) == (2, f"error: --report_to tensorboard: {why}\n")
    assert not run.exists()
    assert run_script(train, [*words, "--report_to", "none"]) == (0, "")
    assert not (run / "runs").exists()
    assert "Samples is left out: tiktoken: is not installed" in (run / "train.log").read_text()


# --- services


STUB = """
import json, os
calls = open(os.environ["STUB_CALLS"], "a", buffering=1)
def init(**options):
    options["config"] = {key: str(value) for key, value in options["config"].items()}
    calls.write(json.dumps(["init", options]) + "\\n")
def log(values, step):
    calls.write(json.dumps(["log", step, values]) + "\\n")
def finish():
    calls.write(json.dumps(["finish"]) + "\\n")
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_hears_of_each_step_once(folder, tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(STUB)
    calls = tmp_path / "calls"
    monkeypatch.setenv("STUB_CALLS", str(calls))
    monkeypatch.syspath_prepend(tmp_path)
    words = stage_b(folder, tmp_path / "b", report_to=name)
    with pytest.MonkeyPatch.context() as patch:
        run_and_kill(words, [2, 5], patch)
    sys.modules.pop(name)
    lines = [json.loads(line) for line in calls.read_text().splitlines()]
    inits = [line[1] for line in lines if line[0] == "init"]
    assert len(inits) == 3
    assert all(options["resume"] == "allow" and options["name"] == "b" for options in inits)
    assert all(options["config"]["max_steps"] == "6" for options in inits)
    if name == "wandb":
        assert len({options["id"] for options in inits}) == 1
    sent = [(tag, line[1]) for line in lines if line[0] == "log" for tag in line[2]]
    assert len(sent) == len(set(sent)), "nothing is sent twice"
    events = read_events(tmp_path / "b")
    expected = {(tag, step) for tag, steps in list_steps(events).items() for step in steps}
    assert set(sent) == expected
    assert lines[-1] == ["finish"]


# --- what the hardware does


NVML = """
NVMLError = OSError
def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index): return "another"
def nvmlDeviceGetHandleByUUID(uuid): return uuid
def nvmlDeviceGetTotalEnergyConsumption(handle): return {"GPU-12-ab": 7500, "another": 1}[handle]
"""


def test_looking_leaves_model_and_chance_as_they_were(folder, tmp_path):
    run = build_trainer(folder / "chats", tmp_path / "run")
    log = RunLog(tmp_path / "run", monitor.Writers())
    speak = build_speaker(BYTES, context=64, chat=True)
    samples = monitor.Samples(log, ["Hi"], speak, tmp_path / "samples.md", 0)
    run.model.train()
    before = torch.get_rng_state()
    samples.on_evaluate(run.args, run.state, run.control, model=run.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert run.model.training


def test_operations_of_a_step_by_hand(folder, tmp_path):
    run = build_trainer(folder / "chats", tmp_path / "run")
    tokens, width, vocab = run.meta.tokens_per_step, 32, run.model.config.vocab_size
    block = (3 * width + width) * width + 2 * 4 * width * width
    attention = 2 * 2 * 64 * width * 3  # keys and values, forward once and backward twice
    learned = run.train_dataset.learned.mean()
    expected = tokens * (6 * block + attention) + tokens * learned * 6 * width * vocab
    assert monitor.count_flops(run) == pytest.approx(expected)


def test_a_product_is_measured():
    rate = monitor.measure_matmul_rate(torch.device("cpu"), bf16=False, seconds=0.01)
    assert math.isfinite(rate)
    assert rate > 1e6


def test_the_product_is_of_the_type_itself_and_takes_no_chance_from_the_run(monkeypatch):
    types, product = [], torch.mm

    def spy(a, b):
        types.append((a.dtype, b.dtype, torch.is_autocast_enabled("cpu")))
        return product(a, b)

    monkeypatch.setattr(torch, "mm", spy)
    before = torch.get_rng_state()
    monitor.measure_matmul_rate(torch.device("cpu"), bf16=True, seconds=0)
    assert types == [(torch.bfloat16, torch.bfloat16, False)]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_of_memory_is_that_of_the_training(no_matmul, folder, tmp_path, monkeypatch):
    run, devices = build_trainer(folder / "chats", tmp_path / "run"), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", devices.append)
    monkeypatch.setattr(monitor, "open_energy_meter", lambda device: lambda: None)
    watch, device = monitor.Hardware(run), torch.device("cuda:0")
    watch.on_train_begin(SimpleNamespace(device=device, bf16=True), run.state, run.control)
    assert devices == [device]


def test_the_energy_is_that_of_the_gpu_itself_however_they_are_counted(tmp_path, monkeypatch):
    (tmp_path / "pynvml.py").write_text(NVML)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab"))
    meter = monitor.open_energy_meter(torch.device("cuda:0"))
    sys.modules.pop("pynvml")
    assert meter() == 7.5


def test_the_share_follows_from_the_rates(folder, tmp_path):
    run = build_trainer(folder / "chats", tmp_path / "run")
    watch = monitor.Hardware(run)
    watch.on_train_begin(run.args, run.state, run.control)
    watch.peak, watch.flops_per_step = 1e9, 2e6
    run.control.should_log = True
    run.rates = {"tokens_per_second": 3 * run.meta.tokens_per_step}
    watch.on_step_end(run.args, run.state, run.control)
    assert run.rates["share_of_matmul"] == pytest.approx(3 * 2e6 / 1e9)
    assert 0.05 < run.rates["peak_memory_gb"] < 100
    assert "energy_wh" not in run.rates, "NVML tells nothing of a CPU"


def test_energy_is_that_since_the_last_line(folder, tmp_path):
    run = build_trainer(folder / "chats", tmp_path / "run")
    watch = monitor.Hardware(run)
    watch.peak, joules = 1.0, iter([3600.0, 7200.0, 7200.0, 9000.0])
    watch.meter = lambda: next(joules)
    run.rates = {"tokens_per_second": 1.0}
    watch.on_step_end(run.args, run.state, run.control)
    assert "energy_wh" not in run.rates, "it is asked for when a line is due"
    run.control.should_log = True
    watch.on_step_end(run.args, run.state, run.control)
    assert run.rates["energy_wh"] == 1.0
    watch.on_log(run.args, run.state, run.control, logs={"loss": 1.0})
    watch.on_step_end(run.args, run.state, run.control)
    assert run.rates["energy_wh"] == 0.0
    watch.on_step_end(run.args, run.state, run.control)
    assert run.rates["energy_wh"] == 0.5


def test_several_services_and_none():
    assert monitor.parse_report_to("") == monitor.parse_report_to("tensorboard") == ["tensorboard"]
    assert monitor.parse_report_to("none") == []
    with pytest.raises(BadFlag, match="--report_to none: is not known; .* or none alone"):
        monitor.parse_report_to("none, tensorboard")
    with pytest.raises(BadFlag, match="wandb is not installed"):
        monitor.parse_report_to("tensorboard,wandb")
