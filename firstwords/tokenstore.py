"""CONTRACT: the token store of stage A, a folder with the tokens of a corpus.

    train.bin val.bin    little-endian uint16 (uint32 above 65,535 ids); <|endoftext|> follows each document
    corpus.json          format, dtype, splits (each: tokens, documents, bytes, sha256), tokenizer_hash,
                         sources, command
    tokenizer.json ...   the tokenizer's files

The bins are nanoGPT's: its bins open here (without `corpus.json`), and ours open there. Invariant: the
store that `open_store` returns has exactly the tokens that `corpus.json` counts; tokens are memory-mapped,
so a store of any size opens at once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np

from firstwords.atomic import hash_file
from firstwords.errors import BadData, MissingInput

FORMAT = "firstwords-tokens-1"
CHECKED_BYTES = 1 << 30  # hashed in about a second
_DTYPES = {"<u2": np.dtype("<u2"), "<u4": np.dtype("<u4")}


class TokenStoreWriter:
    """Append documents to `<folder>/<split>.bin`, streamed.

    Args:
        folder: an existing folder, usually a staging one.
        split: `train` or `val`.
        vocab_size: decides the dtype.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int):
        self.dtype = choose_dtype(vocab_size)
        self._file = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 - closed by close()
        self._digest = hashlib.sha256()
        self._tokens = self._documents = self._bytes = 0

    def append(self, ids: Sequence[int] | np.ndarray, *, num_bytes: int, num_documents: int = 0) -> None:
        """Write tokens.

        Args:
            ids: with the `<|endoftext|>` of every document that ends among them.
            num_bytes: of the text that they stand for.
            num_documents: that end among them.
        """
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += len(ids)
        self._bytes += num_bytes
        self._documents += num_documents

    def close(self) -> dict:
        """Close the file and return its counts, as they stand in `corpus.json` under the split."""
        self._file.close()
        return {
            "tokens": self._tokens,
            "documents": self._documents,
            "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
        }


def choose_dtype(vocab_size: int) -> np.dtype:
    """Return little-endian uint16 where all ids fit in it, else uint32."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


@dataclass(frozen=True)
class TokenStore:
    """One split, opened.

    Attributes:
        tokens: memory map of shape (N,).
        hash: sha256 of the split by `corpus.json`; of a bin without one, of its size and both ends.
    """

    tokens: np.ndarray
    hash: str


def is_store(folder: Path) -> bool:
    """Tell whether the folder holds a token store (ours or nanoGPT's)."""
    return (folder / "train.bin").is_file()


def open_store(folder: Path, split: str) -> TokenStore:
    """Map one split.

    Raises:
        MissingInput: when the split's file is not there.
        BadData: when it is empty, or not what `corpus.json` says.
    """
    path = folder / f"{split}.bin"
    if not path.is_file():
        raise MissingInput(f"{path}: is not there; run prep_text_corpus.py --out_dir {folder}")
    meta = read_corpus(folder)
    counts, dtype = _find_counts(meta, split, folder) if meta else ({}, np.dtype("<u2"))
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise BadData(f"{path}: {size} bytes are no whole number of {dtype} tokens; prepare it anew")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if not meta:
        return TokenStore(tokens, _hash_ends(tokens))
    if counts["tokens"] != len(tokens):
        raise BadData(
            f"{path}: {len(tokens)} tokens, but corpus.json says {counts['tokens']}; prepare it anew"
        )
    return TokenStore(tokens, counts["sha256"])


def check_content(folder: Path, split: str) -> None:
    """Read a split of up to `CHECKED_BYTES` through, and compare it with the sha256 in `corpus.json`.

    Raises:
        BadData: when a byte is another one than was written.
    """
    path, meta = folder / f"{split}.bin", read_corpus(folder)
    if meta and path.stat().st_size <= CHECKED_BYTES:
        counts, _ = _find_counts(meta, split, folder)
        if hash_file(path) != counts["sha256"]:
            raise BadData(f"{path}: is not what was written, by its sha256 in corpus.json; prepare it anew")


def _find_counts(meta: dict, split: str, folder: Path) -> tuple[dict, np.dtype]:
    try:
        counts = meta["splits"][split]
        return {key: counts[key] for key in ("tokens", "sha256")}, _DTYPES[meta["dtype"]]
    except (KeyError, TypeError):
        raise BadData(
            f"{folder / 'corpus.json'}: has no dtype or no counts of {split}.bin; prepare it anew"
        ) from None


def _hash_ends(tokens: np.ndarray) -> str:
    ends = tokens[: 1 << 20].tobytes() + tokens[-(1 << 20) :].tobytes()
    return hashlib.sha256(len(tokens).to_bytes(8, "little") + ends).hexdigest()


def read_corpus(folder: Path) -> dict:
    """Return `corpus.json`, or `{}` where there is none (a store of nanoGPT's).

    Raises:
        BadData: when it is broken or of another format.
    """
    path = folder / "corpus.json"
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BadData(f"{path}: is no JSON; prepare the corpus anew") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise BadData(f"{path}: the format is {found!r}, not {FORMAT!r}; prepare it anew")
    return meta


def block_offset(index: int, epoch: int, *, seed: int, num_tokens: int, seq_len: int) -> int:
    """Tell where block `index` of `epoch` begins, a pure function in O(1).

    An epoch cuts the whole store into blocks of `seq_len` tokens that start at a shift of its own, and
    visits them in an order of its own: a permutation by four Feistel rounds with cycle walking (Black
    and Rogaway 2002, section 3), so that nothing as long as the store is ever drawn or kept.

    Args:
        index: which block of the epoch, below `num_blocks(num_tokens, seq_len)`.
        epoch: the pass over the store, from 0.
        seed: of the run.

    Returns:
        the offset in tokens; `seq_len` tokens from there lie within the store.
    """
    count = num_blocks(num_tokens, seq_len)
    shift = _mix(seed, epoch, 0) % (num_tokens - count * seq_len + 1)
    return shift + permute(index, count, seed=seed, epoch=epoch) * seq_len


def num_blocks(num_tokens: int, seq_len: int) -> int:
    """Return the blocks in an epoch: so many that a token at least stays free for the shift, if any fits."""
    return max((num_tokens - 1) // seq_len, int(num_tokens >= seq_len))


def permute(index: int, count: int, *, seed: int, epoch: int) -> int:
    """Return the place of `index` in the order of `epoch`: a permutation of `range(count)`."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in _round_keys(seed, epoch):
            left, right = right, left ^ (_stir(key, right) & mask)
        index = left << half | right
        if index < count:
            return index


@lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(_mix(seed, epoch, key) for key in range(1, 5))


def _mix(*words: int) -> int:
    return reduce(_stir, words, 0)


def _stir(state: int, word: int) -> int:
    # splitmix64's finaliser (Steele et al. 2014): cheap, and the same everywhere.
    state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return state ^ state >> 31
