"""The loss by tokens: the same for every batch size, by place and by turn."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import BYTES, invent_talks, talk, write_chats, write_config, write_store
from torch.nn import functional

from firstwords import loss as loss_module
from firstwords.dataset import PackedChats, TokenWindows, collate, read_chats
from firstwords.loss import Loss, evaluate_loss
from firstwords.model import IGNORED, build_model
from firstwords.tokenstore import open_store


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = write_config(tmp_path_factory.mktemp("model") / "c.json", initializer_range=0.3)
    return build_model(cfg, BYTES, seed=0).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Seven packed rows with uneven numbers of labels."""
    data = write_chats(tmp_path_factory.mktemp("data") / "chats", invent_talks(14, seed=3))
    dataset = PackedChats(read_chats(data / "train_tokenized.jsonl"), BYTES, 99, seed=0)
    assert len(dataset) > 5
    return dataset


def sum_by_hand(model, dataset):
    """Return the nats over all labels by the plain model, their number, and their bytes."""
    nats, labels = 0.0, []
    for index in range(len(dataset)):
        row = collate([dataset[index]])
        targets = row.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = transformers.GPT2LMHeadModel.forward(model, **row, use_cache=False).logits[0, :-1]
        total = functional.cross_entropy(logits.double(), targets, ignore_index=IGNORED, reduction="sum")
        nats += float(total)
        labels += targets[targets != IGNORED].tolist()
    return nats, len(labels), sum(label < 256 for label in labels)


def check_loss(loss_of, model, dataset):
    """The same for batches of 1, 2 and 5 rows, and what comes out by hand."""
    nats, tokens, num_bytes = sum_by_hand(model, dataset)
    for batch_size in (1, 2, 5):
        loss = loss_of(model, dataset, BYTES, batch_size=batch_size)
        assert loss.mean == pytest.approx(nats / tokens, rel=1e-5)
        assert loss.tokens == tokens
        assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
        assert loss.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_the_loss_of_packed_rows(model, rows):
    check_loss(evaluate_loss, model, rows)


def test_the_loss_of_a_token_store(model, tmp_path):
    data = write_store(tmp_path / "data", ["x"], ["tea and birds " * 9, "seven"])
    check_loss(evaluate_loss, model, TokenWindows(open_store(data, "val").tokens, BYTES, 32))


def test_a_mean_over_batches_is_seen(model, rows):
    def mean_of_batches(model, dataset, tokenizer, *, batch_size):
        batches = range(0, len(dataset), batch_size)
        losses = []
        for begin in batches:
            batch = collate([dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))])
            losses.append(float(model(**batch).loss.detach()))
        whole = evaluate_loss(model, dataset, tokenizer, batch_size=batch_size)
        return replace(whole, nats=whole.tokens * sum(losses) / len(losses))

    with pytest.raises(AssertionError):
        check_loss(mean_of_batches, model, rows)


def test_dropout_is_off_and_the_mode_is_put_back(tmp_path, rows):
    cfg = write_config(tmp_path / "c.json", resid_pdrop=0.5, embd_pdrop=0.5)
    model = build_model(cfg, BYTES, seed=0).train()
    losses = {evaluate_loss(model, rows, BYTES, batch_size=4).nats for _ in range(2)}
    assert len(losses) == 1
    assert model.training
    model.eval()
    evaluate_loss(model, rows, BYTES, batch_size=4)
    assert not model.training


def test_under_bf16_it_is_nearly_the_same(model, rows):
    exact = evaluate_loss(model, rows, BYTES, batch_size=4)
    rough = evaluate_loss(model, rows, BYTES, batch_size=4, bf16=True)
    assert rough.mean == pytest.approx(exact.mean, rel=0.05)
    assert rough.mean != exact.mean


def test_figures_at_the_edges():
    assert Loss(nats=5000.0, tokens=2, num_bytes=0).perplexity == math.inf
    assert Loss(nats=math.log(2), tokens=1, num_bytes=0).bits_per_byte == pytest.approx(1)


# --- by place and by turn


def sum_parts(model, dataset):
    """Return by hand (nats, labels) by the power of two of the place, and by turn, a row at a time."""
    places, turns, correct = {}, {}, 0
    for index in range(len(dataset)):
        row = dataset[index]
        labels = row["labels"]
        positions = row.get("position_ids", torch.arange(len(labels)))
        inputs = {name: rows[None] for name, rows in row.items() if name != "labels"}
        with torch.no_grad():
            logits = transformers.GPT2LMHeadModel.forward(model, **inputs, use_cache=False).logits[0]
        turn = 0
        for place, label in enumerate(labels.tolist()):
            turn = 0 if positions[place] == 0 else turn
            if row["input_ids"][place] == BYTES.role_id("assistant"):
                turn += 1
            if label == IGNORED:
                continue
            nats = -float(logits[place - 1].log_softmax(-1)[label])
            correct += int(logits[place - 1].argmax()) == label
            first = 1 << (int(positions[place]).bit_length() - 1)
            for sums, key in ((places, first), (turns, turn)):
                before = sums.get(key, (0.0, 0))
                sums[key] = (before[0] + nats, before[1] + 1)
    return places, turns, correct


def check_parts(parts, expected):
    assert set(parts) == set(expected)
    for key, (nats, tokens) in expected.items():
        assert parts[key].tokens == tokens
        assert parts[key].nats == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_parts_of_packed_rows(model, rows, batch_size):
    places, turns, correct = sum_parts(model, rows)
    loss = evaluate_loss(model, rows, BYTES, batch_size=batch_size)
    check_parts(loss.by_position, places)
    check_parts(loss.by_turn, turns)
    assert set(turns) == {1, 2}
    assert loss.correct == correct
    assert loss.accuracy == correct / loss.tokens


def test_a_text_has_no_turns(model, tmp_path):
    data = write_store(tmp_path / "data", ["x"], ["tea and birds " * 9])
    loss = evaluate_loss(model, TokenWindows(open_store(data, "val").tokens, BYTES, 32), BYTES, batch_size=3)
    assert loss.by_turn == {}
    assert list(loss.by_position) == [1, 2, 4, 8, 16]
    assert sum(part.tokens for part in loss.by_position.values()) == loss.tokens


def test_logits_in_pieces_give_the_same(model, rows, monkeypatch):
    whole = evaluate_loss(model, rows, BYTES, batch_size=4)
    monkeypatch.setattr(loss_module, "_LOGITS_AT_ONCE", 3 * model.config.vocab_size)
    pieces = evaluate_loss(model, rows, BYTES, batch_size=4)
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-6)
    assert pieces.correct == whole.correct


def test_a_model_that_knows_the_text_is_right_everywhere(tmp_path):
    """Positions alone say what comes: the output of place p is token p + 1."""
    model = build_model(write_config(tmp_path / "c.json", n_embd=128), BYTES, seed=0).eval()
    talks = write_chats(tmp_path / "chats", [talk("hi", "yes")])
    dataset = PackedChats(read_chats(talks / "train_tokenized.jsonl"), BYTES, 16, seed=0)
    ids = dataset[0]["input_ids"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        wide = torch.eye(128)
        model.transformer.wte.weight.zero_()
        for place, token in enumerate(ids[1:].tolist()):
            model.transformer.wpe.weight[place] = 2 * wide[place]
            model.transformer.wte.weight[token] += wide[place]
        model.transformer.ln_f.weight.fill_(9.0)
    assert evaluate_loss(model, dataset, BYTES, batch_size=1).accuracy == 1.0
