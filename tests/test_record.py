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


def test_pairs_of_another_machine_or_setting_are_measured_anew(tmp_path, capsys):
    kept = tmp_path / "row.pairs"

    def measure(setup, stop):
        figures = iter(range(2, 100))

        def run():
            if (figure := next(figures)) == stop:
                raise KeyboardInterrupt
            return float(figure)

        try:
            return record.measure_pairs(run, run, 3, kept=kept, setup=setup)["pairs"]
        except KeyboardInterrupt:
            return len(kept.read_text().splitlines()) - 1

    assert measure({"machine": "one"}, 6) == 2
    assert measure({"machine": "other"}, 5) == 1
    assert "begun anew" in capsys.readouterr().out
    assert measure({"machine": "other"}, None) == [(2.0, 3.0), (2.0, 3.0), (4.0, 5.0)]
    assert capsys.readouterr().out == ""
    assert not kept.exists()
