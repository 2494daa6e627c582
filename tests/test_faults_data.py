"""Data with faults: what is wrong in them is named by its line, and nothing is lost, cut or half made."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from broken import WRITES
from faults import beside
from rows import read_jsonl
from test_rejects import measure
from tiny import (
    BYTES,
    build_flags,
    hash_files,
    invent_talks,
    run_script,
    talk,
    write_chats,
    write_config,
    write_store,
)

import prep_data
import train
from firstwords import conversations, dataset, parts, prep, schema, tokenstore
from firstwords.schema import Message, conversation_row, format_row, parse_conversation
from firstwords.sources import read_raw_rows
from firstwords.template import CHAT_TEMPLATE, encode_chat
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer, load_tokenizer

ROOT = Path(prep_data.__file__).parent

GOOD = [conversation_row(messages) for messages in invent_talks(40)]


class DatasetsAlone:
    """Rows read by `datasets`, and encoded as they come: what most scripts do."""

    __name__ = "datasets_alone"

    @staticmethod
    def main(argv):
        from datasets import load_dataset

        args = prep_data.parse_flags(argv)
        tokenizer = load_tokenizer(args.tokenizer)
        rows = load_dataset("json", data_files=args.dataset[0].name, split="train", streaming=True)
        args.out_dir.mkdir()
        with open(args.out_dir / "train.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                encode_chat([Message(**turn) for turn in row["messages"]], tokenizer)
                file.write(format_row(row))


class Patched:
    """A script of ours with some functions replaced.

    Args:
        name: of the version.
        script: a module with `main`.
        changes: `(module, function, what stands in its place)`.
    """

    def __init__(self, name, script, *changes):
        self.__name__, self._script, self._changes = name, script, changes

    def main(self, argv):
        with pytest.MonkeyPatch.context() as patch:
            for module, function, other in self._changes:
                patch.setattr(module, function, other)
            self._script.main(argv)


DATASETS = DatasetsAlone()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    BYTES.save(folder, chat_template=CHAT_TEMPLATE)
    return folder


@pytest.fixture
def prepare(tmp_path, tokenizer_folder):
    """A function that prepares a file, and returns the exit code and what was written to stderr."""

    def prepare(script, path, *flags, out_dir=tmp_path / "out"):
        words = ["--dataset", path, "--out_dir", out_dir, "--tokenizer", tokenizer_folder, "--num_proc", 1]
        try:
            return run_script(script, [*words, *flags])
        except Exception as error:  # what a script of others ends with
            return 1, str(error)

    return prepare


def write_lines(path, lines):
    path.write_bytes(b"\n".join(lines))
    return path


def dump(row):
    return format_row(row).rstrip("\n").encode()


def spoil(changes):
    """Return the lines of good rows, some of them replaced."""
    lines = [dump(row) for row in GOOD]
    for number, line in changes.items():
        lines[number - 1] = line
    return lines


def check_rejects(prepare, script, path, expected, num_good):
    """Each bad line is named with its number, on the screen and in a list by its reason; no other is."""
    code, errors = prepare(script, path)
    for number, reason in list(expected.items())[: prep.SHOWN_REJECTS]:
        assert f"{path}:{number}: " in errors, f"{reason} has no line number: {errors[:200]}"
    assert code == 65
    out_dir = path.parent / "out"
    assert {row["line"]: row["reason"] for row in read_jsonl(out_dir / "rejects.jsonl")} == expected
    assert prepare(script, path, "--skip_bad")[0] == 0
    assert {row["line"]: row["reason"] for row in read_jsonl(out_dir / "rejects.jsonl")} == expected
    return check_kept(out_dir, num_good)


def check_kept(out_dir, count):
    rows = read_jsonl(out_dir / "train.jsonl") + read_jsonl(out_dir / "val.jsonl")
    assert len(rows) == count
    return rows


# --- 25 to 28: lines


@beside(prep_data, DATASETS)
def test_every_bad_line_has_its_number_and_reason(tmp_path, prepare, implementation):
    bad = {7: dump(GOOD[0])[:20], 21: dump(GOOD[0])[:-1], 30: b"messages", 40: dump(GOOD[0])[:-4]}
    path = write_lines(tmp_path / "rows.jsonl", spoil(bad))
    expected = {7: "bad_json", 21: "bad_json", 30: "bad_json", 40: "truncated"}
    check_rejects(prepare, implementation, path, expected, 36)


@beside(prep_data, DATASETS)
def test_bytes_that_are_no_text_are_named(tmp_path, prepare, implementation):
    def put(text):
        return dump(GOOD[0]).replace(b'"content": "', b'"content": "' + text, 1)

    bad = {3: put(b"\xe9"), 9: put(b"\xe6\x97"), 12: put(b"\xed\xa0\x80")}
    bad |= {20: put(b"\0"), 31: put(b"\\u0000")}
    lines = [line + b"\r\n\t" if number % 2 else line for number, line in enumerate(spoil(bad), 1)]
    path = write_lines(tmp_path / "rows.jsonl", [b"\xef\xbb\xbf" + lines[0], *lines[1:]])
    # There is a blank line behind every second row.
    places = [number + number // 2 for number in bad]
    reasons = ["bad_utf8", "bad_utf8", "bad_utf8", "nul", "nul"]
    check_rejects(prepare, implementation, path, dict(zip(places, reasons, strict=True)), 35)


NO_LOOK_AT_TEXT = Patched("text_unseen", prep_data, (schema, "check_text", lambda text, where: None))


@beside(prep_data, DATASETS, NO_LOOK_AT_TEXT)
def test_half_a_surrogate_is_rejected(tmp_path, prepare, implementation):
    whole = dump(conversation_row(talk("?", "?"))).replace(b'"?"', b'"\\ud83d\\ude00"')
    halves = [whole.replace(b"\\ude00", b""), whole.replace(b"\\ud83d", b"", 1)]
    path = write_lines(tmp_path / "rows.jsonl", spoil({4: whole, 5: halves[0], 6: halves[1]}))
    rows = check_rejects(prepare, implementation, path, {5: "surrogate", 6: "surrogate"}, 38)
    assert conversation_row(talk("\U0001f600", "\U0001f600")) in rows


ASK, TELL = ({"role": role, "content": "x"} for role in ("user", "assistant"))
WRONG = {
    "not_an_object": [dump([ASK, TELL]), b"null"],
    "no_messages": [dump({"messages": value}) for value in (None, "Hi", {"role": "user"})],
    "bad_turn": [dump({"messages": [ASK, turn]}) for turn in ("Hi", None)],
    "missing_key": [dump({"messages": [ASK, {"role": "assistant"}]})],
    "null_content": [dump({"messages": [ASK, TELL | {"content": None}]})],
    "bad_content": [dump({"messages": [ASK, TELL | {"content": value}]}) for value in (3, True, ["Hi"])],
    "empty_turn": [dump({"messages": [ASK | {"content": text}, TELL]}) for text in ("", " \n")],
    "unknown_role": [dump({"messages": [ASK | {"role": "human"}, TELL]})],
    "same_role_twice": [dump({"messages": [ASK, ASK, TELL]})],
    "bad_order": [dump({"messages": turns}) for turns in ([TELL, ASK], [TELL], [ASK, TELL, ASK])],
    "double_key": [b'{"messages": [], ' + dump({"messages": [ASK, TELL]})[1:]],
    "bad_json": [b'{"x": NaN, ' + dump({"messages": [ASK, TELL]})[1:]],
    "unknown_shape": [dump({"text": "x"})],
}


def coerce_turn(turn, place):
    """Take whatever is there for a message."""
    turn = turn if isinstance(turn, dict) else {}
    return Message(str(turn.get("role")), str(turn.get("content")))


COERCING = Patched(
    "coercing",
    prep_data,
    (schema, "_parse_message", coerce_turn),
    (schema, "_check_order", lambda roles: None),
)


@beside(prep_data, DATASETS, COERCING)
def test_rows_of_a_wrong_shape_are_rejected(tmp_path, prepare, implementation):
    bad = [(line, reason) for reason, lines in WRONG.items() for line in lines]
    lines = spoil({number: line for number, (line, _) in enumerate(bad, 5)})
    path = write_lines(tmp_path / "rows.jsonl", [*lines, b""])
    expected = {number: reason for number, (_, reason) in enumerate(bad, 5)}
    check_rejects(prepare, implementation, path, expected, 40 - len(bad))


# --- 29: size


def read_rows(path):
    """Read the rows as prep_data.py does."""
    for located in read_raw_rows(str(path)):
        parse_conversation(schema.parse_line(located.row))


def look_back_at_each_turn(path):
    """Compare each turn with all before it."""
    for located in read_raw_rows(str(path)):
        roles = [turn["role"] for turn in schema.parse_line(located.row)["messages"]]
        assert all(roles[:place].count(role) == place // 2 for place, role in enumerate(roles))


def write_turns(path, count):
    row = conversation_row(talk(*["x"] * count))
    path.write_text(format_row(row))


def write_blank_lines(path, count):
    path.write_text("\n" * 10 * count + format_row(GOOD[0]))


def write_long_line(path, count):
    path.write_text(format_row(conversation_row(talk("w\u00f6rd " * 50 * count, "x"))))


@beside(read_rows, look_back_at_each_turn)
def test_work_grows_with_the_size_and_no_faster(tmp_path, implementation):
    largest = 100_000 if implementation is read_rows else 8_000

    def read(write):
        def prepare(count):
            path = tmp_path / f"{count}.jsonl"
            write(path, count)
            return lambda: implementation(path)

        return prepare

    # 100,000 turns, a million empty lines, 30 MB: with the square it would take 400 times as long.
    for write in (write_turns, write_blank_lines, write_long_line):
        assert measure(read(write), largest) < 60 * measure(read(write), largest // 20), write.__name__


# --- 30: nobody to learn from


@beside(prep_data, DATASETS)
def test_data_without_an_assistant_are_refused(tmp_path, prepare, implementation):
    alone = [dump({"messages": [{"role": "user", "content": f"{n}"}]}) for n in range(40)]
    path = write_lines(tmp_path / "none.jsonl", [*alone, b""])
    for flags in ([], ["--skip_bad"]):
        code, errors = prepare(implementation, path, *flags)
        assert code == 65
        assert f"{path}: none of 40 rows is usable (no_assistant 40)" in errors
    path = write_lines(tmp_path / "some.jsonl", [*spoil({8: alone[0]}), b""])
    check_rejects(prepare, implementation, path, {8: "no_assistant"}, 39)


def read_without_a_look(path):
    """Read a tokenized file as it is."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids, masks = (np.concatenate([row[name] for row in rows]) for name in ("input_ids", "assistant_masks"))
    starts = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    return dataset.Chats(ids.astype(np.int32), masks.astype(bool), starts, "")


