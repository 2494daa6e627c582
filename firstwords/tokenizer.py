"""Text <-> token ids, for GPT-2's BPE, an own BPE, and characters.

    load_tokenizer("data/pydocs").encode("Hi <|end|>")   ->  [72, 105, 32, 60, 124, ...]

The ordinary vocabulary comes first, then the control tokens in the order of `CONTROL_TOKENS`.
Invariant: `encode` never yields a control id, whatever the text holds; control ids come from the
template alone. The encoder is tiktoken (measured at 4 to 8 times the speed of the Hugging Face one), and
the folder that `save` writes gives the same ids in `transformers.AutoTokenizer`. No torch, no transformers.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from firstwords.errors import BadData, BadFlag, Mismatch, MissingInput, suggest
from firstwords.hub import download_files

ROLES = ("system", "user", "assistant")
CONTROL_TOKENS = ("<|endoftext|>", *(f"<|{role}|>" for role in ROLES), "<|end|>", "<|pad|>")
BYTE_LEVEL, CHARACTERS = "byte-level BPE", "characters"

# GPT-2's word pattern: contractions, letters, digits, other signs, white space.
# Radford et al. 2019, section 2.2; the words are those that `pre_tokenizers.ByteLevel` finds. Blanks that
# end the text have a branch of their own, which does not backtrack. No contraction begins as a word does, so
# the commoner of the two may come first: that is 8 % faster than GPT-2's order.
WORD_PATTERN = r""" ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+"""

# The files of a GPT-2's tokenizer: the first alone, or of folders older than it the other two.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
# The longest `tokenizer.json` or `.tiktoken` that is read; GPT-2's have 3.5 and 0.8 million bytes.
TOKENIZER_BYTES = 1 << 26

# tiktoken panics at a million blanks in a row before a word. Cut before the last of them, where the pattern
# cuts anyway, they end a text.
LONG_BLANK = re.compile(r"(?<!\s)\s{500000,}(?=\s\S)")
NEVER = "\0never\0"


class Tokenizer:
    """An ordinary vocabulary and the control tokens behind it.

    Args:
        kind: `BYTE_LEVEL` or `CHARACTERS`.
        vocabulary: the bytes of each ordinary token; the place in the list is its id. Of a BPE the
            places of the merged tokens are also the order of the merges.
        merges: of a BPE, as its file spells them. Without them they are found when they are wanted, which
            takes a second for GPT-2's.
    """

    def __init__(self, kind: str, vocabulary: list[bytes], merges: list[tuple[str, str]] | None = None):
        self._merges = merges
        self.kind = kind
        self.vocabulary = vocabulary
        self.control_ids = {name: len(vocabulary) + i for i, name in enumerate(CONTROL_TOKENS)}
        self.endoftext_id = self.control_ids["<|endoftext|>"]
        self.end_id = self.control_ids["<|end|>"]
        self.pad_id = self.control_ids["<|pad|>"]

    def __len__(self) -> int:
        return len(self.vocabulary) + len(CONTROL_TOKENS)

    @property
    def vocab_size_padded(self) -> int:
        """Rows of the embedding: `len(self)` rounded up to a multiple of 128."""
        return -(-len(self) // 128) * 128

    @cached_property
    def hash(self) -> str:
        """Sha256 of kind and vocabulary: equal hashes give equal ids."""
        digest = hashlib.sha256(self.kind.encode())
        for token in self.vocabulary:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def role_id(self, role: str) -> int:
        """Return the id of the token that opens a turn of `role`."""
        return self.control_ids[f"<|{role}|>"]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one ordinary token; control and surplus ids give `b""`."""
        return self.vocabulary[token_id] if 0 <= token_id < len(self.vocabulary) else b""

    def encode(self, text: str) -> list[int]:
        """Encode text as text.

        Raises:
            BadData: of a character tokenizer, for a character that it does not know.
        """
        return self._encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Encode as `encode` does, faster for long texts; returns (N,) uint32."""
        return self._encode_array(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the raw bytes of the ordinary tokens; control ids are left out."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD."""
        names = {} if skip_control else {i: name.encode() for name, i in self.control_ids.items()}
        parts = (names.get(i) or self.token_bytes(i) for i in map(int, ids))
        return b"".join(parts).decode("utf-8", errors="replace")

    def spell(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Return tokens and merges of a BPE, in order, as GPT-2's files spell them: a byte a character."""
        if self._merges is None:
            self._merges = [tuple(map(_printable, pair)) for pair in _find_merges(self.vocabulary)]
        return [_printable(token) for token in self.vocabulary], self._merges

    def __reduce__(self) -> tuple:
        # The encoders cannot be pickled; another process builds its own.
        return Tokenizer, (self.kind, self.vocabulary)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        if self.kind == CHARACTERS:
            return lambda text: self._encode_array(text).tolist()
        encode = self._bpe.encode_ordinary
        return lambda text: list(chain.from_iterable(map(encode, _cut_blanks(text))))

    @cached_property
    def _encode_array(self) -> Callable[[str], np.ndarray]:
        if self.kind == CHARACTERS:
            return self._encode_characters()
        encode = partial(self._bpe.encode_to_numpy, disallowed_special=())
        return lambda text: np.concatenate([encode(part) for part in _cut_blanks(text)])

    @cached_property
    def _bpe(self):
        try:
            import tiktoken  # here: what only builds models, benchmarks on bare machines, does without it
        except ModuleNotFoundError:
            raise MissingInput(
                "tiktoken: is not installed, and text cannot be encoded; pip install tiktoken"
            ) from None

        ranks = {token: rank for rank, token in enumerate(self.vocabulary)}
        # The special token is never allowed, so it is text like any other; but without one `encode_to_numpy`
        # looks for it at every place, and takes 1.7 times as long.
        special = {NEVER: len(ranks)}
        return tiktoken.Encoding(
            "firstwords", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def _encode_characters(self) -> Callable[[str], np.ndarray]:
        points = [ord(token.decode()) for token in self.vocabulary]
        unknown = len(points)
        ids = np.full(max(points) + 2, unknown, dtype=np.uint32)
        ids[points] = np.arange(len(points))

        def encode(text: str) -> np.ndarray:
            found = ids[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(ids) - 1)]
            if (found == unknown).any():
                strange = text[int((found == unknown).argmax())]
                raise BadData(
                    f"text: the character {strange!r} is not among the {unknown} of this character "
                    "tokenizer; prepare the data with a BPE (--tokenizer bpe:4096)"
                )
            return found

        return encode

    def save(self, folder: Path, *, chat_template: str) -> None:
        """Write the files that `transformers.AutoTokenizer` and `load_tokenizer` read.

        Args:
            folder: an existing folder.
            chat_template: the Jinja text, from `template.CHAT_TEMPLATE`.
        """
        # Not `backend.save`: what it raises when the disk is full is no OSError.
        text = self._build_backend().to_str(pretty=True)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "extra_special_tokens": [f"<|{role}|>" for role in ROLES],
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "chat_template.jinja").write_text(chat_template)

    def _build_backend(self) -> tokenizers.Tokenizer:
        if self.kind == CHARACTERS:
            vocab = {token.decode(): i for i, token in enumerate(self.vocabulary)}
            backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
            backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
            backend.decoder = decoders.Fuse()
        else:
            tokens, merges = self.spell()
            vocab = {token: i for i, token in enumerate(tokens)}
            backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in CONTROL_TOKENS])
        return backend


