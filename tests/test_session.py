"""Chat: the history in the prompt, the budget, text that never breaks nor becomes a control id."""

import random

import pytest
import torch
from tiny import BYTES, build_babbler, build_config
from transformers import GPT2LMHeadModel

from firstwords import checkpoint as checkpoint_module
from firstwords import session as session_module
from firstwords.atomic import remove_folder
from firstwords.checkpoint import write_manifest
from firstwords.errors import BadData, Damaged, Diverged, Mismatch, MissingInput
from firstwords.generate import Sampling
from firstwords.schema import Message
from firstwords.session import ChatSession, Follower, ask_each, ask_many, load_session
from firstwords.template import CHAT_TEMPLATE, encode_prompt
from firstwords.tokenizer import CONTROL_TOKENS, load_tokenizer, train_bpe

NAN = "NaN"


class Scripted(GPT2LMHeadModel):
    """Says the scripted ids whatever it reads, and notes the prompts. `NAN` gives NaN logits."""

    def __init__(self, *replies, positions=4096):
        super().__init__(build_config(n_embd=4, n_positions=positions))
        self.eval()
        self.script = iter([token_id for reply in replies for token_id in reply])
        self.prompts = []
        self.transformer.wte.register_forward_pre_hook(self.note)
        self.lm_head = Head(self.score)

    def note(self, _, inputs):
        if inputs[0].shape[1] > 1:
            self.prompts.append(inputs[0][0].tolist())

    def score(self, hidden):
        """Return the logits (1, V) of the next id of the script."""
        logits = torch.zeros(1, self.config.vocab_size)
        token_id = next(self.script)
        logits[0, 0 if token_id == NAN else token_id] = torch.nan if token_id == NAN else 9.0
        return logits


