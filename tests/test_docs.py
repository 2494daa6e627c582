"""The documents are true: every command in them parses, every file and module they name is there.

Blocks of README.md and tutorial.md are marked by what can be done with them here: `sh` is parsed, `sh run` is
also executed, scaled down, and `sh slow` whole, in the slow tests (test_journey.py); `sh hub` is run on local
stand-ins for sets of the Hub, and `sh gpu` is taken as far as the checks before training, on their data.
"""

import ast
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from transformers import TrainingArguments

import evaluate
import export
import firstwords
import inference
import prep_data
import prep_text_corpus
from firstwords import trainer
from firstwords.args import build_train_parser, check_flags, parse_train_args
from firstwords.dataset import open_train, open_val
from firstwords.errors import FirstwordsError
from firstwords.model import read_config
from firstwords.opening import find_config
from firstwords.schema import format_row
from firstwords.sources import HUB_NAMES
from firstwords.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TAUGHT = ("README.md", "tutorial.md")
DOCUMENTS = (*TAUGHT, "CONTRIBUTING.md")
KINDS = {"sh", "sh run", "sh slow", "sh hub", "sh gpu", "text", "json", "python"}
# What commands may call besides our own scripts, and flags of those that the text names.
FOREIGN = {
    "accelerate",
    "cat",
    "cd",
    "conda",
    "curl",
    "grep",
    "head",
    "ls",
    "pip",
    "sbatch",
    "shuf",
    "sky",
    "source",
    "sudo",
    "tail",
    "tensorboard",
    "torchrun",
    "wsl",
}
FOREIGN_FLAGS = {"--logdir", "--install", "--shutdown", "--signals_to_handle"}
# What starts a script in several processes: its flags are those of the script behind it.
LAUNCHER = re.compile(
    r"^(nohup )?(torchrun|accelerate launch)( --standalone| --\w+ [^\s-]\S*)* (?=train\.py )"
)
FILE_NAME = re.compile(r"[\w./-]+\.(py|sh|md|jsonl?|ya?ml|toml|txt|log|bin|jinja|out|safetensors)")
PARSERS = {
    "prep_text_corpus.py": prep_text_corpus.parse_flags,
    "prep_data.py": prep_data.parse_flags,
    "train.py": parse_train_args,
    "evaluate.py": evaluate.parse_args,
    "inference.py": inference.parse_flags,
    "export.py": export.parse_flags,
}


