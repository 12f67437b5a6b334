"""The training scripts from end to end: train, push to the (stand-in for the) Hub, and load as a stranger."""

import pytest


pytestmark = [pytest.mark.hub, pytest.mark.slow]

TRAIN = """
import runpy, sys
from pathlib import Path

root = Path({root!r})
out = Path({out!r})
common = ["--dataset_name_or_path", str(root / "examples/data/emoji-64"), "--max_samples", "64", "--cpu", "true",
          "--max_train_steps", "3", "--train_batch_size", "8", "--validation_steps", "0", "--hub_license", "cc-by-4.0"]

def train(script, config, *arguments):
    sys.argv = [script, str(root / "examples" / config), *common, *arguments]
    runpy.run_path(str(root / "examples" / script), run_name="__main__")

train("vqgan/train_vqgan.py", "vqgan/emoji_32.yaml", "--output_dir", str(out / "vqgan"),
      "--push_to_hub", "true", "--hub_model_id", "tester/emoji-vqgan")
train("vq_gpt/train_vq_gpt.py", "vq_gpt/emoji_32.yaml", "--output_dir", str(out / "gpt"),
      "--tokenizer", "tester/emoji-vqgan", "--push_to_hub", "true", "--hub_model_id", "tester/emoji-gpt")
"""

LOAD = """
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModel

tokenizer = AutoModel.from_pretrained("tester/emoji-vqgan", trust_remote_code=True)
AutoImageProcessor.from_pretrained("tester/emoji-vqgan", trust_remote_code=True)
pipe = DiffusionPipeline.from_pretrained("tester/emoji-gpt", trust_remote_code=True)
images = pipe(class_labels=[0, 1], output_type="pt").images
assert images.shape == (2, 3, 32, 32), images.shape
card = ModelCard.load("tester/emoji-gpt")
assert card.data.license == "cc-by-4.0" and "bits_per_index" in card.text, card.text
assert "psnr" in ModelCard.load("tester/emoji-vqgan").text
print("loaded without hf_vq")
"""


def test_trained_pushed_and_loaded_by_a_stranger(hub, tmp_path, request):
    hub.run(TRAIN.format(root=str(request.config.rootpath), out=str(tmp_path)))
    assert "loaded without hf_vq" in hub.run(LOAD, installed=False)
