"""The conversation row: what is accepted, and why each bad line is refused, with its number."""

import json
import pickle

import pytest

from firstwords.schema import (
    Message,
    RowError,
    check_text,
    conversation_row,
    format_conversation,
    format_row,
    parse_conversation,
    read_jsonl,
)

S, U, A = (
    {"role": role, "content": text} for role, text in (("system", "s"), ("user", "u"), ("assistant", "a"))
)
SYSTEM, USER, REPLY = Message("system", "s"), Message("user", "u"), Message("assistant", "a")


def turn(content, role="user"):
    return {"role": role, "content": content}


# --- rows


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [U, A]}, [USER, REPLY]),
        ({"messages": [U, A, U, A]}, [USER, REPLY, USER, REPLY]),
        ({"messages": [S, U, A]}, [SYSTEM, USER, REPLY]),
        ({"messages": [U, A], "system": "s"}, [SYSTEM, USER, REPLY]),
        ({"messages": [U, A], "system": None}, [USER, REPLY]),
        ({"messages": [{**U, "name": "Bo"}, A], "id": 7}, [USER, REPLY]),
        ({"messages": [turn(" <|end|>\n"), A]}, [Message("user", " <|end|>\n"), REPLY]),
    ],
)
def test_right_rows_are_taken_as_they_stand(row, messages):
    assert parse_conversation(row) == messages


@pytest.mark.parametrize(
    ("row", "reason", "text"),
    [
        ({}, "no_messages", "'messages' must be a list, but is null"),
        ({"messages": "hi"}, "no_messages", "but is a string"),
        ({"messages": {"0": U}}, "no_messages", "but is an object"),
        ({"messages": [U, "hi"]}, "bad_turn", "turn 2 must be an object, but is a string"),
        ({"messages": [{"content": "hi"}, A]}, "missing_key", "turn 1 has no 'role', only ['content']"),
        ({"messages": [U, {"role": "assistant"}]}, "missing_key", "turn 2 has no 'content', only ['role']"),
        ({"messages": [turn("hi", "human"), A]}, "unknown_role", "turn 1 has the role 'human'"),
        ({"messages": [turn("hi", ["user"]), A]}, "unknown_role", "turn 1 has the role ['user']"),
        ({"messages": [turn(None), A]}, "null_content", "turn 1 (user) is null, not a string"),
        ({"messages": [turn([{"type": "text"}]), A]}, "bad_content", "turn 1 (user) is a list"),
        ({"messages": [turn(3), A]}, "bad_content", "turn 1 (user) is a"),
        ({"messages": [turn(""), A]}, "empty_turn", "turn 1 (user) is empty"),
        ({"messages": [U, turn(" \n\t", "assistant")]}, "empty_turn", "turn 2 (assistant) is empty"),
        ({"messages": [turn("ab\0c"), A]}, "nul", "turn 1 (user) holds a NUL character at offset 2"),
        ({"messages": [turn("é\ud83d"), A]}, "surrogate", "turn 1 (user) holds half a surrogate at 1"),
        ({"messages": [U, A], "system": ""}, "empty_turn", "turn 0 (system) is empty"),
        ({"messages": [U, A], "system": ["s"]}, "bad_content", "turn 0 (system) is a list"),
        ({"messages": []}, "no_assistant", "the roles are []"),
        ({"messages": [S]}, "no_assistant", "the roles are ['system']"),
        ({"messages": [U]}, "no_assistant", "the roles are ['user']"),
        ({"messages": [A]}, "bad_order", "turn 1 is the assistant's where the user's belongs"),
        ({"messages": [S, A]}, "bad_order", "turn 2 is the assistant's where the user's belongs"),
        ({"messages": [U, A, A]}, "same_role_twice", "turn 3 is the assistant's where the user's belongs"),
        ({"messages": [U, U, A]}, "same_role_twice", "turn 2 is the user's where the assistant's belongs"),
        ({"messages": [U, S, A]}, "bad_order", "turn 2 is the system's where the assistant's belongs"),
        ({"messages": [S, S, U, A]}, "same_role_twice", "turn 2 is the system's where the user's belongs"),
        ({"messages": [S, U, A], "system": "s"}, "bad_order", "a top-level 'system' stands beside it"),
        ({"messages": [A, U], "system": "s"}, "bad_order", "turn 1 is the assistant's"),
        ({"messages": [U, A, U]}, "bad_order", "the last turn must be the assistant's"),
    ],
)
def test_wrong_rows_are_refused_by_reason(row, reason, text):
    with pytest.raises(RowError) as caught:
        parse_conversation(row)
    assert caught.value.reason == reason
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_of_every_other_kind_is_fine():
    check_text("\x01\x7f\ufeff\uffff\U0010ffff\u2028 e\u0301", "here")


