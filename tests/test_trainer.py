"""The run: safe saves, the finite check, schedules, logs, and signals."""

import json
import math
import re
import resource
import signal
import sys
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import BYTES, build_flags, build_trainer, invent_talks, run_script, talk, write_chats, write_config
from transformers import TrainerCallback, TrainerState, TrainingArguments

import train
from firstwords import trainer
from firstwords.args import TrainFlags
from firstwords.checkpoint import list_checkpoints, read_manifest, verify
from firstwords.errors import BadFlag, Diverged, IOFailed
from firstwords.log import format_line
from firstwords.loss import evaluate_loss
from firstwords.pace import format_seconds
from firstwords.signals import StopWish
from firstwords.trainer import (
    StopOnSignal,
    Throughput,
    build_training_arguments,
    choose_optimizer,
    count_steps,
)

PLACE_KEYS = {"tokens_seen", "epoch", "step"}
STEP_KEYS = {"loss", "perplexity", "bits_per_byte", "grad_norm", "learning_rate"} | PLACE_KEYS
EVAL_KEYS = {"eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_accuracy"} | PLACE_KEYS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations; the first prompt of the val set is longer than a row of 64 tokens."""
    val = [talk("word " * 40, "much"), talk("two\nlines", "yes"), talk("tea", "bird")]
    return write_chats(tmp_path_factory.mktemp("data") / "chats", invent_talks(30), val)


@pytest.fixture(scope="module")
def cfg(data):
    return write_config(data / "c.json")


class AtStep(TrainerCallback):
    """Do something just before a step (from 1) begins."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.do(kwargs["model"])


def poison(model):
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = math.nan


# --- the finite check


@pytest.mark.parametrize("extra", [{}, {"max_grad_norm": 0.0}])
def test_nan_ends_the_run_before_the_step_and_no_later_checkpoint_is_written(data, tmp_path, extra):
    run = build_trainer(data, tmp_path / "run", max_steps=9, save_steps=2, extra=extra)
    run.add_callback(AtStep(6, poison))
    with pytest.raises(Diverged, match="^step 6: the loss is nan; .* run again with a lower --lr"):
        run.train()
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-2"]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["bad-batch-6.json", "checkpoint-2", "checkpoint-4"]
    bad = json.loads((tmp_path / "run" / "bad-batch-6.json").read_text())
    assert (bad["step"], bad["batch"], bad["first_row"], bad["loss"]) == (6, 5, 10, "nan")
    assert bad["input_ids"] == [run.train_dataset[row]["input_ids"].tolist() for row in (10, 11)]
    for folder in list_checkpoints(tmp_path / "run"):
        verify(folder)
    assert not any("loss" in row and not math.isfinite(row["loss"]) for row in run.state.log_history)


def test_nan_from_the_start_leaves_no_checkpoint(data, tmp_path):
    run = build_trainer(data, tmp_path / "run", max_steps=3, save_steps=1)
    poison(run.model)
    with pytest.raises(Diverged, match="^step 1: "):
        run.train()
    assert list_checkpoints(tmp_path / "run") == []


def test_a_val_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    run = build_trainer(data, tmp_path / "run")
    poison(run.model)
    with pytest.raises(Diverged, match="the val loss is nan"):
        run.evaluate()


# --- what is logged


@pytest.fixture(scope="module")
def finished(data, cfg, tmp_path_factory):
    """A run of 6 steps that was killed after step 5 and went on from the checkpoint of step 3."""
    run = tmp_path_factory.mktemp("runs") / "run"
    words = build_flags(data, run, cfg, max_steps=6, save_steps=3, eval_steps=2, log_steps=1)

    def die(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", die)
        assert run_script(train, words)[0] == 130
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-3"]
    assert run_script(train, words) == (0, "")
    return run


def read_history(run):
    return json.loads((list_checkpoints(run)[0] / "trainer_state.json").read_text())["log_history"]


def test_the_history_has_no_rate_and_no_clock(finished):
    history = read_history(finished)
    steps = [row for row in history if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) == STEP_KEYS for row in steps)
    evals = [row for row in history if "loss" not in row]
    assert [row["step"] for row in evals] == [2, 4, 6]
    assert all(set(row) == EVAL_KEYS for row in evals)


