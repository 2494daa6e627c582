"""Bad lines have an address: 100,000 lines, one in twenty mutated, and every verdict that of an oracle.

The oracle shares no code with the package and does not use Python's `json`: it has a JSON reader of its own.
"""

import gc
import json
import random
import re
import time

import pytest

from firstwords.conversations import Batch, gather_rows, read_account, survey_batch
from firstwords.parts import make_parts, open_work
from firstwords.schema import RowError, parse_conversation, parse_line
from firstwords.sources import read_raw_rows, to_conversation

LINES = 100_000
WORDS = ["tea", "bird", "seven", "naïve", "日本", "🎉", "line\nbreak", "tab\there", '"quoted"', "back\\slash"]
WORDS += ["<|end|>", "{}", "[]", ":", ",", "null", "\u2028"]

# --- the mutators: a row of two or four turns -> a line, and the verdict on it (None: it is good)


def dump(row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def on_line(change, verdict):
    """Mutate the bytes of the line."""
    return lambda row: (change(dump(row)), verdict)


def on_row(change, verdict):
    """Mutate the row; `change` returns the new one, or None where it changed the old."""

    def mutate(row):
        changed = change(row)
        return dump(row if changed is None else changed), verdict

    return mutate


def on_content(text: bytes, verdict):
    """Put bytes at the head of the first turn's content."""
    return on_line(lambda line: line.replace(b'"content": "', b'"content": "' + text, 1), verdict)


def on_turn(place, verdict, **changed):
    return on_row(lambda row: row["messages"][place].update(changed), verdict)


def set_messages(value, verdict):
    return on_row(lambda row: {"messages": value}, verdict)


MUTATORS = [
    on_line(lambda line: line.decode()[: len(line) // 3].encode(), "bad_json"),
    on_line(lambda line: line[:-1], "bad_json"),
    on_line(lambda line: line[:-1] + b",}", "bad_json"),
    on_line(lambda line: line.replace(b'"messages"', b"'messages'"), "bad_json"),
    on_line(lambda line: line.replace(b'"messages"', b"messages"), "bad_json"),
    on_line(lambda line: b'{"x": NaN, ' + line[1:], "bad_json"),
    on_line(lambda line: b'{"x": -Infinity, ' + line[1:], "bad_json"),
    on_line(lambda line: b'{"x": 01, ' + line[1:], "bad_json"),
    on_line(lambda line: line + b" x", "bad_json"),
    on_line(lambda line: line + line, "bad_json"),
    on_content(b"\t", "bad_json"),
    on_content(b"\\x41", "bad_json"),
    on_content(b"\\u12", "bad_json"),
    on_content(b"\xff", "bad_utf8"),
    on_content("é".encode("latin-1"), "bad_utf8"),
    on_content("日".encode()[:2], "bad_utf8"),
    on_content(b"\xed\xa0\x80", "bad_utf8"),
    on_content(b"\0", "nul"),
    on_content(b"\\u0000", "nul"),
    on_content(b"\\ud800", "surrogate"),
    on_content(b"\\udc00", "surrogate"),
    on_content(b"\\ude00\\ud83d", "surrogate"),
    on_line(lambda line: b"[" + line + b"]", "not_an_object"),
    on_line(lambda line: b"null", "not_an_object"),
    on_line(lambda line: b'"text"', "not_an_object"),
    on_line(lambda line: b'{"x": 1, "x": 1, ' + line[1:], "double_key"),
    on_line(lambda line: b'{"x": 1, "\\u0078": 1, ' + line[1:], "double_key"),
    on_line(lambda line: line.replace(b'{"role"', b'{"role": "user", "role"', 1), "double_key"),
    on_row(lambda row: {"message": row["messages"]}, "unknown_shape"),
    set_messages(None, "no_messages"),
    set_messages("Hi", "no_messages"),
    set_messages({"role": "user"}, "no_messages"),
    set_messages([], "no_assistant"),
    on_row(lambda row: row["messages"].__setitem__(1, "Hi"), "bad_turn"),
    on_row(lambda row: row["messages"].__setitem__(0, None), "bad_turn"),
    on_row(lambda row: row["messages"][0].pop("role") and None, "missing_key"),
    on_row(lambda row: row["messages"][1].pop("content") and None, "missing_key"),
    on_turn(1, "null_content", content=None),
    on_turn(0, "bad_content", content=3),
    on_turn(0, "bad_content", content=["Hi"]),
    on_turn(1, "bad_content", content=True),
    on_turn(1, "empty_turn", content=""),
    on_turn(0, "empty_turn", content=" \n\u2003"),
    on_turn(0, "unknown_role", role="human"),
    on_turn(1, "unknown_role", role=["assistant"]),
    on_row(lambda row: row["messages"].insert(0, dict(row["messages"][0])), "same_role_twice"),
    on_row(lambda row: row["messages"].append(dict(row["messages"][-1])), "same_role_twice"),
    on_row(lambda row: row["messages"].pop(0) and None, "bad_order"),
    on_row(lambda row: row["messages"].append(dict(row["messages"][0])), "bad_order"),
    on_row(lambda row: row["messages"].insert(1, {"role": "system", "content": "S"}), "bad_order"),
    set_messages([{"role": "user", "content": "Hi"}], "no_assistant"),
    # These are good.
    on_line(lambda line: line + b"\r", None),
    on_line(lambda line: b" \t" + line + b" ", None),
    on_content(b"\\ud83d\\ude00", None),
    on_content("\x7f\u2028\u0085\ufeff".encode(), None),
    on_row(lambda row: row | {"id": 1e300, "more": {"a": [1, {}]}, "system": "S"}, None),
]

# --- the oracle

TOKEN = re.compile(
    r'[ \t\n\r]*(?:([{}\[\]:,])|("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")'
    r"|((?:-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null)(?![\w.+-])))"
)
PLAIN = {"n": "\n", "t": "\t", "b": "\b", "f": "\f", "r": "\r"}


class Broken(Exception):
    pass


class Pairs(list):
    """An object as its pairs."""


def read_json(text):
    tokens, place = [], 0
    text = text.rstrip(" \t\r\n")
    while place < len(text):
        found = TOKEN.match(text, place)
        if not found:
            raise Broken
        tokens.append(found)
        place = found.end()
    value, rest = read_value(tokens, 0)
    if rest != len(tokens):
        raise Broken
    return value


def read_value(tokens, at):
    if at >= len(tokens):
        raise Broken
    sign, string, plain = tokens[at].groups()
    if string:
        return unescape(string), at + 1
    if plain:
        return {"true": True, "false": False, "null": None}.get(plain, 0), at + 1
    if sign not in "{[":
        raise Broken
    return read_many(tokens, at + 1, "}" if sign == "{" else "]")


def read_many(tokens, at, close):
    items = Pairs() if close == "}" else []
    while not (at < len(tokens) and tokens[at][1] == close and not items):
        if close == "}":
            key, at = read_value(tokens, at)
            if not isinstance(key, str) or at >= len(tokens) or tokens[at][1] != ":":
                raise Broken
            value, at = read_value(tokens, at + 1)
            items.append((key, value))
        else:
            value, at = read_value(tokens, at)
            items.append(value)
        if at >= len(tokens) or tokens[at][1] not in (",", close):
            raise Broken
        at += 1
        if tokens[at - 1][1] == close:
            return items, at
    return items, at + 1


def unescape(string):
    units = re.sub(
        r"\\(u(....)|.)", lambda m: chr(int(m[2], 16)) if m[2] else PLAIN.get(m[1], m[1]), string[1:-1]
    )
    return units.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def has_double(value):
    if isinstance(value, Pairs):
        keys = [key for key, _ in value]
        return len(set(keys)) < len(keys) or any(has_double(inner) for _, inner in value)
    return isinstance(value, list) and any(map(has_double, value))


def judge(line: bytes, *, is_last_line=False):
    """Return why a line is refused, or None."""
    if b"\0" in line:
        return "nul"
    cut = "truncated" if is_last_line and line.startswith(b"{") else None
    try:
        row = read_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return cut or "bad_utf8"
    except Broken:
        return cut or "bad_json"
    if has_double(row):
        return "double_key"
    if not isinstance(row, Pairs):
        return "not_an_object"
    row = dict(row)
    if "messages" not in row:
        return "unknown_shape"
    return judge_turns(row["messages"])


def judge_turns(turns):
    if not isinstance(turns, list) or isinstance(turns, Pairs):
        return "no_messages"
    for verdict in map(judge_turn, turns):
        if verdict:
            return verdict
    order = "".join(dict(turn)["role"][0] for turn in turns)
    if "a" not in order:
        return "no_assistant"
    if re.search("uu|aa|ss", order):
        return "same_role_twice"
    return None if re.fullmatch("s?(ua)+", order) else "bad_order"


def judge_turn(turn):
    if not isinstance(turn, Pairs):
        return "bad_turn"
    turn = dict(turn)
    if not {"role", "content"} <= set(turn):
        return "missing_key"
    if turn["role"] not in ("user", "assistant", "system"):
        return "unknown_role"
    content = turn["content"]
    if not isinstance(content, str):
        return "null_content" if content is None else "bad_content"
    if not re.search(r"\S", content):
        return "empty_turn"
    if "\0" in content:
        return "nul"
    return "surrogate" if re.search("[\ud800-\udfff]", content) else None


# --- the file


def build_lines():
    """Return lines with their line ends, and the verdict that each mutator knows."""
    pick = random.Random(7)
    lines, verdicts = [], []
    for number in range(LINES):
        contents = [
            "w " + " ".join(pick.choices(WORDS, k=pick.randint(0, 7))) for _ in range(pick.choice([2, 2, 4]))
        ]
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        line, verdict = dump({"messages": turns}), None
        if pick.random() < 0.05:
            line, verdict = pick.choice(MUTATORS)({"messages": turns})
        lines.append(line + b"\n")
        verdicts.append(verdict)
        if number % 1000 == 999:
            lines[-1] += b"\r\n \t \n"  # blank lines are counted, and are no rows
            verdicts += ["blank", "blank"]
    return lines, verdicts


def survey(path, folder):
    """Run the first pass over a file; returns the folders of its parts."""
    batches = (Batch(0, False, None, None, 0, rows) for rows in gather_rows(read_raw_rows(str(path))))
    with open_work(folder, {}) as work:
        return list(make_parts(survey_batch, batches, work, num_proc=1))


def test_every_verdict_on_100_000_lines_is_the_oracles(tmp_path):
    lines, verdicts = build_lines()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines) + b'{"messages": [{"role": "us')
    verdicts.append("truncated")
    expected = {
        number: verdict for number, verdict in enumerate(verdicts, 1) if verdict not in (None, "blank")
    }
    assert len(set(expected.values())) == 18
    assert LINES * 0.04 < len(expected) < LINES * 0.05

    split = b"".join(lines).split(b"\n")[:-1] + [b'{"messages": [{"role": "us']
    judged = {n: judge(line, is_last_line=n == len(split)) for n, line in enumerate(split, 1) if line.strip()}
    assert {number: verdict for number, verdict in judged.items() if verdict} == expected

    parts = survey(path, tmp_path / "parts")
    accounts = [read_account(part) for part in parts]
    rejects = [
        json.loads(line)
        for part in parts
        if (part / "rejects.jsonl").exists()
        for line in (part / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {row["line"]: row["reason"] for row in rejects} == expected
    assert {row["file"] for row in rejects} == {str(path)}
    kept = sum(account["kept"] for account in accounts)
    assert kept + len(rejects) == len(judged) == LINES + 1


@pytest.mark.parametrize(("mutate", "place"), [(m, i) for i, m in enumerate(MUTATORS)])
def test_each_mutator_knows_its_verdict(mutate, place):
    line, verdict = mutate(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    )
    assert judge(line) == refuse(line) == verdict, place


def refuse(line):
    """Return why the package refuses a line, or None."""
    try:
        row = parse_line(line + b"\n")
        if isinstance(row, RowError):
            raise row
        to_conversation(row)
    except RowError as error:
        return error.reason
    return None


def test_the_byte_of_bad_utf8_and_nul_is_named():
    assert "at byte 7 of the line" in str(parse_line(b'{"a": "\xff"}\n'))
    assert "at byte 7 of the line" in str(parse_line(b'{"a": "\0"}\n'))


@pytest.mark.parametrize(
    "line", [b'{"a": "\xe6\x97', b'{"a": tr', b'{"a": "\\u12', b'{"a', b'{"a": 1, ', b"{"]
)
def test_what_the_file_breaks_off_in_is_truncated(line):
    assert parse_line(line).reason == "truncated"
    assert parse_line(line + b"\n").reason in ("bad_json", "bad_utf8")


def measure(work, size):
    """Return the shortest of three CPU times."""
    run, spent = work(size), []
    gc.disable()
    try:
        for _ in range(3):
            begin = time.process_time()
            run()
            spent.append(time.process_time() - begin)
    finally:
        gc.enable()
    return min(spent)


def many_turns(count):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(count)]
    line = dump({"messages": turns}) + b"\n"
    return lambda: parse_conversation(parse_line(line))


def many_roles_wrong(count):
    line = dump({"messages": [{"role": "user", "content": "x"}] * count}) + b"\n"

    def refuse():
        with pytest.raises(RowError) as refused:
            parse_conversation(parse_line(line))
        assert len(str(refused.value)) < 200

    return refuse


def many_keys(count):
    line = dump({f"key {i}": i for i in range(count)})[:-1] + b', "key 7": 7}\n'
    return lambda: len(str(parse_line(line)))


def long_text(count):
    line = dump({"messages": [{"role": "user", "content": "wörd " * (count * 50)}]}) + b"\n"
    return lambda: parse_line(line)


@pytest.mark.parametrize("work", [many_turns, many_roles_wrong, many_keys, long_text])
def test_twenty_times_the_turns_or_bytes_take_no_square_of_that(work):
    # 100,000 turns, 100,000 keys, 25 MB; what grew with the square would take 400 times as long.
    assert measure(work, 100_000) < 100 * measure(work, 5_000)