class Head(torch.nn.Module):
    """Makes logits of the last hidden states by a function."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, hidden):
        return self.score(hidden)


def say(text):
    return [*BYTES.encode(text), BYTES.end_id]


def chat(*replies, context=4096, **options):
    return ChatSession(Scripted(*replies), BYTES, context=context, **options)


def test_the_whole_conversation_is_the_prompt():
    session = chat(say("Hello!"), say("Fine."), system="Be brief.")
    assert session.ask("Hi") == "Hello!"
    assert session.ask("How are you?") == "Fine."
    turns = [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello!"),
        Message("user", "How are you?"),
    ]
    assert session.model.prompts == [encode_prompt(turns[:2], BYTES), encode_prompt(turns, BYTES)]
    assert session.messages == [*turns, Message("assistant", "Fine.")]
    assert session.used == len(encode_prompt(session.messages, BYTES)) - 1
    assert session.last.ids == say("Fine.")
    assert session.last.stopped
    assert session.last.evicted == 0


def test_reset_keeps_the_system_message():
    session = chat(say("a"), say("b"), system="Be brief.")
    session.ask("x")
    session.reset()
    assert session.messages == [Message("system", "Be brief.")]
    assert session.last is None
    session.ask("y")
    session.set_system("Be long.")
    assert [m.content for m in session.messages] == ["Be long.", "y", "b"]
    session.set_system(None)
    assert [m.content for m in session.messages] == ["y", "b"]


def test_both_stop_ids_end_a_reply_but_only_end_counts_as_stopped():
    session = chat([*b"one", BYTES.endoftext_id], say("two"))
    assert session.ask("?") == "one"
    assert not session.last.stopped
    assert session.ask("?") == "two"
    assert session.last.stopped


def test_a_reply_is_cut_at_the_limits():
    endless = list(b"ab" * 100)
    session = chat(endless, context=64)
    session.ask("Hi")
    assert len(session.last.ids) == 64 - len(session.model.prompts[0])
    assert not session.last.stopped
    session = chat(endless, sampling=Sampling(max_new_tokens=5))
    assert session.ask("Hi") == "ababa"
    model = Scripted(endless, positions=32)
    session = ChatSession(model, BYTES, context=1000)
    session.ask("Hi")
    assert session.context == 32 == len(model.prompts[0]) + len(session.last.ids)


class Likes(Scripted):
    """Would rather say each id of a list, in that order, than anything else."""

    def __init__(self, ids):
        super().__init__()
        self.scores = torch.zeros(self.config.vocab_size)
        self.scores[ids] = torch.arange(len(ids), 0, -1.0)

    def score(self, hidden):
        return self.scores.repeat(len(hidden), 1)


def test_surplus_and_control_ids_are_never_said():
    surplus = list(range(len(BYTES), BYTES.vocab_size_padded))
    control = sorted(set(BYTES.control_ids.values()) - {BYTES.end_id, BYTES.endoftext_id})
    assert len(surplus) == 122
    assert len(control) == 4
    model = Likes([*surplus, *control, ord("a")])
    session = ChatSession(model, BYTES, context=500, sampling=Sampling(max_new_tokens=3))
    assert session.ask("Hi") == "aaa"
    session.sampling = Sampling(temperature=1.0, seed=0, max_new_tokens=99)
    session.ask("Hi")
    assert not set(session.last.ids) & {*surplus, *control}


TEXTS = [
    "ASCII",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 🇩🇪 é",
    "עברית العربية",
    "",
    "\U0010ffff",
]


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_never_breaks_a_character(text):
    session = chat(say(text))
    pieces = list(session.stream("Hi"))
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces), "a byte a token: a character a piece"
    assert "\ufffd" not in "".join(pieces)


def test_streamed_text_equals_the_decoded_ids_for_random_ids(monkeypatch):
    tokenizer = train_bpe(TEXTS * 3, 340)
    assert any(len(token) > 1 and max(token) > 127 for token in tokenizer.vocabulary)
    chance = random.Random(0)
    session = ChatSession(Scripted(), tokenizer, context=1000)
    for _ in range(1000):
        ids = [chance.randrange(len(tokenizer.vocabulary)) for _ in range(chance.randint(1, 30))]
        monkeypatch.setattr(session_module, "stream_ids", lambda *_, ids=ids, **__: iter(ids))
        assert "".join(session.stream("Hi")) == tokenizer.decode(ids)
        assert session.last.text == tokenizer.decode(ids)
        session.reset()


def test_text_that_looks_like_control_tokens_stays_text():
    hostile = "".join(CONTROL_TOKENS)
    session = chat(say(hostile), say("ok"), system=hostile)
    assert session.ask(f"a{hostile}b") == hostile
    session.ask(hostile)
    control = set(BYTES.control_ids.values())
    frame = [BYTES.control_ids[f"<|{name}|>"] for name in ("system", "end", "user", "end")]
    first, second = ([i for i in prompt if i in control] for prompt in session.model.prompts)
    assistant = BYTES.role_id("assistant")
    assert first == [*frame, assistant]
    assert second == [*frame, assistant, BYTES.end_id, *frame[2:], assistant]


def test_fifty_turns_stay_within_the_context_and_evict_whole_turns():
    replies = [say(f"reply {turn}") for turn in range(50)]
    session = chat(*replies, context=120, system="S")
    for turn in range(50):
        before = session.messages
        session.ask(f"question {turn}")
        prompt = session.model.prompts[-1]
        assert len(prompt) + session.reserve <= session.context
        assert prompt[:3] == [BYTES.role_id("system"), ord("S"), BYTES.end_id]
        asked = Message("user", f"question {turn}")
        in_view = [before[0], *before[1 + 2 * session.last.evicted :], asked]
        assert prompt == encode_prompt(in_view, BYTES), "the oldest go, the others stay in order"
        assert session.messages == [*before, asked, Message("assistant", f"reply {turn}")]
        assert session.used <= session.context - session.reserve
    assert session.last.evicted > 40


def test_no_turn_is_dropped_before_it_must():
    # A turn has 2 * 3 ids, so the prompts have 4, 10 and 16; 5 more are kept for the reply.
    for context, expected in ((21, [0, 0, 0]), (20, [0, 0, 1]), (15, [0, 0, 1]), (14, [0, 1, 2])):
        session = chat(*[say("r")] * 3, context=context, sampling=Sampling(max_new_tokens=5))
        evicted = []
        for _ in range(3):
            session.ask("q")
            evicted.append(session.last.evicted)
        assert evicted == expected, context


def test_the_reserve():
    def reserve(most):
        return chat(context=100, sampling=Sampling(max_new_tokens=most)).reserve

    assert [reserve(most) for most in (None, 10, 50, 400)] == [25, 10, 50, 50]


def test_a_turn_too_long_says_how_long_and_changes_nothing():
    session = chat(say("ok"), say("ok"), context=100, system="S")
    session.ask("first")
    before = session.messages
    # 100 - 25 for the reply - 3 for the system message - 2 around the text - <|assistant|> = 69
    with pytest.raises(BadData, match="is 70 tokens long, and at most 69 tokens fit"):
        session.stream("x" * 70)
    assert session.messages is before
    assert session.ask("x" * 69) == "ok"
    assert session.last.evicted == 1


def test_a_system_message_too_long_is_refused():
    with pytest.raises(BadData, match="system message: with it"):
        chat(context=40, system="x" * 30)
    session = chat(context=40, system="short")
    with pytest.raises(BadData, match="system message"):
        session.set_system("x" * 30)
    assert session.messages == [Message("system", "short")]


def test_a_hundred_megabytes_are_refused_without_being_encoded(monkeypatch):
    session = chat(say("never"))
    text = "x" * 100_000_000
    monkeypatch.setattr(BYTES, "encode", lambda given: [0] * len(given[:10_000]))
    with pytest.raises(BadData, match="is 100,000,000 characters long, and at most 3069 tokens fit"):
        session.stream(text)
    assert session.messages == []


def test_undo_and_restore():
    session = chat(say("a"), say("b"), system="Be brief.", context=60)
    session.ask("x")
    before = session.messages
    session.ask("y" * 30)
    assert session.last.evicted == 1
    assert session.undo() == "y" * 30
    assert session.messages == before
    assert session.last is None
    assert session.undo() == "x"
    assert session.undo() is None
    assert session.messages == [Message("system", "Be brief.")]
    session.restore(before[1:])
    assert session.messages == before[1:]
    with pytest.raises(BadData, match="system message"):
        session.restore([Message("system", "x" * 60), *before[1:]])
    assert session.messages == before[1:]


@pytest.mark.parametrize("text", ["", " \n", "nul \0", "half \ud800"])
def test_what_is_no_text_is_refused(text):
    session = chat(say("never"))
    with pytest.raises(BadData, match="^message: "):
        session.stream(text)
    assert session.messages == []


def test_closing_the_stream_keeps_the_part_that_has_text():
    session = chat(say("Hello!"), say("Again"))
    stream = session.stream("Hi")
    assert [next(stream), next(stream)] == ["H", "e"]
    stream.close()
    assert session.messages == [Message("user", "Hi"), Message("assistant", "He")]
    assert session.last.text == "He"
    assert not session.last.stopped


def test_closing_in_the_middle_of_a_character_keeps_whole_ones():
    session = chat(say("日本"))
    stream = session.stream("Hi")
    assert next(stream) == "日"
    stream.close()
    assert session.messages[-1].content == "日"


def test_closing_before_any_text_withdraws_the_turn():
    session = chat(say(" "), [], say("x"))
    stream = session.stream("Hi")
    stream.close()  # never begun
    assert session.messages == []
    stream = session.stream("Hi")
    assert next(stream) == " "
    stream.close()
    assert session.messages == []
    assert session.last.text == " "


def test_an_empty_reply_is_no_turn():
    session = chat(say(""))
    assert session.ask("Hi") == ""
    assert session.last.stopped
    assert session.messages == []


def test_ctrl_c_inside_the_model_keeps_the_part():
    class Interrupted(Scripted):
        def score(self, hidden):
            try:
                return super().score(hidden)
            except StopIteration:
                raise KeyboardInterrupt from None

    session = ChatSession(Interrupted(list(b"par")), BYTES, context=100)
    with pytest.raises(KeyboardInterrupt):
        session.ask("Hi")
    assert session.messages == [Message("user", "Hi"), Message("assistant", "par")]
    with pytest.raises(KeyboardInterrupt):
        session.ask("Ho")
    assert len(session.messages) == 2, "no text came, the turn is withdrawn"


def test_nan_leaves_the_history_as_it_was():
    session = chat(say("ok"), [ord("a"), NAN])
    session.ask("one")
    before = session.messages
    with pytest.raises(Diverged):
        session.ask("two")
    assert session.messages is before


def test_ask_many_equals_asking_one_by_one():
    model, chance = build_babbler(), random.Random(3)
    talks = [
        ["".join(chance.choices("abcde ?", k=chance.randint(1, 30))) + "!" for _ in range(3)]
        for _ in range(12)
    ]
    systems = [chance.choice([None, "s", "Be brief."]) for _ in talks]

    def start():
        return [ChatSession(model, BYTES, context=80, system=system) for system in systems]

    singly, together = start(), start()
    for turn in range(3):
        texts = [talk[turn] for talk in talks]
        for session, text in zip(singly, texts, strict=True):
            session.ask(text)
        replies = ask_many(together, texts, batch_size=5)
        assert replies == [session.last for session in singly]
        assert replies == [session.last for session in together]
    assert [s.messages for s in together] == [s.messages for s in singly]
    assert len({len(reply.ids) for reply in replies}) > 3
    assert any(reply.evicted for reply in replies)
    assert ask_many([], []) == []


def test_ask_many_asks_nothing_when_one_text_is_refused():
    sessions = [chat(say("never")), chat(say("never"), context=40)]
    sessions[1].model = sessions[0].model
    with pytest.raises(BadData, match="tokens long"):
        ask_many(sessions, ["fine", "x" * 50])
    assert [session.messages for session in sessions] == [[], []]


def save_model(folder, **manifest):
    folder.mkdir(parents=True)
    model = build_babbler(n_layer=2)
    model.save_pretrained(folder)
    BYTES.save(folder, chat_template=CHAT_TEMPLATE)
    write_manifest(folder, manifest)
    return model


def test_load_session_from_a_run_takes_the_newest_checkpoint(tmp_path):
    save_model(tmp_path / "run" / "checkpoint-9", step=9, longest_row=50)
    model = save_model(tmp_path / "run" / "checkpoint-20", step=20, longest_row=64)
    session = load_session(tmp_path / "run", system="S", sampling=Sampling(max_new_tokens=7))
    assert session.folder == tmp_path / "run" / "checkpoint-20"
    assert session.manifest["step"] == 20
    assert session.context == 64
    assert session.tokenizer.hash == BYTES.hash
    plain = ChatSession(model, BYTES, context=64, system="S", sampling=Sampling(max_new_tokens=7))
    assert session.ask("Hi") == plain.ask("Hi")
    assert len(session.last.ids) == 7


def test_load_session_of_a_folder_that_does_not_say_its_longest_row(tmp_path):
    save_model(tmp_path / "model", step=1)
    assert load_session(tmp_path / "model").context == 128


def test_load_session_refuses_what_is_not_there_or_does_not_fit(tmp_path):
    save_model(tmp_path / "model", step=1)
    with pytest.raises(MissingInput, match="did you mean 'model'"):
        load_session(tmp_path / "modle")
    bigger = train_bpe([" ".join(f"{number:x}" for number in range(999))], 400)
    bigger.save(tmp_path / "model", chat_template=CHAT_TEMPLATE)
    with pytest.raises(Damaged, match="tokenizer.json"):
        load_session(tmp_path / "model")
    write_manifest(tmp_path / "model", {"step": 1})
    with pytest.raises(Mismatch, match="384 ids, its tokenizer with control tokens 400"):
        load_session(tmp_path / "model")


def test_ask_each_begins_anew_with_every_text_and_goes_on_after_a_refused_one():
    model = build_babbler()
    session = ChatSession(model, BYTES, context=80, system="s")
    session.ask("before")
    texts = ["one", "", "two?", "x" * 90, "three", "one"]
    answers = list(ask_each(session, iter(texts), batch_size=4))
    assert [text for text, _ in answers] == texts
    for text, answer in answers:
        if text in ("", "x" * 90):
            assert isinstance(answer, BadData)
        else:
            own = ChatSession(model, BYTES, context=80, system="s")
            own.ask(text)
            assert answer == own.last
    assert [message.content for message in session.messages][:2] == ["s", "before"]


def test_explain_gives_each_token_of_the_reply_with_others():
    model = build_babbler(n_layer=2)
    session = ChatSession(model, BYTES, context=100, sampling=Sampling(max_new_tokens=6))
    assert session.explain(2) == []
    session.ask("Hi")
    choices = session.explain(2)
    assert [choice.token_id for choice in choices] == session.last.ids
    for place, choice in enumerate(choices):
        read = torch.tensor([[*session.last.prompt, *session.last.ids[:place]]])
        logits = model(read).logits[0, -1]
        logits[sorted(session.banned_ids)] = -torch.inf
        expected = logits.softmax(-1)
        assert choice.probability == pytest.approx(expected[choice.token_id].item(), abs=1e-5)
        second, third = expected.topk(3).indices[1:].tolist()
        assert [token_id for token_id, _ in choice.others] == [second, third], "greedy: it was the first"
        assert not {token_id for token_id, _ in choice.others} & session.banned_ids


def test_a_followed_run_is_gone_over_to_with_its_conversation(tmp_path):
    run = tmp_path / "run"
    save_model(run / "checkpoint-9", step=9, longest_row=50)
    follower = Follower(run, lambda: load_session(run))
    session = load_session(run, system="S")
    session.ask("Hi")
    session.sampling = Sampling(temperature=0.5)
    assert follower.move(session) is session
    save_model(run / ".staging-1-checkpoint-10", step=10)
    assert not follower.has_newer(session), "what is being written is not there"
    save_model(run / "checkpoint-20", step=20, longest_row=64)
    assert follower.has_newer(session)
    newer = follower.move(session)
    assert (newer.manifest["step"], newer.context) == (20, 64)
    assert newer.messages == session.messages
    assert newer.sampling == session.sampling
    assert follower.move(newer) is newer


def test_a_damaged_newer_checkpoint_is_tried_once(tmp_path):
    run = tmp_path / "run"
    save_model(run / "checkpoint-9", step=9)
    session = load_session(run)
    save_model(run / "checkpoint-20", step=20)
    (run / "checkpoint-20" / "config.json").write_text("{}")
    loads = []
    follower = Follower(run, lambda: loads.append(1) or load_session(run))
    assert follower.move(session) is session
    assert follower.move(session) is session
    assert len(loads) == 1


@pytest.mark.parametrize("moment", ["before it is verified", "before its weights are read"])
def test_a_checkpoint_that_is_pruned_while_it_is_loaded_gives_way_to_the_newer(tmp_path, monkeypatch, moment):
    run = tmp_path / "run"
    save_model(run / "checkpoint-9", step=9)
    verify, load = checkpoint_module.verify, session_module.load_tokenizer

    def train_on(folder):
        if folder.name == "checkpoint-9":
            save_model(run / "checkpoint-20", step=20)
            remove_folder(folder)

    if moment == "before it is verified":
        monkeypatch.setattr(checkpoint_module, "verify", lambda folder: (train_on(folder), verify(folder)))
    else:
        late = lambda folder: (train_on(folder), load(folder))[1]  # noqa: E731
        monkeypatch.setattr(session_module, "load_tokenizer", late)
    assert load_session(run).manifest["step"] == 20


def test_a_run_that_is_removed_while_it_is_loaded_is_missing(tmp_path, monkeypatch):
    run = tmp_path / "run"
    save_model(run / "checkpoint-9", step=9)
    monkeypatch.setattr(
        session_module, "load_tokenizer", lambda folder: remove_folder(run) or load_tokenizer(folder)
    )
    with pytest.raises(MissingInput, match="is no folder"):
        load_session(run)
