"""Chat with a trained model.

    python inference.py --model_dir runs/chat                              talk on the terminal
    python inference.py --model_dir runs/chat --follow                     talk to a run that is training
    python inference.py --model_dir runs/chat --prompt "What is a dict?"   one answer, for scripts
    python inference.py --model_dir runs/chat < questions.txt              a question a line, one chat
    python inference.py --model_dir runs/chat --prompt_file questions.txt  a question a line, each for itself
    python inference.py --model_dir runs/chat --web                        a page to chat on, in the browser
    python inference.py --model_dir runs/chat --serve                      an API for OpenAI's clients

--model_dir is a run, one of its checkpoints, or any model folder; of a run that is still training,
the newest complete checkpoint is taken. Answers go to stdout, everything else to stderr. With --json
each answer is an object on a line of its own: prompt, reply, whether it ended by itself (stopped), its
tokens, the prompt's, the turns out of view (evicted); or the prompt and why it was refused (error).
On the terminal /help lists the commands. Ctrl-C stops a reply; at the prompt it clears the line, and
twice in a row it leaves. Control characters that a model might say (escape sequences of terminals) are
printed as U+FFFD.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from firstwords.args import build_parser, run_main
from firstwords.errors import BadData, BadFlag, IOFailed, MissingInput, suggest
from firstwords.schema import mask_control

COLOURS = {"dim": "\x1b[2m", "warn": "\x1b[33m", "error": "\x1b[31m"}


def parse_flags(argv: list[str] | None):
    """Parse the command line; the numbers are checked by `generate.Sampling`."""
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", required=True, help="a run, a checkpoint-<step>, or a model folder")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default auto")
    add("--dtype", default="fp32", choices=["fp32", "fp16", "bf16", "int8"], help="of the stored weights")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top_p", type=float, default=1.0, help="keep the likeliest ids up to this probability")
    add("--top_k", type=int, default=0, help="keep the k likeliest ids; 0 keeps all")
    add("--min_p", type=float, default=0.0, help="keep ids above this share of the likeliest one")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less; 1 is off")
    add("--seed", type=int, help="of the draws; the same seed gives the same replies")
    add("--max_new_tokens", type=int, help="longest reply in tokens; default: the context's rest")
    add("--system", metavar="TEXT", help="the system message")
    add("--prompt", metavar="TEXT", action="append", help="ask this and end; again: go on with it")
    add("--prompt_file", metavar="FILE", help="ask each line, in a chat of its own, and end; - is stdin")
    add("--json", action="store_true", help="answers as JSON, one object a line")
    add("--follow", action="store_true", help="go over to each new checkpoint, with the conversation")
    add("--web", action="store_true", help="serve a page to chat on, and the API; Ctrl-C ends it")
    add("--serve", action="store_true", help="serve the API alone")
    add("--host", default="127.0.0.1", help="address to serve on, 0.0.0.0 for all; default 127.0.0.1")
    add("--port", type=int, default=8000, help="to serve on, 0 for any that is free; default 8000")
    add("--api_key", help="that clients must give; better as FIRSTWORDS_API_KEY, which nobody sees in ps")
    add("--max_streams", type=int, default=16, help="replies decoded together; default 16, more wait")
    add("--history_file", type=Path, metavar="FILE", help="lines of earlier chats; /dev/null keeps none")
    flags = parser.parse_args(argv)
    if flags.prompt and flags.prompt_file:
        raise BadFlag("--prompt_file: stands beside --prompt; give one of them")
    if flags.follow and (flags.prompt or flags.prompt_file):
        raise BadFlag("--follow: is for a chat, and this ends with its answers; leave it out")
    if (flags.web or flags.serve) and (flags.prompt or flags.prompt_file or flags.json or flags.follow):
        raise BadFlag("--web, --serve: stand beside a flag of another chat; give one of them")
    if flags.max_streams < 1:
        raise BadFlag(f"--max_streams: is {flags.max_streams}; give a number from 1 on")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Load the model and chat as the flags and the terminal say."""
    flags = parse_flags(argv)
    if flags.web or flags.serve:
        serve(flags)
        return
    session = open_session(flags)
    follower = build_follower(flags)
    sys.stdout.reconfigure(errors="replace")
    if flags.prompt_file is not None:
        answer_file(session, flags)
    elif flags.json:
        texts = read_lines(sys.stdin) if flags.prompt is None else flags.prompt
        answer_json(session, texts, follower)
    elif flags.prompt is not None:
        chat = build_chat(session, follower)
        for text in filter(str.strip, flags.prompt):
            chat.answer(text)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        talk(session, follower, flags.history_file)
    else:
        run_lines(build_chat(session, follower))


