"""Tiny real parts of latent diffusion pipelines: 4×4 latents of 8×8 pixels."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from hf_vq import VQGANConfig, VQGANModel, VQLatentDiffusionPipeline


D = 4  # channels of a latent; 4×4 latents of 8×8 pixels
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddpm": lambda: DDPMScheduler(clip_sample=False),
    "dpm": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
    "flow_shifted": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


def make_vqvae(**overrides):
    torch.manual_seed(0)
    config = {
        "base_channels": 32,
        "channel_multiplier": (1, 1),
        "num_res_blocks": 1,
        "attn_resolutions": (),
        "resolution": 8,
        "latent_channels": 4,
        "embed_dim": D,
        "num_embeddings": 16,
        "scaling_factor": 2.5,
    }
    return VQGANModel(VQGANConfig(**{**config, **overrides})).eval()


UNET = {
    "sample_size": 4,
    "out_channels": D,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
}


def make_unet(in_channels=D, **overrides):
    torch.manual_seed(1)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(in_channels=in_channels, **{**UNET, **blocks, **overrides}).eval()


def make_text_unet(in_channels=D, **overrides):
    torch.manual_seed(1)
    blocks = {
        "cross_attention_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(in_channels=in_channels, **{**UNET, **blocks, **overrides}).eval()


def make_text_parts(start=False):
    """With `start`, every text begins with a token of its own, so that the empty one has a token too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[pad]", "[unk]", "a", "red", "blue", "cat", "dog"] + ["[start]"] * start
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if start:
        fast.post_processor = processors.TemplateProcessing("[start] $A", special_tokens=[("[start]", 7)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[pad]", unk_token="[unk]", model_max_length=6
    )
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=30.0,
    )
    return CLIPTextModel(config).eval(), tokenizer


NAMES = {0: "cat", 1: "dog"}


def make_pipeline(kind="unconditional", scheduler="ddim", **overrides):
    parts = {"vqvae": make_vqvae(), "scheduler": SCHEDULERS[scheduler]()}
    if kind == "unconditional":
        parts["unet"] = make_unet()
    elif kind == "class":
        parts |= {"unet": make_unet(num_class_embeds=3), "id2label": NAMES, "null_class_id": 2}
    elif kind == "class_token":
        unet = make_text_unet(encoder_hid_dim=3, encoder_hid_dim_type="text_proj")
        parts |= {"unet": unet, "id2label": NAMES, "null_class_id": 2}
    elif kind == "text":
        parts["unet"] = make_text_unet()
        parts["text_encoder"], parts["tokenizer"] = make_text_parts()
    pipeline = VQLatentDiffusionPipeline(**{**parts, **overrides})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CONDITIONS = {
    "unconditional": {"num_images_per_prompt": 2},
    "class": {"class_labels": ["cat", 1], "guidance_scale": 3.0},
    "class_token": {"class_labels": ["cat", 1], "guidance_scale": 3.0},
    "text": {"prompt": ["a red cat", "a blue dog"], "guidance_scale": 3.0},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents_of(pipeline, **arguments):
    return pipeline(**{"num_inference_steps": 3, "output_type": "latent", **arguments}).latents


def image(seed=3, size=8):
    return torch.rand(1, 3, size, size, generator=seeded(seed)) * 2 - 1