LABELS_UNSEEN = Patched(
    "labels_unseen",
    train,
    (dataset, "read_chats", read_without_a_look),
    (dataset, "choose_lengths", lambda starts, *_: np.diff(starts)),
)


@beside(train, LABELS_UNSEEN)
def test_data_without_a_token_to_learn_from_are_refused(tmp_path, implementation):
    def encode(messages, tokenizer):
        ids, _ = encode_chat(messages, tokenizer)
        return ids, [0] * len(ids)

    data = write_chats(tmp_path / "data", invent_talks(9), encode=encode)
    code, errors = start(implementation, data, tmp_path / "run", seq_len=128)
    assert "train_tokenized.jsonl: has no token to learn from" in errors
    assert code == 65


def start(script, data, run, **flags):
    """Train for two steps; returns the exit code and what was written to stderr."""
    words = build_flags(data, run, write_config(run.parent / "c.json"), max_steps=2, **flags)
    try:
        return run_script(script, words)
    except Exception as error:  # of a version that looks at nothing
        return 1, str(error)


# --- 31: longer than the context


def cut_to_64(messages, tokenizer):
    """Encode as `tokenizer(text, truncation=True)` does."""
    ids, mask = encode_chat(messages, tokenizer)
    return ids[:64], mask[:64]


CUT_IN_SILENCE = Patched("cut_in_silence", prep_data, (conversations, "encode_chat", cut_to_64))