def serve(flags) -> None:
    """Serve the model until Ctrl-C."""
    from firstwords.server.api import build_app
    from firstwords.server.serving import check_key, is_loopback, name_address, open_port, run

    key = flags.api_key if flags.api_key is not None else os.environ.get("FIRSTWORDS_API_KEY")
    check_key(key, flags.host)
    with open_port(flags.host, flags.port) as port:
        app = build_app(
            open_session(flags),
            name=Path(flags.model_dir).resolve().name,
            key=key,
            loopback=is_loopback(flags.host),
            web=flags.web,
            max_streams=flags.max_streams,
        )
        address = name_address(port)
        say(f"{'chat at ' + address if flags.web else 'API at ' + address + '/v1'} (Ctrl-C ends)")
        run(app, port)


def open_session(flags):
    """Load what `--model_dir` names and say what that is."""
    from firstwords.model import quiet_transformers
    from firstwords.quantize import check_dtype

    quiet_transformers()
    device, why = pick_device(flags.device)
    check_dtype(flags.dtype, device)
    session = load_model_dir(flags)
    step = session.manifest.get("step", "unknown")
    size = f"{session.model.num_parameters():,} weights, context {session.context} tokens"
    say(f"loaded {session.folder}: step {step}, {size}, on {device}{why}")
    return store_weights(session, flags.dtype)


def load_model_dir(flags):
    """Return a session of the model that the flags name."""
    from firstwords.session import load_session

    device, _ = pick_device(flags.device)
    system, sampling = flags.system or None, build_sampling(flags)
    return load_session(flags.model_dir, device=device, system=system, sampling=sampling)


def store_weights(session, dtype: str):
    """Store the session's matrices as `--dtype` says, say what that costs, and return the session."""
    from firstwords import quantize

    if dtype == "fp32":
        return session
    cost = quantize.store_weights(session.model, dtype, session.tokenizer)
    say(
        f"--dtype {dtype}: costs {cost.nats:.2g} nats a token; of {cost.tokens} tokens that the model wrote "
        f"in fp32, {cost.agreement:.1%} have the same likeliest one"
    )
    return session


def build_sampling(flags):
    """Return the flags that `generate.Sampling` knows as one; it checks their ranges."""
    from firstwords.generate import Sampling

    return Sampling(**{spec.name: getattr(flags, spec.name) for spec in fields(Sampling)})


def pick_device(name: str) -> tuple[str, str]:
    """Return the device that `--device` asks for and, of `auto`, why it is this one.

    Raises:
        BadFlag: when this machine has no such device.
    """
    from firstwords.model import explain_device, find_device

    device = find_device(name)
    return device, explain_device(device).replace("(", "(auto: ") if name == "auto" else ""


def build_follower(flags):
    """Return what `--follow` asks for, or None.

    Raises:
        BadFlag: when `--model_dir` is no run.
    """
    from firstwords.checkpoint import list_checkpoints
    from firstwords.session import Follower

    if not flags.follow:
        return None
    if not list_checkpoints(Path(flags.model_dir)):
        raise BadFlag(f"--follow: {flags.model_dir} holds no checkpoints; name a run that is training")
    return Follower(Path(flags.model_dir), lambda: store_weights(load_model_dir(flags), flags.dtype))


def build_chat(session, follower, **options):
    """Return a chat whose answers go to stdout and whose remarks to stderr."""
    from firstwords.repl import Chat

    return Chat(session, write=write, say=say, follower=follower, **options)


