"""Tiny real parts of autoregressive pipelines: 4×4 codes of 8×8 pixels."""

import torch

from hf_vq.models.autoencoders.configuration_vqgan import VQGANConfig
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline


KINDS = {
    "unconditional": {"condition_type": "unconditional"},
    "class": {"condition_type": "class", "num_classes": 3, "id2label": {0: "cat", 1: "dog", 2: "owl"}},
    "codes": {"condition_type": "codes", "condition_vocab_size": 7, "condition_length": 4, "n_unmasked": 4},
    "coordinates": {"condition_type": "coordinates", "condition_vocab_size": 40, "condition_length": 16},
}

# the smallest tokenizer and prior that hold all the parts, for what does not look at the pictures
TINY = {
    "base_channels": 8,
    "norm_num_groups": 4,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "latent_channels": 4,
    "embed_dim": 4,
    "num_embeddings": 16,
    "resolution": 8,
}


def make_tiny_tokenizer(**overrides):
    return VQGANModel(VQGANConfig(**{**TINY, **overrides})).eval()


def make_tiny_prior(**overrides):
    config = {"codebook_size": 16, "grid_size": 4, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return VQGPTForCausalLM(VQGPTConfig(**{**config, **overrides})).eval()


def make_pipeline(kind="class", channels=3, **overrides):
    torch.manual_seed(0)
    vqvae = VQGANModel(
        VQGANConfig(
            in_channels=channels,
            out_channels=channels,
            base_channels=32,
            channel_multiplier=(1, 1),
            num_res_blocks=1,
            attn_resolutions=(),
            resolution=8,
            latent_channels=4,
            embed_dim=4,
            num_embeddings=8,
            quantizer="vq",
        )
    )
    config = {"codebook_size": 8, "grid_size": 4, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    prior = VQGPTForCausalLM(VQGPTConfig(**{**config, **KINDS[kind], **overrides}))
    pipeline = VQAutoregressivePipeline(vqvae.eval(), prior.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_small_pipeline():
    """Two codes on a grid of three: few enough to count all images."""
    pipeline = make_pipeline()
    vqvae = VQGANModel(VQGANConfig(**{**pipeline.vqvae.config.to_dict(), "num_embeddings": 2}))
    torch.manual_seed(2)
    prior = VQGPTForCausalLM(
        VQGPTConfig(
            codebook_size=2, grid_size=(1, 3), n_embd=16, n_layer=1, n_head=2, initializer_range=0.7, **KINDS["class"]
        )
    )
    pipeline = VQAutoregressivePipeline(vqvae.eval(), prior.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
