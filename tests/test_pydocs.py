"""The embedded corpus: true answers, nothing held out in training, the same in every process."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from firstwords import pydocs
from firstwords.errors import MissingInput
from firstwords.pydocs import invented, questions, symbols
from firstwords.pydocs.invented import invented_names, is_held_out_name, is_real
from firstwords.schema import conversation_row, parse_conversation

ROOT = Path(__file__).parents[1]
# By pytest, and the last by torch where another test has imported it.
PATCHED = {"sys.unraisablehook", "threading.excepthook", "sys.breakpointhook", "inspect.getfile"}


def resolve(name: str):
    """Return the object of a dotted name, by import and getattr alone."""
    parts = name.split(".")
    for end in range(len(parts) + 1):
        try:
            value = importlib.import_module(".".join(parts[:end]) or "builtins")
            for part in parts[end:]:
                value = getattr(value, part)
        except (ImportError, AttributeError):
            continue
        return value
    raise AttributeError(name)


def list_unpatched() -> list:
    return [s for s in pydocs.list_symbols() if s.name not in PATCHED]


def exists(name: str) -> bool:
    try:
        resolve(name)
    except AttributeError:
        return False
    return True


def parse_prompt(prompt: str) -> tuple[str, int] | None:
    """Read `(name, phrasing)` back from a question, with or without backticks."""
    for index, phrasing in enumerate(pydocs.PHRASINGS):
        before, after = (re.escape(part) for part in phrasing.split("`{}`"))
        if match := re.fullmatch(rf"{before}(`?)([\w.]*\w)\1{after}", prompt):
            return match[2], index
    return None


def list_turns(conversations) -> list[tuple[str, str]]:
    return [(c[place].content, c[place + 1].content) for c in conversations for place in range(0, len(c), 2)]


def list_asked(conversations) -> tuple[Counter, Counter]:
    """Count the `(name, phrasing)` questions and the `(name, follow-up)` questions."""
    asked, followed = Counter(), Counter()
    for conversation in conversations:
        name = None
        for prompt, _ in list_turns([conversation]):
            if parsed := parse_prompt(prompt):
                name = parsed[0]
                asked[parsed] += 1
            elif prompt in pydocs.FOLLOW_UPS:
                followed[name, pydocs.FOLLOW_UPS.index(prompt)] += 1
    return asked, followed


@pytest.fixture(scope="module")
def held_out():
    return pydocs.build_held_out()


@pytest.fixture(scope="module", params=[0, 1])
def built(request):
    return pydocs.build_questions(request.param)


# --- symbols


def test_symbols_are_enough_and_sorted():
    names = [symbol.name for symbol in pydocs.list_symbols()]
    assert 1450 <= len(names) <= 2000
    assert names == sorted(set(names))
    assert {"json.dumps", "os.path.join", "len", "open", "str.join", "shutil.copytree"} <= set(names)


def test_an_object_counts_once():
    objects = [resolve(symbol.name) for symbol in pydocs.list_symbols()]
    keys = Counter(id(getattr(value, "__func__", value)) for value in objects)
    assert keys.most_common(1)[0][1] == 1


def test_every_summary_stands_in_its_docstring():
    for symbol in list_unpatched():
        doc = " ".join(resolve(symbol.name).__doc__.split())
        assert symbol.summary in doc, symbol
        assert symbol.summary.isprintable()
        assert len(symbol.summary) in symbols.SUMMARY_LENGTHS


def test_every_signature_is_what_inspect_prints():
    with_signature = [symbol for symbol in list_unpatched() if symbol.signature]
    assert len(with_signature) > 1000
    for symbol in with_signature:
        assert symbol.signature == str(inspect.signature(resolve(symbol.name))), symbol.name
        assert "0x" not in symbol.signature


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("Return the sine of x.\n\nIn radians.", "Return the sine of x."),
        ("Return it, e.g. a file\nor a folder. More.", "Return it, e.g. a file or a folder."),
        ("name(x) -> int\n\nReturn the number.", "Return the number."),
        ("D.name() -> None.  Remove all of it.", "Remove all of it."),
        ("name(x)\n    goes on\nReturn the number. Or not.", "Return the number."),
        ("Call sys.hook(). sys.hook() must be there.", "Call sys.hook()."),
        ("A line without its full stop", "A line without its full stop"),
        ("Two lines without\na full stop", None),
        ("One line that breaks off:", None),
        ("name(x, y)", None),
        ("Return x (see below. And on).", None),
        ("An enumeration.", None),
        ("Too short.", None),
        ("Too long, " + "very " * 30 + "long.", None),
        (">>> name(1) gives another number.", None),
        ("", None),
    ],
)
def test_parse_summary(doc, summary):
    assert symbols.parse_summary(doc, "name") == summary


def test_a_broken_python_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", str(ROOT / "no-python"))
    with pytest.raises(MissingInput, match="no-python") as caught:
        symbols.read_records.__wrapped__()
    assert "\n" not in str(caught.value)


# --- what is held out


def test_two_phrasings_of_each_symbol_are_held_out(held_out):
    per_symbol = Counter(question.symbol for question in held_out.questions)
    assert set(per_symbol.values()) == {2}
    assert len(per_symbol) == len(pydocs.list_symbols())
    assert {question.phrasing for question in held_out.questions} == set(range(8))


def test_training_has_every_other_phrasing_and_no_held_out_one(built, held_out):
    asked, followed = list_asked(built.train)
    hidden = {(question.symbol, question.phrasing) for question in held_out.questions}
    names = {symbol.name for symbol in pydocs.list_symbols()}
    everything = {(name, index) for name in names for index in range(len(pydocs.PHRASINGS))}
    assert {pair for pair in asked if pair[0] in names} == everything - hidden
    hidden_follow_ups = {(item.symbol, pydocs.FOLLOW_UPS.index(item.prompt)) for item in held_out.follow_ups}
    assert len(followed) > 2 * len(hidden_follow_ups)
    assert not hidden_follow_ups & set(followed)


def test_no_held_out_prompt_is_in_training(built, held_out):
    seen = {prompt.replace("`", "") for prompt, _ in list_turns(built.train)}
    unknown = [u for seed in range(5) for u in held_out.draw_unknown(seed)]
    prompts = [q.prompt for q in held_out.questions] + [u.prompt for u in unknown]
    assert not seen & {prompt.replace("`", "") for prompt in prompts + held_out.greetings}
    names = {parsed[0] for prompt in seen if (parsed := parse_prompt(prompt))}
    assert not names & {u.name for u in unknown}


def test_val_holds_nothing_of_training(built):
    asked, followed = list_asked(built.train)
    known = {symbol.name for symbol in pydocs.list_symbols()}
    for conversation in built.val:
        last = conversation[-2].content
        name, index = parse_prompt(conversation[0].content) or (None, None)
        if len(conversation) == 4:
            assert (name, pydocs.FOLLOW_UPS.index(last)) not in followed
        elif name:
            assert (name, index) not in asked
            assert name in known or not any((name, other) in asked for other in range(8))
    assert 200 < len(built.val) < 600


def test_the_held_out_draws(held_out):
    drawn = held_out.draw(0)
    assert len(set(drawn)) == 200
    assert drawn == pydocs.build_held_out().draw(0) != held_out.draw(1)
    assert all(parse_prompt(q.prompt) == (q.symbol, q.phrasing) for q in drawn)
    assert len(set(held_out.draw_follow_ups(0))) == 100
    unknown = held_out.draw_unknown(0)
    assert Counter(u.kind for u in unknown) == {"swapped": 50, "misspelt": 50}
    assert all(u.answer.startswith("I do not know") and u.name in u.prompt for u in unknown)
    assert len(held_out.greetings) >= 20


# --- invented names


def is_one_edit(one: str, other: str) -> bool:
    prefix = len(os.path.commonprefix([one, other]))
    one, other = one[prefix:], other[prefix:]
    suffix = len(os.path.commonprefix([one[::-1], other[::-1]]))
    one, other = one[: len(one) - suffix], other[: len(other) - suffix]
    return max(len(one), len(other)) == 1 or (len(one) == 2 and one == other[::-1])


@pytest.mark.parametrize("kind", pydocs.INVENTED_KINDS)
def test_invented_names_do_not_exist_and_are_disjoint(kind):
    training = {name for seed in range(3) for name in invented_names(kind, seed, 1500)}
    evaluation = {n for seed in range(3) for n in invented_names(kind, seed, 50, held_out=True)}
    assert not training & evaluation
    assert all(is_held_out_name(name) for name in evaluation)
    assert not [name for name in evaluation | training if exists(name)]


def test_swapped_and_misspelt_are_what_they_say():
    names = {symbol.name: symbol.kind for symbol in pydocs.list_symbols()}
    attributes = {name.rpartition(".")[2] for name, kind in names.items() if kind != "method"}
    for name in invented_names("swapped", 0, 50, held_out=True):
        owner, _, attribute = name.rpartition(".")
        assert inspect.ismodule(resolve(owner))
        assert attribute in attributes
    for name in invented_names("misspelt", 0, 50, held_out=True):
        assert any(is_one_edit(name, real) for real in names), name


def test_enough_names_can_be_invented(monkeypatch):
    assert len(set(invented_names("swapped", 0, 12_000))) == 12_000
    monkeypatch.setattr(invented, "_swap", lambda pick: "json.loads")
    with pytest.raises(ValueError, match="only 0 swapped names, not 1; ask for fewer"):
        invented_names("swapped", 0, 1)


@pytest.mark.parametrize("name", ["json.dumps", "os", "posixpath.join", "if", "quit", "tkinter.Tk"])
def test_aliases_and_modules_are_real(name):
    assert is_real(name)


# --- conversations


def test_every_conversation_is_a_row(built):
    for conversation in built.train + built.val:
        assert parse_conversation(conversation_row(conversation)) == conversation


def test_every_answer_is_the_documented_one(built):
    known = {symbol.name: symbol for symbol in pydocs.list_symbols()}
    for conversation in built.train:
        name = None
        for prompt, answer in list_turns([conversation]):
            if parsed := parse_prompt(prompt):
                name = parsed[0]
                expected = known[name].summary if name in known else pydocs.UNKNOWN_ANSWER
                assert answer == expected
            elif prompt in pydocs.FOLLOW_UPS:
                assert answer == (known[name].signature or questions.NO_SIGNATURE_ANSWER)


def test_the_mixture():
    train = pydocs.build_questions(0).train
    answers = Counter(answer for _, answer in list_turns(train))
    exchanges = sum(p not in pydocs.FOLLOW_UPS for p, _ in list_turns(train))
    assert answers[pydocs.UNKNOWN_ANSWER] / exchanges == pytest.approx(0.3, abs=0.01)
    assert 0.005 < answers[pydocs.GREETING_ANSWER] / exchanges < 0.02
    lengths = [sum(len(m.content) for m in c) for c in train]
    assert 500 < max(lengths) <= questions.JOINED_CHARACTERS
    assert sum(len(c) > 4 for c in train) > 500
    assert sum("`" not in p for p, _ in list_turns(train) if parse_prompt(p)) > 1000


def test_every_pass_asks_once_and_invents_anew():
    train = pydocs.build_questions(3, passes=2, invented=500).train
    asked, _ = list_asked(train)
    known = {symbol.name for symbol in pydocs.list_symbols()}
    assert min(count for (name, _), count in asked.items() if name in known) >= 2
    unknown = Counter(name for (name, _) in asked if name not in known)
    assert len(unknown) == pytest.approx(1000, abs=3)


# --- text


def test_documents_are_unique_and_begin_with_the_symbols():
    documents = list(pydocs.iter_documents())
    docs = [text.split("\n\n", 1)[1] for _, text in documents]
    assert len(docs) == len(set(docs))
    assert sum(map(len, docs)) > 1_500_000
    first = {source.removeprefix("python:") for source, _ in documents[:1200]}
    assert first <= {symbol.name for symbol in pydocs.list_symbols()}
    assert any(source == "python:assert" for source, _ in documents[-100:])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that fails when it is imported."""
    source = '"""A package that tells what it does, at some length."""\nraise SystemExit\n'
    source += 'def loud(x, *, y=1):\n    """Raise the voice until everybody can hear it."""\n'
    source += 'def _quiet():\n    """What is private is not read, however long it is."""\n'
    (tmp_path / "loudly").mkdir()
    (tmp_path / "loudly" / "__init__.py").write_text(source)
    (tmp_path / "loudly" / "broken.py").write_text("def (:\n")
    info = tmp_path / "loudly-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loudly\nVersion: 1.0\n")
    (info / "RECORD").write_text("loudly/broken.py,,\nloudly/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "loudly"


def test_packages_are_read_and_never_imported(package):
    documents = [item for item in pydocs.iter_documents([package]) if item[0].startswith("loudly")]
    assert documents == [
        (
            "loudly:loudly/__init__.py",
            "loudly\n\nA package that tells what it does, at some length.",
        ),
        (
            "loudly:loudly/__init__.py",
            "loudly.loud(x, *, y=1)\n\nRaise the voice until everybody can hear it.",
        ),
    ]
    assert package not in sys.modules


def test_the_packages_of_requirements(package, tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# pins\nloudly==1.0 ; python_version > '3'\nno-such-package-here>=2\n-r x\n")
    assert pydocs.list_packages(path) == ["loudly"]
    with pytest.raises(MissingInput, match="no-such-package-here"):
        next(pydocs.iter_documents(["no-such-package-here"]))
    with pytest.raises(MissingInput, match=r"nowhere\.txt"):
        pydocs.list_packages(tmp_path / "nowhere.txt")


# --- the same in every process

FINGERPRINT = """
import hashlib, sys
from firstwords import pydocs
built, held_out = pydocs.build_questions(0), pydocs.build_held_out()
everything = (pydocs.list_symbols(), built, held_out, held_out.draw_unknown(0))
text = repr(everything) + repr(list(pydocs.iter_documents()))
loaded = {"torch", "transformers", "datasets", "sqlite3", "wsgiref"} & set(sys.modules)
print(hashlib.sha256(text.encode()).hexdigest(), "SECRET-1" in text, sorted(loaded))
"""


def test_nothing_depends_on_the_process(tmp_path):
    outputs = set()
    for salt in ("1", "2"):
        environment = dict(
            PATH=os.environ["PATH"], PYTHONHASHSEED=salt, PYTHONPATH=str(ROOT), HOME=f"/{salt}",
            PYTHONOPTIMIZE="2" if salt == "2" else "", COLUMNS=f"4{salt}", TOKEN="SECRET-1",
        )  # fmt: skip
        command = [sys.executable, "-c", FINGERPRINT]
        folder = ROOT if salt == "1" else tmp_path
        (tmp_path / "shelve.py").write_text("raise SystemExit('the wrong shelve')\n")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().split(maxsplit=1)[1] == "False []\n"


def test_the_hash_is_fixed():
    """It decides what is held out, so a model trained yesterday is scored by it tomorrow."""
    assert symbols.stable_hash("len") == 8698637366198461687
    assert questions.held_out_phrasings("json.dumps") == (4, 5)
    assert questions.held_out_follow_up("len") == 2
