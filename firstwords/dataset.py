"""Prepared data -> fixed rows of (T,) tensors, in an order that is a pure function of (seed, index).

    TokenBlocks      a token store (stage A)          -> input_ids, labels
    TokenWindows     the same for evaluation, in order
    PackedChats      a tokenized JSONL (stage B)      -> input_ids, labels, position_ids

Row `i` of a run is the same row whenever it is asked for, so a resumed run reads on where it stopped
without having kept anything. Invariants: no label stands at position 0 of a conversation or block (nothing
before it could predict it), and labels are unshifted.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from firstwords import tokenstore
from firstwords.errors import BadData, BadFlag, Mismatch, MissingInput
from firstwords.model import IGNORED, find_learned
from firstwords.model.attention import find_documents
from firstwords.packing import choose_lengths, pack_rows
from firstwords.prep import check_written
from firstwords.tokenizer import Tokenizer

LN2 = float(np.log(2))
# Passes over the data beyond which a person is warned. Text read up to 4 times teaches nearly as much as new
# text (Muennighoff et al. 2023); Alpaca's authors took 3 passes, 5 for their larger model.
MANY_EPOCHS = {"text": 4, "conversations": 5}


class TokenBlocks(Dataset):
    """Blocks of `seq_len` tokens of a token store.

    Args:
        store: an opened split.
        tokenizer: gives the bytes of the tokens.
        seq_len: tokens in a block.
        seed: of the order.

    `num_rows` is one epoch until the trainer sets it to the length of the run.

    Raises:
        BadData: when the store is shorter than one block, or begins with ids that the tokenizer has not.
    """

    def __init__(self, store: tokenstore.TokenStore, tokenizer: Tokenizer, seq_len: int, seed: int):
        # A slice of a plain array costs a fifth of one of a memory map's class; the pages stay on the disk.
        self.tokens, self.seq_len, self.seed = np.asarray(store.tokens), seq_len, seed
        self.rows_per_epoch = tokenstore.num_blocks(len(store.tokens), seq_len)
        if not self.rows_per_epoch:
            raise BadData(
                f"the token store holds {len(store.tokens)} tokens, less than one block of {seq_len}; "
                "prepare more text or lower --seq_len"
            )
        self.num_rows = self.rows_per_epoch
        self.longest_row = self.tokens_per_row = seq_len
        self.hash = store.hash
        sample = self.tokens[: 1 << 20]
        _check_ids(sample, tokenizer)
        self.bits_per_byte = bits_per_byte_factor(sample, tokenizer)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return row `index` of the run: `input_ids` (T,) and `labels` (T,), int64."""
        epoch, index = divmod(index, self.rows_per_epoch)
        start = tokenstore.block_offset(
            index, epoch, seed=self.seed, num_tokens=len(self.tokens), seq_len=self.seq_len
        )
        input_ids = self.tokens[start : start + self.seq_len].astype(np.int64)
        labels = input_ids.copy()
        labels[0] = IGNORED
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


class TokenWindows(Dataset):
    """Tokens in their own order for evaluation: every token but the first is a label exactly once.

    By default windows overlap by one token, which only the next one has to predict from. A smaller stride
    gives every label at least `seq_len - stride` tokens to predict from, and costs as many more windows.

    Args:
        tokens: (N,) memory map or array, such as those of an opened store.
        tokenizer: gives the id that fills the last window up.
        seq_len: tokens in a window.
        stride: tokens by which a window is further on than the one before, below `seq_len`.

    Raises:
        BadData: when there are fewer than two tokens, or ids that the tokenizer has not.
    """

    hash: str | None = None  # of the file that the tokens are, where there is one

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, seq_len: int, *, stride: int | None = None):
        if len(tokens) < 2:
            raise BadData(f"the val split holds {len(tokens)} tokens; prepare more text")
        _check_ids(tokens, tokenizer)
        self.tokens, self.seq_len, self.stride = tokens, seq_len, stride or seq_len - 1
        # Of all control tokens the one that a plain GPT-2 has too.
        self.pad_id = tokenizer.endoftext_id

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - self.seq_len) // self.stride))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return window `index`: `input_ids` (T,) and `labels` (T,), int64."""
        start = index * self.stride
        window = self.tokens[start : start + self.seq_len].astype(np.int64)
        input_ids = torch.full((self.seq_len,), self.pad_id)
        labels = torch.full((self.seq_len,), IGNORED)
        input_ids[: len(window)] = labels[: len(window)] = torch.from_numpy(window)
        labels[: self.seq_len - self.stride if index else 1] = IGNORED
        return {"input_ids": input_ids, "labels": labels}


