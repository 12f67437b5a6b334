"""The text encoder inside checkpoints of the original VQ-Diffusion code: CLIP's, as transformers has it."""

import re

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from .checkpoints import drop_keys, load_exactly
from .vq_diffusion_network import with_defaults


OUTER_KEYS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
# The weights that its size is read from, under transformers' names.
SIZE_KEYS = (
    "embeddings.token_embedding.weight",
    "embeddings.position_embedding.weight",
    "encoder.layers.0.mlp.fc1.bias",
)
LAYER_KEYS = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
# The original's defaults, and the values that the pipeline has an equivalent of.
ENCODER_DEFAULTS = {
    "clip_name": "ViT-B/32",
    "num_embed": 49408,
    "normalize": True,
    "pick_last_embedding": True,
    "keep_seq_len_dim": False,
    "additional_last_embedding": False,
    "embed_dim": 1024,
}
ENCODER_VALUES = {
    "pick_last_embedding": (False, "one state for a whole text"),
    "additional_last_embedding": (False, "a second output"),
}
CODEC_DEFAULTS = {
    "context_length": 256,
    "add_start_and_end": False,
    "just_token": False,
    "with_mask": True,
    "pad_value": 0,
    "clip_embedding": False,
    "condition_emb_config": None,
    "tokenizer_config": None,
}
CODEC_VALUES = {
    "add_start_and_end": (True, "texts without CLIP's start and end"),
    "clip_embedding": (False, "a text encoder in the codec"),
}


def text_options(condition_codec: dict | None, condition_emb: dict | None) -> dict:
    """
    How the pipeline treats texts.

    Args:
        condition_codec, condition_emb: the YAML's `condition_codec_config` and `condition_emb_config`.

    Raises:
        ValueError: for a treatment that the pipeline has no equivalent of.
    """
    tables = (
        ("condition_codec_config", condition_codec, "Tokenize", CODEC_DEFAULTS, CODEC_VALUES),
        ("condition_emb_config", condition_emb, "CLIPTextEmbedding", ENCODER_DEFAULTS, ENCODER_VALUES),
    )
    found = []
    for section, given, wanted_class, defaults, values in tables:
        target = str((given or {}).get("target", "")).rpartition(".")[2]
        if target != wanted_class:
            raise ValueError(f"`config` must have a {wanted_class} as {section}, got {target or given!r}.")
        params = with_defaults(given.get("params") or {}, defaults, section)
        for name, (wanted, what) in values.items():
            if params[name] != wanted:
                raise ValueError(
                    f"`config` must have {name}={wanted} in {section}, got {params[name]}: {what} has "
                    f"no equivalent here."
                )
        found.append(params)
    codec, encoder = found
    if encoder["embed_dim"] == 1024:
        raise ValueError(
            "`config` must have an embed_dim other than 1024, its default, in condition_emb_config: "
            "1024 stands for each "
            "state twice, which has no equivalent here."
        )
    return {
        "text_max_length": codec["context_length"],
        "text_lower_case": True,
        "text_normalize": encoder["normalize"],
        "text_mask": False,
        "text_pad_token_id": codec["pad_value"],
    }


def convert_text_encoder(state_dict: dict) -> tuple[CLIPTextModel, dict[str, str]]:
    """
    The text tower of CLIP; the original's half-precision weights become float32.

    Returns:
        the model, and for each key that it does not use, why.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    weights, dropped = drop_keys(
        state_dict, {"text_projection": "the projection of a whole text, which per-token states do not need"}
    )
    new = {}
    for key, value in weights.items():
        new |= _renamed(key, value.float())
    return clip_text_model(new, "quick_gelu"), dropped


def clip_text_model(weights: dict, activation: str) -> CLIPTextModel:
    """CLIP's text transformer from its weights under transformers' names, with heads of 64 as all of CLIP's have.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    layers = {key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}
    for key in SIZE_KEYS:
        if key not in weights:
            raise ValueError(f"`checkpoint` lacks the key {key} of a CLIP text encoder.")
    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    if width % 64:
        raise ValueError(
            f"`checkpoint` must have a CLIP text encoder with heads of 64 channels, got the width {width}."
        )
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        max_position_embeddings=len(weights["embeddings.position_embedding.weight"]),
        hidden_act=activation,
        # CLIP's vocabulary ends with the start and the end of a text
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        encoder = CLIPTextModel(config)
    # the one tensor that no checkpoint of it holds
    encoder.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    load_exactly(encoder, weights)
    return encoder.eval()


def _renamed(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if key in OUTER_KEYS:
        return {OUTER_KEYS[key]: value}
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key)
    if layer is not None:
        prefix, name = f"encoder.layers.{layer[1]}.", layer[2]
        joined = re.fullmatch(r"attn\.in_proj_(weight|bias)", name)
        if joined is not None:
            parts = zip("qkv", value.chunk(3), strict=True)
            return {f"{prefix}self_attn.{part}_proj.{joined[1]}": rows for part, rows in parts}
        old = next((old for old in LAYER_KEYS if name.startswith(old)), None)
        if old is not None:
            return {prefix + LAYER_KEYS[old] + name.removeprefix(old): value}
    raise ValueError(f"`checkpoint` has the unknown key transformer.condition_emb.{key}.")