def test_what_follows_from_the_loss(finished):
    for row in read_history(finished):
        loss = row.get("loss", row.get("eval_loss"))
        assert row.get("perplexity", row.get("eval_perplexity")) == pytest.approx(math.exp(loss))
        ratio = row.get("bits_per_byte", row.get("eval_bits_per_byte")) * math.log(2) / loss
        assert 1 < ratio < 1.5, "a byte a token, and the end tokens on top"


def test_tensorboard_has_every_step_once_after_a_resume(finished):
    events = EventAccumulator(str(finished / "runs"), size_guidance={"tensors": 0})
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    train_tags = ("loss", "perplexity", "bits_per_byte", "tokens_per_second", "tokens_seen", "learning_rate")
    for tag in (*train_tags, "grad_norm", "epoch"):
        assert steps.pop(f"train/{tag}") == [1, 2, 3, 4, 5, 6], tag
    for tag in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens_seen", "epoch"):
        assert steps.pop(f"eval/{tag}") == [2, 4, 6], tag
    for tag in ("stop_rate", "role_leak", "repeat_4gram", "empty", "exact", "mean_tokens", "num_prompts"):
        assert steps.pop(f"health/{tag}") == [2, 4, 6], tag
    rates = {"train/seconds_left", "train/share_of_matmul", "train/peak_memory_gb"}
    assert set(steps) == rates
    assert all(steps[tag] == [1, 2, 3, 4, 5, 6] for tag in rates)
    losses = {row["step"]: row["loss"] for row in read_history(finished) if "loss" in row}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses)
    samples = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    assert len(samples) == 2, "the prompt that does not fit is not asked"


def test_train_log_is_lines_that_a_person_can_read(finished):
    lines = (finished / "train.log").read_text().splitlines()
    number = r"[-\d.,e+]+"
    line = re.compile(
        rf"step (\d)/6  loss {number}  ppl {number}  bpb {number}  lr {number}  grad {number}"
        rf"  tok/s {number}  matmul \d+%  mem {number}G  tokens {number}  epoch {number}  left \d+m\d\ds"
    )
    steps = [match[1] for match in map(line.fullmatch, lines) if match]
    assert steps == list("12345" + "456")
    line = re.compile(rf"step (\d)/6  val loss {number}  ppl {number}  bpb {number}  acc {number}")
    assert [match[1] for match in map(line.fullmatch, lines) if match] == list("24" + "46")
    assert sum("going on from" in x and x.endswith("checkpoint-3") for x in lines) == 1
    assert lines[-1].startswith(f"{finished}: finished, ")
    assert re.search(r"29,152 parameters on cpu \(.*GPU.*\); 6 steps of", lines[0])
    assert not any("\r" in x or "\x1b" in x for x in lines)


def test_samples_are_asked_and_shown_on_one_line(finished):
    lines = (finished / "train.log").read_text().splitlines()
    assert sum(x.startswith("  two lines  ->  '") for x in lines) == 4
    refused = [x for x in lines if "->  not asked" in x]
    assert len(refused) == 4
    assert refused[0].startswith("  word word")
    assert "is 200 tokens long" in refused[0]


def test_tokens_seen_are_the_real_tokens_of_whole_epochs(data, tmp_path):
    run = build_trainer(data, tmp_path / "run", batch_size=1)
    rows, real = run.train_dataset.rows_per_epoch, int(run.train_dataset.lengths.sum())
    assert real < rows * 64, "there is padding"
    run.state.global_step, run.args.max_steps = rows, rows
    run.train_dataset.num_rows = rows
    assert run.tokens_seen == real
    assert run.epochs_seen == 1


def test_evaluation_is_weighted_by_tokens_and_logged(data, tmp_path):
    run = build_trainer(data, tmp_path / "run")
    expected = evaluate_loss(run.model, run.eval_dataset, BYTES, batch_size=1)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.mean, rel=1e-6)
    assert run.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
    assert run.state.log_history[-1]["step"] == 0


