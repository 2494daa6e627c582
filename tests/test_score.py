"""Numbers that mean the same everywhere: the loss by tokens, and the marks of answers."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import BYTES, invent_talks, write_chats, write_config, write_store
from torch.nn import functional

from firstwords import score
from firstwords.dataset import PackedChats, TokenWindows, collate, read_chats
from firstwords.model import IGNORED, build_model
from firstwords.pydocs import GREETING_ANSWER, HeldOut, build_held_out
from firstwords.schema import Message
from firstwords.score import Answer, Loss, answer_questions, evaluate_loss, score_answers
from firstwords.session import ChatSession, Reply
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
    check_loss(evaluate_loss, model, TokenWindows(open_store(data, "val"), BYTES, 32))


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


# --- answers


def build_answer(kind, expected, text, *, stopped=True, drawn=True, subject="x"):
    return Answer(kind, subject, "?", expected, Reply(text, [], stopped, 0), drawn)


def test_marks_of_hand_made_answers():
    unknown = "I do not know that name."
    answers = [
        build_answer("question", "A.", "A.", subject="a"),
        build_answer("question", "A.", "A", subject="a"),
        build_answer("question", "B.", "B.", stopped=False, subject="b"),
        build_answer("question", "C.", "C.", drawn=False, subject="c"),
        build_answer("question", "C.", unknown, drawn=False, subject="c"),
        build_answer("followup", "(x)", "(x)"),
        build_answer("followup", "(y)", "(x)"),
        build_answer("swapped", unknown, unknown),
        build_answer("swapped", unknown, "I do not know its arguments."),
        build_answer("misspelt", unknown, "It opens a file."),
        build_answer("misspelt", unknown, unknown),
        build_answer("misspelt", unknown, " " + unknown),
        build_answer("greeting", "Hello!", "Hello!"),
    ]
    assert score_answers(answers) == {
        "exact_match": 1 / 3,
        "exact_match_all": 2 / 5,
        "stop_rate": 12 / 13,
        "followup_match": 1 / 2,
        "unknown_match": 3 / 5,
        "unknown_match_swapped": 2 / 2,
        "unknown_match_misspelt": 1 / 3,
        "false_unknown": 1 / 5,
        "greeting_match": 1.0,
        "num_questions": 3,
        "num_questions_all": 5,
        "num_symbols": 3,
        "num_followups": 2,
        "num_unknown": 5,
        "num_greetings": 1,
    }


def test_the_line_of_a_reply():
    row = build_answer("question", "A.", "A.", stopped=False, drawn=False, subject="a").row()
    assert row == {
        **{"kind": "question", "subject": "a", "prompt": "?", "expected": "A.", "reply": "A."},
        **{"exact": False, "stopped": False, "drawn": False},
    }


class Few(HeldOut):
    """Some of the real questions that are held out, and 5 invented names of each kind."""

    def draw(self, seed, count=200):
        return super().draw(seed, 20)

    def draw_unknown(self, seed, per_kind=50):
        return super().draw_unknown(seed, 5)


@pytest.fixture(scope="module")
def few():
    real = build_held_out()
    return Few(real.questions[::90], real.follow_ups[::200], real.greetings[:4])


@pytest.fixture
def oracle(few, monkeypatch):
    """A stand-in for `ask_many` that knows every answer; a follow-up only after its first turn."""
    known = {question.prompt: question.answer for question in few.questions}
    known |= {unknown.prompt: unknown.answer for unknown in few.draw_unknown(0)}
    known |= dict.fromkeys(few.greetings, GREETING_ANSWER)
    known |= {item.first_prompt: item.first_answer for item in few.follow_ups}

    def reply(session, text):
        asked = [message.content for message in session.messages if message.role == "user"]
        after = {(item.first_prompt, item.prompt): item.answer for item in few.follow_ups}
        answer = after[asked[-1], text] if asked else known[text]
        session.messages += [Message("user", text), Message("assistant", answer)]
        return Reply(answer, [], True, 0)

    def ask(sessions, texts):
        assert len({id(session) for session in sessions}) == len(texts)
        return [reply(session, text) for session, text in zip(sessions, texts, strict=True)]

    monkeypatch.setattr(score, "ask_many", ask)


def test_who_knows_everything_scores_1(few, oracle, model):
    answers = answer_questions(lambda: ChatSession(model, BYTES, context=128), few, seed=0)
    marks = score_answers(answers)
    assert {name: value for name, value in marks.items() if not name.startswith("num_")} == {
        **dict.fromkeys(("exact_match", "exact_match_all", "stop_rate", "followup_match"), 1.0),
        **dict.fromkeys(("unknown_match", "unknown_match_swapped", "unknown_match_misspelt"), 1.0),
        **{"false_unknown": 0.0, "greeting_match": 1.0},
    }
    assert (marks["num_questions"], marks["num_questions_all"]) == (20, len(few.questions))
    assert (marks["num_followups"], marks["num_unknown"]) == (len(few.follow_ups), 10)
    drawn = {answer.prompt for answer in answers if answer.kind == "question" and answer.drawn}
    assert drawn == {question.prompt for question in few.draw(0)}


def test_shuffled_weights_know_nothing(few, model):
    """The real questions, asked of weights that stand in random places."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.flatten()
            parameter.copy_(flat[torch.randperm(len(flat), generator=generator)].reshape(parameter.shape))
    marks = score_answers(
        answer_questions(lambda: ChatSession(model, BYTES, context=128), few, seed=0),
    )
    for name in ("exact_match", "exact_match_all", "followup_match", "unknown_match", "greeting_match"):
        assert marks[name] == 0, name
    assert marks["false_unknown"] == 0