def talk(session, follower, history_file: Path | None) -> None:
    """Chat on the terminal."""
    from firstwords.terminal import find_history_file, run_repl

    say("/help lists the commands", "dim")
    chat = build_chat(session, follower, tells_speed=True)
    run_repl(chat, history_file or find_history_file(), coloured=has_colour(sys.stdout))


def run_lines(chat) -> None:
    """Answer the lines of stdin, questions and commands, to its end.

    Raises:
        BadData: at the end, when some could not be answered.
    """
    from firstwords.repl import REFUSED

    refused = 0
    for line in read_lines(sys.stdin):
        try:
            if not chat.take(line):
                break
        except REFUSED as error:
            refused += 1
            say(f"error: {error}", "error")
    check_refused(refused, "stdin")


def answer_json(session, texts: Iterable[str], follower) -> None:
    """Answer each text in one conversation, with an object on a line of its own.

    Raises:
        BadData: at the end, when some could not be answered.
    """
    refused = 0
    for text in filter(str.strip, texts):
        if follower and (newer := follower.move(session)) is not session:
            session = newer
            say(f"(now step {session.manifest['step']:,})", "dim")
        try:
            session.ask(text)
        except BadData as error:
            refused += 1
            write_json(text, error)
        else:
            write_json(text, session.last)
    check_refused(refused, "prompts")


def answer_file(session, flags) -> None:
    """Answer each line of `--prompt_file` in a conversation of its own.

    Raises:
        BadData: at the end, when some could not be answered.
    """
    from firstwords.session import ask_each

    refused = 0
    for text, answer in ask_each(session, filter(str.strip, open_prompts(flags.prompt_file))):
        refused += isinstance(answer, BadData)
        if flags.json:
            write_json(text, answer)
        elif isinstance(answer, BadData):
            say(f"error: {answer}", "error")
        else:
            write(mask_control(answer.text) + "\n")
    check_refused(refused, flags.prompt_file)


def check_refused(refused: int, where: str) -> None:
    """Raise `BadData` when there were lines that could not be answered."""
    if refused:
        raise BadData(f"{where}: lines that were not answered: {refused}; see above why")


def open_prompts(name: str) -> Iterator[str]:
    """Return the lines of a file, or of stdin for `-`.

    Raises:
        MissingInput: when there is no such file.
        IOFailed: when it cannot be read.
    """
    if name == "-":
        return read_lines(sys.stdin)
    path = Path(name)
    if not path.exists():
        near = suggest(path.name, [p.name for p in path.parent.glob("*")])
        raise MissingInput(f"--prompt_file {path}: is not there; {near}")
    try:
        return read_lines(open(path, encoding="utf-8-sig"))  # noqa: SIM115 - read to its end, line by line
    except OSError as error:
        raise IOFailed(f"--prompt_file {path}: cannot be read ({error.strerror}); name another") from None


def read_lines(file) -> Iterator[str]:
    """Return the lines of an open file without their ends; bytes that are no UTF-8 are refused later."""
    file.reconfigure(errors="surrogateescape")
    return (line.rstrip("\n") for line in file)


def write(text: str) -> None:
    """Print a part of an answer on stdout."""
    print(text, end="", flush=True)


def write_json(text: str, answer) -> None:
    """Print a `Reply`, or the error in its place, as one line of ASCII."""
    if isinstance(answer, BadData):
        row = {"prompt": text, "error": str(answer)}
    else:
        row = {
            "prompt": text,
            "reply": answer.text,
            "stopped": answer.stopped,
            "tokens": len(answer.ids),
            "prompt_tokens": len(answer.prompt),
            "evicted": answer.evicted,
        }
    print(json.dumps(row), flush=True)


def say(text: str, style: str = "") -> None:
    """Print a remark on stderr, apart from the answers; with colour only on a terminal."""
    text = mask_control(text)
    if style and has_colour(sys.stderr):
        text = f"{COLOURS[style]}{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def has_colour(stream) -> bool:
    """Tell whether colours are wanted there (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    run_main(main)
