"""The denoiser of the original latent diffusion code (`UNetModel`) as diffusers' UNet2DModel or
UNet2DConditionModel.
"""

import re
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ..models.priors.unet_2d_latent import LatentUNet2DConditionModel, LatentUNet2DModel
from .checkpoints import load_exactly
from .reading import MAX_DEPTH, is_count, is_depth


REQUIRED = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions")
# The other arguments of `UNetModel`, and their defaults.
DEFAULTS = {
    "dropout": 0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "use_checkpoint": False,  # of gradients
    "use_fp16": False,
    "num_heads": -1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "use_spatial_transformer": False,
    "transformer_depth": 1,
    "context_dim": None,
    "n_embed": None,
    "legacy": True,
}
# Those that a diffusers UNet has no equivalent of, unless they have this value, and why.
FIXED_PARAMS = {
    "dims": (2, "its images have two dimensions"),
    "n_embed": (None, "a denoiser that predicts codes is no denoiser of latents"),
    "use_fp16": (False, "the original's own conversion to half precision does nothing"),
}
OUTER_KEYS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "label_emb": "class_embedding",
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


def unet_params(given: dict) -> dict:
    """The arguments of the original's `UNetModel`, defaults included.

    Raises:
        ValueError: for an argument that it does not have, or that diffusers' classes have no equivalent of.
    """
    unknown = sorted(set(given) - set(DEFAULTS) - set(REQUIRED))
    if unknown:
        raise ValueError(f"`config` has names in unet_config that are not known: {unknown}.")
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise ValueError(f"`config` lacks {missing[0]} in unet_config.")
    params = {**DEFAULTS, **given}
    for name, (wanted, why) in FIXED_PARAMS.items():
        if params[name] != wanted:
            raise ValueError(f"`config` must have {name}={wanted} in unet_config, got {params[name]}: {why}.")
    for name in ("in_channels", "model_channels", "out_channels"):
        _check(params, name, is_count(params[name]), "an int of at least 1")
    for name in ("num_res_blocks", "transformer_depth"):
        _check(params, name, is_depth(params[name]), f"an int from 1 to {MAX_DEPTH}")
    for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
        _check(params, name, params[name] == -1 or is_count(params[name]), "-1 or an int of at least 1")
    for name in ("num_classes", "context_dim"):
        _check(params, name, params[name] is None or is_count(params[name]), "an int of at least 1, or none")
    for name in ("channel_mult", "attention_resolutions"):
        values = params[name]
        is_list = isinstance(values, (list, tuple)) and all(map(is_count, values))
        _check(params, name, is_list and (name != "channel_mult" or values), "a list of ints of at least 1")
    dropout = params["dropout"]
    _check(params, "dropout", isinstance(dropout, (int, float)) and 0 <= dropout < 1, "a number in [0, 1)")
    if params["channel_mult"][0] != 1:
        raise ValueError(
            f"`config` must have a channel_mult in unet_config that begins with 1, got "
            f"{params['channel_mult']}: diffusers' "
            "first convolution is as wide as the first level."
        )
    if params["num_heads"] == params["num_head_channels"] == -1:
        raise ValueError("`config` must have num_heads or num_head_channels in unet_config.")
    if (params["context_dim"] is not None) != params["use_spatial_transformer"]:
        raise ValueError(
            "`config` must have context_dim in unet_config if and only if use_spatial_transformer is set."
        )
    return params


def _check(params: dict, name: str, is_right: Any, wanted: str) -> None:
    if not is_right:
        raise ValueError(f"`config` must have {wanted} as {name} in unet_config, got {params[name]!r}.")


