#!/usr/bin/env python
"""Hand a trained model on: as a Hugging Face folder, as GGUF for llama.cpp and Ollama, to the Hub.

    python export.py --model_dir runs/chat --format hf --out_dir export/chat
    python export.py --model_dir runs/chat --format gguf --dtype q8_0 --out_dir export/chat_gguf
    python export.py --model_dir runs/chat --format hf --out_dir export/chat --push_to_hub me/chat

--model_dir is a finished run, one of its checkpoints, or a model folder; a run that has not reached its end
is refused. The folder is written whole or not at all, with a model card, README.md: read it before you hand
it on. --push_to_hub uploads the folder afterwards, with the token of `hf auth login`.
"""

from pathlib import Path

from firstwords.args import build_parser, run_main
from firstwords.atomic import stage_folder
from firstwords.errors import BadFlag, Diverged, IOFailed, suggest

DTYPES = {"hf": ("fp32", "bf16"), "gguf": ("f16", "f32", "q8_0")}
# Of a manifest, what concerns the one who gets the model; the rest names folders of this machine.
HANDED_ON = ("format", "step", "tokens_seen", "longest_row", "tokenizer_hash", "versions")

HF_USAGE = """\
```python
from transformers import pipeline

chat = pipeline("text-generation", "{name}")
reply = chat([{{"role": "user", "content": "Hello"}}], do_sample=False)
print(reply[0]["generated_text"][-1]["content"])
```

or with firstwords: `python inference.py --model_dir {name}`."""

GGUF_USAGE = """\
```sh
llama-cli -m {file} -c {context} --temp 0
ollama create {name} -f Modelfile && ollama run {name}
```"""


def parse_flags(argv: list[str] | None):
    """Parse the command line and check what can be checked without the model."""
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", type=Path, required=True, help="a finished run, a checkpoint-<step>, a model folder")
    add("--format", required=True, choices=sorted(DTYPES), help="hf: safetensors; gguf: llama.cpp")
    add("--out_dir", type=Path, required=True, help="the folder to write")
    add("--dtype", help="of hf: fp32 (default), bf16; of gguf: f16 (default), f32, q8_0")
    add("--name", help="of the model in its card; default: the name of --out_dir")
    add("--license", help="for the card, as the Hub spells it: mit, cc-by-4.0, ...")
    add("--overwrite", action="store_true", help="replace --out_dir")
    add("--push_to_hub", metavar="REPO", help="upload to this repository, owner/name, and make it if need be")
    flags = parser.parse_args(argv)
    dtypes = DTYPES[flags.format]
    flags.dtype = flags.dtype or dtypes[0]
    if flags.dtype not in dtypes:
        near = suggest(flags.dtype, list(dtypes))
        raise BadFlag(f"--dtype {flags.dtype}: --format {flags.format} has no such type; {near}")
    flags.name = flags.name or flags.out_dir.resolve().name
    if flags.push_to_hub:
        check_repo(flags.push_to_hub)
    return flags


def check_repo(repo: str) -> None:
    """Raise `BadFlag` when `repo` cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadFlag(f"--push_to_hub {repo}: {' '.join(str(error).split())}") from None
    if repo.count("/") != 1:
        raise BadFlag(f"--push_to_hub {repo}: names no owner; write owner/name")


def main(argv: list[str] | None = None) -> None:
    """Export the model that the flags name."""
    flags = parse_flags(argv)
    session = load_finished(flags.model_dir)
    with stage_folder(flags.out_dir, overwrite=flags.overwrite) as staging:
        if flags.format == "hf":
            usage = write_hf(staging, session, flags)
        else:
            usage = write_llamacpp(staging, session, flags)
        write_card(staging, session, flags, usage)
    size = sum(path.stat().st_size for path in flags.out_dir.iterdir())
    print(f"{flags.out_dir}: {flags.format} {flags.dtype}, {size:,} bytes; read its README.md")
    if flags.push_to_hub:
        print(f"uploaded: {push(flags.out_dir, flags.push_to_hub)}")


def load_finished(model_dir: Path):
    """Return a session of a finished model whose weights are numbers.

    Raises:
        Mismatch: for a run that has not reached its end.
        Diverged: when a weight is NaN or infinite.
    """
    from firstwords.checkpoint import find_init
    from firstwords.model import quiet_transformers
    from firstwords.session import load_session

    quiet_transformers()
    session = load_session(find_init(model_dir, "--model_dir"))
    for name, weight in session.model.named_parameters():
        if not weight.isfinite().all():
            raise Diverged(f"{session.folder}: {name} holds NaN or infinity; export another checkpoint")
    return session


def write_hf(folder: Path, session, flags) -> str:
    """Write a plain Hugging Face folder; return how to use it."""
    import torch

    from firstwords.checkpoint import write_manifest
    from firstwords.model import set_generation
    from firstwords.template import CHAT_TEMPLATE

    model = session.model.to(torch.bfloat16 if flags.dtype == "bf16" else torch.float32)
    model.config.use_cache = True  # the trainer turned it off for training
    set_generation(model, session.tokenizer)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    session.tokenizer.save(folder, chat_template=CHAT_TEMPLATE)
    handed_on = {key: session.manifest[key] for key in HANDED_ON if key in session.manifest}
    write_manifest(folder, {**handed_on, "longest_row": session.context})
    return HF_USAGE.format(name=flags.push_to_hub or flags.name)


def write_llamacpp(folder: Path, session, flags) -> str:
    """Write a GGUF file and an Ollama Modelfile; return how to use them."""
    try:
        from firstwords.llamacpp import format_modelfile, write_gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise BadFlag("--format gguf: the package gguf is not installed; pip install gguf") from None
    name = f"model-{flags.dtype}.gguf"
    write_gguf(folder / name, session.model, session.tokenizer, flags.dtype, name=flags.name)
    (folder / "Modelfile").write_text(format_modelfile(name, session.context), encoding="utf-8")
    return GGUF_USAGE.format(file=name, context=session.context, name=flags.name)


def write_card(folder: Path, session, flags, usage: str) -> None:
    """Write the model card of what the folder holds."""
    from firstwords.card import Facts, format_card, read_curve, read_scores

    facts = Facts(
        manifest=session.manifest,
        num_weights=session.model.num_parameters(),
        num_tokens=len(session.tokenizer),
        context=session.context,
        scores=read_scores(session.folder, session.manifest.get("step")),
        curve=read_curve(session.folder),
        figures=list_run_figures(session.folder),
    )
    card = format_card(flags.name, facts, usage, license=flags.license)
    (folder / "README.md").write_text(card, encoding="utf-8")


def list_run_figures(folder: Path) -> list[tuple[str, str]]:
    """Return the head figures of a finished run's report; what evaluate.py measured is among the scores."""
    from firstwords.figures import list_figures
    from firstwords.history import read_run

    if not (folder / "runs").is_dir():
        return []
    figures = list_figures(read_run(folder))
    return [(f.name, f.shown) for f in figures if not f.source.startswith("evaluation")]


def push(folder: Path, repo: str) -> str:
    """Upload a folder to the Hub and return its address.

    Raises:
        IOFailed: when the Hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        return api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Export of firstwords"
        ).commit_url
    except Exception as error:  # its own errors, and whatever the HTTP library of its version raises
        why = " ".join(str(error).split())[:200]
        raise IOFailed(
            f"--push_to_hub {repo}: not uploaded ({why}); {folder} is whole, `hf auth login` and "
            f"`hf upload {repo} {folder}` do the rest"
        ) from error


if __name__ == "__main__":
    run_main(main)
