"""A model and a test that papers report -> its score.

    items = read_hellaswag("hellaswag_val.jsonl", 200)
    score_items(score_endings(model, tokenizer, items))     ->  {"acc": 0.265, "acc_norm": 0.27}
    run_tasks(model, tokenizer, ["piqa", "blimp"], harness)  ->  by lm-eval, the extra firstwords[eval]

Our own scorer is for training, where HellaSwag (Zellers et al. 2019) is asked at each evaluation. Invariant:
on the same items it gives what lm-eval gives, item for item (a test compares them).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from firstwords.checkpoint import build_twin
from firstwords.errors import BadData, BadFlag, MissingInput, suggest
from firstwords.loss import autocast, score_labels
from firstwords.model import IGNORED, GPT2LMHeadModel
from firstwords.schema import RowError
from firstwords.sources import read_rows
from firstwords.tokenizer import Tokenizer

HELLASWAG = "hub:Rowan/hellaswag"

# The tests of CORE (Li et al. 2024, DataComp-LM, their list of 22) that lm-eval has under a name of its own.
# It asks them without examples in the prompt, so its figures compare with lm-eval's and not with CORE's.
CORE = (
    *("hellaswag", "arc_easy", "arc_challenge", "copa", "commonsense_qa", "piqa", "openbookqa"),
    *("lambada_openai", "wsc273", "winogrande", "boolq", "coqa", "squadv2", "agieval_lsat_ar"),
    *("bigbench_qa_wikidata_generate_until", "bigbench_dyck_languages_generate_until"),
    *("bigbench_cs_algorithms_multiple_choice", "bigbench_operators_generate_until"),
    *("bigbench_repeat_copy_logic_generate_until", "bigbench_language_identification_multiple_choice"),
)


@dataclass(frozen=True)
class Item:
    """A beginning and its possible endings, of which `gold` is the right one."""

    context: str
    endings: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Outcome:
    """The log-likelihood of each ending of an item, and which one was picked.

    Attributes:
        nats: (E,) sum over the tokens of the ending.
        pick, pick_norm: the likeliest ending, and the likeliest per character.
    """

    nats: tuple[float, ...]
    pick: int
    pick_norm: int
    gold: int


def read_hellaswag(source: str, limit: int | None) -> list[Item]:
    """Read items in HellaSwag's layout.

    Args:
        source: a `.jsonl` or `.parquet`, a folder of them with a validation split, or `HELLASWAG` on the
            Hub, whose validation split is asked.
        limit: the first so many; None for all.

    Raises:
        MissingInput: when it is neither there nor reachable.
        BadData: for a row that is no item, or for no item at all.
    """
    items: list[Item] = []
    for located in read_rows(source, split=None if Path(source).is_file() else "validation"):
        if len(items) == limit:
            break
        if isinstance(located.row, RowError):
            raise BadData(f"{located.where}: {located.row}; mend it")
        items.append(_parse_item(located.row, located.where))
    if not items:
        raise BadData(f"{source}: holds no item; name another file")
    return items


def _parse_item(row: dict, where: str) -> Item:
    try:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        endings, gold = tuple(map(_clean, row["endings"])), int(row["label"])
        if not (len(endings) > 1 and all(endings) and 0 <= gold < len(endings)):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadData(
            f"{where}: is no item of HellaSwag (activity_label, ctx_a, ctx_b, endings, label); mend it"
        ) from None
    return Item(_clean(context), endings, gold)


def _clean(text: str) -> str:
    """Take out the marks that WikiHow left in HellaSwag, as every published figure does."""
    without = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return without.replace("  ", " ")


def score_endings(
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    context: int | None = None,
    batch_size: int = 32,
    bf16: bool = False,
) -> list[Outcome]:
    """Weigh every ending of every item, those of like length together.

    Args:
        model: put into evaluation mode for the call, and back.
        tokenizer: the one that it was trained with.
        items: from `read_hellaswag`.
        context: tokens that beginning and ending may fill; what is over falls away on the left.
        batch_size: endings at a time.
        bf16: compute under autocast, as the training did.
    """
    context = context or model.config.n_positions
    pairs = [_encode_pair(item.context, ending, tokenizer) for item in items for ending in item.endings]
    order = sorted(range(len(pairs)), key=lambda place: -len(pairs[place][0]))
    nats = np.zeros(len(pairs))
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(model.device, bf16):
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            batch = _collate_pairs([pairs[place] for place in places], context, tokenizer.endoftext_id)
            owners = np.repeat(places, (batch["labels"][:, 1:] != IGNORED).sum(1).numpy())
            nats -= np.bincount(owners, score_labels(model, batch)[0], len(pairs))
    model.train(was_training)
    ends = np.cumsum([len(item.endings) for item in items])
    return [_pick(item, nats[end - len(item.endings) : end]) for item, end in zip(items, ends, strict=True)]


def _encode_pair(context: str, ending: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Return the ids of both, and how many of them belong to the ending."""
    ids = tokenizer.encode(f"{context} {ending}")
    # Blanks that end the beginning belong to the word behind them.
    begin = len(tokenizer.encode(context.rstrip()))
    return ids, len(ids) - begin