def unet_config(given: dict) -> tuple[type, dict]:
    """The class and the configuration of a denoiser with the arguments `given` to the original's `UNetModel`.

    Raises:
        ValueError: as `unet_params`, or for a width that its heads do not divide.
    """
    params = unet_params(given)
    widths = [params["model_channels"] * multiplier for multiplier in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    _check_heads(params, [width for width, attention in zip(widths, attends, strict=True) if attention] + widths[-1:])
    config = {
        "sample_size": params["image_size"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "dropout": params["dropout"],
        "num_class_embeds": params["num_classes"],
        "resnet_time_scale_shift": "scale_shift" if params["use_scale_shift_norm"] else "default",
    }
    plain = "Resnet" if params["resblock_updown"] else ""
    if params["use_spatial_transformer"]:
        kind, cross = UNet2DConditionModel, "CrossAttn"
        config |= {
            "cross_attention_dim": params["context_dim"],
            "transformer_layers_per_block": params["transformer_depth"],
            "attention_head_dim": [_num_heads(params, width) for width in widths],  # diffusers' name for their number
        }
        # blocks that resample by residual blocks have no convolution to leave out
        if params["resblock_updown"] or not params["conv_resample"]:
            kind = LatentUNet2DConditionModel
            config["resample_type"] = "resnet" if params["resblock_updown"] else "pool"
    else:
        cross = "Attn"
        if params["resblock_updown"]:
            config |= {"downsample_type": "resnet", "upsample_type": "resnet"}
        if params["use_scale_shift_norm"]:
            config["attn_norm_num_groups"] = 32  # else the middle block's attention has no norm beside such residuals
        kind, fields = _heads(params, widths, attends)
        config |= fields
    config["down_block_types"] = [_block_type(cross if attention else plain, "Down") for attention in attends]
    config["up_block_types"] = [_block_type(cross if attention else plain, "Up") for attention in reversed(attends)]
    return kind, config


def _block_type(kind: str, way: str) -> str:
    return f"Resnet{way}sampleBlock2D" if kind == "Resnet" else f"{kind}{way}Block2D"


def _num_heads(params: dict, width: int) -> int:
    channels = params["num_head_channels"]
    return params["num_heads"] if channels == -1 else width // channels


def _check_heads(params: dict, widths: list[int]) -> None:
    name = "num_heads" if params["num_head_channels"] == -1 else "num_head_channels"
    wrong = [width for width in widths if width % params[name]]
    if wrong:
        raise ValueError(f"`config` must have {name} divide the width {wrong[0]} in unet_config, got {params[name]}.")


def _heads(params: dict, widths: list[int], attends: list[bool]) -> tuple[type, dict]:
    """
    The class, and how its heads are counted. A UNet2DModel has heads of one width; what else there is, and resampling
    without convolutions, is [`LatentUNet2DModel`]'s.
    """
    by_width = params["num_head_channels"] != -1
    up = params["num_heads_upsample"]
    up = params["num_heads"] if up == -1 or by_width or not params["legacy"] else up
    used = {width for width, attention in zip(widths, attends, strict=True) if attention} | {widths[-1]}
    fields = {"attention_head_dim": params["num_head_channels"]}
    if not by_width:
        head_widths = {width // params["num_heads"] for width in used}
        if len(head_widths) > 1 or up != params["num_heads"]:
            fields = {"num_attention_heads": params["num_heads"], "num_up_attention_heads": up}
        else:
            fields = {"attention_head_dim": head_widths.pop()}
    # blocks that resample by residual blocks have no convolution to leave out
    if not params["conv_resample"] and not params["resblock_updown"]:
        fields["resample_with_conv"] = False
    is_stock = set(fields) == {"attention_head_dim"}
    return UNet2DModel if is_stock else LatentUNet2DModel, fields


def _renamed(key: str, config: dict) -> str:
    """The name in diffusers of a weight of `UNetModel`; an empty string if it has none."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    for old, new in OUTER_KEYS.items():
        if key.startswith(old + "."):
            return new + key[len(old) :]
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", key)
    if found is None:
        return ""
    part, number, rest = found[1], int(found[2]), found[3]
    if part == "middle_block":
        names = {0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}
        return _inside(names[number], rest) if number in names else ""
    module, _, rest = rest.partition(".")
    if part == "input_blocks":
        level, i = divmod(number - 1, layers + 1)
        block = f"down_blocks.{level}"
        if i == layers and rest.startswith(tuple(RESNET_KEYS)):
            crosses = config["down_block_types"][level : level + 1] == ["CrossAttnDownBlock2D"]
            return _inside(f"{block}.{'resnet_' if crosses else ''}downsamplers.0", rest)
        if rest.startswith("op."):
            return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    else:
        level, i = divmod(number, layers + 1)
        block = f"up_blocks.{level}"
        if module != "0" and rest.startswith(tuple(RESNET_KEYS)):
            crosses = config["up_block_types"][level : level + 1] == ["CrossAttnUpBlock2D"]
            return _inside(f"{block}.{'resnet_' if crosses else ''}upsamplers.0", rest)
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


def _split_attention(name: str, weight: torch.Tensor, heads: int) -> dict[str, torch.Tensor]:
    """
    The 1-D convolutions of the original's attention as linear layers. `qkv` holds head after head, and in each its
    queries, keys and values; with 1 for `heads` the queries of all heads come first.
    """
    weight = weight[..., 0] if weight.ndim == 3 else weight
    if ".proj_out." in name:
        return {name.replace(".proj_out.", ".to_out.0."): weight}
    if ".norm." in name:
        return {name.replace(".norm.", ".group_norm."): weight}
    if len(weight) % (3 * heads):
        raise ValueError(
            f"`checkpoint` has {len(weight)} rows for {name}, which must be queries, keys and values of {heads} heads."
        )
    parts = weight.reshape(heads, 3, -1, *weight.shape[1:])
    return {name.replace(".qkv.", f".to_{letter}."): parts[:, i].flatten(0, 1) for i, letter in enumerate("qkv")}


def _heads_of(config: dict, name: str, width: int) -> int:
    """The number of heads of an attention layer with `width` channels."""
    if config.get("num_attention_heads") is None:
        return max(width // config["attention_head_dim"], 1)
    return config["num_up_attention_heads" if name.startswith("up_blocks") else "num_attention_heads"]


def convert_unet(params: dict, state_dict: dict, **changes: Any) -> UNet2DModel | UNet2DConditionModel:
    """
    Args:
        params: `unet_config`'s `params` in the original's YAML.
        state_dict: the weights, without `model.diffusion_model.`.
        changes: `weights`, already under diffusers' names, that replace converted ones or come beside them; every
            other argument goes to the configuration.

    Raises:
        ValueError: as `unet_config`, or for a key that is missing or unknown.
    """
    kind, config = unet_config(params)
    weights = changes.pop("weights", {})
    new = {}
    for key, weight in state_dict.items():
        name = _renamed(key, config)
        if not name:
            raise ValueError(f"`checkpoint` has the unknown key model.diffusion_model.{key}.")
        if not issubclass(kind, UNet2DConditionModel) and ".attentions." in name:
            if not weight.ndim:
                raise ValueError(f"`checkpoint` has the key model.diffusion_model.{key} as a single number.")
            heads = 1 if params.get("use_new_attention_order") else _heads_of(config, name, len(weight) // 3)
            new.update(_split_attention(name, weight, heads))
        else:
            new[name] = weight
    with torch.device("meta"):
        unet = kind(**config | changes)
    load_exactly(unet, new | weights)
    return unet.eval()
