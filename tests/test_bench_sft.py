"""What the sides of benchmarks/bench_sft.py train on."""

import json

import pytest
from tiny import invent_talks, write_chats, write_config

from benchmarks import bench_sft, bench_train, record


def test_on_a_gpu_ours_has_as_many_tokens_a_step_as_packing_has(tmp_path, monkeypatch):
    sides = []
    monkeypatch.setattr(bench_sft, "find_spec", lambda name: True)
    monkeypatch.setattr(bench_sft, "version", lambda name: "1")
    monkeypatch.setattr(bench_sft, "has_bf16", lambda device: True)
    monkeypatch.setattr(bench_sft, "find_device", str)
    monkeypatch.setattr(bench_sft, "TrainerSide", lambda module, words: sides.append(words) or Closed())
    monkeypatch.setattr(bench_sft, "compare_losses", lambda args: {})
    monkeypatch.setattr(bench_sft, "compare", lambda *words: None)
    bench_sft.main(["--device", "cuda", "--rivals", "trl_packing", "--data_dir", str(tmp_path)])
    ours, rival = ({words[0]: words[words.index("--batch_size") + 1]} for words in sides)
    assert (ours, rival) == ({"ours": "8"}, {"trl_packing": "8"})


class Closed:
    """A side that was never started."""

    def close(self):
        """End it."""


@pytest.mark.slow  # two trainers, each a process of its own
def test_padding_is_measured(tmp_path, monkeypatch):
    data = write_chats(tmp_path / "chats", invent_talks(40))
    write_config(tmp_path / "small_test.json", n_embd=8, n_positions=1024)
    monkeypatch.setattr(bench_sft, "CONFIGS", tmp_path)
    monkeypatch.setattr(bench_train, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    bench_sft.main(["--rivals", "padded", "--pairs", "1", "--data_dir", str(data)])
    row = json.loads((tmp_path / "results" / "sft_vs_padded.json").read_text())
    losses = row["settings"]["initial_losses"]
    assert losses["ours"] == pytest.approx(losses["rival"], abs=1e-5)
    assert list(row["losses"]["rival"]) == ["1", "2"]
