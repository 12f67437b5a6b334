"""The real training scripts, killed with SIGKILL at random steps and started again: the metrics of an unbroken run."""

import random

import pytest

from tests.examples.runs import COMMON, STEPS, finish, kill_at, rows


VQGAN = [
    "examples/vqgan/train_vqgan.py", "examples/vqgan/emoji_32.yaml", *COMMON,
    "--disc_start_fraction", "0.2", "--disc_warmup_steps", "4",
]  # fmt: skip
GPT = [
    "examples/vq_gpt/train_vq_gpt.py", "examples/vq_gpt/emoji_32.yaml", *COMMON,
    "--tokenizer", "examples/checkpoints/emoji-32-segmentation/vqvae", "--pkeep", "0.9",
    "--gradient_accumulation_steps", "2",
]  # fmt: skip


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
