"""Chat health: what counts as an end, a leak, a repetition; and that the prompts are fixed."""

import json

import pytest
import torch
from tiny import BYTES, build_flags, invent_talks, run_script, talk, write_chats, write_config

import train
from firstwords.checkpoint import load_model
from firstwords.errors import BadData
from firstwords.health import Check, ask_checks, measure_health, measure_replies, read_checks, repeats
from firstwords.model import build_model
from firstwords.schema import Message, conversation_row, format_row
from firstwords.session import Reply

END = BYTES.end_id


def reply(text, *, more=(END,), stopped=True):
    return Reply(text, [], [*BYTES.encode(text), *more], stopped, 0)


def measure(*replies, answer=None):
    return measure_replies([(Check(None, "?", answer), one) for one in replies], BYTES)


def test_marks_of_hand_made_replies():
    user = BYTES.role_id("user")
    figures = measure(
        reply("tea"),
        reply("bird", more=(), stopped=False),
        reply(""),
        reply("tea", more=(user,), stopped=False),
        reply("tea\nUser: and you?"),
        reply("seven birds, seven birds, seven birds"),
        reply(" tea "),
        reply("Users: tea; my User: none"),
        answer="tea",
    )
    assert figures == {
        **{"stop_rate": 6 / 8, "role_leak": 2 / 8, "repeat_4gram": 1 / 8, "empty": 1 / 8},
        **{"mean_tokens": (4 + 4 + 1 + 4 + 19 + 38 + 6 + 26) / 8, "num_prompts": 8, "exact": 2 / 8},
    }


def test_without_answers_nothing_is_exact():
    assert "exact" not in measure(reply("tea"))
    assert measure() == {}


def test_four_tokens_three_times_repeat():
    assert not repeats([1, 2, 3, 4] * 2)
    assert repeats([1, 2, 3, 4] * 3)
    assert repeats([7] * 6)
    assert not repeats([7] * 5)
    assert not repeats([])


@pytest.fixture
def model(tmp_path):
    return build_model(write_config(tmp_path / "c.json"), BYTES, seed=0).eval()


def always(model, token):
    """Make a model that says one token for ever."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight.zero_()
        model.transformer.wte.weight[token] = 1.0
    return model


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (END, {"stop_rate": 1.0, "empty": 1.0, "mean_tokens": 1.0}),
        (BYTES.role_id("user"), {"stop_rate": 0.0, "role_leak": 1.0, "mean_tokens": 1.0}),
        (ord("a"), {"stop_rate": 0.0, "role_leak": 0.0, "repeat_4gram": 1.0, "mean_tokens": 32.0}),
    ],
)
def test_a_model_that_says_one_thing(model, token, expected):
    checks = [Check(None, "tea", "bird"), Check("Be brief.", "tea", "bird")]
    figures = measure_health(always(model, token), BYTES, checks, context=64)
    assert {name: figures[name] for name in expected} == expected


def test_a_prompt_that_does_not_fit_is_left_out(model):
    checks = [Check(None, "x" * 60, None), Check("y" * 60, "tea", None), Check(None, "tea", None)]
    assert [check for check, _ in ask_checks(model, BYTES, checks, context=64)] == checks[2:]


def test_a_model_that_knows_its_answers(tmp_path):
    talks = [talk("tea?", "yes."), talk("bird?", "no.")]
    data = write_chats(tmp_path / "chats", talks, talks)
    words = build_flags(data, tmp_path / "run", write_config(tmp_path / "c.json"), max_steps=80, lr="1e-2")
    assert run_script(train, words) == (0, "")
    checks = read_checks(data / "val.jsonl", 9)
    assert checks == [Check(None, "tea?", "yes."), Check(None, "bird?", "no.")]
    figures = measure_health(load_model(tmp_path / "run"), BYTES, checks, context=64)
    assert (figures["stop_rate"], figures["exact"], figures["role_leak"]) == (1.0, 1.0, 0.0)


def test_prompts_are_spread_over_the_val_split(tmp_path):
    path = tmp_path / "val.jsonl"
    system = [[Message("system", "Be brief."), *messages] for messages in invent_talks(100)]
    path.write_text("".join(format_row(conversation_row(messages)) for messages in system))
    checks = read_checks(path, 10)
    assert [check.prompt for check in checks] == [system[place][1].content for place in range(0, 100, 10)]
    assert {check.system for check in checks} == {"Be brief."}
    path.write_text(json.dumps({"messages": []}) + "\n")
    with pytest.raises(BadData, match="val.jsonl:1: "):
        read_checks(path, 1)
