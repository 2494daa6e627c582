"""Lines of a chat: what is asked, what each command does, and what is said of a bad one."""

import json

import pytest
from tiny import BYTES, talk
from transformers import GPT2Config

from firstwords.errors import BadData, CannotCreate, Damaged, IOFailed, MissingInput
from firstwords.generate import Choice, Sampling
from firstwords.model import GPT2LMHeadModel
from firstwords.repl import COMMANDS, HELP, Chat
from firstwords.session import ChatSession


class Scripted(ChatSession):
    """A session that says the scripted texts in place of a model's."""

    def __init__(self, *replies, context=1000, **options):
        shape = {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 1024}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=BYTES.vocab_size_padded, **shape)).eval()
        super().__init__(model, BYTES, context=context, **options)
        self.replies = iter(replies)
        self.asked = []

    def _stream_ids(self, plan):
        self.asked.append(plan.messages[-1].content)
        yield from BYTES.encode(next(self.replies))
        yield BYTES.end_id


class Heard:
    """A chat with what it wrote and said."""

    def __init__(self, *replies, follower=None, tells_speed=False, **options):
        self.written, self.said, self.styles = "", [], []
        self.session = Scripted(*replies, **options)
        self.chat = Chat(
            self.session, write=self.write, say=self.say, follower=follower, tells_speed=tells_speed
        )

    def write(self, text):
        self.written += text

    def say(self, text, style):
        self.said.append(text)
        self.styles.append(style)

    def take(self, *lines):
        for line in lines:
            assert self.chat.take(line)
        return self.said

    def refuse(self, error, match, line):
        before = self.chat.session.messages, self.chat.session.sampling, self.written
        with pytest.raises(error, match=match):
            self.chat.take(line)
        assert (self.chat.session.messages, self.chat.session.sampling, self.written) == before


def contents(session):
    return [message.content for message in session.messages]


def test_a_question_is_answered_and_quit_leaves():
    heard = Heard("path", "two\nlines")
    heard.take("  /etc/passwd what?  ", "", "   ", "a\nb")
    assert heard.session.asked == ["/etc/passwd what?", "a\nb"], "a path is no command"
    assert heard.written == "path\ntwo\nlines\n"
    assert heard.said == []
    assert not heard.chat.take("/quit")


def test_control_characters_of_the_model_do_not_reach_the_terminal():
    everything = "".join(map(chr, range(256)))
    heard = Heard("\x1b[31mred\x9b0m\x07", everything)
    heard.take("Hi", "Ho")
    harmless = {*"\t\n", *map(chr, range(32, 127)), *map(chr, range(160, 256))}
    visible = "".join(c if c in harmless else "\ufffd" for c in everything)
    assert heard.written == f"\ufffd[31mred\ufffd0m\ufffd\n{visible}\n"


def test_eviction_is_told_once_a_conversation():
    heard = Heard(*["x" * 10] * 6, context=48)
    told = []
    for turn in range(6):
        if turn == 4:
            heard.take("/reset")
        del heard.said[:]
        heard.take("y" * 10)
        told.append(any("oldest turns" in text for text in heard.said))
    assert told == [False, True, False, False, False, True]


