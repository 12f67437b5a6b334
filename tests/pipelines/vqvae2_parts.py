"""Tiny real parts of hierarchical pipelines: two or three grids of codes."""

import torch

from hf_vq.models.autoencoders.configuration_vqvae2 import VQVAE2Config
from hf_vq.models.autoencoders.modeling_vqvae2 import VQVAE2Model
from hf_vq.models.priors.configuration_pixelsnail import PixelSNAILConfig
from hf_vq.models.priors.modeling_pixelsnail import PixelSNAILForCausalLM
from hf_vq.pipelines.pipeline_vqvae2 import VQVAE2Pipeline


CLASSES = {"condition_type": "class", "num_classes": 3, "id2label": {0: "cat", 1: "dog", 2: "owl"}}
NAMES = {2: ("top_prior", "bottom_prior"), 3: ("top_prior", "middle_prior", "bottom_prior")}


def make_prior(grid, above=None, num_codes=8, seed=0, condition=CLASSES, num_upper_codes=None):
    torch.manual_seed(seed)
    upper = {"conditioning_grid_size": above, "conditioning_codebook_size": num_upper_codes or num_codes}
    conditioning = upper if above else {}
    config = PixelSNAILConfig(
        codebook_size=num_codes,
        grid_size=grid,
        hidden_size=16,
        kernel_size=3,
        num_blocks=1,
        num_res_blocks=1,
        res_channels=8,
        num_attention_heads=2,
        conditioning_channels=8,
        dropout=0.0,
        **condition,
        **conditioning,
    )
    prior = PixelSNAILForCausalLM(config).eval()
    with torch.no_grad():  # far from uniform, and each code depends on the others
        for name, parameter in prior.named_parameters():
            if name.endswith("original0"):
                parameter.mul_(2.5)
    return prior


def make_vqvae(levels=2, num_codes=8, channels=3, **options):
    torch.manual_seed(0)
    return VQVAE2Model(
        VQVAE2Config(
            num_levels=levels,
            downsample_factor=2**levels,
            in_channels=channels,
            hidden_size=8,
            residual_hidden_size=4,
            num_residual_layers=1,
            embed_dim=4,
            num_embeddings=num_codes,
            resolution=8,
            **options,
        )
    ).eval()


def make_pipeline(levels=2, num_codes=8, top=2, condition=CLASSES, channels=3):
    """Top, middle and bottom grids of `top`, 2·`top`, 4·`top` codes along each side, of 4, 8 or 16 pixels · `top`."""
    sides = [top * 2**level for level in range(levels)]
    priors = [
        make_prior(side, above, num_codes, seed=side, condition=condition)
        for side, above in zip(sides, [None, *sides[:-1]], strict=True)
    ]
    vqvae = make_vqvae(levels, num_codes, channels)
    pipeline = VQVAE2Pipeline(vqvae, **dict(zip(NAMES[levels], priors, strict=True)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