@pytest.mark.parametrize("overlong", ["drop", "split", "truncate"])
@beside(prep_data, CUT_IN_SILENCE)
def test_no_token_is_lost_in_silence(tmp_path, prepare, implementation, overlong):
    talks = [*invent_talks(30), *(talk(*["word " * 5, "reply " * (2 + n)] * 3) for n in range(10))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(format_row(conversation_row(messages)) for messages in talks))
    assert prepare(implementation, path, "--overlong", overlong, "--seq_len", 64)[0] == 0
    splits = json.loads((tmp_path / "out" / "data_report.json").read_text())["splits"]
    total = {
        name: sum(counts[name] for counts in splits.values())
        for name in ("tokens_read", "tokens_repeated", "tokens_dropped", "tokens")
    }
    written = [row for split in splits for row in read_jsonl(tmp_path / "out" / f"{split}_tokenized.jsonl")]
    assert total["tokens_read"] == sum(len(encode_chat(messages, BYTES)[0]) for messages in talks)
    assert total["tokens"] == sum(len(row["input_ids"]) for row in written)
    assert total["tokens_dropped"] == total["tokens_read"] + total["tokens_repeated"] - total["tokens"] > 0


# --- 33: few rows and none


@beside(prep_data, DATASETS)
def test_empty_data_are_refused_and_small_data_train(tmp_path, prepare, implementation):
    for name, text in (("empty.jsonl", ""), ("blank.jsonl", "\n \n\n")):
        (tmp_path / name).write_text(text)
        code, errors = prepare(implementation, tmp_path / name)
        assert str(tmp_path / name) in errors
        assert code == 65
        assert not (tmp_path / "out").exists()
    two = write_lines(tmp_path / "two.jsonl", [dump(row) for row in GOOD[:2]] + [b""])
    assert prepare(implementation, two) == (0, "")
    assert start(train, tmp_path / "out", tmp_path / "run", batch_size=8, grad_accum=2) == (0, "")


