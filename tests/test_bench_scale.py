"""What benchmarks/bench_scale.py starts on several GPUs, by two processes on a CPU."""

import json

import pytest
from tiny import run_script, write_config

from benchmarks import bench_scale, record
from benchmarks.turns import say_flags
from firstwords.args import check_flags, parse_train_args


def test_a_machine_with_one_gpu_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    code, errors = run_script(bench_scale, ["--device", "cuda"])
    why = "needs two GPUs or more, and there is 1; measure on such a machine"
    assert (code, errors) == (2, f"error: --device cuda: {why}\n")


def test_both_sides_train_on_the_same_rows(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(bench_scale, "compare", lambda *words, **settings: asked.append((words, settings)))
    bench_scale.measure_gpus(tmp_path / "data", 5)
    for (_, data, flags, _, _), _ in asked:
        words = [*say_flags(flags), "--data_dir", str(data), "--model_dir", "m", "--no_assistant_only_loss"]
        check_flags(parse_train_args(words)[0])
        assert flags["grad_accum"] % 3 == 0
    assert {words[0] for words, _ in asked} == {"scale_gpu_ddp", "scale_gpu_fsdp"}


@pytest.mark.slow  # starts two processes, and one
def test_accelerate_starts_what_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "describe_setup", lambda settings, device: {"settings": settings})
    cfg = str(write_config(tmp_path / "c.json"))
    flags = bench_scale.FLAGS | {"cfg": cfg, "seq_len": 32, "grad_accum": 2}
    data = bench_scale.write_store(tmp_path / "data")
    launchers = [bench_scale.accelerate("ddp", 2), bench_scale.launch(1)]
    bench_scale.compare("scale_gpu_ddp", data, flags, launchers, 1, processes=[2, 1])
    row = json.loads((tmp_path / "results" / "scale_gpu_ddp.json").read_text())
    assert row["median"] > 0
    assert row["settings"]["processes"] == [2, 1]