def test_time_left_goes_by_the_steps_of_this_life(monkeypatch):
    class Run:
        meta = trainer.RunMeta({}, 100.0, 2)
        rates = None

    class State:
        global_step, max_steps = 50, 100

    now = iter([10.0, 10.0, 12.0, 20.0, 22.0])
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(now))
    watch = Throughput(Run())
    watch.on_train_begin(None, State, None)
    watch.on_step_begin(None, State, None)
    State.global_step = 51
    watch.on_step_end(None, State, None)
    assert watch.trainer.rates == {"tokens_per_second": 50.0, "seconds_left": 2.0 * 49}
    watch.on_step_begin(None, State, None)  # 8 seconds went into a save
    State.global_step = 52
    watch.on_step_end(None, State, None)
    assert watch.trainer.rates == {"tokens_per_second": 50.0, "seconds_left": 6.0 * 48}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0m00s"), (59.6, "1m00s"), (245, "4m05s"), (3 * 3600 + 20 * 60, "3h20m"), (51 * 3600, "2d03h")],
)
def test_lengths_of_time(seconds, text):
    assert format_seconds(seconds) == text


def test_the_line_of_an_evaluation():
    logs = {"eval_loss": 1.5, "eval_perplexity": 4.4817, "eval_bits_per_byte": 2.0, "eval_accuracy": 0.25}
    assert format_line(3, 9, logs) == "step 3/9  val loss 1.5000  ppl 4.482  bpb 2.0000  acc 0.2500"


# --- saves


def test_a_checkpoint_has_all_its_files_and_a_manifest(finished):
    folder = list_checkpoints(finished)[0]
    manifest = read_manifest(folder)
    assert set(manifest["files"]) == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    }
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    assert (manifest["step"], manifest["max_steps"], manifest["longest_row"] <= 64) == (6, 6, True)
    assert manifest["tokens_seen"] == read_history(finished)[-1]["tokens_seen"]
    assert manifest["tokenizer_hash"] == BYTES.hash
    assert manifest["parent"] is None
    assert "clock" not in json.dumps(manifest)
    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-6", "checkpoint-3"]


