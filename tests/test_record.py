"""What benchmarks/record.py writes down of a measurement."""

import json

from benchmarks import record


def test_a_figure_of_a_gpu_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100")
    record.write_result("generate_gpu", {"median": 2.0}, {"new": 3}, "cuda")
    record.write_result("generate_cpu_fp32", {"median": 2.0}, {"new": 3})
    machines = [
        json.loads((tmp_path / f"generate_{row}.json").read_text())["machine"] for row in ("gpu", "cpu_fp32")
    ]
    assert machines[0] == f"NVIDIA H100; {machines[1]}"
    assert f"| {machines[0]} |" in record.format_table()
