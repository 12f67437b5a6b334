"""Folders that the commands are given."""

import pytest
import torch
from PIL import Image

import hf_vq
from tests.pipelines import latent_diffusion_parts, vq_diffusion_parts
from tests.pipelines.autoregressive_parts import make_tiny_prior, make_tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a tokenizer, a prior, a pipeline of both, and two pictures."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    vqgan = make_tiny_tokenizer()
    prior = make_tiny_prior(condition_type="class", num_classes=3, id2label={0: "cat", 1: "dog", 2: "owl"})
    vqgan.save_pretrained(folder / "vqgan")
    prior.save_pretrained(folder / "prior")
    hf_vq.VQAutoregressivePipeline(vqvae=vqgan, prior=prior.eval()).save_pretrained(folder / "pipeline")
    Image.radial_gradient("L").resize((13, 9)).save(folder / "a.png")
    Image.linear_gradient("L").resize((20, 20)).save(folder / "b.png")
    return folder


@pytest.fixture
def model(folder):
    return hf_vq.VQGANModel.from_pretrained(folder / "vqgan")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A folder for each kind of pipeline that samples by diffusion."""
    folder = tmp_path_factory.mktemp("diffusion")
    vq_diffusion_parts.make_pipeline("text").save_pretrained(folder / "codes")
    latent_diffusion_parts.make_pipeline("class").save_pretrained(folder / "latents")
    return folder