# --- 34: the token file


def flip(data):
    """Change one bit in the middle, so that the id is another one of the vocabulary."""
    place = len(data) // 4 * 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "cut": lambda data: data[:-64],
    "cut within a token": lambda data: data[:-1],
    "empty": lambda data: b"",
    "flipped": flip,
    "four bytes a token": lambda data: np.frombuffer(data, "<u2").astype("<u4").tobytes(),
    "ids that are none": lambda data: b"\xff" * len(data),
}


def map_alone(folder, split):
    """Map a split as nanoGPT does."""
    return tokenstore.TokenStore(np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r"), "")


MAPPED_ALONE = Patched(
    "mapped_alone",
    train,
    (tokenstore, "open_store", map_alone),
    (tokenstore, "check_content", lambda folder, split: None),
    (tokenstore, "read_corpus", lambda folder: {}),
    (dataset, "_check_ids", lambda ids, tokenizer: None),
)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "data", ["some text, more of it"] * 30, ["some other text"] * 9)


@pytest.mark.parametrize(
    ("split", "damage"),
    [*(("train", damage) for damage in (*DAMAGE, "another tokenizer")), ("val", "cut"), ("val", "flipped")],
)
@beside(train, MAPPED_ALONE)
def test_a_token_file_that_is_wrong_is_refused(tmp_path, store, implementation, split, damage):
    if damage == "another tokenizer":
        Tokenizer(BYTE_LEVEL, [bytes([255 - value]) for value in range(256)]).save(
            store, chat_template=CHAT_TEMPLATE
        )
    else:
        path = store / f"{split}.bin"
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    code, errors = start(implementation, store, tmp_path / "run", no_assistant_only_loss=True)
    assert code == (78 if damage == "another tokenizer" else 65)
    assert errors.count("\n") == 1
    assert str(store) in errors
    assert not (tmp_path / "run").exists()


# --- 35: killed, and the disk full


@contextlib.contextmanager
def stage_in_place(target, *, overwrite=False):
    """Write into the folder itself."""
    target.mkdir(parents=True, exist_ok=True)
    yield target