def test_a_full_disk_ends_the_run_with_one_line_and_spoils_nothing(data, tmp_path):
    run = build_trainer(data, tmp_path / "run", max_steps=4, save_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    run.add_callback(AtStep(4, fill_disk))
    try:
        with pytest.raises(IOFailed, match="^.*run: saving failed .*; free some space and run again$"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    verify(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize(
    ("error", "is_disk"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (OSError(28, "No space left on device"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_only_what_the_disk_does_is_a_failed_save(data, tmp_path, monkeypatch, error, is_disk):
    run = build_trainer(data, tmp_path / "run", max_steps=2)

    def fail(*args):
        raise error

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(IOFailed if is_disk else type(error), match="pos|failed|stream|space|assert|memory"):
        run.train()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_whole_model_of_fsdp_is_loaded_and_no_number_drawn(data, tmp_path, monkeypatch):
    run = build_trainer(data, tmp_path / "run")
    run.model.attention = "dense"
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    monkeypatch.setattr(run, "is_fsdp_enabled", True)
    monkeypatch.setattr(run.accelerator, "get_state_dict", lambda model: weights)
    before = torch.get_rng_state()
    whole, places = run.find_whole_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert (whole.attention, places) == ("dense", range(len(run.eval_dataset)))
    assert whole.lm_head.weight is whole.transformer.wte.weight
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, weights[name])
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(whole(ids, labels=ids).loss, run.model.eval()(ids, labels=ids).loss)


def test_intervals_are_those_of_the_flags_also_after_a_resume(data, cfg, tmp_path, monkeypatch):
    words = build_flags(data, tmp_path / "run", cfg, max_steps=8, save_steps=2, log_steps=4)
    terminate = AtStep(3, lambda model: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(StopOnSignal, "on_step_begin", terminate.on_step_begin)
    assert run_script(train, words)[0] == 75
    monkeypatch.undo()
    words = build_flags(data, tmp_path / "run", cfg, max_steps=8, save_steps=5, log_steps=1)
    assert run_script(train, words)[0] == 0
    assert [row["step"] for row in read_history(tmp_path / "run") if "loss" in row] == [4, 5, 6, 7, 8]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-8", "checkpoint-5"]


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_for_a_save_and_a_stop(handlers, tmp_path, number):
    wish = StopWish(tmp_path)
    wish.defer()

    class Control:
        should_save = should_training_stop = False

    state = TrainerState(is_world_process_zero=True)
    assert not StopOnSignal(wish).on_step_end(None, state, Control()).should_training_stop
    signal.raise_signal(number)
    control = StopOnSignal(wish).on_step_end(None, state, Control())
    assert control.should_save
    assert control.should_training_stop


# --- flags -> arguments


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"epochs": 1, "batch_size": 4}, 25),
        ({"epochs": 0.5, "batch_size": 4, "grad_accum": 2}, 7),
        ({"epochs": 2, "batch_size": 3}, 67),
    ],
)
def test_steps_of_the_run(flags, steps):
    assert count_steps(TrainFlags(**flags), rows_per_epoch=100) == steps


@pytest.mark.parametrize("flags", [{}, {"max_steps": 5, "epochs": 1}, {"max_steps": 0}, {"epochs": -1}])
def test_no_steps_or_two_wishes_are_refused(flags):
    with pytest.raises(BadFlag, match="^--max_steps: "):
        count_steps(TrainFlags(**flags), rows_per_epoch=100)


def list_rates(data, folder, steps, **flags):
    """Return the learning rate of each step."""
    run = build_trainer(data, folder, max_steps=steps, **flags)
    optimizer = run.create_optimizer()
    scheduler = run.create_scheduler(num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert all(len(set(groups)) == 1 for groups in rates)
    return [groups[0] for groups in rates]


def cosine(step, warmup, steps, least):
    if step < warmup:
        return step / warmup
    return least + (1 - least) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_cosine_by_hand(data, tmp_path, least, optim):
    rates = list_rates(data, tmp_path, 20, lr=2.0, warmup_steps=4, min_lr_ratio=least, optim=optim)
    assert rates == pytest.approx([2.0 * cosine(step, 4, 20, least) for step in range(20)])


def stable(step, warmup, decay, steps, least):
    if step < warmup:
        return least + (1 - least) * step / warmup
    return 1.0 if step < steps - decay else least + (1 - least) * (steps - step) / decay


@pytest.mark.parametrize(("warmup", "decay"), [(4, 6), (0.2, 0.3)])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_warmup_stable_decay_by_hand(data, tmp_path, warmup, decay, least):
    flags = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": warmup, "decay_steps": decay}
    rates = list_rates(data, tmp_path, 20, lr=2.0, min_lr_ratio=least, **flags)
    assert rates == pytest.approx([2.0 * stable(step, 4, 6, 20, least) for step in range(20)])


def test_a_floor_that_the_schedule_does_not_know_is_refused():
    flags = TrainFlags(model_dir="x", lr_scheduler_type="linear", min_lr_ratio=0.1, device="cpu")
    with pytest.raises(BadFlag, match="^--min_lr_ratio: linear takes none"):
        build_training_arguments(flags, {}, 10)


@pytest.mark.parametrize("wrong", [{"optim": "adamm"}, {"lr_scheduler_type": "cosinus"}])
def test_a_name_that_trainer_does_not_know_is_refused(wrong):
    with pytest.raises(BadFlag, match="adamm|cosinus") as error:
        build_training_arguments(TrainFlags(model_dir="x", device="cpu", **wrong), {}, 10)
    assert "\n" not in str(error.value)


def test_fields_of_trainer_beat_what_follows_from_our_flags():
    flags = TrainFlags(model_dir="x", device="cpu", lr=0.5, weight_decay=0.25)
    arguments = build_training_arguments(flags, {"adam_beta2": 0.9}, 10)
    assert (arguments.learning_rate, arguments.weight_decay) == (0.5, 0.25)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.max_grad_norm) == (0.9, 0.9, 1.0)
    assert arguments.logging_nan_inf_filter is False


def test_norms_and_biases_do_not_decay(data, tmp_path):
    run = build_trainer(data, tmp_path, weight_decay=0.25)
    groups = {
        id(p): group["weight_decay"] for group in run.create_optimizer().param_groups for p in group["params"]
    }
    decays = {name: groups[id(p)] for name, p in run.model.named_parameters()}
    assert len(decays) == len(groups)
    for name, parameter in run.model.named_parameters():
        assert decays[name] == (0.25 if parameter.ndim > 1 else 0.0), name


def test_muon_is_ours_and_the_rest_is_trainer_s():
    flags = TrainFlags(model_dir="x", device="cpu", optim="muon", lr=0.5, weight_decay=0.25)
    arguments = build_training_arguments(flags, {"adam_beta2": 0.99, "adam_epsilon": 1e-6}, 10)
    assert choose_optimizer(replace(flags, optim="adamw_torch_fused"), arguments) is None
    factory, kwargs = choose_optimizer(flags, arguments)
    assert factory is trainer.MuonAdamWFactory
    expected = {"lr": 0.5, "weight_decay": 0.25, "betas": (0.9, 0.99), "eps": 1e-6}
    assert kwargs == expected | {"optim": "muon", "momentum": 0.95}
    kwargs = choose_optimizer(replace(flags, optim="normuon", muon_momentum=0.8), arguments)[1]
    assert (kwargs["optim"], kwargs["momentum"]) == ("normuon", 0.8)


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_plain_run(data, tmp_path):
    """By a backend that needs no compiler; packed rows, whose documents and labels differ at every step."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    weights = []
    for extra in ({}, compiled):
        torch.compiler.reset()
        run = build_trainer(data, tmp_path / f"run{len(weights)}", extra=extra)
        run.add_callback(Throughput(run))
        run.train()
        weights.append(run.model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "stable"), [(None, False), ("reduce-overhead", True)])
def test_what_a_step_keeps_lies_outside_of_cuda_graphs(data, tmp_path, monkeypatch, mode, stable):
    """Here the graph is one tensor for all losses, as its memory would be; and autograd's first gradients."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": mode}
    extra = compiled if mode else {}
    run = build_trainer(data, tmp_path / "run", grad_accum=3, max_steps=1, extra=extra)
    kept, were_there, graph = [], [], torch.zeros(())

    def train_in_graph(self, model, inputs, num_items_in_batch=None):
        were_there.append([parameter.grad is not None for parameter in model.parameters()])
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss.backward()
        return graph.copy_(loss.detach())

    def spy(*args, **options):
        kept.extend(loss for _, loss in run._micro_batches)
        return torch.tensor(1.0)

    monkeypatch.setattr("transformers.Trainer.training_step", train_in_graph)
    monkeypatch.setattr("transformers.Trainer._get_grad_norm", spy)
    run.train()
    assert len({loss.item() for loss in kept}) == len({loss.data_ptr() for loss in kept}) == 3
    assert [all(there) for there in were_there] == [stable, True, True]
    assert any(were_there[0]) == stable


def test_several_gpus_in_one_process_are_refused(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(BadFlag, match="^--device cpu: 2 GPUs and one process; launch with torchrun"):
        build_training_arguments(TrainFlags(device="cpu", model_dir="x"), {}, 1)


def test_the_gpu_is_waited_for_once_a_step(data, tmp_path, monkeypatch):
    """Of all that a step does, only the finite check asks for a value; the log does at its own intervals."""
    run = build_trainer(data, tmp_path / "run", log_steps=100, grad_accum=2)
    run.add_callback(Throughput(run))
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "nonzero", "__int__", "cpu"):
        read = getattr(torch.Tensor, name)

        def spy(self, *args, read=read, name=name, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if self.requires_grad or "trainer.py" in caller or "modeling" in caller or "masking" in caller:
                reads.append((run.state.global_step, name, caller))
            return read(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    run.train()
    inside = [(name, caller.rpartition("/")[2]) for step, name, caller in reads if step == 2]
    assert inside == [("tolist", "trainer.py")]
