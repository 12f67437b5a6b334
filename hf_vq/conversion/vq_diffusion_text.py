"""The text encoder inside checkpoints of the original VQ-Diffusion code: CLIP's, as transformers has it."""

import math
import re

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .checkpoints import drop_keys, load_exactly
from .vq_diffusion_network import NETWORKS, with_defaults


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
    if encoder["pick_last_embedding"] and not encoder["keep_seq_len_dim"]:
        raise ValueError(
            "`config` must have keep_seq_len_dim=True with pick_last_embedding=True in condition_emb_config, got "
            "False: the original's cross-attention, too, reads a sequence."
        )
    return {
        "text_max_length": codec["context_length"],
        "text_lower_case": True,
        "text_normalize": encoder["normalize"],
        "text_mask": False,
        "text_pad_token_id": codec["pad_value"],
        "text_pooled": encoder["pick_last_embedding"],
    }


def with_single_states(diffusion: dict, network: dict, text: dict, learned_null: bool = False) -> tuple[dict, dict]:
    """
    The options and the weights of a denoiser that reads each state of a text once.

    Where the original reckons with states of 1024 channels, it gives each one twice, [s, s], and the cross-attention's
    W₁ s + W₂ s is (W₁ + W₂) s. The length that it then divides by is √2 |s|.

    Args:
        diffusion: `params` of the YAML's `diffusion_config`.
        network: the keys under `transformer.`, of the denoiser.
        text: the keys under `condition_emb.`, see `convert_text_encoder`.
        learned_null: see `convert_transformer`.

    Raises:
        ValueError: for a denoiser of other states, or a null text that is not like them.
    """
    options = with_defaults(
        diffusion["condition_emb_config"].get("params") or {}, ENCODER_DEFAULTS, "condition_emb_config"
    )
    width, projected = text["text_projection"].shape
    width = projected if options["pick_last_embedding"] else width
    # 512 channels of the projection make 1024 by the default embed_dim, and 1024 channels do by any other
    is_twice = projected * (2 if options["embed_dim"] == 1024 else 1) == 1024
    section = diffusion["transformer_config"]
    params = {**NETWORKS["Text2ImageTransformer"][1], **section["params"]}
    wanted = width * (1 + is_twice)
    if params["condition_dim"] != wanted:
        raise ValueError(
            f"`config` must have condition_dim={wanted} in transformer_config, as many channels as the text encoder's "
            f"states{' twice' * is_twice}, got {params['condition_dim']}."
        )
    if learned_null and (is_twice or options["pick_last_embedding"]):
        raise ValueError(
            "`config` must have learnable_cf=False with pick_last_embedding=True or states of 1024 channels, got "
            "True: the original's learned null text is 77 states of 512."
        )
    if not is_twice:
        return diffusion, network
    scale = math.sqrt(0.5) if options["normalize"] else 1.0
    folded = {
        key: (value[:, :width] + value[:, width:]) * scale
        for key, value in network.items()
        if re.fullmatch(r"blocks\.\d+\.attn2\.(key|value)\.weight", key) and value.shape[1:] == (2 * width,)
    }
    section = {**section, "params": {**section["params"], "condition_dim": width}}
    return {**diffusion, "transformer_config": section}, {**network, **folded}


def convert_text_encoder(
    state_dict: dict, pooled: bool = False
) -> tuple[CLIPTextModel | CLIPTextModelWithProjection, dict[str, str]]:
    """
    The text tower of CLIP, with its projection if a text is one state (`pooled`); the original's half-precision
    weights become float32.

    Returns:
        the model, and for each key that it does not use, why.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    if "text_projection" not in state_dict:
        raise ValueError("`checkpoint` lacks the key transformer.condition_emb.text_projection.")
    weights, dropped = drop_keys(
        state_dict, {"text_projection": "the projection of a whole text, which per-token states do not need"}
    )
    new = {}
    for key, value in weights.items():
        new |= _renamed(key, value.float())
    if pooled:
        return clip_text_model(new, "quick_gelu", state_dict["text_projection"].float()), {}
    return clip_text_model(new, "quick_gelu"), dropped


def clip_text_model(
    weights: dict, activation: str, projection: torch.Tensor | None = None
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text transformer from its weights under transformers' names, with heads of 64 as all of CLIP's have; and
    with the `projection` `(width, projection_dim)` of a whole text, if that is given.

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
    if projection is not None:
        config.projection_dim = projection.shape[1]
        weights = {f"text_model.{key}": value for key, value in weights.items()}
        weights["text_projection.weight"] = projection.T.contiguous()
    with torch.device("meta"):
        encoder = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    text_model = encoder if projection is None else encoder.text_model
    # the one tensor that no checkpoint of it holds
    text_model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
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
