"""What benchmarks/bench_train.py measures on a GPU, walked through on a CPU with shapes of a few weights."""

import json

import pytest
from tiny import write_config

from benchmarks import bench_train, record
from firstwords.dataset import open_train
from firstwords.tokenizer import load_tokenizer


def test_a_store_of_as_many_words_as_gpt2_has_is_drawn(tmp_path):
    tokenizer = load_tokenizer(bench_train.draw_store(tmp_path / "data", 50_298, 4096))
    assert (len(tokenizer), tokenizer.vocab_size_padded) == (50_304, 50_304)
    blocks = open_train(tmp_path / "data", tokenizer, 1024, seed=0, assistant_only=False)
    assert blocks.rows_per_epoch >= 3


RIVALS = ("vs_published", "vs_stock", "vs_nanogpt")
# A foreign trainer that knows the vocabulary, and where the tokens are.
NANOGPT = """
import itertools, pickle, sys
from pathlib import Path
flags = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
assert pickle.loads((Path(flags["dataset"]) / "meta.pkl").read_bytes()) == {"vocab_size": 50_304}
assert (Path(flags["dataset"]) / "train.bin").is_file()
for step in itertools.count():
    print(f"iter {step}: loss 4.2500, time 500.00ms, mfu 1.00%", flush=True)
"""


@pytest.mark.slow  # three trainers, each a process of its own
def test_the_figures_of_a_gpu_are_written_to_the_last(tmp_path, monkeypatch):
    shrunk = {"device": "cpu", "seq_len": 16, "batch_size": 1, "grad_accum": 1, "steps": 1}
    start = bench_train.start

    def start_small(name, **words):
        words.pop("torch_compile", None)
        return start(name, **words | shrunk | {"bf16": False})

    monkeypatch.setattr(bench_train, "start", start_small)
    monkeypatch.setattr(bench_train, "find_device", str)
    monkeypatch.setattr(bench_train, "measure_matmul_rate", lambda device, bf16: 1e12)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench_train, "CONFIGS", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench_train, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    write_config(tmp_path / "baseline_124m.json", n_embd=8, n_positions=16)
    (tmp_path / "train.py").write_text(NANOGPT)
    bench_train.main(["--device", "cuda", "--sizes", "124m", "--pairs", "1", "--nanogpt", str(tmp_path)])
    rows = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    for rival in RIVALS[:2]:
        losses = rows[f"train_gpu_124m_{rival}"]["losses"]
        assert list(losses["rival"]) == ["1", "2"]
        assert losses["ours"].keys() >= losses["rival"].keys()
    assert all(row["machine"].startswith("a GPU; ") for row in rows.values())
    assert set(rows) == {f"train_gpu_124m_{row}" for row in (*RIVALS, "share")}
