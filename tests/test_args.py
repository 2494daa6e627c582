"""The command line: flag beats recipe beats default, errors are one line, and --help is quick."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from firstwords import args, errors
from firstwords.args import OUR_WORDS, TrainFlags, build_parser, parse_train_args, run_main
from firstwords.errors import BadFlag, FirstwordsError, MissingInput

ROOT = Path(args.__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def parse(*words):
    """Return the flags alone; nothing was for TrainingArguments."""
    flags, extra = parse_train_args(list(words))
    assert extra == {}
    return flags


def write_recipe(tmp_path, text, name="chat.yaml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return f"--recipe={tmp_path / name}"


def catch(error, function, *values):
    """Return the one line that `function` raises."""
    with pytest.raises(error) as caught:
        function(*values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- flags


def test_the_words_that_are_fixed_do_what_they_say():
    line = (
        "--data_dir d --model_dir m --init_model_dir i --cfg c --seq_len 64 --batch_size 2 --grad_accum 3 "
        "--lr 1e-3 --warmup_steps 10 --max_steps 20 --weight_decay 0.2 --bf16 --log_steps 5 --save_steps 6 "
        "--no_assistant_only_loss"
    )
    flags = vars(parse(*line.split()))
    expected = {
        "data_dir": Path("d"),
        "model_dir": Path("m"),
        "init_model_dir": "i",
        "cfg": Path("c"),
        "seq_len": 64,
        "batch_size": 2,
        "grad_accum": 3,
        "lr": 1e-3,
        "warmup_steps": 10.0,
        "max_steps": 20,
        "weight_decay": 0.2,
        "bf16": True,
        "log_steps": 5,
        "save_steps": 6,
        "assistant_only_loss": False,
    }
    assert {name: flags[name] for name in expected} == expected
    assert vars(TrainFlags()) | expected == flags


def test_dashes_are_underscores_in_names_and_stay_in_values():
    assert parse("--data-dir", "my-data", "--model_dir=my-model") == parse(
        "--data_dir=my-data", "--model-dir", "my-model"
    )
    assert parse("--data-dir=a--b=c-d").data_dir == Path("a--b=c-d")
    parser = build_parser("")
    parser.add_argument("--system_text")
    for text in ("-- be-brief, please-do --", "--no-flag-this is, it?", "a --b-c"):
        assert parser.parse_args(["--system-text", text]).system_text == text


def test_negative_forms_and_the_last_word_wins():
    assert parse("--bf16", "--no_bf16").bf16 is False
    assert parse("--no-bf16", "--bf16").bf16 is True
    assert parse("--assistant_only_loss").assistant_only_loss is True
    assert parse("--lr", "1", "--lr", "2").lr == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lr", "fast"], "--lr: invalid float value: 'fast'; see --help"),
        (["--seed", "1.5"], "--seed: invalid int value: '1.5'; see --help"),
        (["--max_steps", "1e3"], "--max_steps: invalid int value: '1e3'; see --help"),
        (["--max_steps"], "--max_steps: expected one argument; see --help"),
        (["--device", "gpu"], "--device: invalid choice: 'gpu'"),
        (["--bf16=1"], "--bf16: ignored explicit argument '1'; see --help"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(words, text):
    assert text in catch(BadFlag, parse, *words)


# --- of the other scripts


def build_small_parser():
    parser = build_parser("What it does.")
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--top_k", type=int)
    return parser


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--modle-dir", "x"], "--modle_dir: unknown flag; did you mean '--model_dir'?"),
        (["--modle_dir=x"], "--modle_dir: unknown flag; did you mean '--model_dir'?"),
        (
            ["--model_dir", "x", "--zzzz"],
            "--zzzz: unknown flag; known: --debug, --help, --model_dir, --top_k, -h",
        ),
        (["--model", "x"], "--model: unknown flag; did you mean '--model_dir'?"),  # no abbreviation
        (["--model_dir", "x", "more"], "more: unknown flag"),
        (["--model_dir", "x", "-k"], "-k: unknown flag"),
        ([], "the following arguments are required: --model_dir; see --help"),
        (["--model_dir", "x", "--top_k", "few"], "--top_k: invalid int value: 'few'; see --help"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_suggestion(words, text):
    assert text in catch(BadFlag, build_small_parser().parse_args, words)


def test_words_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--model-dir", "runs/a-b", "--debug"])
    assert vars(build_small_parser().parse_args()) == {"model_dir": "runs/a-b", "top_k": None, "debug": True}


# --- recipes


def test_flag_beats_recipe_beats_default(tmp_path):
    recipe = write_recipe(tmp_path, "lr: 1e-3\nseq_len: 64\nbf16: true\nassistant_only_loss: true\n")
    flags = parse(recipe, "--lr", "5e-4", "--no_bf16", "--no_assistant_only_loss")
    assert (flags.lr, flags.seq_len, flags.bf16, flags.assistant_only_loss) == (5e-4, 64, False, False)
    assert flags.batch_size == TrainFlags().batch_size
    assert parse("--seq_len", "32", recipe).seq_len == 32  # before the recipe or behind it
    assert flags.recipe == tmp_path / "chat.yaml"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 3e-4", "lr", 3e-4),  # a string to YAML
        ("lr: 3.0e-4", "lr", 3e-4),
        ("warmup_steps: 100", "warmup_steps", 100.0),
        ("warmup-steps: 0.1", "warmup_steps", 0.1),
        ("resume: no", "resume", "no"),  # false to YAML
        ("bf16: no", "bf16", False),
        ("bf16: yes", "bf16", True),
        ("no_bf16: true", "bf16", False),
        ("no_bf16: false", "bf16", True),
        ("data_dir: data/a b", "data_dir", Path("data/a b")),
        ("# nothing\n", "lr", TrainFlags().lr),
        ("", "lr", TrainFlags().lr),
    ],
)
def test_a_recipe_says_what_a_flag_says(tmp_path, text, name, value):
    found = getattr(parse(write_recipe(tmp_path, text)), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchsize: 2", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        (
            "max_grad_nrom: 1",
            "unknown key 'max_grad_nrom'; did you mean 'max_grad_norm'?",
        ),
        ("help: true", "unknown key 'help'"),
        ("1: 2", "unknown key '1'"),
        ("lr: fast", "--lr: invalid float value: 'fast'"),
        ("max_steps: 1.5", "--max_steps: invalid int value: '1.5'"),
        ("seed: true", "--seed: invalid int value: 'True'"),
        ("lr:", "lr is None; recipes are flat, give one value"),
        ("tokenizer: null", "tokenizer is None"),
        ("lr: [1, 2]", "lr is [1, 2]; recipes are flat"),
        ("optim:\n  name: muon", "optim is {'name': 'muon'}; recipes are flat"),
        ("bf16: 1", "bf16 is 1; write true or false"),
        ("bf16: 'no'", "bf16 is 'no'; write true or false"),
        ("recipe: other.yaml", "recipe is 'other.yaml'; a recipe names no other"),
        ("- lr\n- 1", "must be `key: value` lines"),
        ("lr", "must be `key: value` lines"),
        ("lr: [1\nseed: 2", "broken YAML"),
        ("lr: 1\n\tseed: 2", "broken YAML"),
    ],
)
def test_a_recipe_that_is_wrong_is_named(tmp_path, text, said):
    line = catch(BadFlag, parse, write_recipe(tmp_path, text))
    assert line.startswith(f"--recipe {tmp_path / 'chat.yaml'}: ")
    assert said in line


def test_a_recipe_in_no_known_encoding_is_refused(tmp_path):
    (tmp_path / "chat.yaml").write_bytes(b"lr: \xff")
    assert "broken YAML" in catch(BadFlag, parse, f"--recipe={tmp_path / 'chat.yaml'}")


def test_a_mistyped_recipe_is_suggested(tmp_path):
    write_recipe(tmp_path, "lr: 1", "pydocs_chat.yaml")
    (tmp_path / "pydocs_cha.txt").write_text("")
    line = catch(MissingInput, parse, f"--recipe={tmp_path / 'pydocs_cat.yaml'}")
    assert line.endswith("is not there; did you mean 'pydocs_chat.yaml'?")
    assert "there is nothing like it" in catch(MissingInput, parse, "--recipe=nowhere/x.yaml")


# --- fields of TrainingArguments


def test_fields_of_training_arguments_pass_through(tmp_path):
    recipe = write_recipe(tmp_path, "max_grad_norm: 5e-1\nignore_data_skip: true\nlr: 1e-3\nadam_beta2: 0.9")
    flags, extra = parse_train_args([recipe, "--adam-beta2", "0.95", "--torch_compile=no", "--seed", "3"])
    assert (flags.lr, flags.seed) == (1e-3, 3)
    assert extra == {
        "max_grad_norm": 0.5,
        "ignore_data_skip": True,
        "adam_beta2": 0.95,
        "torch_compile": False,
    }
    line = catch(BadFlag, parse, "--adam_beta2", "x")
    assert line.startswith("--adam_beta2")
    assert "invalid float value: 'x'" in line


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_recompute_full(name):
    flags, extra = parse_train_args([f"--{name}", "true", "--recompute=full"])
    assert (flags.recompute, extra) == ("full", {})
    assert parse_train_args([f"--{name}"])[0].recompute == "full"
    assert parse_train_args([f"--{name}=false"])[0].recompute == "none"
    line = catch(BadFlag, parse, f"--{name}", "--recompute=selective")
    assert line == f"--{name}: True is --recompute full, not selective; leave one out"
    assert "use --recompute" in catch(BadFlag, parse, f"--{name}_kwargs={{}}")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--bathc_size", "3"], "--bathc_size: unknown flag; did you mean '--batch_size'?"),
        (["--mixed_precision", "fp8"], "--mixed_precision: nothing is computed in fp8 here"),
        (["--mixed-precision=fp8"], "--mixed_precision=fp8: nothing is computed in fp8 here"),
        (["--mixed_precision", "bf16"], "--mixed_precision: is a word of accelerate's; use --bf16, or"),
        (["--max-grad-nrom=1"], "unknown flag; did you mean '--max_grad_norm'?"),
        (["--batch", "3"], "--batch: unknown flag"),
        (["more"], "more: unknown flag"),
    ],
)
def test_an_unknown_flag_of_train_is_refused_with_a_suggestion(words, text):
    assert text in catch(BadFlag, parse, *words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_dir", "x"),
        ("learning_rate", "1"),
        ("save_strategy", "steps"),
        ("per_device_train_batch_size", "2"),
    ],
)
def test_what_is_ours_to_set_is_refused_with_our_word(tmp_path, name, value):
    expected = f"--{name}: is ours to set; use --{OUR_WORDS[name]}"
    assert catch(BadFlag, parse, f"--{name}", value) == expected
    assert catch(BadFlag, parse, write_recipe(tmp_path, f"{name}: {value}")) == expected


def test_our_words_are_ours_and_theirs_are_theirs():
    from transformers import TrainingArguments

    ours, theirs = ({spec.name for spec in fields(kind)} for kind in (TrainFlags, TrainingArguments))
    assert set(OUR_WORDS) <= theirs - ours
    assert set(OUR_WORDS.values()) <= ours


# --- run_main


def run(main, argv=()):
    with pytest.raises(SystemExit) as ended:
        run_main(main, list(argv))
    return ended.value.code


def raise_(error):
    def main(argv):
        raise error

    return main


KINDS = FirstwordsError.__subclasses__()


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_an_error_is_one_line_and_its_exit_code(capsys, kind):
    assert run(raise_(kind("data/x: is wrong; mend it"))) == kind.exit_code
    assert capsys.readouterr() == ("", "error: data/x: is wrong; mend it\n")


def test_other_ends(capsys, tmp_path):
    assert run(lambda argv: None) == 0
    assert run(lambda argv: sys.exit(3)) == 3
    assert capsys.readouterr() == ("", "")
    assert run(lambda argv: (tmp_path / "nowhere").read_text()) == 74
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: No such file or directory\n"
    assert run(raise_(OSError("disk on fire"))) == 74
    assert capsys.readouterr().err == "error: system: disk on fire\n"
    assert run(raise_(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_a_traceback_with_debug_alone(capsys):
    assert run(raise_(errors.BadData("x: is wrong; mend it")), ["--debug"]) == 65
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "in main\n" in shown
    assert shown.endswith("error: x: is wrong; mend it\n")


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 / 0, [])


def test_words_of_main_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--a", "b"])
    taken = []
    with pytest.raises(SystemExit):
        run_main(taken.append)
    assert taken == [["--a", "b"]]


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_has_gone_ends_the_script_quietly(lines):
    code = (
        f"from firstwords.args import run_main\nrun_main(lambda argv: [print('x') for _ in range({lines})])"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=buffered,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


# --- help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "firstwords.args" in imported
    assert not imported & {"torch", "transformers", "datasets", "accelerate"}
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8")))
    assert docstring in ended.stdout
    assert "--debug" in ended.stdout


def test_every_flag_of_train_has_a_help_and_its_default():
    text = args.build_train_parser("").format_help()
    for spec in fields(TrainFlags):
        entry = re.search(rf"^  --{spec.name}\b.*?(?=^  -|\Z)", text, re.M | re.S)
        words = " ".join(entry[0].split())
        assert spec.default in (None, "") or f"(default {spec.default})" in words
