"""Reads repositories of diffusers' deprecated `VQDiffusionPipeline` as the parts of a `VQDiffusionImagePipeline`."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import Transformer2DModel
from diffusers.models.model_loading_utils import load_state_dict
from huggingface_hub import snapshot_download

from ..conversion.diffusers_tokenizer import load_vqmodel, read_vqmodel_config
from ..models.priors.transformer_vq_diffusion import VQDiffusionTransformer2DModel
from ..schedulers.scheduling_mask_replace import MaskReplaceScheduler


NULL_EMBEDDING = "learned_classifier_free_sampling_embeddings"

# Arguments of `Transformer2DModel` and `VQModel` that must have one of these values, those of the published models.
TRANSFORMER_VALUES = {
    "activation_fn": ("geglu-approximate",),  # x σ(1.702 x)
    "attention_type": ("default",),
    "double_self_attention": (False,),
    "norm_elementwise_affine": (True,),
    "norm_eps": (1e-5,),
    "norm_type": ("ada_norm",),
    "only_cross_attention": (False,),
}


def load_parts(source: str | Path, **options: Any) -> dict:
    """
    The arguments of `VQDiffusionImagePipeline` that stand for a repository.

    Args:
        source: a folder, or the id of a repository.
        options: of `snapshot_download`.

    Raises:
        ValueError: it is no repository of a `VQDiffusionPipeline`, or a part has no equivalent.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), **options))
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != "VQDiffusionPipeline":
        raise ValueError(f"`{source}` must hold a VQDiffusionPipeline of diffusers, got a {index.get('_class_name')}.")
    tokenizer = getattr(transformers, index["tokenizer"][1]).from_pretrained(folder / "tokenizer")
    null_embedding = _null_embedding(folder / NULL_EMBEDDING)
    denoiser = _denoiser(folder / "transformer")
    vqvae = load_vqmodel(folder / "vqvae", resolution=_image_size(folder / "vqvae", denoiser.config.sample_size))
    transformer = convert_transformer(denoiser, null_embedding, text_length=tokenizer.model_max_length)
    return {
        "vqvae": vqvae,
        "transformer": transformer,
        "scheduler": convert_scheduler(_read_json(folder / "scheduler" / "scheduler_config.json")),
        "text_encoder": getattr(transformers, index["text_encoder"][1]).from_pretrained(folder / "text_encoder"),
        "tokenizer": tokenizer,
        "text_max_length": tokenizer.model_max_length,
        "text_normalize": True,
        "text_mask": False,
    }


def convert_scheduler(config: dict) -> MaskReplaceScheduler:
    """The chain of a `VQDiffusionScheduler`, whose classes are the codes and the mask."""
    names = {
        "num_train_timesteps": "num_train_timesteps",
        "alpha_cum_start": "alpha_cumprod_start",
        "alpha_cum_end": "alpha_cumprod_end",
        "gamma_cum_start": "gamma_cumprod_start",
        "gamma_cum_end": "gamma_cumprod_end",
    }
    values = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}  # the defaults are the same
    return MaskReplaceScheduler(num_embeddings=config["num_vec_classes"] - 1, **values)


def convert_transformer(
    model: Transformer2DModel, null_embedding: torch.Tensor | None = None, text_length: int = 77
) -> VQDiffusionTransformer2DModel:
    """
    A denoiser for text with the same weights; its logits are the original's log-probabilities up to a constant.

    Args:
        model: over discrete inputs, with `cross_attention_dim`.
        null_embedding (`(S, D)`, *optional*): the learned states of no text.
        text_length: S, where there is none.

    Raises:
        ValueError: `model` has an argument that `VQDiffusionTransformer2DModel` has no equivalent of.
    """
    config = model.config
    _check_values(config, TRANSFORMER_VALUES, "Transformer2DModel")
    for name in ("num_vector_embeds", "num_embeds_ada_norm", "cross_attention_dim"):
        if config[name] is None:
            raise ValueError(f"`transformer` must be a Transformer2DModel with {name}, got None.")
    converted = VQDiffusionTransformer2DModel(
        num_embeddings=config.num_vector_embeds - 1,
        sample_size=config.sample_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        num_train_timesteps=config.num_embeds_ada_norm,
        condition_type="text",
        cross_attention_dim=config.cross_attention_dim,
        learnable_null_embedding=null_embedding is not None,
        text_length=text_length if null_embedding is None else len(null_embedding),
        dropout=config.dropout,
    )
    weights = dict(model.state_dict())
    if not config.attention_bias:
        attention = (name for name in converted.state_dict() if re.search(r"\.to_[qkv]\.bias$", name))
        weights |= {name: torch.zeros_like(converted.state_dict()[name]) for name in attention}
    if null_embedding is not None:
        weights["null_embedding"] = null_embedding
    converted.load_state_dict(weights)
    return converted.eval()


def _image_size(folder: Path, grid_size: int) -> int:
    """Side of the images that the tokenizer was trained on: `grid_size` is that of the codes it is used with."""
    return grid_size * 2 ** (len(read_vqmodel_config(folder)["block_out_channels"]) - 1)


def _denoiser(folder: Path) -> Transformer2DModel:
    config = _read_json(folder / "config.json")
    config.setdefault("norm_type", "ada_norm")  # the published file has none, and diffusers' own loading needs one
    with torch.device("meta"):
        model = Transformer2DModel.from_config(config)
    model.load_state_dict(_weights(folder), assign=True)
    return model


def _null_embedding(folder: Path) -> torch.Tensor | None:
    """The learned states `(S, D)` of no text, float32; None where the empty prompt is used."""
    if not _read_json(folder / "config.json")["learnable"]:
        return None
    return _weights(folder)["embeddings"].float()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise ValueError(f"`{folder}` must hold one of {names}.")
    return load_state_dict(found[0])


def _check_values(config, known: dict[str, tuple], class_name: str):
    for name, values in known.items():
        if name in config and config[name] not in values:
            raise ValueError(f"A {class_name} with {name}={config[name]!r} has no equivalent; known: {values}.")


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"`{path}` does not exist; a repository of a VQDiffusionPipeline has it.")
    return json.loads(path.read_text(encoding="utf-8"))


__all__ = ["convert_scheduler", "convert_transformer", "load_parts"]
