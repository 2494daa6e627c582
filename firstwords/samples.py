"""A checkpoint and a prompt -> what it says, and the file in which one can watch it learn.

    ## step 250

    **What does `os.getcwd` do?**

    greedy

        Return the current working directory.

`samples.md` of a run has one such section for each evaluation. Invariant: a step stands in it once, through
any number of resumes; what a killed life of the run wrote beyond its last checkpoint is cut off.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from firstwords import atomic
from firstwords.errors import BadData
from firstwords.generate import GREEDY, Sampling, stream_ids
from firstwords.schema import mask_control
from firstwords.session import ChatSession
from firstwords.tokenizer import Tokenizer

KINDS = {
    "greedy": Sampling(max_new_tokens=64),
    "sampled": Sampling(temperature=0.8, top_p=0.95, seed=0, max_new_tokens=64),
}
_HEADING = re.compile(r"^## step (\d+)$", re.MULTILINE)

Speak = Callable[..., str]


def build_speaker(tokenizer: Tokenizer, *, context: int, chat: bool) -> Speak:
    """Return `speak(model, prompt, sampling)`: the reply to a question, or how a text goes on.

    Args:
        context: tokens that prompt and reply may fill.
        chat: the model was trained on conversations.

    Raises (of `speak`):
        BadData: for a prompt that does not fit, or holds what the tokenizer has not.
    """

    def answer(model, prompt: str, sampling: Sampling = GREEDY) -> str:
        return ChatSession(model, tokenizer, context=context, sampling=sampling).ask(prompt)

    def go_on(model, prompt: str, sampling: Sampling = GREEDY) -> str:
        return continue_text(model, tokenizer, prompt, context=context, sampling=sampling)

    return answer if chat else go_on


def continue_text(model, tokenizer: Tokenizer, prompt: str, *, context: int, sampling: Sampling) -> str:
    """Return how a text goes on behind `prompt`, up to `<|endoftext|>` or the end of the context.

    Raises:
        BadData: for a prompt that leaves no room.
    """
    ids = [tokenizer.endoftext_id, *tokenizer.encode(prompt)]
    context = min(context, model.config.n_positions)
    if len(ids) >= context:
        raise BadData(f"prompt: is {len(ids)} tokens long, the context is {context}; shorten it")
    surplus = range(len(tokenizer), model.config.vocab_size)
    banned = {*surplus, *tokenizer.control_ids.values()} - {tokenizer.endoftext_id}
    banned = {token for token in banned if token < model.config.vocab_size}
    stop = {tokenizer.endoftext_id}
    new = stream_ids(
        model, ids, stop_ids=stop, banned_ids=banned, sampling=sampling, limit=context - len(ids)
    )
    return tokenizer.decode(new, skip_control=True)


def draw_samples(model, prompts: list[str], speak: Speak) -> dict[str, dict[str, str]]:
    """Return for each prompt what is said, greedy and sampled; of one that does not fit, why."""
    samples: dict[str, dict[str, str]] = {}
    for prompt in prompts:
        try:
            samples[prompt] = {kind: speak(model, prompt, sampling) for kind, sampling in KINDS.items()}
        except BadData as error:
            samples[prompt] = {"not asked": str(error)}
    return samples


def find_beginnings(rows, tokenizer: Tokenizer, count: int, *, length: int = 12) -> list[str]:
    """Return how the first `count` documents of a `dataset.TokenWindows` begin, in `length` tokens each."""
    tokens = np.asarray(rows.tokens[:65_536])
    ends = np.flatnonzero(tokens == tokenizer.endoftext_id)
    starts = np.concatenate([[0], ends + 1])
    beginnings = (tokens[start : start + length] for start in starts)
    texts = (tokenizer.decode(ids.tolist(), skip_control=True) for ids in beginnings if len(ids))
    return list(dict.fromkeys(text for text in texts if text.strip()))[:count]


def format_section(step: int, samples: dict[str, dict[str, str]]) -> str:
    """Return a section of `samples.md`; what the model said is indented, so that it stays text."""
    lines = [f"## step {step}", ""]
    for prompt, replies in samples.items():
        lines += [f"**{' '.join(prompt.split())}**", ""]
        for kind, reply in replies.items():
            lines += [kind, "", *(f"    {line}" for line in reply.splitlines() or [""]), ""]
    return "\n".join(lines) + "\n"


def append_section(path: Path, section: str) -> None:
    """Write a section behind the others."""
    with open(path, "a", encoding="utf-8", opener=atomic.open_no_link) as file:
        file.write(mask_control(section))


def cut_sections(path: Path, last_step: int) -> None:
    """Leave out the sections beyond `last_step`, whole or half-written."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    beyond = [match.start() for match in _HEADING.finditer(text) if int(match[1]) > last_step]
    if beyond:
        atomic.write_text(path, text[: beyond[0]])


def parse_samples(text: str) -> dict[int, dict[str, dict[str, str]]]:
    """Read `samples.md` back: step -> prompt -> kind -> reply. What is half-written is left out."""
    sections: dict[int, dict[str, dict[str, str]]] = {}
    prompt = kind = None
    for line in text.splitlines():
        if match := _HEADING.match(line):
            prompts = sections.setdefault(int(match[1]), {})
            prompt = kind = None
        elif line.startswith("    ") and kind is not None:
            said = prompts[prompt].get(kind)
            prompts[prompt][kind] = line[4:] if said is None else f"{said}\n{line[4:]}"
        elif line.startswith("**") and line.endswith("**") and sections:
            prompt, kind = line[2:-2], None
            prompts[prompt] = {}
        elif line.strip() and prompt is not None:
            kind = line
    return sections
