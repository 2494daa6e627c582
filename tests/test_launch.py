"""The files for clusters: their keys and flags are known where they are read, and their commands work."""

import os
import signal
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from nursery import ALONE, ROOT
from tiny import write_config

import evaluate
import prep_text_corpus
from benchmarks.bench_scale import format_paper
from firstwords.args import parse_train_args
from firstwords.checkpoint import is_complete

SBATCH = ROOT / "docs" / "cluster" / "slurm.sbatch"
SKY = yaml.safe_load((ROOT / "docs" / "cluster" / "sky.yaml").read_text(encoding="utf-8"))
SCRIPTS = ("prep_text_corpus.py", "train.py", "evaluate.py")
# Of sky/utils/schemas.py in SkyPilot 0.13: of a task, of its resources, of its recovery, of a mounted bucket.
TASK_KEYS = {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run", "envs", "secrets"}
RESOURCE_KEYS = {"accelerators", "cpus", "memory", "infra", "use_spot", "disk_size", "job_recovery", "any_of"}
RECOVERY_KEYS = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
MOUNT_KEYS = {"name", "source", "store", "persistent", "mode"}

SRUN = """#!/bin/bash
# Slurm's srun as far as the job uses it: tasks side by side, a signal passed on, the highest exit code.
tasks=$SLURM_NTASKS pids=() code=0
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
trap 'kill -TERM "${pids[@]}"' TERM
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=$tasks "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid"
    ended=$?
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid"
        ended=$?
    done
    ((ended > code)) && code=$ended
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi
"""
NOTE = """#!/bin/bash
# A Python that only notes its words, and that a corpus was made.
printf '%s\\0' "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
"""
REAL = f"""#!/bin/bash
exec {sys.executable} "$@"
"""


def build_place(folder, python):
    """Make a folder as the jobs find it, and return the environment in which they run there."""
    (folder / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for name in SCRIPTS:
        (folder / name).symlink_to(ROOT / name)
    slurm = {"JOB_ID": 7, "JOB_NODELIST": "here", "NTASKS": 2, "NTASKS_PER_NODE": 2, "CPUS_PER_TASK": 1}
    return (
        os.environ
        | ALONE
        | {
            **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
            "SLURM_SUBMIT_DIR": str(folder),
            "SKYPILOT_NUM_GPUS_PER_NODE": "2",
            "DIR": str(folder / "out"),
            "CALLS": str(folder / "calls"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }
    )


def start(job, folder, env):
    words = ["bash", str(SBATCH)] if job == "slurm" else ["bash", "-c", SKY["run"]]
    return subprocess.Popen(
        words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("job", ["slurm", "sky"])
def test_every_flag_of_the_jobs_is_known(tmp_path, job, monkeypatch):
    monkeypatch.chdir(ROOT)
    env = build_place(tmp_path, NOTE)
    env |= {name: text for name, text in SKY["envs"].items() if name != "DIR"} if job == "sky" else {}
    process = start(job, tmp_path, env)
    assert process.wait() == 0, process.stdout.read()
    calls = [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    named = [(next(word for word in call if word in SCRIPTS), call) for call in calls]
    count = 2 if job == "slurm" else 1
    assert [script for script, _ in named] == [SCRIPTS[0], *[SCRIPTS[1]] * count, *[SCRIPTS[2]] * 2]
    for script, call in named:
        words = call[call.index(script) + 1 :]
        if script == "train.py":
            flags, extra = parse_train_args(words)
            assert (flags.grad_accum % 8, flags.grad_accum % 16, extra) == (0, 0, {})
            assert flags.batch_size * flags.grad_accum * flags.seq_len * flags.max_steps == pytest.approx(
                10e9, rel=1e-3
            )
        else:
            parse = prep_text_corpus.parse_flags if script == SCRIPTS[0] else evaluate.parse_args
            parse(words)
    launched = [call for call in calls if "torch.distributed.run" in call]
    assert len(launched) == (job == "sky")


def test_both_jobs_are_the_same_run():
    text = SBATCH.read_text(encoding="utf-8")
    for name in ("TEXT", "TRAIN", "SCORES"):
        ours = text.split(f"{name}=${{{name}:-")[1].split("}")[0]
        assert ours.split() == SKY["envs"][name].split()


def test_sky_yaml_has_the_keys_that_skypilot_knows():
    assert set(SKY) <= TASK_KEYS
    assert set(SKY["resources"]) <= RESOURCE_KEYS
    assert set(SKY["resources"]["job_recovery"]) <= RECOVERY_KEYS
    assert all(set(mount) <= MOUNT_KEYS for mount in SKY["file_mounts"].values())
    assert SKY["resources"]["use_spot"] is True
    assert all(isinstance(value, str) for value in SKY["envs"].values())
    assert any(SKY["envs"]["DIR"].startswith(mount) for mount in SKY["file_mounts"]), (
        "it outlives the machine"
    )


def test_the_job_for_slurm_is_told_in_time_and_queued_again():
    lines = SBATCH.read_text(encoding="utf-8").splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line)
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    assert options["open-mode"] == "append", "the lines of the life before stay"
    assert options["gpus-per-node"] == options["ntasks-per-node"] == "8"
    assert subprocess.run(["bash", "-n", SBATCH], check=False).returncode == 0


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_accelerate_reads_the_configurations(name, kind):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision == "no", "train.py says"
    assert (config.fsdp_config or {}).get("fsdp_version", 2) == 2


def test_what_is_on_paper_was_calculated():
    assert format_paper() in (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path):
    """The environment of a small run: a text in place of FineWeb-Edu, 40 steps."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"tea and {n} birds and the sea" for n in range(400)))
    write_config(tmp_path / "c.json")
    train = (
        "--seq_len 64 --batch_size 2 --grad_accum 4 --max_steps 40 --log_steps 1 --save_steps 20 --device cpu"
    )
    return build_place(tmp_path, REAL) | {
        "TEXT": f"--dataset {tmp_path / 'text.txt'} --split_docs blank_line --tokenizer char",
        "TRAIN": f"--cfg {tmp_path / 'c.json'} {train}",
        "SCORES": "--device cpu",
    }


@pytest.mark.slow
def test_the_job_for_slurm_does_it_all_and_goes_on_when_it_is_stopped(tmp_path, small):
    process = start("slurm", tmp_path, small)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 75, rest
    assert rest.count("stopped by SIGTERM and saved at step") == 1
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
    check_whole("slurm", tmp_path, small)


@pytest.mark.slow
def test_the_job_for_skypilot_does_it_all(tmp_path, small):
    check_whole("sky", tmp_path, small)


def check_whole(job, folder, env):
    process = start(job, folder, env)
    text = process.stdout.read()
    assert process.wait() == 0, text
    assert is_complete(folder / "out" / "base")
    assert (folder / "out" / "base" / "report.html").is_file()
