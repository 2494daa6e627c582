"""Errors for people: each class carries the exit code with which a script ends.

    data/train.jsonl:7: broken JSON at column 12; mend the line or pass --skip_bad      -> exit 65

A message is one line, `where: what is wrong, with the value; what to do`. Every floor may raise these;
`args.run_main` turns them into the line on stderr and the exit code.
"""

from difflib import get_close_matches


class FirstwordsError(Exception):
    """Base of all errors that a user can cause; never raised itself."""

    exit_code = 1


class BadFlag(FirstwordsError):
    """A flag, recipe key or config value that cannot be met."""

    exit_code = 2


class BadData(FirstwordsError):
    """Data that was read but cannot be used."""

    exit_code = 65


class MissingInput(FirstwordsError):
    """A file, folder or Hub id that is not there."""

    exit_code = 66


class Diverged(FirstwordsError):
    """A loss or gradient that is NaN or infinite."""

    exit_code = 70


class BadBatch(Diverged):
    """A batch whose loss or gradient is NaN or infinite: a run that goes back may leave it out.

    Attributes:
        skipped: the batches that the run has left out and this one, counted from its beginning.
    """

    def __init__(self, message: str, skipped: tuple[int, ...]):
        super().__init__(message)
        self.skipped = skipped


class OutOfMemory(FirstwordsError):
    """The device has not enough memory for the step."""

    exit_code = 71


class CannotCreate(FirstwordsError):
    """An output folder that cannot be made, is in use, or is locked by another process."""

    exit_code = 73


class IOFailed(FirstwordsError):
    """A read or write that failed half-way: disk full, folder read-only."""

    exit_code = 74


class Stopped(FirstwordsError):
    """Stopped by a signal with the state saved; the same command goes on."""

    exit_code = 75


class Damaged(FirstwordsError):
    """A checkpoint whose files are not what its manifest says."""

    exit_code = 76


class Mismatch(FirstwordsError):
    """Two things that must agree and do not: tokenizer, shape, data, flags."""

    exit_code = 78


def suggest(word: str, known: list[str]) -> str:
    """Return `did you mean 'x'?`, or the first 20 of what is known when nothing is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near or not known:
        return f"did you mean {near[0]!r}?" if near else "there is nothing like it"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"known: {', '.join(sorted(known)[:20])}{more}"
