"""Reads repositories of diffusers' deprecated `VQDiffusionPipeline` as the parts of a `VQDiffusionImagePipeline`."""

import json
import re
from pathlib import Path

import torch
import transformers
from diffusers import Transformer2DModel, VQModel
from diffusers.models.model_loading_utils import load_state_dict
from huggingface_hub import snapshot_download

from ..models.autoencoders.configuration_vqgan import VQGANConfig
from ..models.autoencoders.modeling_vqgan import VQGANModel
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
VQMODEL_VALUES = {
    "act_fn": ("silu", "swish"),
    "lookup_from_codebook": (False,),
    "norm_type": ("group",),
}
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # whether it has attention
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}

# In diffusers' names of a `VQModel`'s weights → in `VQGANModel`'s.
WEIGHT_NAMES = (
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def load_parts(source: str | Path, **options) -> dict:
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
    vqvae = VQModel.from_pretrained(folder / "vqvae")
    transformer = convert_transformer(denoiser, null_embedding, text_length=tokenizer.model_max_length)
    return {
        "vqvae": convert_tokenizer(vqvae, denoiser.config.sample_size),
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


def convert_tokenizer(model: VQModel, grid_size: int) -> VQGANModel:
    """
    A `VQGANModel` with the same weights.

    Args:
        model: the original.
        grid_size: side of the codes' grid that it is used with, which says what it was trained at.

    Raises:
        ValueError: `model` has an argument that `VQGANModel` has no equivalent of.
    """
    converted = VQGANModel(_tokenizer_config(model.config, grid_size))
    levels = len(converted.config.channel_multiplier)
    weights = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in WEIGHT_NAMES:
            name = re.sub(pattern, replacement, name)
        # numbered from the lowest resolution there, from the highest here
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)
        is_projection = re.search(r"\.(q|k|v|proj_out)\.weight$", name)
        weights[name] = value[:, :, None, None] if is_projection else value
    converted.load_state_dict(weights)
    return converted.eval()


def _tokenizer_config(config, grid_size: int) -> VQGANConfig:
    _check_values(config, VQMODEL_VALUES, "VQModel")
    widths, groups = config.block_out_channels, config.norm_num_groups
    if any(width % widths[0] for width in widths):
        raise ValueError(f"`vqvae` must have block_out_channels that are multiples of the first, got {widths}.")
    for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        if unknown := sorted(set(config[name]) - set(known)):
            raise ValueError(f"`vqvae` has {name} {unknown}; known: {sorted(known)}.")
    attention = [DOWN_BLOCKS[kind] for kind in config.down_block_types]
    if attention != [UP_BLOCKS[kind] for kind in reversed(config.up_block_types)]:
        raise ValueError(
            "`vqvae` must have attention at the same resolutions in down_block_types and up_block_types, got "
            f"{config.down_block_types} and {config.up_block_types}."
        )
    resolution = grid_size * 2 ** (len(widths) - 1)
    return VQGANConfig(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        base_channels=widths[0],
        channel_multiplier=[width // widths[0] for width in widths],
        num_res_blocks=config.layers_per_block,
        attn_resolutions=[resolution // 2**level for level, has_one in enumerate(attention) if has_one],
        mid_attention=config.mid_block_add_attention,
        latent_channels=config.latent_channels,
        norm_num_groups=groups,
        resolution=resolution,
        embed_dim=config.latent_channels if config.vq_embed_dim is None else config.vq_embed_dim,
        num_embeddings=config.num_vq_embeddings,
        legacy_beta=True,  # fixed in the original's code
    )


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


__all__ = ["convert_scheduler", "convert_tokenizer", "convert_transformer", "load_parts"]
