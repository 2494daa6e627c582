"""train.py: what it refuses and how, and what it does with a folder that was used before."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    BYTES,
    SHAPE,
    build_flags,
    hash_files,
    hash_results,
    invent_talks,
    run_script,
    talk,
    write_chats,
    write_config,
    write_store,
)

import train
from firstwords import atomic, opening
from firstwords.args import TrainFlags
from firstwords.checkpoint import list_checkpoints, load_model, read_manifest, verify
from firstwords.errors import Mismatch
from firstwords.model import GPT2LMHeadModel
from firstwords.opening import MODELS, choose_device, find_config
from firstwords.resume import compare_runs
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import train_bpe
from firstwords.trainer import RunTrainer, StopOnSignal

NO_DEVICE = "mps" if not torch.backends.mps.is_available() else "cuda"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data of both stages, broken data, a config, and a finished run `done` of 4 steps in stage A."""
    home = tmp_path_factory.mktemp("home")
    cfg = write_config(home / "c.json")
    chats = write_chats(home / "chats", invent_talks(20))
    store = write_store(home / "store", ["tea and birds " * 30] * 5, ["birds and tea " * 9])
    for name, split, line in (("broken", "train", "{\n"), ("broken-val", "val", '{"input_ids": [1]}\n')):
        shutil.copytree(chats, home / name)
        with open(home / name / f"{split}_tokenized.jsonl", "a") as file:
            file.write(line)
    shutil.copytree(chats, home / "broken-prompts")
    (home / "broken-prompts" / "val.jsonl").write_text('{"messages": []}\n')
    write_chats(home / "mute", invent_talks(5), encode=lambda messages, _: ([1, 2, 3], [0, 0, 0]))
    shutil.copytree(chats, home / "empty")
    (home / "empty" / "train_tokenized.jsonl").write_text("")
    shutil.copytree(chats, home / "no-tokenizer")
    (home / "no-tokenizer" / "tokenizer.json").unlink()
    write_chats(home / "other", invent_talks(5), tokenizer=train_bpe(["tea and birds " * 9], 262 + 3))
    (home / "file").write_text("no folder")
    words = build_flags(store, home / "done", cfg, max_steps=4, no_assistant_only_loss=True)
    assert run_script(train, words) == (0, "")
    shutil.copytree(home / "done" / "checkpoint-4", home / "undone" / "checkpoint-4")
    shutil.copytree(home / "done", home / "spoilt")
    (home / "spoilt" / "model.safetensors").write_bytes(b"\0" * 99)
    return home


def go(home, run, **flags):
    """Run train.py on the conversations; words in `flags` may hold `{home}`."""
    quick = {"data_dir": home / "chats", "model_dir": run, "cfg": home / "c.json", "max_steps": 6}
    words = build_flags(**quick | flags)
    return run_script(train, [word.replace("{home}", str(home)) for word in words])


# --- bad input: one line, the code of DESIGN, nothing left behind


