"""The real training scripts, killed with SIGKILL at random steps and started again: the metrics of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
COMMON = [
    "--dataset_name_or_path", "examples/data/emoji-64", "--max_samples", "96", "--cpu", "true", "--seed", "3",
    "--max_train_steps", str(STEPS), "--train_batch_size", "8", "--logging_steps", "1", "--validation_steps", "10",
    "--checkpointing_steps", "3", "--lr_warmup_steps", "2",
]  # fmt: skip
VQGAN = [
    "examples/vqgan/train_vqgan.py", "examples/vqgan/emoji_32.yaml", *COMMON,
    "--disc_start_fraction", "0.2", "--disc_warmup_steps", "4",
]  # fmt: skip
GPT = [
    "examples/vq_gpt/train_vq_gpt.py", "examples/vq_gpt/emoji_32.yaml", *COMMON,
    "--tokenizer", "examples/checkpoints/emoji-32/vqvae", "--pkeep", "0.9", "--gradient_accumulation_steps", "2",
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


def finish(command: list[str], output_dir: Path) -> None:
    process = start(command, output_dir)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors.decode()


def kill_at(step: int, command: list[str], output_dir: Path) -> None:
    process = start(command, output_dir)
    while process.poll() is None and max((row["step"] for row in rows(output_dir)), default=0) < step:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run ended before step {step}"
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("command", [VQGAN, GPT], ids=["vqgan", "vq_gpt"])
def test_three_kills_change_nothing(command, tmp_path):
    finish(command, tmp_path / "unbroken")
    for step in sorted(random.Random(0).sample(range(2, STEPS), 3)):
        kill_at(step, command, tmp_path / "killed")
    finish(command, tmp_path / "killed")
    unbroken, killed = rows(tmp_path / "unbroken"), rows(tmp_path / "killed")
    assert len(unbroken) == STEPS + 2
    assert ("disc_loss" in unbroken[-2]) == (command is VQGAN)
    assert killed == unbroken
