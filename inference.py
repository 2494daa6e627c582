"""Chat with a trained model.

    python inference.py --model_dir runs/chat                              talk on the terminal
    python inference.py --model_dir runs/chat --prompt "What is a dict?"   one answer, for scripts
    python inference.py --model_dir runs/chat < questions.txt              a question a line

--model_dir is a run, one of its checkpoints, or any model folder; of a run that is still training,
the newest complete checkpoint is taken. Answers go to stdout, everything else to stderr. Ctrl-C
stops a reply; at the prompt it clears the line, and twice in a row it leaves. Control characters
that a model might say (escape sequences of terminals) are printed as U+FFFD.
"""

import os
import re
import sys
from dataclasses import fields

from firstwords.args import build_parser, run_main
from firstwords.errors import BadData, suggest
from firstwords.schema import mask_control

HELP = """\
/help          this list
/reset         forget the conversation; the system message stays
/system TEXT   set the system message; without TEXT take it away
/quit          leave (also Ctrl-D)
Ctrl-C         stop the reply; at the prompt clear the line, twice leave"""


def parse_flags(argv: list[str] | None):
    """Parse the command line; the numbers are checked by `generate.Sampling`."""
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", required=True, help="a run, a checkpoint-<step>, or a model folder")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default auto")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top_p", type=float, default=1.0, help="keep the likeliest ids up to this probability")
    add("--top_k", type=int, default=0, help="keep the k likeliest ids; 0 keeps all")
    add("--min_p", type=float, default=0.0, help="keep ids above this share of the likeliest one")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less; 1 is off")
    add("--seed", type=int, help="of the draws; the same seed gives the same replies")
    add("--max_new_tokens", type=int, help="longest reply in tokens; default: the context's rest")
    add("--system", metavar="TEXT", help="the system message")
    add("--prompt", metavar="TEXT", action="append", help="ask this and end; again: go on with it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Load the model and chat as the flags and the terminal say."""
    flags = parse_flags(argv)
    chat = Chat(open_session(flags))
    sys.stdout.reconfigure(errors="replace")
    if flags.prompt is not None:
        for text in filter(str.strip, flags.prompt):
            chat.answer(text)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        run_repl(chat)
    else:
        run_lines(chat)


def open_session(flags):
    """Load what `--model_dir` names and say what that is."""
    from firstwords.model import quiet_transformers
    from firstwords.session import load_session

    quiet_transformers()
    device, why = pick_device(flags.device)
    session = load_session(
        flags.model_dir, device=device, system=flags.system or None, sampling=build_sampling(flags)
    )
    step = session.manifest.get("step", "unknown")
    size = f"{session.model.num_parameters():,} weights, context {session.context} tokens"
    say(f"loaded {session.folder}: step {step}, {size}, on {device}{why}")
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
    from firstwords.model import find_device

    device = find_device(name)
    if name != "auto":
        return device, ""
    return device, " (auto: no GPU found)" if device == "cpu" else " (auto)"


class Chat:
    """A session that answers on stdout and understands the commands of the prompt."""

    def __init__(self, session):
        self.session = session
        self.told_eviction = False

    def answer(self, text: str) -> None:
        """Print the reply as it comes; Ctrl-C stops it and is passed on."""
        pieces = self.session.stream(text)
        try:
            for piece in pieces:
                print(mask_control(piece), end="", flush=True)
        finally:
            pieces.close()
            print(flush=True)
        self._comment(self.session.last)

    def _comment(self, reply) -> None:
        if reply.evicted and not self.told_eviction:
            self.told_eviction = True
            say(f"(context of {self.session.context} tokens full: the oldest turns are dropped)")
        if not reply.stopped:
            say(f"(the reply did not end by itself: {len(reply.ids)} tokens)")

    def take(self, line: str) -> bool:
        """Do what one line asks, a command or a question; return False when it is to leave."""
        line = line.strip()
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        if re.fullmatch(r"/\w+", command):
            self._run_command(command, argument.strip())
        elif line:
            self.answer(line)
        return True

    def _run_command(self, command: str, argument: str) -> None:
        if command == "/help":
            say(HELP)
        elif command == "/reset":
            self.session.reset()
            self.told_eviction = False
            say("(forgotten)")
        elif command == "/system":
            self.session.set_system(argument or None)
            say("(system message set)" if argument else "(no system message)")
        else:
            near = suggest(command, ["/help", "/reset", "/system", "/quit"])
            say(f"{command}: unknown command; {near}")


def run_lines(chat: Chat) -> None:
    """Answer the lines of stdin to its end.

    Raises:
        BadData: at the end, when some could not be asked.
    """
    sys.stdin.reconfigure(errors="surrogateescape")
    refused = 0
    for line in sys.stdin:
        try:
            if not chat.take(line):
                break
        except BadData as error:
            refused += 1
            say(f"error: {error}")
    if refused:
        raise BadData(f"stdin: lines that were not answered: {refused}; see above why")


def run_repl(chat: Chat) -> None:
    """Chat on the terminal until /quit, Ctrl-D, or Ctrl-C twice in a row."""
    from prompt_toolkit import PromptSession

    say("/help lists the commands")
    prompts = PromptSession()
    while (line := read_line(prompts)) is not None:
        try:
            if not chat.take(line):
                break
        except KeyboardInterrupt:
            say("(stopped)")
        except BadData as error:
            say(f"error: {error}")


def read_line(prompts) -> str | None:
    """Return the next line from the terminal, or None at Ctrl-D.

    Ctrl-C clears a line that holds text; the second one in a row ends the program with 130.
    """
    style = "" if "NO_COLOR" in os.environ else "ansigreen bold"
    interrupts = 0
    while interrupts < 2:
        try:
            return prompts.prompt([(style, "you> ")])
        except EOFError:
            return None
        except KeyboardInterrupt:
            interrupts = 1 if prompts.default_buffer.text else interrupts + 1
    sys.exit(130)


def say(text: str) -> None:
    """Print a remark on stderr, apart from the answers."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
