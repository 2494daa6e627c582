"""Two lists of texts -> how many of the one are nearly a text of the other.

    count_near([["Add 1 and 2, please, and say why."]], [["Add 1 and 2, please, and say so."]])

Nearly: of all runs of `WORDS` words in either text, a share of `SIMILAR` or more is in both (Jaccard; Broder
1997). That is estimated by MinHash and found by locality-sensitive hashing, both of the library datasketch.
Invariant: the memory is that of the signatures of the first list, 1 KB a text; the second is streamed,
a piece of a text at a time.
"""

from collections.abc import Iterable

from firstwords.errors import BadFlag

WORDS, SIMILAR, NUM_PERM = 3, 0.8, 128


def check_library() -> None:
    """Raise unless datasketch and xxhash are installed.

    Raises:
        BadFlag: saying how to install it.
    """
    try:
        import datasketch  # noqa: F401
        import xxhash  # noqa: F401
    except ImportError:
        raise BadFlag(
            "--near_duplicates: needs the libraries datasketch and xxhash; pip install 'firstwords[near]'"
        ) from None


def count_near(held_out: Iterable[Iterable[str]], texts: Iterable[Iterable[str]]) -> int:
    """Return how many of `texts` are nearly one of `held_out`, or the very same.

    Args:
        held_out, texts: each text in pieces; a run of words lies in one of them.
    """
    from datasketch import MinHash, MinHashLSH
    from xxhash import xxh32_intdigest

    # Asked for half as alike, the index misses hardly any; what it proposes is looked at once more. Its own
    # hash, SHA-1, takes 9 times as long, and drawing the permutations anew as long as 300 words.
    index = MinHashLSH(threshold=SIMILAR / 2, num_perm=NUM_PERM)
    empty = MinHash(num_perm=NUM_PERM, hashfunc=xxh32_intdigest)
    signatures = {}
    for number, text in enumerate(held_out):
        signatures[number] = _sign(text, empty.copy())
        index.insert(number, signatures[number])
    return sum(_is_near(_sign(text, empty.copy()), index, signatures) for text in texts)


def _is_near(signature, index, signatures: dict) -> bool:
    return any(signatures[number].jaccard(signature) >= SIMILAR for number in index.query(signature))


def _sign(pieces: Iterable[str], signature):
    for piece in pieces:
        words = piece.encode("utf-8").split()
        runs = {b" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
        signature.update_batch(list(runs))
    return signature