INIT = {"cfg": None, "init_model_dir": "{home}/done"}
REFUSED = [
    ({"data_dir": None}, 2, "--data_dir: is missing"),
    ({"model_dir": None}, 2, "--model_dir: is missing"),
    ({"cfg": None}, 2, "--cfg: give either --cfg"),
    ({"init_model_dir": "{home}/done"}, 2, "--cfg: give either --cfg"),
    ({"max_steps": None}, 2, "--max_steps: give either --max_steps or --epochs"),
    ({"epochs": 1}, 2, "--max_steps: give either --max_steps or --epochs"),
    ({"max_steps": 0}, 2, "--max_steps: 0 steps train nothing"),
    ({"data_dir": "{home}/chat"}, 66, "--data_dir {home}/chat: is no folder; did you mean 'chats'"),
    ({"data_dir": "{home}/file"}, 66, "--data_dir {home}/file: is no folder"),
    ({"data_dir": "{home}/done"}, 66, "train_tokenized.jsonl: is not there; run prep_data.py"),
    ({"data_dir": "{home}/no-tokenizer"}, 66, "holds no tokenizer.json"),
    ({"cfg": "smal_test"}, 66, "--cfg smal_test: is no file and no name in configs/models; did you mean 'sm"),
    ({"cfg": "{home}/d.json"}, 66, "did you mean '{home}/c.json'"),
    (INIT | {"init_model_dir": "{home}/dnoe"}, 66, "_dir {home}/dnoe: is no folder; did you mean 'done'"),
    (INIT | {"init_model_dir": "gpt2"}, 66, "--init_model_dir gpt2: is no folder"),
    (INIT | {"init_model_dir": "hub:nobody/nothing"}, 66, "hub:nobody/nothing: neither cached nor reachable"),
    (INIT | {"init_model_dir": "{home}/undone"}, 78, "has not reached its end; let it finish, or name"),
    (INIT | {"init_model_dir": "{home}/spoilt"}, 76, "model.safetensors: is not the file that was written"),
    (INIT | {"data_dir": "{home}/other"}, 78, "its tokenizer (262 tokens"),
    (INIT | {"seq_len": 129}, 2, "the model's context is 128"),
    ({"tokenizer": "{home}/other"}, 78, "--tokenizer {home}/other: is not the one in"),
    ({"tokenizer": "{home}/nowhere"}, 66, "--tokenizer"),
    ({"seq_len": 129}, 2, "--seq_len 129: the model's context is 128; give that or less"),
    ({"seq_len": 8}, 65, "no conversation is left that fits --seq_len 8"),
    ({"seq_len": 1}, 2, "--seq_len: is 1; give 2 or more"),
    *(({name: 0}, 2, f"--{name}: is 0; give 1 or more") for name in ("batch_size", "grad_accum")),
    *(({name: 0}, 2, f"--{name}: is 0; give 1 or more") for name in ("log_steps", "save_steps")),
    ({"save_total_limit": 0}, 2, "--save_total_limit: is 0; give 1 or more"),
    *(({"lr": lr}, 2, f"--lr: is {lr}; give a number above 0") for lr in ("0.0", "-1.0", "nan")),
    *(({name: "-1"}, 2, f"--{name}: is -1") for name in ("eval_steps", "warmup_steps", "decay_steps")),
    *(({name: "-1"}, 2, f"--{name}: is -1") for name in ("weight_decay", "min_lr_ratio", "seed")),
    *(({name: "inf"}, 2, f"--{name}: is inf") for name in ("warmup_steps", "decay_steps", "lr")),
    *(({"max_steps": None, "epochs": value}, 2, f"--epochs: is {value}") for value in ("nan", "inf", "0.0")),
    ({"lr": "fast"}, 2, "--lr"),
    ({"max_stesp": 4}, 2, "did you mean '--max_steps'"),
    ({"learning_rate": 4}, 2, "use --lr"),
    ({"optim": "adamm"}, 2, "adamm"),
    ({"save_only_model": True}, 2, "--save_only_model: such a run could not be gone on with"),
    ({"muon_momentum": "1"}, 2, "--muon_momentum: is 1.0; give 0 or more, below 1"),
    ({"lr_scheduler_type": "linear", "min_lr_ratio": 0.5}, 2, "--min_lr_ratio: linear takes none"),
    ({"device": NO_DEVICE}, 2, f"--device {NO_DEVICE}: "),
    ({"sample_prompts": "{home}/nowhere.txt"}, 66, "--sample_prompts {home}/nowhere.txt: is not there"),
    ({"data_dir": "{home}/store"}, 2, "is a token store and has no assistant to learn from; pass --no_"),
    ({"data_dir": "{home}/broken"}, 65, "train_tokenized.jsonl:21: is no row"),
    ({"data_dir": "{home}/broken-val"}, 65, "val_tokenized.jsonl:4: is no row"),
    ({"data_dir": "{home}/broken-prompts"}, 65, "val.jsonl:1: no assistant turn"),
    ({"data_dir": "{home}/mute"}, 65, "has no token to learn from"),
    ({"data_dir": "{home}/empty"}, 65, "has no token to learn from"),
    ({"model_dir": "{home}/file"}, 73, "{home}/file: cannot be written"),
]


