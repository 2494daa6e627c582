"""What benchmarks/bench_preflight.py asks of train.py, and what it says when that fails."""

import json

import pytest
from tiny import write_config

from benchmarks import bench_preflight, record
from firstwords.args import check_flags, parse_train_args


def test_a_gpu_is_asked_for_a_run_whose_memory_outweighs_the_probe(tmp_path):
    words = bench_preflight.say_run(bench_preflight.FLAGS["cuda"], tmp_path)
    flags, _ = parse_train_args([*words, "--model_dir", str(tmp_path / "run")])
    check_flags(flags)
    assert (str(flags.cfg), flags.seq_len, flags.bf16) == ("baseline_124m", 1024, True)


def test_why_a_pair_failed_is_shown(tmp_path):
    with pytest.raises(
        SystemExit, match=f"(?s)-m benchmarks.bench_preflight ended with 66:.*{tmp_path}/none"
    ):
        bench_preflight.call_pair(bench_preflight.say_run({"cfg": "small_test"}, tmp_path / "none"))


@pytest.mark.slow  # a preflight and a run
def test_a_pair_is_measured_on_drawn_words(tmp_path, monkeypatch):
    cfg = write_config(tmp_path / "c.json", n_embd=8)
    quick = {"cfg": cfg, "seq_len": 64, "batch_size": 2, "max_steps": 4, "eval_steps": 0}
    monkeypatch.setitem(bench_preflight.FLAGS, "cpu", quick)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "describe_setup", lambda settings, device: {})
    bench_preflight.main(["--pairs", "1"])
    row = json.loads((tmp_path / "results" / "preflight_time.json").read_text())
    assert row["median"] > 0