IN_PLACE = Patched(
    "in_place",
    prep_data,
    (prep_data, "stage_folder", stage_in_place),
    (parts, "stage_folder", stage_in_place),
)


def die_at_write(number, folder):
    """Kill this process at write `number` (from 1) below a folder."""
    left = [number]

    def watch(event, args):
        if event not in WRITES or not args or not str(args[0]).startswith(str(folder)):
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def fork(run, *faults):
    """Run a function in a child in which faults were injected; returns its exit code, or minus the signal."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            for inject, *rest in faults:
                inject(*rest)
            code = run()[0]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def case(tmp_path, prepare, monkeypatch):
    """A file that is prepared in three parts, and the hashes of what comes out of it."""
    monkeypatch.setattr(conversations, "BATCH_ROWS", 15)
    path = write_lines(tmp_path / "rows.jsonl", [*spoil({}), b""])
    assert prepare(prep_data, path)[0] == 0
    expected = hash_files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    return path, expected


def check_start_again(prepare, script, path, expected):
    out_dir = path.parent / "out"
    assert hash_files(out_dir) in ({}, expected), "half a folder"
    code, errors = prepare(script, path)
    assert code == 0, errors
    assert hash_files(out_dir) == expected
    assert sorted(os.listdir(path.parent)) == ["out", "rows.jsonl"]
    shutil.rmtree(out_dir)


@beside(prep_data, IN_PLACE)
def test_preparing_killed_anywhere_leaves_nothing_half(case, prepare, implementation):
    path, expected = case
    code, number = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        number += 7
        code = fork(lambda: prepare(implementation, path), (die_at_write, number, path.parent))
        check_start_again(prepare, implementation, path, expected)
    assert code == 0
    assert number > 50


@beside(prep_data, IN_PLACE)
def test_preparing_killed_again_and_again_goes_on(case, prepare, implementation):
    path, expected = case
    code, number = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        number += 1
        code = fork(lambda: prepare(implementation, path), (die_at_write, number, path.parent))
        assert hash_files(path.parent / "out") in ({}, expected), "half a folder"
    assert code == 0, "it needs a human"
    check_start_again(prepare, implementation, path, expected)


def limit_files(size):
    """Let this process write no file beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [1000, 4000, 9000])
@beside(prep_data, IN_PLACE)
def test_a_full_disk_leaves_nothing_half(case, prepare, implementation, size):
    path, expected = case
    assert fork(lambda: prepare(implementation, path), (limit_files, size)) in (73, 74)
    assert not (path.parent / "out").exists()
    check_start_again(prepare, implementation, path, expected)


# --- 36: again


def script_of_ours():
    """Return the words after `python`."""
    return [str(ROOT / "prep_data.py")]


def hashes_of_the_process():
    """Return those of a version that draws val by Python's own `hash`."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import prep_data
from firstwords import conversations
conversations.hash_content = lambda texts, seed: hash((seed, *texts)) % 2**64
prep_data.main(sys.argv[1:])
"""
    return ["-c", code]


@beside(script_of_ours, hashes_of_the_process)
def test_preparing_again_gives_the_same_bytes(tmp_path, tokenizer_folder, implementation):
    rows = [conversation_row(talk(f"Wö ist {n}?", "日本 🎉")) for n in range(40)]
    locales = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}
    children = []
    for number, env in enumerate((*locales, {"TZ": "Asia/Tokyo"})):
        folder = tmp_path / f"place-{number}"
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(map(format_row, rows)), encoding="utf-8")
        words = ["--dataset", "rows.jsonl", "--out_dir", "out", "--num_proc", str(1 + number % 2)]
        command = [sys.executable, *implementation(), *words, "--tokenizer", str(tokenizer_folder)]
        env = os.environ | {"PYTHONHASHSEED": str(number)} | env
        children.append(subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL))
    assert [child.wait() for child in children] == [0, 0, 0]
    first, *others = (hash_files(tmp_path / f"place-{number}" / "out") for number in range(3))
    assert others == [first, first]
