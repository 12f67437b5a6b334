"""diffusers' `VQModel` as `VQGANModel`, and back."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from ..loading import find_file
from ..models.autoencoders.configuration_vqgan import VQGANConfig
from ..models.autoencoders.modeling_vqgan import VQGANModel
from .checkpoints import load_exactly
from .layouts import from_diffusers, to_diffusers
from .reading import load_state_dict


WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # whether it has attention
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def read_vqmodel_config(source: str | Path, subfolder: str | None = None, **options: Any) -> dict:
    """The configuration of a `VQModel`, with diffusers' defaults.

    Raises:
        ValueError: if there is none, or it is of another class.
    """
    from diffusers import VQModel

    path = find_file(source, "config.json", subfolder, **options)
    where = f"`{source}`" + (f", subfolder {subfolder!r}," if subfolder else "")
    if path is None:
        raise ValueError(f"{where} has no config.json.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("_class_name") != "VQModel":
        found = config.get("_class_name") or config.get("model_type")
        raise ValueError(
            f"{where} must hold a VQModel of diffusers, got {found!r}; `subfolder` names the part of a pipeline."
        )
    signature = inspect.signature(VQModel.__init__).parameters
    defaults = {
        name: parameter.default for name, parameter in signature.items() if name not in ("self", "args", "kwargs")
    }
    unknown = sorted(name for name in config if name not in defaults and not name.startswith("_"))
    if unknown:
        raise ValueError(f"{where} has options that this diffusers' VQModel does not know: {unknown}.")
    return {**defaults, **{name: value for name, value in config.items() if name in defaults}}


def load_vqmodel(
    source: str | Path,
    subfolder: str | None = None,
    resolution: int | None = None,
    scaling_factor: float = 1.0,
    **options: Any,
) -> VQGANModel:
    """A `VQModel` of a folder or repository; see `VQGANModel.from_diffusers`."""
    config = read_vqmodel_config(source, subfolder, **options)
    paths = (find_file(source, name, subfolder, **options) for name in WEIGHT_FILES)
    path = next((path for path in paths if path is not None), None)
    if path is None:
        raise ValueError(f"`{source}` must have one of {WEIGHT_FILES} beside its config.json.")
    return convert_vqmodel(config, load_state_dict(path, "source"), resolution, scaling_factor)


def convert_vqmodel(
    config: dict, state_dict: dict, resolution: int | None = None, scaling_factor: float = 1.0
) -> VQGANModel:
    """A `VQGANModel` of a `VQModel`'s configuration and weights.

    Args:
        config: every option of `VQModel`.
        state_dict: its weights.
        resolution: side of the images it was trained on, in pixels; `sample_size` by default.
        scaling_factor: what latents are multiplied by for diffusion.

    Raises:
        ValueError: an option that `VQGANModel` has no equivalent of, or weights that are not exactly the model's.
    """
    with torch.device("meta"):
        model = VQGANModel(vqgan_config(config, resolution, scaling_factor))
    load_exactly(model, {name: value.float() for name, value in from_diffusers(state_dict).items()})
    return model.eval()


def vqgan_config(config: dict, resolution: int | None = None, scaling_factor: float = 1.0) -> VQGANConfig:
    """The configuration of `convert_vqmodel`."""
    for name, known in {"act_fn": ("silu", "swish"), "norm_type": ("group", "spatial")}.items():
        if config[name] not in known:
            raise ValueError(f"A VQModel with {name}={config[name]!r} has no equivalent; known: {known}.")
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    if config["norm_type"] == "spatial" and groups != 32:
        raise ValueError(f"A VQModel with norm_type='spatial' must have norm_num_groups=32, got {groups}.")
    if config["norm_type"] == "spatial" and config["vq_embed_dim"] not in (None, config["latent_channels"]):
        raise ValueError(
            "A VQModel with norm_type='spatial' must have vq_embed_dim = latent_channels, got "
            f"{config['vq_embed_dim']} and {config['latent_channels']}."
        )
    if any(width % widths[0] for width in widths):
        raise ValueError(f"`vqvae` must have block_out_channels that are multiples of the first, got {widths}.")
    for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        if unknown := sorted(set(config[name]) - set(known)):
            raise ValueError(f"`vqvae` has {name} {unknown}; known: {sorted(known)}.")
    attention = [DOWN_BLOCKS[kind] for kind in config["down_block_types"]]
    if attention != [UP_BLOCKS[kind] for kind in reversed(config["up_block_types"])]:
        raise ValueError(
            "`vqvae` must have attention at the same resolutions in down_block_types and up_block_types, got "
            f"{config['down_block_types']} and {config['up_block_types']}."
        )
    factor = 2 ** (len(widths) - 1)
    if resolution is None:
        size = config["sample_size"]
        resolution = size if isinstance(size, int) and size > factor and size % factor == 0 else 32 * factor
    return VQGANConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        base_channels=widths[0],
        channel_multiplier=[width // widths[0] for width in widths],
        num_res_blocks=config["layers_per_block"],
        attn_resolutions=[resolution // 2**level for level, has_one in enumerate(attention) if has_one],
        mid_attention=config["mid_block_add_attention"],
        latent_channels=config["latent_channels"],
        decoder_norm=config["norm_type"],
        norm_num_groups=groups,
        resolution=resolution,
        embed_dim=config["latent_channels"] if config["vq_embed_dim"] is None else config["vq_embed_dim"],
        num_embeddings=config["num_vq_embeddings"],
        legacy_beta=True,  # fixed in the original's code
        scaling_factor=scaling_factor,
    )


# Fields of `VQGANConfig` that `VQModel` has one value of.
SAVED_VALUES = {
    "quantizer": ("vq", "ema"),
    "attention_type": ("vanilla",),
    "resamp_with_conv": (True,),
    "spatial_norm_conv": (False,),
    "tanh_out": (False,),
    "give_pre_end": (False,),
    "remapped_from": (None,),
}


def save_vqmodel(model: VQGANModel, folder: str | Path) -> None:
    """Writes a tokenizer as a `VQModel`; see `VQGANModel.to_diffusers`."""
    from diffusers import VQModel

    with torch.device("meta"):
        converted = VQModel(**vqmodel_config(model.config))
    weights = dict(model.state_dict())
    if model.config.quantizer == "ema":
        weights = {name: value for name, value in weights.items() if not name.startswith("quantize.")}
        weights["quantize.embedding.weight"] = model.quantize.codebook
    load_exactly(converted, to_diffusers(weights))
    converted.save_pretrained(folder)


def vqmodel_config(config: VQGANConfig) -> dict:
    """The options of `VQModel` for a `VQGANConfig`.

    Raises:
        ValueError: a field that `VQModel` has no equivalent of.
    """
    for name, known in SAVED_VALUES.items():
        value = getattr(config, name, known[0])
        if value not in known:
            raise ValueError(f"A VQGANModel with {name}={value!r} has no equivalent in diffusers; known: {known}.")
    for name in ("channel_multiplier", "num_res_blocks", "attn_resolutions", "latent_channels"):
        if config.of_decoder(name) != getattr(config, name):
            raise ValueError(f"A VQGANModel whose `decoder_{name}` differs has no equivalent in diffusers.")
    if config.decoder_norm == "spatial" and config.norm_num_groups != 32:
        raise ValueError(f"Spatial norms of diffusers have 32 groups, got norm_num_groups={config.norm_num_groups}.")
    if config.decoder_norm == "spatial" and config.embed_dim != config.latent_channels:
        raise ValueError(
            "Spatial norms of diffusers need embed_dim = latent_channels, got "
            f"{config.embed_dim} and {config.latent_channels}."
        )
    side = min(config.image_size)
    attention = [side // 2**level in config.attn_resolutions for level in range(len(config.channel_multiplier))]
    down, up = {v: k for k, v in DOWN_BLOCKS.items()}, {v: k for k, v in UP_BLOCKS.items()}
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [down[has_one] for has_one in attention],
        "up_block_types": [up[has_one] for has_one in reversed(attention)],
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "sample_size": side,
        "num_vq_embeddings": config.num_embeddings,
        "norm_num_groups": config.norm_num_groups,
        "vq_embed_dim": config.embed_dim,
        "scaling_factor": config.scaling_factor,
        "norm_type": config.decoder_norm,
        "mid_block_add_attention": config.mid_attention,
    }


__all__ = ["convert_vqmodel", "find_file", "load_vqmodel", "read_vqmodel_config", "save_vqmodel", "vqgan_config"]
