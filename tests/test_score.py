"""The marks of answers."""

import pytest
import torch
from tiny import BYTES, write_config

from firstwords import score
from firstwords.model import build_model
from firstwords.pydocs import GREETING_ANSWER, HeldOut, build_held_out
from firstwords.schema import Message
from firstwords.score import Answer, answer_questions, score_answers
from firstwords.session import ChatSession, Reply


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = write_config(tmp_path_factory.mktemp("model") / "c.json", initializer_range=0.3)
    return build_model(cfg, BYTES, seed=0).eval()


def build_answer(kind, expected, text, *, stopped=True, drawn=True, subject="x"):
    return Answer(kind, subject, "?", expected, Reply(text, [], [], stopped, 0), drawn)


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
        return Reply(answer, [], [], True, 0)

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