@dataclass(frozen=True)
class Block:
    """A fenced block: `kind` is what stands behind the opening fence."""

    document: str
    line: int
    kind: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a block: its words, and where it stands."""

    where: str
    kind: str
    words: tuple[str, ...]

    @property
    def script(self) -> str | None:
        """The script of ours that it calls, or None."""
        own = [word for word in self.words[:2] if re.fullmatch(r"(\./)?\w+\.(py|sh)", word)]
        return own[0].removeprefix("./") if own else None

    @property
    def flags(self) -> list[str]:
        """The words behind `python` and the script."""
        return list(self.words[2:])

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def read_blocks(document: str) -> list[Block]:
    """Return the fenced blocks of a document in order."""
    blocks, kind, first = [], None, 0
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if kind is None:
            kind, first = line.removeprefix("```").strip(), number
        else:
            blocks.append(Block(document, first, kind, "\n".join(lines[first : number - 1]) + "\n"))
            kind = None
    assert kind is None, f"{document}:{first}: the block has no end"
    return blocks


def read_commands(block: Block) -> list[Command]:
    """Split a block of shell text into its commands; here-documents and redirections are left out."""
    text = re.sub(r"<<'?(\w+)'?\n(.*\n)*?\1\n", "\n", block.text).replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        line = LAUNCHER.sub("python ", re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip()))
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        for words in _split_words(list(lexer)):
            commands.append(Command(f"{block.document}:{block.line}", block.kind, tuple(words)))
    return commands


def _split_words(words: list[str]) -> list[list[str]]:
    """Cut at `&&`, `|`, `;` and `&`; drop redirections, and what may stand before a command."""
    parts: list[list[str]] = [[]]
    waiting = iter(words)
    for word in waiting:
        if set(word) <= set("<>&") and set(word) & set("<>"):
            next(waiting)
            if word != "<" and parts[-1][-1] == "2":
                parts[-1].pop()
        elif set(word) <= set("&|;"):
            parts.append([])
        elif parts[-1] or not re.fullmatch(r"\w+=.*|nohup|run", word):
            parts[-1].append(word)
    return [part for part in parts if part]


def list_commands(*kinds: str, documents: tuple[str, ...] = TAUGHT) -> list[Command]:
    """Return the shell commands of documents: of the given kinds of block, or of all."""
    blocks = [block for document in documents for block in read_blocks(document)]
    wanted = [block for block in blocks if block.kind in (kinds or KINDS - {"text", "json", "python"})]
    return [command for block in wanted for command in read_commands(block)]


def list_run_all() -> list[Command]:
    """Return the commands that run_all.sh calls through `run`."""
    text = (ROOT / "run_all.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("run ")]
    text = "\n".join(lines).replace('"${precision[@]}"', "")
    return read_commands(Block("run_all.sh", 1, "sh", text))


def list_inline() -> list[Command]:
    """Return the commands that stand in backticks in the text of the documents."""
    return [
        command
        for document in DOCUMENTS
        for span in read_spans(document)
        if span.startswith(("python ", "./"))
        for command in read_commands(Block(document, 0, "sh", span))
    ]


def read_text(document: str) -> str:
    """Return a document without its fenced blocks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.sub(r"^```[^\n]*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def read_spans(document: str) -> list[str]:
    """Return what stands in backticks in the text; a line may end within."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", read_text(document))]


def check_command(command: Command) -> None:
    """Parse a command with the very parser of its script; whatever is wrong with it is raised."""
    script = command.script
    if script is None:
        is_code = command.words[:2] in (("python", "-c"), ("python", "-"))
        is_ours = command.words[:2] == ("python", "-m") and (ROOT / find_module(command.words[2])).is_file()
        may_be = is_code or is_ours or command.words[0] in FOREIGN
        assert may_be, f"{command}: is no command that documents may call"
    elif script.endswith(".sh"):
        assert (ROOT / script).stat().st_mode & 0o111, f"{command}: cannot be executed"
    else:
        assert command.words[0] == "python", f"{command}: is called without python"
        assert script in PARSERS, f"{command}: there is no such script"
        if "--help" not in command.flags:
            parse_command(command)


def find_module(name: str) -> str:
    """Return the path of a module that is called with `python -m`."""
    return f"{name.replace('.', '/')}.py"


def parse_command(command: Command):
    """Return the parsed flags of a script; of train.py, whose configuration is read too, a pair."""
    try:
        parsed = PARSERS[command.script](command.flags)
        if command.script == "train.py":
            flags, _ = parsed
            check_flags(flags)
            if flags.cfg is not None:
                assert flags.seq_len <= read_config(find_config(flags.cfg))["n_positions"]
    except FirstwordsError as error:
        raise AssertionError(f"{command}: {error}") from error
    return parsed


# --- commands


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Recipes and configurations are named from the root of the clone."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "command", [*list_commands(documents=DOCUMENTS), *list_run_all(), *list_inline()], ids=str
)
def test_command_parses(command):
    check_command(command)


@pytest.mark.parametrize(
    "text",
    [
        "python train.py --data_dir d --model_dir m --cfg small_test --max_step 5",
        "python train.py --data_dir d --model_dir m --max_steps 5",
        "python train.py --data_dir d --model_dir m --cfg small_test --max_steps 5 --seq_len 2048",
        "nohup python train.py --data_dir d --model_dir m --cfg small_tset --max_steps 5 > out 2>&1 &",
        "HF_HUB_OFFLINE=1 python train.py --recipe configs/recipes/none.yaml",
        "python prep_data.py --dataset x.jsonl \\\n  --out_dir d --sistem hello",
        "python inference.py --model_dir m --device gpu",
        "LATEST=$(los -1dt runs/chat/checkpoint-* | head -1)",
        "python infer.py --model_dir m",
        "./run_everything.sh",
        "A=1 python evaluate.py --model_dir m --question none && cd x",
        "python -m docs.costs",
    ],
)
def test_check_command_finds_what_is_wrong(text):
    command = read_commands(Block("x", 1, "sh", text + "\n"))[0]
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_command(command)


def test_read_commands_splits_as_the_shell_does():
    text = """cat > x.jsonl <<'END'
python nothing.py
END
# a comment
A=1 nohup python train.py --lr 1 \\
    --cfg 'a b' > x.out 2>&1 &
LATEST=$(ls -1dt runs/* | head -1)
cd x && ./run_all.sh; python -c "print(1); x = 2 > 1"  # another
"""
    words = [" ".join(command.words) for command in read_commands(Block("x", 1, "sh", text))]
    assert words == [
        "cat",
        "python train.py --lr 1 --cfg a b",
        "ls -1dt runs/*",
        "head -1",
        "cd x",
        "./run_all.sh",
        "python -c print(1); x = 2 > 1",
    ]


def test_kinds_of_blocks_are_known_and_all_in_use():
    assert {block.kind for document in TAUGHT for block in read_blocks(document)} == KINDS
    assert {block.kind for block in read_blocks("CONTRIBUTING.md")} <= KINDS - {"sh run", "sh slow"}


def test_the_loop_that_the_tutorial_shows_is_the_one_that_runs():
    blocks = [block.text for block in read_blocks("tutorial.md") if block.kind == "python"]
    shown = next(text for text in blocks if text.startswith("    for _ in range(steps):"))
    assert shown in (ROOT / "docs/lab.py").read_text(encoding="utf-8")


def test_the_glossary_is_in_the_order_of_the_alphabet():
    words = [row[0].lower() for row in read_table("tutorial.md", "word")]
    assert words == sorted(words)
    assert len(words) >= 40


def test_commands_of_run_all_are_taught():
    taught = {command.words for command in list_commands()}
    called = [command for command in list_run_all() if command.words[0] == "python"]
    assert {command.script for command in called} == set(PARSERS) - {"export.py"}
    for command in called:
        assert command.words in taught, f"in neither README nor tutorial: {command}"


def test_scripts_are_bash():
    for script in ROOT.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


# --- hub and gpu blocks, on stand-ins for what lies on the Hub

STAND_INS = {
    "alpaca": {"instruction": "Add the numbers {}.", "input": "1 and 2", "output": "That is {}."},
    "dolly": {"instruction": "Add {}.", "context": "1 and 2", "response": "That is {}.", "category": "x"},
    "openwebtext": {"text": "A page of the web, number {}. " * 30},
    "c4": {"text": "A page of the web, number {}. " * 30, "timestamp": "x", "url": "y"},
    "fineweb-edu": {"text": "A page to learn from, number {}. " * 30, "id": "x"},
}


def stand_in(command: Command, folder: Path) -> list[str]:
    """Return the flags of a prep command with a file of ours for its Hub set, below `folder`."""
    args = parse_command(command)
    name = str(args.dataset[0] if isinstance(args.dataset, list) else args.dataset)
    assert name in HUB_NAMES, f"{command}: {name!r} is none of {sorted(HUB_NAMES)}"
    rows = [{key: value.replace("{}", str(n)) for key, value in STAND_INS[name].items()} for n in range(200)]
    dataset = write_rows(folder / f"{name}.jsonl", rows)
    tokenizer = folder / ("seed" if args.tokenizer == "gpt2" else args.tokenizer)
    here = ["--dataset", dataset, "--out_dir", str(folder / args.out_dir), "--tokenizer", str(tokenizer)]
    hub = ("--dataset", name, "--dataset_config", args.dataset_config)
    without_hub = [word for word in command.flags if word not in hub]
    # argparse takes the last of a flag that is given twice.
    return [*without_hub, *here]


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write a JSONL and return its path."""
    path.write_text("".join(map(format_row, rows)), encoding="utf-8")
    return str(path)


def check_before_training(command: Command, folder: Path, runs: set[str]) -> str:
    """Do what train.py does before it builds a model; return the run that it would make.

    Args:
        command: of train.py.
        folder: where the data of its `--data_dir` are.
        runs: made by the commands before it.
    """
    flags, extra = parse_command(command)
    tokenizer = load_tokenizer(folder / flags.data_dir)
    options = {"assistant_only": flags.assistant_only_loss, "overlong": flags.overlong}
    data = open_train(folder / flags.data_dir, tokenizer, flags.seq_len, seed=flags.seed, **options)
    open_val(folder / flags.data_dir, tokenizer, flags.seq_len, **options)
    assert flags.cfg or flags.init_model_dir in runs, f"{command}: {flags.init_model_dir} comes from nowhere"
    steps = trainer.count_steps(flags, data.rows_per_epoch)
    trainer.build_training_arguments(replace(flags, device="cpu"), extra, steps)
    return str(flags.model_dir)


def prepare_seed(folder: Path) -> None:
    """Make a token store `seed`, whose tokenizer stands in for GPT-2's."""
    rows = write_rows(folder / "seed.jsonl", [{"text": f"page {n} of a text"} for n in range(99)])
    prep_text_corpus.main(["--dataset", rows, "--out_dir", str(folder / "seed"), "--tokenizer", "bpe:270"])


@pytest.mark.parametrize("document", TAUGHT)
def test_hub_and_gpu_blocks_reach_the_training(document, tmp_path):
    prepare_seed(tmp_path)
    runs: set[str] = set()
    for command in list_commands("sh hub", "sh gpu", documents=(document,)):
        if command.script in ("prep_text_corpus.py", "prep_data.py"):
            script = prep_data if command.script == "prep_data.py" else prep_text_corpus
            script.main(stand_in(command, tmp_path))
        elif command.script == "train.py":
            runs.add(check_before_training(command, tmp_path, runs))
    assert len(runs) >= 2


@pytest.mark.parametrize(
    "flags",
    [
        "--data_dir seed --cfg small_test --seq_len 8 --max_steps 2",
        "--data_dir seed --cfg small_test --seq_len 8 --max_steps 2 --epochs 2 --no_assistant_only_loss",
        "--data_dir sead --cfg small_test --seq_len 8 --max_steps 2 --no_assistant_only_loss",
        "--data_dir seed --init_model_dir runs/none --seq_len 8 --max_steps 2 --no_assistant_only_loss",
    ],
)
def test_check_before_training_finds_what_is_wrong(flags, tmp_path):
    prepare_seed(tmp_path)
    command = Command("x", "sh gpu", ("python", "train.py", "--model_dir", "m", *flags.split()))
    with pytest.raises((AssertionError, FirstwordsError)):
        check_before_training(command, tmp_path, set())


# --- recipes, models, dependencies


@pytest.mark.parametrize("path", sorted((ROOT / "configs/recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_builds_and_says_how_it_is_called(path):
    words = ("python", "train.py", "--recipe", f"configs/recipes/{path.name}")
    flags, extra = parse_command(Command(path.name, "sh", words))
    trainer.build_training_arguments(replace(flags, device="cpu"), extra, trainer.count_steps(flags, 100))
    assert path.read_text(encoding="utf-8").splitlines()[1] == f"#   {' '.join(words)}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/models").glob("*.json")), ids=lambda p: p.stem)
def test_model_config_builds(path):
    # Those of characters are nanoGPT's shapes.
    expected = {"shakespeare_cpu": 64, "shakespeare_gpu": 256}.get(path.stem, 1024)
    assert read_config(path)["n_positions"] == expected


def test_environment_installs_the_requirements():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *packages, pip_part = environment["dependencies"]
    assert pip_part == {"pip": ["-r requirements.txt"]}
    python = next(package for package in packages if package.startswith("python="))
    wanted = Requirement(f"python{read_project()['requires-python']}")
    check_pin(Requirement(python.replace("=", "==")), wanted)


def test_project_ranges_admit_the_pins():
    pins = {pin.name.lower(): pin for pin in read_pins("requirements.txt")}
    for text in read_project()["dependencies"]:
        wanted = Requirement(text)
        check_pin(pins[wanted.name.lower()], wanted)


def test_project_ranges_admit_the_tools():
    ranges = {Requirement(text).name: text for text in read_project()["optional-dependencies"]["dev"]}
    for pin in read_pins("requirements-dev.txt"):
        check_pin(pin, Requirement(ranges[pin.name]))


def check_pin(pin: Requirement, wanted: Requirement) -> None:
    """Compare an exact pin with a range."""
    assert next(iter(pin.specifier)).version in wanted.specifier, f"{pin} is not in {wanted}"
    assert str(pin.marker) == str(wanted.marker), f"{pin} and {wanted} are for different systems"


def read_project() -> dict:
    """Return the project table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_pins(name: str) -> list[Requirement]:
    """Return the pins of a requirements file, each of them exact; `-r` lines are left out."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    return pins


# --- what the text names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_text(document)):
        path, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            assert (ROOT / (path or document)).is_file(), f"{document}: {target} is not there"
            assert not anchor or anchor in list_anchors(path or document), f"{document}: no heading {target}"


def list_anchors(document: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", read_text(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_the_text_are_there_or_are_written(document):
    written = "".join(path.read_text(encoding="utf-8") for path in list_sources())
    examples = "".join(block.text for block in read_blocks(document))
    for span in read_spans(document):
        if FILE_NAME.fullmatch(span):
            there = (ROOT / span).is_file() or Path(span).name in written or span in examples
            assert there or Path(span).name == "nohup.out", f"{document}: nothing makes {span}"


def list_sources() -> list[Path]:
    """Return the scripts and the modules of the package."""
    return [*ROOT.glob("*.py"), *(ROOT / "firstwords").rglob("*.py")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_named_in_the_text_exist(document):
    known = list_flags() | FOREIGN_FLAGS
    for span in read_spans(document):
        for flag in re.findall(r"(?<![\w-])--[a-z]\w*", span):
            assert flag in known, f"{document}: {flag} in `{span}` is a flag of no script"


def list_flags() -> set[str]:
    """Return every flag of every script: of train.py from its parser, of others from `add("--...")`."""
    flags = {*build_train_parser("").flag_names(), *(f"--{spec.name}" for spec in fields(TrainingArguments))}
    for path in list_sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                flags.add(node.args[0].value)
    return {flag for flag in flags if isinstance(flag, str)}


def test_every_flag_of_ours_stands_in_a_text():
    texts = [*map(ROOT.joinpath, DOCUMENTS), *(ROOT / "docs").rglob("*.md")]
    recipes = (ROOT / "configs" / "recipes").glob("*.yaml")
    named = {flag for path in texts for flag in re.findall(r"--\w+", path.read_text(encoding="utf-8"))}
    named |= {f"--{key}" for path in recipes for key in yaml.safe_load(path.read_text(encoding="utf-8"))}
    named |= {f"--{flag[5:]}" for flag in named if flag.startswith("--no_")}
    ours = {flag for flag in build_train_parser("").flag_names() if not flag.startswith(("--no_", "-h"))}
    for path in [*ROOT.glob("*.py"), ROOT / "firstwords" / "prep.py"]:
        ours |= set(re.findall(r'\badd\(\s*"(--\w+)"', path.read_text(encoding="utf-8")))
    assert ours - named == set()
    assert len(ours) > 90


def read_table(document: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose first heading is `first`, without backticks."""
    rows, inside = [], False
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0] == first)
        if inside:
            rows.append(cells)
    assert rows, f"{document} has no table with {first!r}"
    return rows[2:]


def test_module_table_is_the_package():
    package = ROOT / "firstwords"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    listed = [row[0] for row in read_table("README.md", "module")]
    assert set(listed) == modules
    floors = re.findall(r"^    \d  (\w+)  ", firstwords.__doc__, re.M)
    assert listed == ["errors", "args", "atomic", *floors], "they stand in the order of the floors"


def test_script_table_is_the_root():
    scripts = {path.name for path in ROOT.iterdir() if path.suffix in (".py", ".sh")}
    assert {row[0] for row in read_table("README.md", "script")} == scripts


def test_exit_codes_are_those_of_the_errors():
    codes = {int(row[0]) for row in read_table("README.md", "code")}
    assert codes == {kind.exit_code for kind in FirstwordsError.__subclasses__()} | {0}


@pytest.mark.parametrize("document", [*DOCUMENTS, "run_all.sh"])
def test_nothing_is_left_to_be_filled_in(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert not re.findall(r"@@\w+@@|^TRANSCRIPT$|FP32_MINUTES|TO BE PASTED", text, flags=re.MULTILINE)