def test_speed_is_told_where_it_is_wanted(monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr("firstwords.repl.time.monotonic", lambda: next(times))
    assert Heard("nineteen characters", tells_speed=True).take("Hi") == ["(20 tokens, 10 tokens/s)"]


def test_a_reply_without_an_end_is_told():
    heard = Heard("four", sampling=Sampling(max_new_tokens=4))
    heard.session._stream_ids = lambda plan: iter(BYTES.encode("four"))
    assert heard.take("Hi") == ["(the reply did not end by itself: 4 tokens)"]


def test_help_names_every_command():
    said = Heard().take("/help")
    assert said == [HELP]
    assert all(f"{command} " in HELP for command in COMMANDS)


def test_system_and_reset():
    heard = Heard("a")
    assert heard.take("/system  Be  brief. ") == ["(system message set)"]
    heard.take("Hi", "/reset")
    assert contents(heard.session) == ["Be  brief."]
    assert heard.take("/system")[-1] == "(no system message)"
    assert heard.session.messages == []
    heard.refuse(BadData, "system message: with it", f"/system {'x' * 900}")


def test_undo_takes_back_turn_by_turn():
    heard = Heard("1", "2", "3")
    heard.take("one", "two", "/undo")
    assert heard.said[-1] == "(taken back: 'two')"
    assert contents(heard.session) == ["one", "1"]
    heard.take("three")
    assert contents(heard.session) == ["one", "1", "three", "3"]
    heard.take("/undo", "/undo")
    assert heard.session.messages == []
    heard.refuse(BadData, "^/undo: there is no turn", "/undo")


def test_undo_brings_turns_back_into_view():
    heard = Heard(*["x" * 10] * 3, context=70)
    heard.take("a" * 10, "b" * 10)
    used = heard.session.used
    heard.take("c" * 35)
    assert heard.session.last.evicted == 2
    heard.take("/undo")
    assert heard.session.used == used


def test_retry_asks_again_in_place_of_the_last_turn():
    heard = Heard("1", "2", "again", "once more")
    heard.refuse(BadData, "nothing was asked yet", "/retry")
    heard.take("one", "two", "/retry")
    assert contents(heard.session) == ["one", "1", "two", "again"]
    assert "greedy: the same words again" in heard.said[-1]
    heard.take("/undo", "/retry")
    assert contents(heard.session) == ["one", "1", "two", "once more"], "what was taken back can be asked"


def test_retry_of_a_question_whose_reply_was_empty_keeps_the_turn_before():
    heard = Heard("1", "", "2")
    heard.take("one", "two", "/retry")
    assert contents(heard.session) == ["one", "1", "two", "2"]


@pytest.mark.parametrize(("sampling", "remark"), [({}, True), ({"seed": 3}, True), ({"seed": None}, False)])
def test_retry_says_when_it_must_give_the_same(sampling, remark):
    heard = Heard("1", "1", sampling=Sampling(temperature=0.8 if sampling else 0, **sampling))
    heard.take("one", "/retry")
    assert any("the same words again" in text for text in heard.said) is remark


def test_edit_replaces_the_last_question():
    heard = Heard("1", "2", "3", "4")
    heard.refuse(BadData, "nothing was asked yet", "/edit x")
    heard.take("one", "two", "/edit three")
    assert contents(heard.session) == ["one", "1", "three", "3"]
    heard.take("/edit")
    assert heard.chat.draft == "three"
    heard.take("four")
    assert contents(heard.session) == ["one", "1", "four", "4"]
    assert heard.chat.draft is None


def test_an_edit_can_be_left():
    heard = Heard("1", "2")
    heard.take("one", "/edit", "")
    assert heard.said[-1] == "(left as it was)"
    heard.take("/edit", "/temp 1", "two")
    assert contents(heard.session) == ["one", "1", "two", "2"], "a command leaves it too"


def test_an_edit_that_is_refused_changes_nothing():
    heard = Heard("1", "2")
    heard.take("one", "two")
    heard.refuse(BadData, "at most", f"/edit {'x' * 900}")
    heard.take("/edit")
    heard.refuse(BadData, "at most", "x" * 900)


def test_temp_and_seed():
    heard = Heard()
    heard.take("/temp", "/temp 0.8", "/seed", "/seed 7", "/temp 0", "/seed off")
    assert heard.said == [
        "(temperature 0, greedy)",
        "(temperature 0.8)",
        "(no seed: drawn anew each time)",
        "(seed 7)",
        "(temperature 0, greedy)",
        "(no seed: drawn anew each time)",
    ]
    assert heard.session.sampling == Sampling()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("/temp warm", "^/temp: is 'warm'; give a number from 0 on$"),
        ("/temp -1", "^/temp: is '-1'; give a number from 0 on$"),
        ("/temp nan", "^/temp: is 'nan'"),
        ("/temp inf", "^/temp: is 'inf'"),
        ("/temp 0.8 please", "^/temp: is '0.8 please'"),
        ("/seed x\x1b[31m", "^/seed: is 'x\ufffd\\[31m'; give a whole number from 0 to"),
        ("/seed 1.5", "^/seed: is '1.5'"),
        ("/seed -1", "^/seed: is '-1'"),
        ("/why", "^/why: there is no reply"),
        ("/why many", "^/why: is 'many'; give a whole number from 0 to 20$"),
        ("/why 21", "^/why: is '21'"),
        ("/undo 2", "^/undo: takes nothing behind it, but there is '2'; leave it out$"),
        ("/retry now", "^/retry: takes nothing"),
        ("/reset all", "^/reset: takes nothing"),
        ("/help me", "^/help: takes nothing"),
        ("/save", "^/save: names no file"),
        ("/save /tmp/x", "^/save: nothing was said yet"),
        ("/load", "^/load: names no file"),
        ("/rest", "^/rest: unknown command; did you mean '/reset'"),
        ("/frobnicate", "^/frobnicate: unknown command; known: /edit, /help, "),
    ],
)
def test_a_bad_command_is_refused_and_says_what_would_be_right(line, match):
    Heard().refuse(BadData, match, line)