# --- lines


def read_bytes(tmp_path, data: bytes):
    (tmp_path / "rows.jsonl").write_bytes(data)
    return list(read_jsonl(tmp_path / "rows.jsonl"))


def test_bom_crlf_and_blank_lines_are_fine_and_counted(tmp_path):
    data = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe2\x80\xa8"}\n\n{"a": 3}'
    assert read_bytes(tmp_path, data) == [(1, {"a": 1}), (4, {"a": "\u2028"}), (6, {"a": 3})]


def test_a_bom_alone_and_an_empty_file_hold_no_row(tmp_path):
    assert read_bytes(tmp_path, b"\xef\xbb\xbf\n") == []
    assert read_bytes(tmp_path, b"") == []


@pytest.mark.parametrize(
    ("line", "reason", "text"),
    [
        (b'{"a": "\xff"}', "bad_utf8", "not UTF-8 at byte 7 of the line"),
        (b'{"a": "\xed\xa0\x80"}', "bad_utf8", "not UTF-8 at byte 7"),
        (b'{"a": 1,}', "bad_json", "broken JSON at column"),
        (b'{"a": 1} {"a": 2}', "bad_json", "broken JSON at column 10"),
        (b"{'a': 1}", "bad_json", "broken JSON at column 2"),
        (b'{"a": "b', "bad_json", "broken JSON at column 7"),
        (b'{"a": "\t"}', "bad_json", "broken JSON at column 8"),
        (b'{"a": NaN}', "bad_json", "NaN is no JSON value"),
        (b'{"a": [-Infinity]}', "bad_json", "-Infinity is no JSON value"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json", "nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "bad_json", "more digits than"),
        (b'{"a": 1, "b": 2, "a": 1}', "double_key", "the key 'a' stands twice"),
        (b'{"a": {"role": "x", "role": "y"}}', "double_key", "the key 'role' stands twice"),
        (b'[{"a": 1}]', "not_an_object", "must be one JSON object, but is a list"),
        (b"null", "not_an_object", "but is null"),
        (b'"{}"', "not_an_object", "but is a string"),
        (b"\xef\xbb\xbf{}", "bad_json", "broken JSON at column 1"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_bad_line_gives_its_reason_and_the_next_one_is_read(tmp_path, line, reason, text):
    rows = read_bytes(tmp_path, b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    assert [number for number, _ in rows] == [1, 2, 3]
    assert (rows[0][1], rows[2][1]) == ({"n": 1}, {"n": 3})
    error = rows[1][1]
    assert isinstance(error, RowError)
    assert error.reason == reason
    assert text in str(error)


def test_a_last_line_that_breaks_off_is_refused(tmp_path):
    good = format_row(conversation_row([USER, REPLY])).encode()
    rows = read_bytes(tmp_path, good + good[:-8])
    assert rows[0] == (1, json.loads(good))
    assert rows[1][0] == 2
    assert rows[1][1].reason == "truncated"


@pytest.mark.parametrize(
    "text", ["plain", "é日🎉", '"quoted" back\\slash', "\n\t\x7f\x1f\u2028", "/</script>"]
)
def test_a_conversation_is_formatted_as_its_row(text):
    messages = [Message("system", text), USER, Message("assistant", text)]
    assert format_conversation(messages) == format_row(conversation_row(messages))


def test_a_reason_reaches_another_process():
    copy = pickle.loads(pickle.dumps(RowError("nul", "holds a NUL")))
    assert (copy.reason, str(copy)) == ("nul", "holds a NUL")


def test_reading_is_lazy(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"n": 1}\n' * 100_000)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert next(rows) == (1, {"n": 1})
    rows.close()


# --- writing


def test_what_is_written_reads_back_the_same(tmp_path):
    conversation = [
        Message("system", 'Quote "this"\\ and\ttabs\r\n'),
        Message("user", "日本語 🎉 \u2028 \x85 \x0b <|end|>"),
        Message("assistant", "é e\u0301 \U0010ffff \x7f"),
    ]
    line = format_row(conversation_row(conversation))
    assert line.count("\n") == 1
    assert line.endswith("}\n")
    assert "日本語 🎉" in line
    [(_, row)] = read_bytes(tmp_path, line.encode())
    assert parse_conversation(row) == conversation


def test_the_written_row_is_the_contract_letter_by_letter():
    row = conversation_row([SYSTEM, USER, REPLY])
    assert format_row(row) == (
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, '
        '{"role": "assistant", "content": "a"}]}\n'
    )
