"""The denoiser of the original latent diffusion code (`UNetModel`) as diffusers' UNet2DModel or UNet2DConditionModel."""

import re

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from .checkpoints import load_exactly


# Arguments of `UNetModel` that do not change what it computes, or are read elsewhere.
KNOWN_PARAMS = {
    "attention_resolutions",
    "channel_mult",
    "context_dim",
    "dropout",
    "image_size",
    "in_channels",
    "legacy",
    "model_channels",
    "num_head_channels",
    "num_heads",
    "num_res_blocks",
    "out_channels",
    "transformer_depth",
    "use_checkpoint",
    "use_spatial_transformer",
}
# Arguments that a diffusers UNet has no equivalent of, unless they have this value.
FIXED_PARAMS = {
    "conv_resample": True,
    "dims": 2,
    "n_embed": None,
    "num_classes": None,
    "num_heads_upsample": -1,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
    "use_scale_shift_norm": False,
}
OUTER_KEYS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET_KEYS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_config(params: dict) -> tuple[type, dict]:
    """The class and the configuration of a denoiser with the arguments `params` of the original's `UNetModel`.

    Raises:
        ValueError: for an argument that diffusers' classes have no equivalent of.
    """
    for name, wanted in FIXED_PARAMS.items():
        if params.get(name, wanted) != wanted:
            raise ValueError(f"`config` must have {name}={wanted} in unet_config, got {params[name]}.")
    unknown = sorted(set(params) - KNOWN_PARAMS - set(FIXED_PARAMS))
    if unknown:
        raise ValueError(f"`config` has names in unet_config that are not known: {unknown}.")
    widths = [params["model_channels"] * multiplier for multiplier in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    config = {
        "sample_size": params["image_size"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "dropout": params.get("dropout", 0),
    }
    if params.get("use_spatial_transformer", False):
        kind, cross = UNet2DConditionModel, "CrossAttn"
        config |= {
            "cross_attention_dim": params["context_dim"],
            "transformer_layers_per_block": params.get("transformer_depth", 1),
            "attention_head_dim": [_num_heads(params, width) for width in widths],  # diffusers' name for their number
        }
    else:
        kind, cross = UNet2DModel, "Attn"
        config["attention_head_dim"] = _head_width(params, widths, attends)
    config["down_block_types"] = [f"{cross if attention else ''}DownBlock2D" for attention in attends]
    config["up_block_types"] = [f"{cross if attention else ''}UpBlock2D" for attention in reversed(attends)]
    return kind, config


def _num_heads(params: dict, width: int) -> int:
    channels = params.get("num_head_channels", -1)
    return params["num_heads"] if channels == -1 else width // channels


def _head_width(params: dict, widths: list[int], attends: list[bool]) -> int:
    """The channels of a head, which a UNet2DModel has one of for all its blocks (the middle one always attends)."""
    found = {
        width // _num_heads(params, width)
        for width, attention in zip(widths, attends, strict=True)
        if attention or width == widths[-1]
    }
    if len(found) > 1:
        raise ValueError(
            f"`config` must have num_head_channels in unet_config: with num_heads={params['num_heads']} the heads have "
            f"{sorted(found)} channels, and those of a UNet2DModel have one width."
        )
    return found.pop()


def _renamed(key: str, layers: int, levels: int) -> str:
    """The name in diffusers of a weight of `UNetModel`; an empty string if it has none."""
    for old, new in OUTER_KEYS.items():
        if key.startswith(old + "."):
            return new + key[len(old) :]
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", key)
    if found is None:
        return ""
    part, number, rest = found[1], int(found[2]), found[3]
    if part == "middle_block":
        return _inside({0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}[number], rest)
    module, _, rest = rest.partition(".")
    if part == "input_blocks":
        level, i = divmod(number - 1, layers + 1)
        block = f"down_blocks.{level}"
        if rest.startswith("op."):
            return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    else:
        level, i = divmod(number, layers + 1)
        block = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return f"{block}.upsamplers.0.{rest}"
    if level >= levels:
        return ""
    return _inside(f"{block}.{'resnets' if module == '0' else 'attentions'}.{i}", rest)


def _inside(block: str, rest: str) -> str:
    for old, new in RESNET_KEYS.items():
        if rest.startswith(old + "."):
            return f"{block}.{new}{rest[len(old) :]}"
    return f"{block}.{rest}"


def _split_attention(name: str, weight: torch.Tensor, head_width: int) -> dict[str, torch.Tensor]:
    """
    The 1-D convolutions of the original's attention as linear layers. `qkv` holds head after head, and in each its
    queries, keys and values.
    """
    weight = weight[..., 0] if weight.ndim == 3 else weight
    if ".proj_out." in name:
        return {name.replace(".proj_out.", ".to_out.0."): weight}
    if ".norm." in name:
        return {name.replace(".norm.", ".group_norm."): weight}
    heads = weight.reshape(-1, 3, head_width, *weight.shape[1:])
    return {name.replace(".qkv.", f".to_{letter}."): heads[:, i].flatten(0, 1) for i, letter in enumerate("qkv")}


def convert_unet(params: dict, state_dict: dict, **changes) -> UNet2DModel | UNet2DConditionModel:
    """
    Args:
        params: `unet_config`'s `params` in the original's YAML.
        state_dict: the weights, without `model.diffusion_model.`.
        changes: `weights`, already under diffusers' names, that replace converted ones or come beside them; every other
            argument goes to the configuration.

    Raises:
        ValueError: as `unet_config`, or for a key that is missing or unknown.
    """
    kind, config = unet_config(params)
    weights = changes.pop("weights", {})
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    new = {}
    for key, weight in state_dict.items():
        name = _renamed(key, layers, levels)
        if not name:
            raise ValueError(f"`checkpoint` has the unknown key model.diffusion_model.{key}.")
        if kind is UNet2DModel and ".attentions." in name:
            new.update(_split_attention(name, weight, config["attention_head_dim"]))
        else:
            new[name] = weight
    with torch.device("meta"):
        unet = kind(**config | changes)
    load_exactly(unet, new | weights)
    return unet.eval()
