"""The checkpoint and the run folder: what is whole, what is chosen, what is loaded."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import BYTES, SHAPE, hash_files, write_config

from firstwords import atomic, checkpoint
from firstwords.checkpoint import (
    COMPLETE,
    MANIFEST,
    find_checkpoint,
    find_init,
    find_resumable,
    list_checkpoints,
    load_model,
    publish,
    publish_final,
    read_manifest,
    read_step,
    set_aside,
    verify,
    write_manifest,
)
from firstwords.errors import Damaged, IOFailed, Mismatch, MissingInput
from firstwords.model import attention, build_model

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def stage(folder, step):
    """Write a checkpoint of files that hold only their name and step."""
    folder.mkdir(parents=True)
    for name in (*MODEL_FILES, *STATE_FILES):
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 20)
    write_manifest(folder, {"step": step, "longest_row": 64})
    return folder


@pytest.fixture
def run(tmp_path):
    """A run that has not reached its end, with checkpoints of the steps 5, 9 and 10."""
    for step in (9, 10, 5):
        stage(tmp_path / "run" / f"checkpoint-{step}", step)
    (tmp_path / "run" / "train.log").write_text("step 1/20\n")
    return tmp_path / "run"


def finish(run):
    publish_final(list_checkpoints(run)[0], run)
    return run


def damage(path, how):
    """Spoil one file as a torn write, a bad disk or a person would."""
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "zeroed":
        path.write_bytes(bytes(len(data)))
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "flipped":
        place = len(data) // 3
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


# --- what is whole


@pytest.mark.parametrize("how", ["missing", "empty", "zeroed", "cut", "longer", "flipped"])
@pytest.mark.parametrize("name", [*MODEL_FILES, *STATE_FILES])
def test_verify_sees_damage_in_every_file(run, name, how):
    folder = run / "checkpoint-9"
    verify(folder)
    damage(folder / name, how)
    with pytest.raises(Damaged, match=f"^{folder / name}: .*; go back to another checkpoint"):
        verify(folder)


@pytest.mark.parametrize("how", ["missing", "empty", "zeroed", "cut"])
def test_verify_sees_damage_in_the_manifest(run, how):
    damage(run / "checkpoint-9" / MANIFEST, how)
    with pytest.raises(Damaged):
        verify(run / "checkpoint-9")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"files": 3}', '{"files": {"config.json": {}}}'])
def test_a_manifest_of_another_kind_is_damage(run, text):
    (run / "checkpoint-9" / MANIFEST).write_text(text)
    with pytest.raises(Damaged):
        verify(run / "checkpoint-9")


def test_a_file_that_the_manifest_does_not_name_does_no_harm(run):
    (run / "checkpoint-9" / "evaluation.json").write_text("{}")
    verify(run / "checkpoint-9")


def test_the_manifest_names_every_file_and_keeps_what_it_was_given(run):
    manifest = read_manifest(run / "checkpoint-9")
    assert (manifest["step"], manifest["longest_row"]) == (9, 64)
    hashes = hash_files(run / "checkpoint-9")
    del hashes[MANIFEST]
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == hashes
    assert read_step(run / "checkpoint-9") == 9
    assert read_step(None) == 0
    assert read_manifest(run) == {}


# --- which is chosen


def test_the_newest_is_that_of_the_highest_step_whatever_the_file_times(run):
    os.utime(run / "checkpoint-5", (4e9, 4e9))
    assert list_checkpoints(run) == [run / f"checkpoint-{step}" for step in (10, 9, 5)]
    assert find_resumable(run) == (run / "checkpoint-10", [])


def test_what_only_looks_like_a_checkpoint_is_never_chosen(run, tmp_path):
    stage(run / "checkpoint-abc", 99)
    stage(run / "checkpoint-99.tmp", 99)
    stage(run / "checkpoint-98.corrupt", 98)
    stage(run / "tmp-checkpoint-97", 97)
    stage(run / ".staging-1" / "checkpoint-96", 96)
    stage(run / "checkpoint--95", 95)
    (run / "checkpoint-94").write_text("a file")
    (run / "checkpoint-93").mkdir()
    (run / "checkpoint-92").symlink_to(stage(tmp_path / "elsewhere", 92))
    (run / "checkpoint-91").symlink_to(tmp_path / "nothing")
    torn = stage(run / "checkpoint-90", 90)
    (torn / MANIFEST).unlink()
    folder, passed_over = find_resumable(run)
    assert folder == run / "checkpoint-10"
    assert [reason.split(":")[0].split("-")[-1] for reason in passed_over] == ["94", "93", "92", "91", "90"]
    assert find_checkpoint(run) == run / "checkpoint-10"


def test_a_damaged_newest_gives_way_to_the_one_before_and_is_set_aside(run):
    damage(run / "checkpoint-10" / "optimizer.pt", "cut")
    before = hash_files(run / "checkpoint-10")
    folder, passed_over = find_resumable(run)
    assert folder == run / "checkpoint-9"
    assert len(passed_over) == 1
    assert "checkpoint-10/optimizer.pt" in passed_over[0]
    assert find_checkpoint(run) == run / "checkpoint-9"
    assert set_aside(run, 9) == [run / "checkpoint-10.corrupt"]
    assert hash_files(run / "checkpoint-10.corrupt") == before
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-9", "checkpoint-5"]
    stage(run / "checkpoint-10", 10)
    assert set_aside(run, 9) == [run / "checkpoint-10.corrupt1"]
    assert (run / "checkpoint-10.corrupt").is_dir()


def test_when_none_is_whole_that_is_an_error(run):
    for folder in list_checkpoints(run):
        damage(folder / "model.safetensors", "flipped")
    with pytest.raises(Damaged, match="no checkpoint is whole .*checkpoint-10/model.safetensors"):
        find_resumable(run)
    with pytest.raises(Damaged):
        find_checkpoint(run)


def test_no_checkpoint_yet(tmp_path):
    assert find_resumable(tmp_path) == (None, [])
    with pytest.raises(MissingInput, match="holds no checkpoint yet"):
        find_checkpoint(tmp_path)


# --- publishing


def test_publishing_prunes_by_step_and_keeps_the_newest(run):
    for step in (5, 9):
        os.utime(run / f"checkpoint-{step}", (4e9 + step, 4e9 + step))
    publish(stage(run / ".staging-1" / "checkpoint-15", 15), run, keep=2)
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-15", "checkpoint-10"]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-15"]
    verify(run / "checkpoint-15")


def test_pruning_leaves_what_is_not_ours(run):
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-abc").mkdir()
    publish(stage(run / ".staging-1" / "checkpoint-15", 15), run, keep=1)
    names = sorted(path.name for path in run.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-15", "checkpoint-abc"]


def test_what_is_not_ours_and_has_the_name_is_kept_aside(run, tmp_path):
    (run / "checkpoint-15").mkdir()
    (run / "checkpoint-15" / "model.safetensors").write_text("torn")
    (run / "checkpoint-16").write_text("a file")
    (run / "checkpoint-17").symlink_to(tmp_path)
    for step in (15, 16, 17):
        publish(stage(run / ".staging-1" / f"checkpoint-{step}", step), run, keep=2)
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-17", "checkpoint-16"]
    verify(run / "checkpoint-16")
    verify(run / "checkpoint-17")
    assert (run / "checkpoint-15.corrupt" / "model.safetensors").read_text() == "torn"
    assert (run / "checkpoint-16.corrupt").read_text() == "a file"
    assert (run / "checkpoint-17.corrupt").is_symlink()


def test_nothing_is_pruned_for_a_checkpoint_that_does_not_verify(run):
    damage(run / "checkpoint-10" / "optimizer.pt", "flipped")
    publish(stage(run / ".staging-1" / "checkpoint-15", 15), run, keep=2)
    assert [folder.name for folder in list_checkpoints(run)] == [
        *("checkpoint-15", "checkpoint-10", "checkpoint-9"),
    ]


def test_pruning_reads_again_only_what_somebody_wrote_into(run, monkeypatch):
    verified, read = {}, []
    publish(stage(run / ".staging-1" / "checkpoint-11", 11), run, keep=2, verified=verified)
    monkeypatch.setattr(checkpoint, "is_whole", lambda folder: read.append(folder.name))
    publish(stage(run / ".staging-1" / "checkpoint-12", 12), run, keep=2, verified=verified)
    assert read == []
    assert sorted(folder.name for folder in verified) == ["checkpoint-11", "checkpoint-12"]
    monkeypatch.undo()
    damage(run / "checkpoint-12" / "optimizer.pt", "flipped")
    publish(stage(run / ".staging-1" / "checkpoint-13", 13), run, keep=2, verified=verified)
    assert [read_step(folder) for folder in list_checkpoints(run)] == [13, 12, 11]


def test_a_manifest_with_another_word_in_it_is_damage(run):
    path = run / "checkpoint-9" / MANIFEST
    manifest = json.loads(path.read_text())
    for change in ({"step": 8}, {"longest_row": 65}, {"more": 1}):
        path.write_text(atomic.format_json(manifest | change))
        with pytest.raises(Damaged, match="manifest.json: is not what was written .sha256"):
            verify(run / "checkpoint-9")


def test_a_disk_that_refuses_leaves_what_was_there(run, monkeypatch):
    before = hash_files(run)

    def refuse(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync_folder", refuse)
    staging = stage(run / ".staging-1" / "checkpoint-15", 15)
    with pytest.raises(IOFailed, match="saving failed .No space left on device.; free some space"):
        publish(staging, run, keep=1)
    shutil.rmtree(run / ".staging-1")
    assert hash_files(run) == before


def test_the_finished_run_is_the_model_without_the_state(run):
    finish(run)
    assert checkpoint.is_complete(run)
    assert (run / COMPLETE).read_text() == "step 10\n"
    names = {path.name for path in run.iterdir() if path.is_file()}
    assert names == {*MODEL_FILES, MANIFEST, COMPLETE, "train.log"}
    assert read_manifest(run)["step"] == 10
    verify(run)
    for name in MODEL_FILES:
        assert (run / name).read_bytes() == (run / "checkpoint-10" / name).read_bytes()


@pytest.mark.parametrize("moved", range(len(MODEL_FILES) + 2))
def test_finishing_that_is_killed_half_way_leaves_the_run_as_good_as_before(run, monkeypatch, moved):
    class Killed(BaseException):
        pass

    left = iter(range(moved))
    rename = os.rename

    def rename_or_die(source, target):
        if next(left, None) is None:
            raise Killed
        rename(source, target)

    monkeypatch.setattr("pathlib.os.rename", rename_or_die)
    with pytest.raises(Killed):
        finish(run)
    monkeypatch.undo()
    assert not checkpoint.is_complete(run)
    assert read_step(find_checkpoint(run)) == 10
    assert find_resumable(run)[0] == run / "checkpoint-10"
    with pytest.raises(Mismatch):
        find_init(run)
    atomic.sweep_leftovers(run)
    verify(find_checkpoint(finish(run)))


# --- what a chat or another stage may load (DESIGN, contract 4)


def test_a_finished_run_is_its_own_model(run):
    finish(run)
    assert find_checkpoint(run) == find_init(run) == run


@pytest.mark.parametrize("find", [find_checkpoint, find_init])
@pytest.mark.parametrize("name", [*MODEL_FILES, MANIFEST])
def test_a_finished_run_that_is_not_whole_is_refused(run, find, name):
    finish(run)
    damage(run / name, "missing")
    with pytest.raises(Damaged):
        find(run)


def test_an_unfinished_run_may_chat_but_not_be_an_init(run):
    assert find_checkpoint(run) == run / "checkpoint-10"
    with pytest.raises(Mismatch, match=f"has not reached its end.*name {run / 'checkpoint-10'}"):
        find_init(run)


def test_a_named_checkpoint_may_do_both(run):
    for find in (find_checkpoint, find_init):
        assert find(run / "checkpoint-9") == run / "checkpoint-9"
    damage(run / "checkpoint-9" / "tokenizer.json", "flipped")
    for find in (find_checkpoint, find_init):
        with pytest.raises(Damaged):
            find(run / "checkpoint-9")


@pytest.mark.parametrize("find", [find_checkpoint, find_init])
def test_a_plain_folder_needs_no_manifest(tmp_path, find):
    (tmp_path / "config.json").write_text("{}")
    assert find(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("find", "flag"), [(find_checkpoint, "--model_dir"), (find_init, "--init_model_dir")]
)
def test_a_mistyped_folder_names_the_nearest(run, find, flag):
    with pytest.raises(MissingInput, match=f"^{flag} .*rnu: is no folder; did you mean 'run'"):
        find(run.parent / "rnu")
    with pytest.raises(MissingInput, match="nothing is beside it"):
        find(run / "no" / "where")
    with pytest.raises(MissingInput):
        find(run / "train.log")


def test_a_folder_without_a_model_is_no_init(tmp_path):
    with pytest.raises(MissingInput, match="holds no model; name a run or a checkpoint"):
        find_init(tmp_path)


# --- loading weights


@pytest.fixture
def saved(tmp_path):
    """A model folder, and the model that was saved there."""
    model = build_model(write_config(tmp_path / "c.json", initializer_range=0.3), BYTES, seed=0).eval()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(30)[None]).logits


def test_what_was_saved_is_loaded(saved):
    folder, model = saved
    loaded = load_model(folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.config._attn_implementation == attention.NAME
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_config_of_another_depth_is_refused(saved):
    folder, _ = saved
    for depth in (SHAPE["n_layer"] + 1, SHAPE["n_layer"] - 1):
        edit_config(folder, n_layer=depth)
        with pytest.raises(Mismatch, match="model.safetensors is not of the shape in config.json"):
            load_model(folder)


@pytest.mark.parametrize("wrong", [{"n_embd": 16}, {"vocab_size": 512}, {"n_positions": 64}, {"n_inner": 9}])
def test_a_config_of_other_sizes_is_refused(saved, wrong):
    folder, _ = saved
    edit_config(folder, **wrong)
    with pytest.raises(Mismatch):
        load_model(folder)


def test_weights_under_other_names_are_refused(saved):
    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.scale"] = weights.pop("transformer.ln_f.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Mismatch, match="2 tensors"):
        load_model(folder)


def test_weights_of_another_model_are_refused(saved, tmp_path):
    folder, _ = saved
    config = transformers.GPT2Config(vocab_size=384, **SHAPE | {"n_embd": 64})
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(Mismatch):
        load_model(folder)


def test_pickled_weights_are_never_loaded(saved):
    folder, model = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MissingInput, match="has no model.safetensors; pickled weights are never loaded"):
        load_model(folder)


def test_torn_weights_and_a_broken_config_are_damage(saved):
    folder, _ = saved
    damage(folder / "model.safetensors", "cut")
    with pytest.raises(Damaged, match="the weights cannot be read"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(Damaged, match="config.json: is broken"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingInput, match="has no config.json"):
        load_model(folder)


def test_a_model_of_another_kind_is_refused(saved):
    folder, _ = saved
    edit_config(folder, model_type="llama")
    with pytest.raises(Mismatch, match="is a 'llama' model, not GPT-2"):
        load_model(folder)


def test_code_and_kernels_that_the_config_names_are_ignored(saved):
    folder, model = saved
    (folder / "evil.py").write_text("raise SystemExit('the code of the folder was run')\n")
    edit_config(
        folder,
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        torch_dtype="float16",
    )
    loaded = load_model(folder)
    assert loaded.config._attn_implementation == attention.NAME
    assert loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "auto_map")
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_folder_as_the_hub_has_it(saved, tmp_path):
    """Keys without the prefix, the old mask buffers among them, and the composed activation."""
    folder, model = saved
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, activation_function="gelu_new")
    loaded = load_model(folder)
    assert loaded.config.activation_function == "gelu_pytorch_tanh"
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-4)
