"""A pipeline with a condition tokenizer and its processor carries the code of both."""

import pytest
import torch

import hf_vq
from hf_vq.hub import save_with_code
from tests.pipelines.autoregressive_parts import make_tiny_prior, make_tiny_tokenizer


pytestmark = pytest.mark.hub

LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({source!r}, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
assert "hf_vq" not in sys.modules
assert type(pipeline.condition_processor).__name__ == "VQConditionProcessor"
assert type(pipeline.condition_processor).__module__.startswith("diffusers_modules."), pipeline.condition_processor
labels = torch.arange(3).repeat_interleave(3)[:8].repeat(8, 1).numpy()
indices = pipeline(condition_image=labels, generator=torch.Generator().manual_seed(0), output_type="indices").indices
assert indices.tolist() == {expected!r}
"""


def test_loads_without_hf_vq(hub, tmp_path):
    torch.manual_seed(0)
    pipeline = hf_vq.VQAutoregressivePipeline(
        vqvae=make_tiny_tokenizer(),
        prior=make_tiny_prior(condition_type="codes", condition_vocab_size=16, condition_length=16),
        condition_tokenizer=make_tiny_tokenizer(in_channels=3),
        condition_processor=hf_vq.VQConditionProcessor("segmentation", num_labels=3, size=8),
    )
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(3).repeat_interleave(3)[:8].repeat(8, 1).numpy()
    generator = torch.Generator().manual_seed(0)
    expected = pipeline(condition_image=labels, generator=generator, output_type="indices").indices.tolist()
    folder = str(tmp_path / "pipeline")
    save_with_code(pipeline, folder)
    hub.run(LOAD.format(source=folder, expected=expected), installed=False)
    loaded = hf_vq.VQAutoregressivePipeline.from_pretrained(folder)
    assert isinstance(loaded.condition_processor, hf_vq.VQConditionProcessor)