def _collate_pairs(pairs: list[tuple[list[int], int]], context: int, fill: int) -> dict[str, torch.Tensor]:
    # The last id is only predicted, so one more than the context fits.
    pairs = [(ids[-(context + 1) :], length) for ids, length in pairs]
    width = max(len(ids) for ids, _ in pairs)
    input_ids = torch.full((len(pairs), width), fill)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, (ids, length) in enumerate(pairs):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, max(len(ids) - length, 1) : len(ids)] = torch.tensor(ids[max(len(ids) - length, 1) :])
    return {"input_ids": input_ids, "labels": labels}


def _pick(item: Item, nats: np.ndarray) -> Outcome:
    per_character = nats / [len(ending) for ending in item.endings]
    return Outcome(tuple(nats.tolist()), int(nats.argmax()), int(per_character.argmax()), item.gold)


def score_items(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the shares of items whose right ending was the likeliest, and the likeliest per character."""
    return {
        "acc": sum(outcome.pick == outcome.gold for outcome in outcomes) / len(outcomes),
        "acc_norm": sum(outcome.pick_norm == outcome.gold for outcome in outcomes) / len(outcomes),
    }


def parse_eval_tasks(text: str) -> int | None:
    """Return how many items `hellaswag:200` asks for; None of `hellaswag`: all.

    Raises:
        BadFlag: for another test, or no number.
    """
    name, colon, count = text.partition(":")
    if name != "hellaswag":
        raise BadFlag(
            f"--eval_tasks {text}: within training there is hellaswag; others by evaluate.py --tasks"
        )
    if colon and not (count.isdigit() and int(count)):
        raise BadFlag(f"--eval_tasks {text}: how many items? write hellaswag:200")
    return int(count) if colon else None


def check_harness() -> None:
    """Raise `BadFlag` when lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise BadFlag("--tasks: lm-eval is not installed; pip install 'lm-eval[hf]'")


def open_harness(task_dir: Path | None):
    """Return lm-eval's list of tasks, with those of a folder of yaml files beside them.

    Raises:
        BadFlag: when lm-eval is not installed, or the folder is not there.
    """
    check_harness()
    if task_dir is not None and not task_dir.is_dir():
        raise BadFlag(f"--task_dir {task_dir}: is no folder; name one with lm-eval's yaml files")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(task_dir) if task_dir else None)


def choose_tasks(text: str, harness) -> list[str]:
    """Return the tasks of a list with commas; `core` stands for those of `CORE`.

    Raises:
        BadFlag: for a name that lm-eval does not know, with near ones.
    """
    known = set(harness.all_tasks)
    names = []
    for name in filter(None, (word.strip() for word in text.split(","))):
        if name == "core":
            names += [task for task in CORE if task in known]
        elif name in known:
            names.append(name)
        else:
            raise BadFlag(f"--tasks {name}: lm-eval has no such task; {suggest(name, sorted(known))}")
    if not names:
        raise BadFlag(f"--tasks {text!r}: names no task; for example hellaswag,piqa")
    return list(dict.fromkeys(names))


def run_tasks(
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    tasks: list[str],
    harness,
    *,
    context: int,
    batch_size: int,
    limit: int | None = None,
) -> dict:
    """Let lm-eval run tasks on a model.

    It gets the model as we loaded it, not the folder, from which it would load what else lies there.

    Args:
        model, tokenizer: of one checkpoint.
        tasks: from `choose_tasks`.
        harness: from `open_harness`.
        context: tokens that the model was trained on; longer prompts lose their left.
        batch_size: requests at a time.
        limit: items of each task; None for all.

    Returns:
        lm-eval's `results` by task, its `versions` and `n-samples`.

    Raises:
        MissingInput: when the data of a task cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    subject = HFLM(
        pretrained=model, tokenizer=build_twin(tokenizer), max_length=context, batch_size=batch_size
    )
    try:
        found = simple_evaluate(
            model=subject,
            tasks=tasks,
            task_manager=harness,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (OSError, ConnectionError, ValueError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise MissingInput(
            f"--tasks {','.join(tasks)}: their data cannot be had ({why[0]:.160}); fetch them with a network"
        ) from None
    kept = {key: found[key] for key in ("results", "versions", "n-samples")}
    return json.loads(json.dumps(kept, default=str))