@pytest.mark.parametrize(("flags", "code", "why"), REFUSED)
def test_what_is_refused_is_one_line_and_leaves_nothing(home, tmp_path, flags, code, why):
    before = hash_files(home)
    found, errors = go(home, tmp_path / "run", **flags)
    assert (found, len(errors.splitlines())) == (code, 1), errors
    assert errors.startswith("error: ")
    assert why.format(home=home) in errors
    assert not (tmp_path / "run").exists()
    assert hash_files(home) == before


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_that_nobody_foresaw_leaves_no_empty_folder_of_ours(home, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(opening, "open_run", fail)
    (tmp_path / "theirs").mkdir()
    for name in ("run", "theirs"):
        with pytest.raises(error):
            train.main([str(word) for word in build_flags(home / "chats", tmp_path / name, home / "c.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_that_was_there_stays_there(home, tmp_path):
    (tmp_path / "run").mkdir()
    assert go(home, tmp_path / "run", seq_len=129)[0] == 2
    assert (tmp_path / "run").is_dir()


def test_bf16_where_it_cannot_be_had_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "has_bf16", lambda device: False)
    code, errors = go(home, tmp_path / "run", bf16=True)
    assert (code, errors) == (2, "error: --bf16: this cpu cannot compute in bfloat16; use --no_bf16\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("feature", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bf16_of_a_cpu_is_that_of_its_hardware(monkeypatch, feature):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not opening.has_bf16("cpu")
    monkeypatch.setattr(torch.cpu, feature, lambda: True)
    assert opening.has_bf16("cpu")


def test_bf16_keeps_the_weights_in_fp32(home, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "has_bf16", lambda device: True)  # slower elsewhere, but the same
    for name, flags in {"exact": {}, "rough": {"bf16": True}}.items():
        assert go(home, tmp_path / name, log_steps=1, **flags) == (0, "")
    exact, rough = (read_losses(tmp_path / name) for name in ("exact", "rough"))
    assert rough == pytest.approx(exact, rel=0.02)
    assert rough != exact
    weights = load_file(tmp_path / "rough" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def read_losses(run):
    state = json.loads((list_checkpoints(run)[0] / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def test_a_rate_that_blows_up_ends_with_70_and_no_spoilt_checkpoint(home, tmp_path):
    code, errors = go(home, tmp_path / "run", lr=1e30, warmup_steps=0, save_steps=1, log_steps=1)
    assert code == 70
    assert len(errors.splitlines()) == 1
    assert "run again with a lower --lr" in errors
    step = int(errors.split("step ")[1].split(":")[0])
    assert 1 <= step <= 3
    checkpoints = list_checkpoints(tmp_path / "run")
    assert all(int(folder.name.removeprefix("checkpoint-")) < step for folder in checkpoints)
    assert not (tmp_path / "run" / "COMPLETE").exists()


def test_too_little_memory_is_71_with_advice(home, tmp_path, monkeypatch):
    def fail(self, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore")

    monkeypatch.setattr(RunTrainer, "train", fail)
    code, errors = go(home, tmp_path / "run")
    assert code == 71
    assert len(errors.splitlines()) == 1
    assert "--seq_len 64: there was no memory left; --batch_size " in errors
    assert " takes the same steps with " in errors


def test_a_gpu_that_is_too_small_for_the_model_alone(home, tmp_path, monkeypatch):
    def build(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(opening, "build_run", build)
    code, errors = go(home, tmp_path / "run")
    assert code == 71
    assert "there was no memory left" in errors
    assert not (tmp_path / "run").exists()


# --- a run from its beginning to its end


@pytest.fixture(scope="module")
def done(home):
    """A finished run of 6 steps on the conversations, with checkpoints of the steps 4 and 6."""
    assert go(home, home / "chat-done", save_steps=4) == (0, "")
    return home / "chat-done"


@pytest.fixture
def used(done, tmp_path):
    """The same run when it had come to step 4."""
    shutil.copytree(done / "checkpoint-4", tmp_path / "used" / "checkpoint-4")
    return tmp_path / "used"


def test_the_manifest_of_a_run(home, done):
    manifest = read_manifest(done)
    assert (manifest["step"], manifest["max_steps"], manifest["parent"]) == (6, 6, None)
    assert manifest["flags"]["seq_len"] == "64"
    assert manifest["compare"]["init_weights"] == "random"
    assert manifest["tokenizer_hash"] == BYTES.hash
    assert manifest["data_dir"] == str(home / "chats")
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "accelerate", "tokenizers"}
    assert "model_dir" not in manifest["flags"]
    verify(done)


def test_a_finished_run_started_again_does_nothing(home, done, capsys):
    before = hash_files(done)
    assert go(home, done, save_steps=4) == (0, "")
    assert capsys.readouterr().out == f"{done}: finished at step 6; nothing to do\n"
    assert hash_files(done) == before


def test_a_used_run_goes_on_to_the_same_end(home, done, used):
    assert go(home, used, save_steps=4) == (0, "")
    assert hash_results(used) == hash_results(done)
    assert f"going on from {used / 'checkpoint-4'}" in (used / "train.log").read_text()


def test_resume_no_refuses_a_used_folder(home, done, used, tmp_path):
    for run in (done, used):
        before = hash_files(run)
        code, errors = go(home, run, save_steps=4, resume="no")
        assert code == 73
        assert f"--model_dir {run}: is used already" in errors
        assert hash_files(run) == before
    (tmp_path / "fresh").mkdir()
    assert go(home, tmp_path / "fresh", max_steps=1, resume="no") == (0, "")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"lr": 0.25}, "lr was 0.0006, is 0.25"),
        ({"grad_accum": 2}, "grad_accum was 1, is 2"),
        ({"seed": 7}, "seed was 0, is 7"),
        ({"max_steps": 9}, "max_steps was 6, is 9"),
        ({"optim": "muon"}, "optim was adamw_torch_fused, is muon"),
        ({"no_assistant_only_loss": True}, "assistant_only_loss was True, is False"),
        ({"adam_beta2": 0.5}, "adam_beta2 was None, is 0.5"),
        ({"data_dir": "{home}/mixed"}, "data was "),
        ({"cfg": "{home}/wide.json"}, "'n_embd': 64"),
    ],
)
def test_another_flag_or_other_data_are_named_with_both_values(home, done, used, flags, why):
    if not (home / "mixed").exists():
        write_chats(home / "mixed", invent_talks(20, seed=9))
        write_config(home / "wide.json", n_embd=64)
    for run in (used, done):
        before = hash_files(run)
        code, errors = go(home, run, **{"save_steps": 4, **flags})
        assert (code, len(errors.splitlines())) == (78, 1)
        assert why in errors
        assert "--allow_change" in errors
        assert hash_files(run) == before


def test_a_flag_that_an_older_run_did_not_know_had_its_default():
    theirs = {"lr": "0.1"}
    compare_runs(TrainFlags(), theirs, theirs | {"hours": "None", "recompute": "none"})
    with pytest.raises(Mismatch, match="hours was None, is 2.0"):
        compare_runs(TrainFlags(), theirs, theirs | {"hours": "2.0"})


def test_a_change_that_is_allowed_goes_on(home, used):
    assert go(home, used, lr=0.25, weight_decay=0.5, allow_change="lr")[0] == 78
    assert go(home, used, lr=0.25, weight_decay=0.5, allow_change="--lr, weight_decay") == (0, "")
    assert read_manifest(used)["compare"]["lr"] == "0.25"


def test_flags_that_change_no_step_may_change(home, used, tmp_path):
    (tmp_path / "prompts.txt").write_text("tea\n\nbird\n")
    flags = {"log_steps": 1, "save_steps": 3, "eval_steps": 6, "save_total_limit": 1}
    assert go(home, used, sample_prompts=str(tmp_path / "prompts.txt"), **flags) == (0, "")
    assert [folder.name for folder in list_checkpoints(used)] == ["checkpoint-6"]
    log = (used / "train.log").read_text()
    assert log.count("\n  tea  ->  ") == log.count("\n  bird  ->  ") == 1


def test_a_finished_run_is_not_stretched(home, done):
    before = hash_files(done)
    code, errors = go(home, done, save_steps=4, max_steps=9, allow_change="max_steps")
    assert code == 78
    assert f"--max_steps 9: the run in {done} is finished at step 6" in errors
    assert hash_files(done) == before


def test_a_run_killed_before_it_was_published_is_published(home, done, tmp_path):
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.copytree(done / name, tmp_path / "run" / name)
    assert go(home, tmp_path / "run", save_steps=4) == (0, "")
    assert hash_results(tmp_path / "run") == hash_results(done)


def test_a_torn_newest_checkpoint_gives_way_and_is_set_aside(home, done, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.copytree(done / name, run / name)
    torn = run / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    code, errors = go(home, run, save_steps=4)
    assert code == 0
    assert errors.startswith(f"passed over: {torn}: is not the file that was written")
    found = hash_results(run)
    aside = {name for name in found if name.startswith("checkpoint-6.corrupt/")}
    assert f"{torn.parent.name}.corrupt/optimizer.pt" in aside
    assert {name: found[name] for name in found.keys() - aside} == hash_results(done)


def test_when_no_checkpoint_is_whole_the_run_does_not_begin_anew(home, used):
    (used / "checkpoint-4" / "scheduler.pt").unlink()
    before = hash_files(used)
    code, errors = go(home, used, save_steps=4)
    assert code == 76
    assert "scheduler.pt: is missing" in errors
    assert hash_files(used) == before


def test_what_only_looks_like_a_checkpoint_is_left_alone(home, done, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done / "checkpoint-4", run / "checkpoint-abc")
    shutil.copytree(done / "checkpoint-4", tmp_path / "elsewhere")
    (run / "checkpoint-99").mkdir()
    (run / "checkpoint-7").write_text("a file")
    (run / "checkpoint-8").symlink_to(tmp_path / "elsewhere")
    (run / ".staging-999999999").mkdir()
    before = hash_files(run / "checkpoint-abc")
    code, errors = go(home, run, save_steps=4, resume="no")
    assert code == 0
    assert [line.split(":")[1].split("-")[-1] for line in errors.splitlines()] == ["99", "8", "7"]
    assert (run / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
    assert hash_files(run / "checkpoint-abc") == before
    assert (run / "checkpoint-7").is_file()
    assert (run / "checkpoint-8").is_symlink()
    assert not (run / ".staging-999999999").exists()


def test_a_second_process_on_the_folder_is_refused(home, used):
    before = hash_files(used)
    with atomic.lock_folder(used):
        code, errors = go(home, used, save_steps=4)
    assert code == 73
    assert "is writing here; wait for it or name another folder" in errors
    assert hash_files(used) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_75(home, done, tmp_path, monkeypatch, number):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(StopOnSignal, "on_step_begin", on_step_begin)
    code, errors = go(home, tmp_path / "run", save_steps=4)
    assert code == 75
    assert f"stopped by {number.name} and saved at step 3 of 6" in errors
    monkeypatch.undo()
    assert go(home, tmp_path / "run", save_steps=4) == (0, "")
    names = ("model.safetensors", "checkpoint-6/trainer_state.json", "checkpoint-6/optimizer.pt")
    ours, theirs = hash_files(tmp_path / "run"), hash_files(done)
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_a_signal_in_the_last_step_lets_the_run_finish(home, done, tmp_path, monkeypatch):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StopOnSignal, "on_step_begin", on_step_begin)
    assert go(home, tmp_path / "run", save_steps=4) == (0, "")
    assert hash_results(tmp_path / "run") == hash_results(done)


def test_epochs_instead_of_steps(home, tmp_path):
    assert go(home, tmp_path / "run", max_steps=None, epochs=2, batch_size=3) == (0, "")
    state = json.loads((list_checkpoints(tmp_path / "run")[0] / "trainer_state.json").read_text())
    assert state["log_history"][-1]["epoch"] == pytest.approx(2, abs=0.5)
    assert state["log_history"][-1]["epoch"] >= 2


def test_overlong_conversations_are_announced(home, tmp_path, capsys):
    data = write_chats(tmp_path / "data", [*invent_talks(4), talk("long " * 20, "short")])
    assert go(home, tmp_path / "run", data_dir=data, max_steps=1) == (0, "")
    line = f"1 conversations are longer than --seq_len 64: --overlong drop costs {100 + 5 + 4} tokens"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "run" / "train.log").read_text()


# --- stage B from stage A


def test_stage_b_takes_shape_tokenizer_and_context_from_stage_a(home, tmp_path):
    assert go(home, tmp_path / "run", **INIT, max_steps=1, lr=1e-9) == (0, "")
    manifest, parent = read_manifest(tmp_path / "run"), read_manifest(home / "done")
    weights = parent["files"]["model.safetensors"]["sha256"]
    assert manifest["parent"]["from"] == str(home / "done")
    assert (manifest["parent"]["step"], manifest["parent"]["weights"]) == (4, weights)
    assert (manifest["parent"]["sources"], manifest["parent"]["parent"]) == (parent["sources"], None)
    assert manifest["compare"]["init_weights"] == weights
    assert manifest["longest_row"] == 64 == parent["longest_row"]
    ours, theirs = (load_model(folder).state_dict() for folder in (tmp_path / "run", home / "done"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-7) for name in theirs)


def test_a_named_checkpoint_of_an_unfinished_run_is_an_init(home, tmp_path):
    init = "{home}/undone/checkpoint-4"
    assert go(home, tmp_path / "run", cfg=None, init_model_dir=init, max_steps=1) == (0, "")


def test_other_weights_of_the_parent_are_another_run(home, used, tmp_path):
    run = tmp_path / "run"
    assert go(home, run, max_steps=1, **INIT) == (0, "")
    code, errors = go(home, run, max_steps=1, cfg=None, init_model_dir=str(used / "checkpoint-4"))
    assert code == 78
    assert "init_weights was " in errors


def test_a_plain_gpt2_gets_rows_for_the_control_tokens_and_is_said_to_be_unverified(home, tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=257, **SHAPE)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    BYTES.save(tmp_path / "plain", chat_template=CHAT_TEMPLATE)
    flags = {"cfg": None, "init_model_dir": str(tmp_path / "plain"), "max_steps": 1}
    assert go(home, tmp_path / "run", **flags) == (0, "")
    assert f"{tmp_path / 'plain'}: has no manifest, its files were not verified" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "run")
    assert manifest["parent"]["weights"] == "not verified"
    model = load_model(tmp_path / "run")
    assert model.config.vocab_size == BYTES.vocab_size_padded
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "run")
    assert generation.eos_token_id == [BYTES.end_id, BYTES.endoftext_id]


# --- small parts


def test_a_config_by_name_or_by_path(home):
    assert find_config(Path("small_test")) == MODELS / "small_test.json"
    assert find_config(home / "c.json") == home / "c.json"


def test_auto_takes_a_device_that_is_there():
    flags = TrainFlags(device="auto")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    assert there[choose_device(flags, {})]
