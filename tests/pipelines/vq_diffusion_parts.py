"""Tiny real parts of VQ-Diffusion pipelines: 4×4 codes of 8×8 pixels, weights so large that every input matters."""

import torch
from transformers import set_seed

from hf_vq import MaskReplaceScheduler, VQDiffusionImagePipeline, VQDiffusionTransformer2DModel
from tests.pipelines.latent_diffusion_parts import make_text_parts, make_vqvae


CODES, STEPS = 16, 10
MASK = CODES
NAMES = {0: "cat", 1: "dog"}
KINDS = {
    "unconditional": {},
    "class": {"condition_type": "class", "num_classes": 2, "null_class": True, "mlp_type": "conv"},
    "text": {"condition_type": "text", "cross_attention_dim": 8},
    "text_learned": {
        "condition_type": "text",
        "cross_attention_dim": 8,
        "learnable_null_embedding": True,
        "text_length": 6,
    },
}
CONDITIONS = {
    "unconditional": {"num_images_per_prompt": 2},
    "class": {"class_labels": ["cat", 1], "guidance_scale": 3.0},
    "text": {"prompt": ["a red cat", "a blue dog"], "guidance_scale": 3.0},
    "text_learned": {"prompt": ["a red cat", "a blue dog"], "guidance_scale": 3.0},
}


def make_transformer(kind="unconditional", **overrides):
    set_seed(0)
    config = {
        "num_embeddings": CODES,
        "sample_size": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_train_timesteps": STEPS,
    }
    transformer = VQDiffusionTransformer2DModel(**{**config, **KINDS[kind], **overrides}).eval()
    for parameter in transformer.parameters():
        parameter.data.mul_(10)
    return transformer


def make_copying_transformer():
    """It is sure of the codes that it sees, and takes all for equally likely under the mask."""
    transformer = make_transformer(attention_head_dim=CODES)
    for parameter in transformer.parameters():
        parameter.data.zero_()
    transformer.norm_out.weight.data.fill_(1)
    diagonal = torch.eye(CODES)
    transformer.latent_image_embedding.emb.weight.data[:CODES, :CODES] = diagonal
    transformer.out.weight.data[:, :CODES] = 20 * diagonal
    return transformer


def make_pipeline(kind="unconditional", **overrides):
    parts = {
        "vqvae": make_vqvae(),
        "transformer": make_transformer(kind),
        "scheduler": MaskReplaceScheduler(CODES, STEPS),
        "id2label": NAMES if kind == "class" else None,
    }
    if kind.startswith("text"):
        parts["text_encoder"], parts["tokenizer"] = make_text_parts(start=True)
    pipeline = VQDiffusionImagePipeline(**{**parts, **overrides})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(batch_size=1, seed=7):
    return torch.randint(CODES, (batch_size, 4, 4), generator=seeded(seed))


def indices_of(pipeline, **arguments):
    return pipeline(**{"generator": seeded(), "output_type": "indices", **arguments}).indices


def image(batch_size=1, seed=3):
    return torch.rand(batch_size, 3, 8, 8, generator=seeded(seed)) * 2 - 1


def conditions_by_hand(pipeline, kind) -> tuple[dict, dict]:
    """What the transformer takes for the conditions of `CONDITIONS`, and for none."""
    if kind == "unconditional":
        return {}, {}
    if kind == "class":
        return {"class_labels": torch.tensor([0, 1])}, {"class_labels": torch.tensor([2, 2])}
    text = pipeline.tokenizer(["a red cat", "a blue dog", "", ""], padding="max_length", return_tensors="pt")
    states, mask = pipeline.text_encoder(**text).last_hidden_state, text["attention_mask"].bool()
    null = {"encoder_hidden_states": states[2:], "encoder_attention_mask": mask[2:]}
    if kind == "text_learned":
        null = {"encoder_hidden_states": pipeline.transformer.null_embedding.expand(2, -1, -1)}
    return {"encoder_hidden_states": states[:2], "encoder_attention_mask": mask[:2]}, null


def log_probs_by_hand(pipeline, kind, sample, timestep, scale=3.0):
    """Guidance of log-probabilities in float64, each condition in a pass of its own."""
    given, null = conditions_by_hand(pipeline, kind)
    conditional = pipeline.transformer(sample, timestep, **given).sample.double().log_softmax(-1)
    if kind == "unconditional":
        return conditional
    unconditional = pipeline.transformer(sample, timestep, **null).sample.double().log_softmax(-1)
    return (unconditional + scale * (conditional - unconditional)).log_softmax(-1)