@dataclass(frozen=True)
class Chats:
    """Tokenized conversations end to end: `ids` (N,), `masks` (N,), and `starts` (C + 1,) into both."""

    ids: np.ndarray
    masks: np.ndarray
    starts: np.ndarray
    hash: str

    @property
    def lengths(self) -> np.ndarray:
        """(C,) tokens of each conversation."""
        return np.diff(self.starts)


def read_chats(path: Path) -> Chats:
    """Read a tokenized JSONL of contract 2.

    Raises:
        MissingInput: when it is not there.
        BadData: for a line that breaks the contract, with its number, a file without a learned token, or
            one that is not what the report beside it says.
    """
    if not path.is_file():
        raise MissingInput(f"{path}: is not there; run prep_data.py --out_dir {path.parent}")
    ids, masks, lengths = [], [], []
    digest = hashlib.sha256()
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            digest.update(line)
            row_ids, row_mask = _parse_row(line, path, number)
            ids.append(row_ids)
            masks.append(row_mask)
            lengths.append(len(row_ids))
    if not any(mask.any() for mask in masks):
        raise BadData(f"{path}: has no token to learn from; run prep_data.py anew")
    check_written(path, digest.hexdigest())
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Chats(np.concatenate(ids), np.concatenate(masks), starts, digest.hexdigest())


