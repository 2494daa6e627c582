"""Do things with strangers' files, each in a forked child, and tell what that did to the machine.

    python tests/prison.py <<< '[{"act": "chat", "folder": "evil"}]'
        ->  [{"result": "refused Damaged: evil/config.json: ...", "did": [], "opened": ["config.json"]}]

`did` lists what no file may cause: a socket, a process, an unpickled global, code from the folder, a kernel
loader. Sockets and processes are also refused. Whoever calls looks for the canary that a payload writes.
One process imports torch and transformers; a child per case keeps what one does from the next.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

SECONDS, EXTRA_BYTES = 3, 3 << 30
PICKLES = (".bin", ".pt", ".pth")
QUESTION = [{"role": "user", "content": "Hi"}]


# --- what is done: ours


def chat(folder):
    from firstwords.generate import Sampling
    from firstwords.session import load_session

    return load_session(folder, sampling=Sampling(max_new_tokens=4)).ask("Hi")


def init(folder):
    from firstwords import checkpoint
    from firstwords.opening import check_parent
    from firstwords.tokenizer import load_tokenizer

    found = checkpoint.find_init(Path(folder))
    model = checkpoint.load_model(found)
    return check_parent(str(found), found, model, load_tokenizer(found))["weights"]


def export(folder):
    import export as script

    out = Path(folder).parent / "exported"
    script.main(["--model_dir", folder, "--format", "hf", "--out_dir", str(out)])
    return (out / "chat_template.jinja").read_text() + " ".join(sorted(path.name for path in out.iterdir()))


def prompt(folder):
    from firstwords.schema import Message
    from firstwords.template import encode_prompt
    from firstwords.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return tokenizer.decode(encode_prompt([Message("user", "Hi")], tokenizer))


def read(folder):
    from firstwords.sources import read_rows

    return [located.row["question"] for located in read_rows(folder)]


def start(folder):
    """Run one of our scripts with the folder as working directory."""
    return run_python([str(Path(__file__).parent.parent / "evaluate.py"), "--help"], folder)


# --- what is done: as people do it without us


def stock_pickle(folder):
    import torch

    path = next(path for path in Path(folder).iterdir() if path.suffix in PICKLES)
    return sorted(torch.load(path, weights_only=False))


def stock_auto(folder):
    from transformers import AutoModelForCausalLM

    return type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__


def stock_tokenizer(folder):
    from transformers import AutoTokenizer

    return type(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)).__name__


def stock_gpt2(folder):
    from transformers import GPT2LMHeadModel

    return type(GPT2LMHeadModel.from_pretrained(folder)).__name__


def stock_prompt(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


def stock_read(folder):
    import datasets

    rows = datasets.load_dataset(folder, split="train", streaming=True)
    return [row["question"] for row in rows]


def stock_start(folder):
    return run_python(["-c", "import json; print(json.dumps('usage'))"], folder)


def run_python(words, folder):
    import subprocess

    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.stdout.split(":")[0] + done.stderr


# --- the watch


def watch(folder: str, did: list, opened: list, *, processes: bool) -> None:
    """Note what an audit hook hears of, and refuse sockets and, unless allowed, processes."""
    import transformers.modeling_utils

    def note_kernel(name, *_, **__):
        did.append("kernel")
        raise ImportError(name)

    # The package that downloads kernels is not installed; what stands here is as far as a name gets.
    transformers.modeling_utils.load_and_register_attn_kernel = note_kernel
    transformers.integrations.peft.is_peft_available = lambda: True

    def hook(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
            did.append("socket")
            raise OSError("no network here")
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            if not processes:
                did.append("process")
                raise OSError("no processes here")
        elif event == "pickle.find_class":
            did.append("pickle")
        elif event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(folder):
            did.append("code")
        elif event == "open" and isinstance(args[0], str) and args[0].startswith(folder + "/"):
            opened.append(args[0].removeprefix(folder + "/"))

    sys.addaudithook(hook)


class OutOfTime(BaseException):
    """The seconds of a case are over; nothing that tries again catches it."""


def run_out(number, frame):
    raise OutOfTime


def run_case(case: dict) -> dict:
    """Do one thing and describe it; an error becomes `refused Class: text`, or `crashed` when not ours."""
    did, opened = [], []
    signal.signal(signal.SIGALRM, run_out)
    signal.alarm(SECONDS)
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, limit))
    watch(case["folder"], did, opened, processes=case["act"].endswith("start"))
    try:
        result = globals()[case["act"]](case["folder"])
    except BaseException as error:  # whatever it is: telling is the purpose
        kind = next(kind for kind in type(error).__mro__ if kind is not BaseException)
        ours = "FirstwordsError" in [base.__name__ for base in kind.__mro__]
        result = f"{'refused' if ours else 'crashed'} {kind.__name__}: {error}"
    return {"result": result, "did": sorted(set(did)), "opened": sorted(set(opened))}


def fork_case(case: dict) -> dict:
    """Run a case in a child; one that is killed by its limits says so."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        os.dup2(2, 1)
        with os.fdopen(writer, "w") as file:
            json.dump(run_case(case), file, default=str)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.wait()
    return (
        json.loads(text) if text else {"result": "crashed: no end within its limits", "did": [], "opened": []}
    )


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "0"  # a name that reaches the Hub shows as a socket
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch
    import transformers

    import evaluate  # noqa: F401 - what a case needs is imported before it is watched
    import firstwords.trainer  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = json.load(sys.stdin)
    print(json.dumps([fork_case(case) for case in cases]))
