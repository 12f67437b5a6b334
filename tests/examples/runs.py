"""Runs of the real training scripts, in this process and in others."""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState


ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
COMMON = [
    "--dataset_name_or_path", "examples/data/emoji-64", "--max_samples", "96", "--cpu", "true", "--seed", "3",
    "--max_train_steps", str(STEPS), "--train_batch_size", "8", "--logging_steps", "1", "--validation_steps", "10",
    "--checkpointing_steps", "3", "--lr_warmup_steps", "2",
]  # fmt: skip
UNREPEATABLE = ("seconds", "images_per_second")


def rows(output_dir: Path) -> list[dict]:
    file = output_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: v for name, v in row.items() if not name.endswith(UNREPEATABLE)} for row in found]


def start(command: list[str], output_dir: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, "--output_dir", str(output_dir)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def fork(command: list[str], output_dir: Path) -> multiprocessing.Process:
    """The script of a command in a process of its own that has what this one has imported."""
    module = script(Path(command[0]).stem.removeprefix("train_"))

    def run():
        os.chdir(ROOT)
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        module.main([*command[1:], "--output_dir", str(output_dir)])

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finish(command: list[str], output_dir: Path) -> None:
    process = fork(command, output_dir)
    process.join()
    assert process.exitcode == 0


def kill_at(step: int, command: list[str], output_dir: Path) -> None:
    process = fork(command, output_dir)
    while process.is_alive() and max((row["step"] for row in rows(output_dir)), default=0) < step:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run ended before step {step}"


EXAMPLES = ROOT / "examples"


def script(name):
    """The module of a training script."""
    return importlib.import_module(f"hf_vq.training.scripts.train_{name}")


def places_and_length(inputs, steps):
    places = ["--tokenizer", str(inputs / "tokenizer"), "--dataset_name_or_path", str(inputs / "images")]
    return [*places, "--max_train_steps", str(steps), "--train_batch_size", "4", "--resolution", "16", "--cpu", "true"]