def learns_from_text(spec: str) -> bool:
    """Tell whether a `--tokenizer` is made from the data, and not loaded."""
    return spec == "char" or spec.startswith("bpe:")


def build_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer that `--tokenizer` asks for.

    Args:
        spec: `bpe:N` (N tokens, the control tokens among them), `char`, or what `load_tokenizer` takes.
        texts: what `bpe:N` and `char` learn from; not touched otherwise.

    Raises:
        BadFlag: when `spec` is none of these.
        MissingInput: when it names a path that is not there.
    """
    if spec == "char":
        return build_char(texts)
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdigit() or int(size) < 256 + len(CONTROL_TOKENS):
            raise BadFlag(f"--tokenizer: {spec!r} has no size of 262 or more; write bpe:4096")
        return train_bpe(texts, int(size))
    return load_tokenizer(spec)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; over bytes as in GPT-2).

    Args:
        texts: the text to learn the merges from.
        vocab_size: tokens in all, the control tokens counted; a small text may give fewer.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=sorted(_BYTE_TO_CHARACTER.values()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(BYTE_LEVEL, _parse_tokens(_sort_vocabulary(backend.get_vocab(), "the trained BPE")))


def build_char(texts: Iterable[str]) -> Tokenizer:
    """Make each character of the texts a token, in the order of their code points.

    Raises:
        BadData: when the texts hold no character.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise BadData("--tokenizer char: the text is empty; give a --dataset with text in it")
    return Tokenizer(CHARACTERS, [character.encode() for character in sorted(characters)])