def test_save_and_load(tmp_path):
    path = tmp_path / "talk.jsonl"
    heard = Heard("1 日本", "2", "3", "4")
    heard.take("/system S", "one", f"/save {path}", "two\nlines", "/save")
    row = {"messages": [{"role": m.role, "content": m.content} for m in heard.session.messages]}
    assert json.loads(path.read_text(encoding="utf-8")) == row
    assert heard.said[-1] == f"(turns in {path}: 2)"
    other = Heard("5")
    other.take(f"/load {path}")
    assert other.session.messages == heard.session.messages
    other.take("three", "/save")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1
    other.refuse(CannotCreate, "is there already", f"/save {tmp_path}")
    third = Heard("1")
    third.take("one")
    third.refuse(CannotCreate, "talk.jsonl: is there already; name another", f"/save {path}")
    third.refuse(MissingInput, f"there is no folder {tmp_path}/none; make it", f"/save {tmp_path}/none/x")
    third.refuse(IOFailed, "writing failed .*; mend that, or free some space", "/save /proc/self/x")


def test_a_saved_conversation_holds_turns_out_of_view(tmp_path):
    heard = Heard(*["x" * 10] * 4, context=60)
    heard.take(*["y" * 10] * 4, f"/save {tmp_path / 'a.jsonl'}")
    assert heard.session.last.evicted
    assert len(json.loads((tmp_path / "a.jsonl").read_text())["messages"]) == 8


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "holds no conversation;"),
        (b"import json\nimport os\n", "broken JSON|no JSON|not JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n' * 2, "holds more than one conversation;"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\x00", "holds a NUL"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        (b'{"messages": [{"role": "root", "content": "x"}]}', "the role 'root'"),
        (b"[" * 100_000, "nested too deep|broken JSON"),
    ],
)
def test_load_refuses_what_is_no_conversation(tmp_path, data, match):
    path = tmp_path / "talk.jsonl"
    path.write_bytes(data)
    heard = Heard("1")
    heard.take("one")
    heard.refuse(BadData, match, f"/load {path}")


def test_load_of_nothing_says_what_is_near(tmp_path):
    (tmp_path / "talk.jsonl").write_text("")
    heard = Heard()
    heard.refuse(MissingInput, "did you mean 'talk.jsonl'", f"/load {tmp_path / 'tlk.jsonl'}")
    heard.refuse(MissingInput, "is no file", f"/load {tmp_path}")
    heard.refuse(MissingInput, "is no file", "/load /dev/zero")


def test_why_shows_tokens_with_what_else_they_might_have_been():
    heard = Heard("日")
    heard.session.explain = lambda num_others: [
        Choice(ord("H"), 0.991, [(ord("\x1b"), 0.004), (ord("'"), 0.001)][:num_others]),
        Choice("日".encode()[0], 0.3, [(BYTES.end_id, 0.2)]),
        Choice(BYTES.end_id, 1.0, []),
    ]
    assert heard.take("/why") == [
        "'H'                   99.1 %   '\\x1b' 0.4 %  \"'\" 0.1 %",
        "b'\\xe6'               30.0 %   <|end|> 20.0 %",
        "<|end|>              100.0 %",
    ]
    assert heard.styles == ["", "warn", ""]
    assert "'\\x1b'" not in heard.take("/why 0")[3]


class Trained:
    """A run that has trained on: gives another session when it is asked, or fails."""

    def __init__(self, *steps):
        self.steps = iter(steps)

    def move(self, session):
        step = next(self.steps, None)
        if isinstance(step, Exception):
            raise step
        if step is None:
            return session
        newer = Scripted(f"step {step}")
        newer.manifest = {"step": step}
        newer.restore(session.messages)
        return newer


def test_follow_goes_over_before_a_question_with_the_conversation():
    heard = Heard("1", "2", follower=Trained(None, 400, Damaged("x: is broken; wait"), None))
    heard.take("one")
    assert heard.said == []
    heard.take("two")
    assert heard.said == ["(now step 400)"]
    assert contents(heard.chat.session) == ["one", "1", "two", "step 400"]
    heard.chat.session.replies = iter(["3"])
    heard.take("three")
    assert heard.said[1:] == ["error: x: is broken; wait"]
    assert heard.written == "1\nstep 400\n3\n"


def test_ctrl_c_while_writing_closes_the_stream_at_once():
    heard = Heard("word" * 100)

    def interrupt(text):
        heard.written += text
        if len(heard.written) == 20:
            raise KeyboardInterrupt

    heard.chat.write = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:  # its traceback keeps the stream alive
        heard.chat.answer("Hi")
    assert heard.session.messages == talk("Hi", "word" * 5), "recorded before the next prompt"
    assert caught.tb