def _parse_row(line: bytes, path: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        row = json.loads(line)
        ids = np.array(row["input_ids"], dtype=np.int32)
        mask = np.array(row["assistant_masks"], dtype=bool)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise BadData(
            f"{path}:{number}: is no row with input_ids and assistant_masks; run prep_data.py anew"
        ) from None
    if ids.ndim != 1 or ids.shape != mask.shape or not len(ids):
        raise BadData(f"{path}:{number}: {ids.size} ids and {mask.size} mask values; run prep_data.py anew")
    return ids, mask


class PackedChats(Dataset):
    """Whole conversations packed into rows of `seq_len`; an epoch visits the rows in an order of its own.

    Args:
        chats: from `read_chats`.
        tokenizer: gives the pad id and the bytes of the tokens.
        seq_len: tokens in a row; longer conversations follow `overlong`.
        seed: of the order.
        assistant_only: learn where the mask is 1; else everything but the first token.
        overlong: `drop` leaves them out, `truncate` cuts their end.

    Raises:
        BadData: when a token is outside the vocabulary, or nothing to learn is left.
    """

    def __init__(
        self,
        chats: Chats,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        *,
        assistant_only: bool = True,
        overlong: str = "drop",
    ):
        _check_ids(chats.ids, tokenizer)
        self.chats, self.seq_len, self.seed, self.pad_id = chats, seq_len, seed, tokenizer.pad_id
        self.hash = chats.hash
        self.learned = choose_learned(chats, assistant_only)
        self.lengths = choose_lengths(chats.starts, self.learned, seq_len, overlong)
        kept = np.flatnonzero(self.lengths)
        self.dropped_tokens = int(len(chats.ids) - self.lengths.sum())
        self.num_overlong = int((chats.lengths > seq_len).sum())
        if not len(kept):
            raise BadData(
                f"no conversation is left that fits --seq_len {seq_len} with a token to learn; raise "
                "--seq_len or take --overlong truncate"
            )
        self.rows = [kept[row] for row in pack_rows(self.lengths[kept], seq_len)]
        self.rows_per_epoch = self.num_rows = len(self.rows)
        self.longest_row = int(self.lengths.max())
        self.tokens_per_row = float(self.lengths.sum() / len(self.rows))
        self.bits_per_byte = bits_per_byte_factor(chats.ids[self.learned], tokenizer)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return row `index` of the run: `input_ids`, `labels`, `position_ids`, each (T,) int64.

        The tail of a row that is not full holds pads, each at position 0: a conversation of its own.
        """
        epoch, index = divmod(index, self.rows_per_epoch)
        place = tokenstore.permute(index, self.rows_per_epoch, seed=self.seed, epoch=epoch)
        return self.read_row(self.rows[place])

    def read_row(self, conversations: np.ndarray) -> dict[str, torch.Tensor]:
        """Lay the given conversations into one row; shapes as in `__getitem__`."""
        input_ids = np.full(self.seq_len, self.pad_id, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORED, dtype=np.int64)
        position_ids = np.zeros(self.seq_len, dtype=np.int64)
        begin = 0
        for conversation in conversations:
            length = self.lengths[conversation]
            source = slice(self.chats.starts[conversation], self.chats.starts[conversation] + length)
            row = slice(begin, begin + length)
            input_ids[row] = self.chats.ids[source]
            labels[row] = np.where(self.learned[source], self.chats.ids[source], IGNORED)
            position_ids[row] = np.arange(length)
            begin += length
        arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    for wrong in (int(ids.min()), int(ids.max())):
        if not 0 <= wrong < len(tokenizer):
            raise BadData(
                f"the data hold id {wrong}, but the tokenizer has {len(tokenizer)}; prepare them anew, or "
                "name the tokenizer that made them with --tokenizer"
            )


def choose_learned(chats: Chats, assistant_only: bool) -> np.ndarray:
    """Return (N,) bool: where a label stands, never at the first token of a conversation."""
    learned = chats.masks.copy() if assistant_only else np.ones(len(chats.ids), dtype=bool)
    learned[chats.starts[:-1]] = False
    return learned


def bits_per_byte_factor(ids: np.ndarray, tokenizer: Tokenizer) -> float:
    """Return what a loss in nats per token is multiplied by to give bits per byte of text.

    Args:
        ids: (N,) the tokens that are predicted; control tokens count as tokens of 0 bytes.
    """
    counts = np.bincount(ids, minlength=len(tokenizer))
    num_bytes = sum(int(n) * len(tokenizer.token_bytes(i)) for i, n in enumerate(counts) if n)
    return len(ids) / max(num_bytes, 1) / LN2


def open_train(
    data_dir: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    seed: int,
    assistant_only: bool,
    overlong: str = "drop",
) -> TokenBlocks | PackedChats:
    """Open the training split of a token store or of tokenized conversations.

    Raises:
        MissingInput: when the folder holds neither.
        BadFlag: when assistant-only loss is asked of a token store, which has no assistant.
        BadData: when the data are not what was written.
        Mismatch: when a token store is another tokenizer's.
    """
    if tokenstore.is_store(data_dir):
        store = _open_store(data_dir, "train", tokenizer, assistant_only)
        return TokenBlocks(store, tokenizer, seq_len, seed)
    chats = read_chats(find_chats(data_dir, "train"))
    return PackedChats(chats, tokenizer, seq_len, seed, assistant_only=assistant_only, overlong=overlong)


def open_val(
    data_dir: Path,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    assistant_only: bool,
    overlong: str = "drop",
) -> TokenWindows | PackedChats:
    """Open the val split, to be read in full; errors as of `open_train`."""
    if tokenstore.is_store(data_dir):
        store = _open_store(data_dir, "val", tokenizer, assistant_only)
        windows = TokenWindows(store.tokens, tokenizer, seq_len)
        windows.hash = store.hash
        return windows
    chats = read_chats(find_chats(data_dir, "val"))
    return PackedChats(chats, tokenizer, seq_len, 0, assistant_only=assistant_only, overlong=overlong)


def _open_store(
    data_dir: Path, split: str, tokenizer: Tokenizer, assistant_only: bool
) -> tokenstore.TokenStore:
    if assistant_only:
        raise BadFlag(
            f"--data_dir {data_dir}: is a token store and has no assistant to learn from; "
            "pass --no_assistant_only_loss"
        )
    store = tokenstore.open_store(data_dir, split)
    made_with = tokenstore.read_corpus(data_dir).get("tokenizer_hash", tokenizer.hash)
    if made_with != tokenizer.hash:
        raise Mismatch(
            f"--data_dir {data_dir}: its tokens are of the tokenizer {made_with!s:.8}, but the tokenizer is "
            f"{tokenizer.hash[:8]}; prepare it anew"
        )
    tokenstore.check_content(data_dir, split)
    return store


def find_chats(data_dir: Path, split: str) -> Path:
    """Return the path of a split's tokenized conversations.

    Raises:
        MissingInput: when the folder is not there.
    """
    if not data_dir.is_dir():
        raise MissingInput(f"--data_dir {data_dir}: is not there; run a prep script with --out_dir first")
    return data_dir / f"{split}_tokenized.jsonl"


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows of (T,) into a batch of (B, T), and say what a GPU would be waited for to find out.

    That is `learned`, the places that a label follows, and of packed rows `documents`, where each begins; see
    `model`. No `attention_mask`: see `model.GPT2LMHeadModel`.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    batch["learned"] = find_learned(batch["labels"])
    if "position_ids" in batch:
        batch["documents"] = find_documents(batch["position_ids"])
    return batch