def has_other_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Tell whether a folder's data were made by another one; of a folder that holds none nobody knows."""
    return (folder / "tokenizer.json").is_file() and load_tokenizer(folder).hash != tokenizer.hash


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load from a folder with the files of a tokenizer, from a `.tiktoken` file, or from the Hub.

    Args:
        name: a path, `hub:<id>` of a GPT-2, or `gpt2`, which is short for `hub:gpt2`.

    Raises:
        MissingInput: when nothing is there.
        Mismatch: when the file is no byte-level BPE of GPT-2's kind and no character vocabulary of ours.
    """
    path = Path(name)
    if str(name).startswith("hub:"):
        return _read_folder(_download(str(name)))
    if path.is_dir():
        return _read_folder(path)
    if path.is_file() and path.suffix == ".tiktoken":
        return _read_tiktoken(path)
    if str(name) == "gpt2":
        return _read_folder(_download("gpt2"))
    words = ["gpt2", "bpe:4096", "char"] if path.parent == Path() else []
    near = suggest(path.name, words + [p.name for p in path.parent.glob("*")])
    raise MissingInput(
        f"--tokenizer {name}: is no folder, no .tiktoken file and none of gpt2, hub:<id>, bpe:N, char; {near}"
    )


def _download(name: str) -> Path:
    return download_files(
        name.removeprefix("hub:"),
        TOKENIZER_FILES,
        asked_by=f"--tokenizer {name}",
        otherwise="give a gpt2.tiktoken file or bpe:4096 instead",
    )


def _read_folder(folder: Path) -> Tokenizer:
    tokenizer_json, vocab, merges = (folder / name for name in TOKENIZER_FILES)
    if tokenizer_json.is_file():
        return _read_tokenizer_json(tokenizer_json)
    if vocab.is_file() and merges.is_file():
        return _read_vocab_and_merges(vocab, merges)
    raise MissingInput(
        f"{folder}: holds no tokenizer.json, nor a vocab.json with its merges.txt; name a folder that a prep "
        "script wrote, or one of a GPT-2"
    )


def _read_tokenizer_json(path: Path) -> Tokenizer:
    try:
        return _parse_tokenizer_json(json.loads(_read_text(path)), path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Mismatch(f"{path}: is no tokenizer of Hugging Face's kind; write it anew") from None


def _read_vocab_and_merges(vocab: Path, merges: Path) -> Tokenizer:
    """Read the two files in which OpenAI published GPT-2's tokenizer; the first line of merges names it."""
    try:
        ids, lines = json.loads(_read_text(vocab)), _read_text(merges).split("\n")
        added = [{"content": token, "id": ids[token]} for token in CONTROL_TOKENS if token in ids]
        pairs = [line for line in lines if line and not line.startswith("#version")]
        model = {"type": "BPE", "vocab": ids, "merges": pairs}
        spec = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": added}
        return _parse_tokenizer_json(spec, vocab)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Mismatch(f"{vocab}: is with {merges.name} no tokenizer of GPT-2's; get both anew") from None


def _read_text(path: Path) -> str:
    if path.stat().st_size > TOKENIZER_BYTES:
        raise ValueError
    return path.read_text(encoding="utf-8")


def _parse_tokenizer_json(spec: dict, path: Path) -> Tokenizer:
    kind = _find_kind(spec)
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    if kind is None:
        raise Mismatch(f"{path}: is neither GPT-2's kind of BPE nor characters; name one that is")
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in CONTROL_TOKENS}
    tokens = _sort_vocabulary(vocab, path)
    if kind == CHARACTERS:
        tokenizer = Tokenizer(kind, [token.encode() for token in tokens])
    else:
        merges = _parse_merges(tokens, spec["model"]["merges"], path)
        tokenizer = Tokenizer(kind, _parse_tokens(tokens), merges)
    for name, token_id in added.items():
        if tokenizer.control_ids.get(name) != token_id:
            raise Mismatch(f"{path}: {name!r} has the id {token_id}, which is not ours; name another")
    return tokenizer


