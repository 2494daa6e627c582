"""Symbols -> the conversations of stage B and the questions held out from them.

    user: What does `math.sqrt` do?          assistant: Return the square root of x.
    user: What are its arguments?            assistant: (x, /)
    user: What does `json.copytree` do?      assistant: I do not know that name.

Two of the eight phrasings of the question, and one of the five follow-ups, are held out for each
symbol, chosen by a hash of its name. Invented names belong to training or to evaluation by their
own hash. Invariant: what is held out is the same for every seed, and no seed's training
conversations hold any of it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice, zip_longest

from firstwords.pydocs.invented import invented_names
from firstwords.pydocs.symbols import Symbol, list_symbols, stable_hash
from firstwords.schema import Message

PHRASINGS = (
    "What does `{}` do?",
    "What is `{}`?",
    "Explain `{}`.",
    "Describe `{}` in one sentence.",
    "Tell me what `{}` is for.",
    "What is `{}` used for?",
    "In Python, what does `{}` do?",
    "I came across `{}`. What is it for?",
)
FOLLOW_UPS = (
    "What are its arguments?",
    "Which arguments does it take?",
    "What is its signature?",
    "Show me its arguments.",
    "How do I call it?",
)
UNKNOWN_ANSWER = "I do not know that name."
NO_SIGNATURE_ANSWER = "I do not know its arguments."
GREETING_WORDS = (
    "Hello",
    "Hi",
    "Hey",
    "Good morning",
    "Good afternoon",
    "Good evening",
    "Greetings",
)
GREETED = ("", " there", " again", " friend", " everyone")
HELD_OUT_GREETINGS = frozenset(  # both halves of which training has in other greetings
    ["Hi there", "Hello again", "Hey friend", "Good morning everyone", "Good evening again"]
)
GREETING_ANSWER = "Hello! Ask me what a name of the Python standard library does."
SMALL_TALK = {
    "You are welcome.": ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much."),
    "Goodbye!": ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you later."),
    "I am a small language model. I know the standard library of Python.": (
        "Who are you?",
        "What are you?",
        "What can you do?",
        "What do you know?",
        "Introduce yourself.",
        "Help",
    ),
}

# What one pass of training holds: exchanges, each of which stands by itself. Each symbol is asked about
# once in each of its six training phrasings; the other kinds are given per symbol or as a share.
FOLLOW_UPS_PER_SYMBOL = 3  # of these six, so many go on: question, summary, follow-up, signature
NO_SIGNATURE_SHARE = 0.5  # of the symbols without a signature: asked for it, once
INVENTED_SHARE = 0.3  # of all exchanges: as many swapped as misspelt, and some coined
COINED_SHARE = 0.10  # of the invented ones; only trained, so that `os.frobnicate` is unknown too
SMALL_TALK_SHARE = 0.015  # of all exchanges: greetings (two of three), thanks, who are you
BARE_SHARE = 0.10  # of all questions: typed without the backticks
# A chat goes on, and a model with learned positions must have seen the later ones: some exchanges
# are joined to longer conversations, which must still fit into a row of 256 tokens.
JOINED_SHARE = 0.3  # of all exchanges
JOINED_EXCHANGES = (2, 6)
JOINED_CHARACTERS = 560
# What `val.jsonl` holds, all of it held out from training.
VAL_QUESTIONS, VAL_FOLLOW_UPS, VAL_UNKNOWN, VAL_GREETINGS = 200, 60, 60, 10


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question: `phrasing` is the index into `PHRASINGS`."""

    symbol: str
    phrasing: int
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A held-out follow-up and the turn before it, which is asked in a training phrasing."""

    symbol: str
    first_prompt: str
    first_answer: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A question about an invented name; `kind` is one of `INVENTED_KINDS`."""

    kind: str
    name: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Questions:
    """The conversations of stage B, shuffled by the seed."""

    train: list[list[Message]]
    val: list[list[Message]]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Everything that no training conversation holds; the same for every training seed."""

    questions: list[Question]
    follow_ups: list[FollowUp]
    greetings: list[str]

    def draw(self, seed: int, count: int = 200) -> list[Question]:
        """Draw `count` different held-out questions."""
        return _draw(self.questions, f"questions {seed}", count)

    def draw_follow_ups(self, seed: int, count: int = 100) -> list[FollowUp]:
        """Draw `count` different follow-ups, of symbols that have a signature."""
        return _draw(self.follow_ups, f"follow-ups {seed}", count)

    def draw_unknown(self, seed: int, per_kind: int = 50) -> list[Unknown]:
        """Invent `per_kind` swapped and as many misspelt names, and ask about each."""
        pick = random.Random(f"unknown {seed}")
        return [
            Unknown(kind, name, pick.choice(PHRASINGS).format(name), UNKNOWN_ANSWER)
            for kind in ("swapped", "misspelt")
            for name in invented_names(kind, seed, per_kind, held_out=True)
        ]


def _draw(items: list, key: str, count: int) -> list:
    return random.Random(key).sample(items, min(count, len(items)))


def held_out_phrasings(name: str) -> tuple[int, int]:
    """Return the two phrasings (indices) that training never uses with this name."""
    pairs = list(combinations(range(len(PHRASINGS)), 2))
    return pairs[stable_hash(f"phrasing {name}") % len(pairs)]


def training_phrasings(name: str) -> list[int]:
    """Return the phrasings (indices) that training uses with this name."""
    held_out = held_out_phrasings(name)
    return [index for index in range(len(PHRASINGS)) if index not in held_out]


def held_out_follow_up(name: str) -> int:
    """Return the follow-up (index) that training never uses with this name."""
    return stable_hash(f"follow-up {name}") % len(FOLLOW_UPS)


def training_follow_ups(name: str) -> list[int]:
    """Return the follow-ups (indices) that training uses with this name."""
    return [index for index in range(len(FOLLOW_UPS)) if index != held_out_follow_up(name)]


@cache
def list_greetings() -> dict[str, bool]:
    """Return all greetings, in order, and whether each is held out."""
    plain = [word + whom for word in GREETING_WORDS for whom in GREETED]
    return {
        (text if capital else text.lower()) + mark: text in HELD_OUT_GREETINGS
        for text in plain
        for capital in (True, False)
        for mark in ("", "!", ".")
    }


def build_held_out() -> HeldOut:
    """Return every held-out question, follow-up and greeting."""
    symbols = list_symbols()
    questions = [
        Question(symbol.name, index, PHRASINGS[index].format(symbol.name), symbol.summary)
        for symbol in symbols
        for index in held_out_phrasings(symbol.name)
    ]
    follow_ups = [_held_out_follow_up(symbol) for symbol in symbols if symbol.signature]
    greetings = [text for text, held_out in list_greetings().items() if held_out]
    return HeldOut(questions, follow_ups, greetings)


def _held_out_follow_up(symbol: Symbol) -> FollowUp:
    choices = training_phrasings(symbol.name)
    first = choices[stable_hash(f"first {symbol.name}") % len(choices)]
    prompt = FOLLOW_UPS[held_out_follow_up(symbol.name)]
    first_prompt = PHRASINGS[first].format(symbol.name)
    return FollowUp(symbol.name, first_prompt, symbol.summary, prompt, symbol.signature)


def build_questions(seed: int = 0, *, passes: int = 1, invented: int | None = None) -> Questions:
    """Build the training and validation conversations.

    Args:
        seed: the order, and every choice among what training may use.
        passes: how often each (symbol, training phrasing) occurs; every pass has invented names of
            its own, so that the model learns what exists, and not a list of what does not.
        invented: exchanges about invented names in each pass; by default `INVENTED_SHARE` of all.
    """
    pick = random.Random(f"train {seed}")
    train = [exchange for _ in range(passes) for exchange in _build_real(pick)]
    if invented is None:
        invented = round(len(train) / passes * INVENTED_SHARE / (1 - INVENTED_SHARE))
    train += _build_invented(pick, seed, passes * invented)
    train += _build_small_talk(pick, round(len(train) * SMALL_TALK_SHARE))
    pick.shuffle(train)
    return Questions(list(_join_exchanges(train, pick)), _build_val(seed))


def _build_real(pick: random.Random) -> Iterator[list[Message]]:
    for symbol in list_symbols():
        phrasings = training_phrasings(symbol.name)
        pick.shuffle(phrasings)
        follow_ups = _draw_follow_ups(symbol, pick)
        for index, follow_up in zip_longest(phrasings, follow_ups):
            exchange = _turn(_quote(index, symbol.name, pick), symbol.summary)
            if follow_up is not None:
                exchange += _turn(FOLLOW_UPS[follow_up], symbol.signature or NO_SIGNATURE_ANSWER)
            yield exchange


def _draw_follow_ups(symbol: Symbol, pick: random.Random) -> list[int]:
    wanted = FOLLOW_UPS_PER_SYMBOL if symbol.signature else pick.random() < NO_SIGNATURE_SHARE
    return pick.sample(training_follow_ups(symbol.name), wanted)


def _build_invented(pick: random.Random, seed: int, count: int) -> Iterator[list[Message]]:
    coined = round(count * COINED_SHARE)
    swapped = (count - coined) // 2
    counts = {"swapped": swapped, "misspelt": count - coined - swapped, "coined": coined}
    for kind, wanted in counts.items():
        for name in invented_names(kind, seed, wanted):
            yield _turn(_quote(pick.randrange(len(PHRASINGS)), name, pick), UNKNOWN_ANSWER)


def _build_small_talk(pick: random.Random, count: int) -> Iterator[list[Message]]:
    greetings = [text for text, held_out in list_greetings().items() if not held_out]
    for _ in range(count):
        answer = pick.choice(list(SMALL_TALK))
        talk = _turn(pick.choice(SMALL_TALK[answer]), answer)
        yield talk if pick.random() < 1 / 3 else _turn(pick.choice(greetings), GREETING_ANSWER)


def _join_exchanges(exchanges: list[list[Message]], pick: random.Random) -> Iterator[list[Message]]:
    """Join runs of neighbours, as many exchanges as `JOINED_SHARE` says, and pass on the others."""
    run_length = sum(JOINED_EXCHANGES) / 2
    chance = JOINED_SHARE / (JOINED_SHARE + (1 - JOINED_SHARE) * run_length)
    waiting = iter(exchanges)
    for conversation in waiting:
        wanted = pick.randint(*JOINED_EXCHANGES) if pick.random() < chance else 1
        for exchange in islice(waiting, wanted - 1):
            if _count_characters(conversation + exchange) > JOINED_CHARACTERS:
                yield conversation
                conversation = []
            conversation = conversation + exchange
        yield conversation


def _count_characters(messages: list[Message]) -> int:
    return sum(len(message.content) for message in messages)


def _build_val(seed: int) -> list[list[Message]]:
    held_out = build_held_out()
    key = f"val {seed}"
    val = [_turn(q.prompt, q.answer) for q in held_out.draw(key, VAL_QUESTIONS)]
    for item in held_out.draw_follow_ups(key, VAL_FOLLOW_UPS):
        val.append(_turn(item.first_prompt, item.first_answer) + _turn(item.prompt, item.answer))
    val += [_turn(u.prompt, u.answer) for u in held_out.draw_unknown(key, VAL_UNKNOWN // 2)]
    greetings = _draw(held_out.greetings, f"greetings {key}", VAL_GREETINGS)
    return val + [_turn(text, GREETING_ANSWER) for text in greetings]


def _turn(prompt: str, answer: str) -> list[Message]:
    return [Message("user", prompt), Message("assistant", answer)]


def _quote(index: int, name: str, pick: random.Random) -> str:
    prompt = PHRASINGS[index].format(name)
    return prompt.replace("`", "") if pick.random() < BARE_SHARE else prompt
