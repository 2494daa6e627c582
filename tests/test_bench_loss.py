"""The recipe of Tiny Shakespeare, and what benchmarks/bench_loss.py makes of runs."""

import json
import math
import shlex
from dataclasses import replace

import pytest
from tiny import run_script

import evaluate
import prep_text_corpus
import train
from benchmarks import bench_loss, record
from firstwords import trainer
from firstwords.args import check_flags, parse_train_args
from firstwords.checkpoint import list_checkpoints, read_manifest
from firstwords.model import read_config
from firstwords.opening import find_config


def test_the_recipe_of_shakespeare_from_a_text_to_a_loss(tmp_path):
    text = tmp_path / "play.txt"
    text.write_text("First Citizen:\nSpeak, speak.\n\nAll:\nResolved. Resolved.\n\n" * 60)
    words = ["--dataset", str(text), "--tokenizer", "char", "--out_dir", str(tmp_path / "data")]
    assert run_script(prep_text_corpus, words) == (0, "")
    here = ["--data_dir", tmp_path / "data", "--model_dir", tmp_path / "run", "--device", "cpu"]
    recipe = ["--recipe", "configs/recipes/shakespeare.yaml", "--max_steps", 6]
    assert run_script(train, [*recipe, *here]) == (0, "")
    history = json.loads((list_checkpoints(tmp_path / "run")[0] / "trainer_state.json").read_text())
    in_training = history["log_history"][-1]["eval_loss"]
    assert run_script(evaluate, ["--model_dir", tmp_path / "run", "--no_baselines"])[0] == 0
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())["val_loss"]
    assert measured == pytest.approx(in_training, abs=1e-5)
    assert measured < math.log(30), "less than nothing learned"
    assert read_manifest(tmp_path / "run")["flags"]["optim"] == "normuon"


@pytest.mark.parametrize("name", bench_loss.CASES)
def test_all_arms_of_a_case_differ_in_the_optimizer_alone(name):
    case = bench_loss.CASES[name]
    seen = []
    for arm in case.arms.values():
        words = shlex.split(f"{arm} {case.shape} --data_dir d --model_dir m --max_steps 10 --device cpu")
        flags, extra = parse_train_args(words)
        check_flags(flags)
        trainer.build_training_arguments(replace(flags, bf16=False), extra, 10)
        seen.append((flags.cfg, flags.seq_len, flags.batch_size, flags.grad_accum, flags.bf16))
        assert flags.seq_len <= read_config(find_config(flags.cfg))["n_positions"]
    assert len(set(seen)) == 1
    assert {"ours", "nanogpt"} <= set(case.arms)
    assert {f"tokens_{name}_vs_{arm}" for arm in case.arms if arm != "ours"} <= set(record.ROWS)


LOSSES = {
    "nanogpt-2000": [{1000: 2.0, 2000: 1.9}, {1000: 2.1, 2000: 1.8}, {1000: 2.0, 2000: 1.7}],
    "adamw-2000": [{2000: 1.7}, {2000: 1.7}, {2000: 1.0}],
    "ours-500": [{250: 2.2, 500: 1.9}, {250: 2.1, 500: 1.85}, {250: 2.3, 500: 1.75}],
    "ours-1000": [{1000: 1.65}, {1000: 1.7}, {1000: 1.71}],
    "ours-2000": [{2000: 1.55}, {2000: 1.57}, {2000: 1.6}],
}


def test_the_rows_say_after_which_share_of_the_tokens_the_loss_is_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    bench_loss.write_rows("cpu_shape", bench_loss.CASES["cpu_shape"], LOSSES, "cpu")
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    found = {name: [row[key] for key in ("low", "median", "high")] for name, row in rows.items()}
    assert found == {
        "tokens_cpu_shape_vs_nanogpt": [0.25, 0.5, 1.0],
        "tokens_cpu_shape_vs_adamw": [0.5, 0.5, math.inf],
        "loss_cpu_shape_quarter": [1.75, 1.85, 1.9],
        "loss_cpu_shape": [1.55, 1.57, 1.6],
    }
    losses = "2.200 (2.100 to 2.300) | 1.850 (1.750 to 1.900)"
    assert f"| tokens_cpu_shape_vs_nanogpt | ours-500 | 384,000 | {losses} |" in record.format_curves()
    assert record.format_curves().count("| ours-500 |") == 1


def test_the_curve_of_a_rival_that_was_measured_apart_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for rival in bench_loss.RIVALS:
        case = bench_loss.keep_arms(bench_loss.CASES["cpu_shape"], ("ours", rival))
        losses = {arm: curves for arm, curves in LOSSES.items() if arm.startswith(("ours", rival))}
        bench_loss.write_rows("cpu_shape", case, losses, "cpu")
    assert record.format_curves().count("| adamw-2000 |") == 1


def test_rivals_that_are_not_asked_for_are_left_out():
    case = bench_loss.keep_arms(bench_loss.CASES["cpu_shape"], ("ours", "adamw"))
    assert list(case.arms) == ["ours", "adamw"]