def _find_kind(spec: dict) -> str | None:
    """Tell which of our kinds gives the ids that this `tokenizer.json` gives; None when none does."""
    model, splitter = spec["model"], spec["pre_tokenizer"] or {}
    if spec.get("normalizer"):
        return None
    if model.get("type") == "WordLevel" and all(len(token) == 1 for token in model["vocab"]):
        return CHARACTERS
    plain = not splitter.get("add_prefix_space") and splitter.get("use_regex", True)
    # GPT-2's own file on the Hub is older than the field `type`; of all models only a BPE has merges.
    if "merges" in model and splitter.get("type") == "ByteLevel" and plain:
        return BYTE_LEVEL
    return None


def _parse_merges(tokens: list[str], merges: list, where: Path) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    places = {token: place for place, token in enumerate(tokens)}
    if [left + right for left, right in pairs] != [token for token in tokens if len(token) != 1]:
        raise Mismatch(f"{where}: its ids are not in the order of its merges; train a BPE anew")
    if any(places[part] >= places["".join(pair)] for pair in pairs for part in pair):
        raise Mismatch(f"{where}: a merge needs a token that only a later one makes; train a BPE anew")
    if set(_CHARACTER_TO_BYTE) != {token for token in tokens if len(token) == 1}:
        raise Mismatch(f"{where}: has not all 256 bytes as tokens; train a BPE anew")
    return pairs


def _read_tiktoken(path: Path) -> Tokenizer:
    vocab = {}
    if path.stat().st_size > TOKENIZER_BYTES:
        raise BadData(f"{path}: has {path.stat().st_size} bytes, which no vocabulary needs; get it anew")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            vocab[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise BadData(f"{path}:{number}: is no `base64 rank` pair; get the file anew") from None
    tokens = sorted(vocab, key=vocab.get)
    if sorted(vocab.values()) != list(range(len(vocab))) or sum(len(token) == 1 for token in tokens) < 256:
        raise BadData(f"{path}: its {len(vocab)} ranks have gaps; get the file anew")
    return Tokenizer(BYTE_LEVEL, tokens)


def _sort_vocabulary(vocab: dict[str, int], where) -> list[str]:
    tokens = sorted(vocab, key=vocab.get)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise Mismatch(f"{where}: its ids have gaps below the control tokens; train the BPE anew")
    return tokens


def _parse_tokens(tokens: list[str]) -> list[bytes]:
    return [bytes(_CHARACTER_TO_BYTE[character] for character in token) for token in tokens]


def _find_merges(vocabulary: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the pair that each merged token is made of, in the order of the merges.

    Applying all earlier merges to the bytes of a token leaves exactly its two parts.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    merges = []
    for rank, token in enumerate(vocabulary):
        if len(token) > 1:
            merges.append(_merge_below(token, ranks, rank))
    return merges


def _merge_below(token: bytes, ranks: dict[bytes, int], limit: int) -> tuple[bytes, bytes]:
    find, size = ranks.get, len(token)
    ends = list(range(size + 1))  # part i is token[ends[i] : ends[i + 1]]
    pairs = [find(token[i : i + 2], limit) for i in range(size - 1)]
    while len(pairs) > 1:
        best = min(pairs)
        if best >= limit:
            raise Mismatch(f"token {limit} {token!r}: is not made by earlier merges; train a BPE anew")
        place = pairs.index(best)
        del ends[place + 1], pairs[place]
        if place < len(pairs):
            pairs[place] = find(token[ends[place] : ends[place + 2]], limit)
        if place:
            pairs[place - 1] = find(token[ends[place - 1] : ends[place + 1]], limit)
    return token[: ends[1]], token[ends[1] :]


def _cut_blanks(text: str) -> list[str]:
    cuts = [match.end() for match in LONG_BLANK.finditer(text)] if len(text) > 500_000 else []
    return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])] if cuts else [text]


def _build_byte_alphabet() -> dict[int, str]:
    # GPT-2 writes each byte as one printable character: itself where it is printable and no blank,
    # else the next free code point from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _printable(token: bytes) -> str:
    return token.decode("latin-1").translate(_BYTE_TO_CHARACTER)


_BYTE_TO_CHARACTER = _build_byte_alphabet()
_CHARACTER_TO_BYTE = {character: byte for byte, character in _BYTE_TO_CHARACTER.items()}
