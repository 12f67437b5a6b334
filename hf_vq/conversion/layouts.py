"""Weights of the VQGAN family under the names of other programs, brought to the names of `VQGANModel`.

`VQGANModel` has the names of the original VQGAN, which most of the others have kept or renamed. What a network looks
like follows from its weights (`network_fields`), so that a configuration is needed for what is not in them only.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from ..models.autoencoders.configuration_vqgan import VQGANConfig
from ..models.autoencoders.modeling_vqgan import VQGANModel
from .checkpoints import load_exactly


# In diffusers' names of a `VQModel`'s weights → in `VQGANModel`'s.
DIFFUSERS_NAMES = (
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.up_blocks\.(\d+)\.", r".up.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.spatial_norm\.", ".norm."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    # before diffusers 0.13
    (r"\.query\.", ".q."),
    (r"\.key\.", ".k."),
    (r"\.value\.", ".v."),
    (r"\.proj_attn\.", ".proj_out."),
)
# In the names of LlamaGen, and of Janus's first release → in `VQGANModel`'s.
LLAMAGEN_NAMES = (
    (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"^decoder\.conv_blocks\.(\d+)\.", r"decoder.up.\1."),
    (r"\.res\.(\d+)\.", r".block.\1."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)


def renamed(weights: dict, names: tuple[tuple[str, str], ...]) -> dict:
    """The weights under other names: every pattern of `names` is replaced in turn."""
    new = {}
    for name, value in weights.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        new[name] = value
    return new


def count(weights: dict, pattern: str) -> int:
    """How many numbers the group of `pattern` takes in the names that begin with it."""
    return len({match[1] for match in (re.match(pattern, name) for name in weights) if match})


def reversed_levels(weights: dict) -> dict:
    """The decoder's levels are numbered from the highest resolution here, from the lowest in most other programs."""
    last = count(weights, r"decoder\.up\.(\d+)\.") - 1
    pattern = r"^decoder\.up\.(\d+)\."
    return {re.sub(pattern, lambda m: f"decoder.up.{last - int(m[1])}.", name): v for name, v in weights.items()}


def from_llamagen(weights: dict) -> dict:
    """LlamaGen's names to ours; its history of the codes in use, which only its logs show, must be dropped before."""
    return reversed_levels(renamed(weights, LLAMAGEN_NAMES))


def from_diffusers(weights: dict) -> dict:
    """The weights of diffusers' `VQModel` under our names; its attention has linear layers, ours 1×1 convolutions."""
    new = reversed_levels(renamed(weights, DIFFUSERS_NAMES))
    is_projection = re.compile(r"\.(q|k|v|proj_out)\.weight$")
    return {name: v[:, :, None, None] if is_projection.search(name) and v.ndim == 2 else v for name, v in new.items()}


def to_diffusers(weights: dict) -> dict:
    """Our weights under the names of diffusers' `VQModel`."""
    names = (
        (r"\.down\.(\d+)\.", r".down_blocks.\1."),
        (r"\.up\.(\d+)\.", r".up_blocks.\1."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"(attentions\.\d+)\.norm\.(?=norm_layer|conv_)", r"\1.spatial_norm."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"\.proj_out\.", ".to_out.0."),
    )
    new = {}
    for name, value in renamed(reversed_levels(weights), names).items():
        is_projection = re.search(r"attentions\.\d+\.(to_[qkv]|to_out\.0)\.weight$", name)
        new[name] = value[:, :, 0, 0] if is_projection else value
    return new


def _linear_kernel(array: torch.Tensor) -> torch.Tensor:
    return array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T


# The last part of a name in Flax → (in torch, how the array becomes the tensor).
FLAX_LEAVES: dict[str, tuple[str, Callable]] = {
    "kernel": ("weight", _linear_kernel),  # height, width, in, out
    "scale": ("weight", lambda array: array),
    "bias": ("bias", lambda array: array),
    "embedding": ("weight", lambda array: array),
}


def from_flax(weights: dict) -> dict:
    """Weights of the original VQGAN's port to Flax: `down_0` for `down.0`, kernels as (height, width, in, out)."""
    new = {}
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in FLAX_LEAVES:
            raise ValueError(
                f"`checkpoint` has the key {name}; the last part of a Flax name is one of {[*FLAX_LEAVES]}."
            )
        path = re.sub(r"\b(down|up|block|attn)_(\d+)(?=\.|$)", r"\1.\2", path)
        path = re.sub(r"\bmid\.(block|attn)\.(\d)", r"mid.\1_\2", path)  # these are no lists
        kind, convert = FLAX_LEAVES[leaf]
        new[f"{path}.{kind}"] = convert(value).contiguous()
    return new


def network_fields(weights: dict, resolution: int = 256) -> dict:
    """The fields of `VQGANConfig` that follow from weights under our names, an encoder alone included.

    Args:
        weights: at least the encoder's, with `quant_conv` and `quantize.embedding.weight`.
        resolution: side of the images, which attention is counted by.

    Raises:
        ValueError: for a weight that no VQGAN lacks.
    """

    def shape(name):
        if name not in weights:
            raise ValueError(f"`checkpoint` lacks the key {name} of a VQGAN.")
        return weights[name].shape

    base, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = count(weights, r"encoder\.down\.(\d+)\.")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if not levels or any(width % base for width in widths):
        raise ValueError(
            f"`checkpoint` has the widths {widths}, which must be multiples of the first convolution's {base}."
        )
    fields = {}
    if "decoder.conv_in.weight" in weights:
        decoder = [shape(f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
        if any(width % base for width in decoder):
            raise ValueError(f"`checkpoint` has the decoder's widths {decoder}, which must be multiples of {base}.")
        if decoder != widths:
            fields = {"decoder_channel_multiplier": [width // base for width in decoder]}
    with_attention = [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in weights]
    codes, embed_dim = shape("quantize.embedding.weight")
    return {
        "in_channels": in_channels,
        "out_channels": weights["decoder.conv_out.weight"].shape[0] if "decoder.conv_out.weight" in weights else None,
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "attn_resolutions": [resolution // 2**level for level in with_attention],
        "mid_attention": "encoder.mid.attn_1.q.weight" in weights,
        "latent_channels": shape("encoder.conv_out.weight")[0],
        "embed_dim": embed_dim,
        "num_embeddings": codes,
        "resolution": resolution,
        **fields,
    }


def build(weights: dict, resolution: int = 256, **fields: Any) -> VQGANModel:
    """A `VQGANModel` with weights under our names; `fields` of its configuration come before those of the weights.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    inferred = {} if "embed_dim" in fields else network_fields(weights, resolution)
    config = VQGANConfig(**{"resolution": resolution, **inferred, **fields})
    with torch.device("meta"):
        model = VQGANModel(config)
    load_exactly(model, weights)
    return model.eval()


__all__ = [
    "build",
    "from_diffusers",
    "from_flax",
    "from_llamagen",
    "network_fields",
    "renamed",
    "reversed_levels",
    "to_diffusers",
]
