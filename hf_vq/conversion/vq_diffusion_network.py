"""The denoiser and the noise schedule of the original VQ-Diffusion code."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from ..models.priors.transformer_vq_diffusion import VQDiffusionTransformer2DModel
from ..schedulers.scheduling_mask_replace import MaskReplaceScheduler
from .checkpoints import drop_keys, load_exactly
from .reading import MAX_DEPTH, is_count, is_depth


# The original's classes of denoisers: the condition, the one attn_type that each takes, and its own defaults.
NETWORKS = {
    "UnCondition2ImageTransformer": (
        "unconditional",
        {
            "attn_type": "self",
            "class_type": "adalayernorm",
            "n_layer": 24,
            "n_embd": 512,
            "content_seq_len": 256,
            "content_spatial_size": (16, 16),
            "mlp_type": "conv_mlp",
        },
    ),
    "Condition2ImageTransformer": (
        "class",
        {
            "attn_type": "selfcondition",
            "class_type": "adalayernorm",
            "class_number": 1000,
            "n_layer": 24,
            "n_embd": 1024,
            "content_seq_len": 1024,
            "content_spatial_size": (32, 32),
            "mlp_type": "conv_mlp",
        },
    ),
    "Text2ImageTransformer": (
        "text",
        {
            "attn_type": "selfcross",
            "condition_seq_len": 77,
            "condition_dim": 512,
            "n_layer": 14,
            "n_embd": 1024,
            "content_seq_len": 1024,
            "content_spatial_size": (32, 32),
            "mlp_type": "fc",
            "checkpoint": False,  # of gradients
        },
    ),
}
# Defaults that the three share. The trainer sets diffusion_step and content_emb_config to those of `diffusion_config`.
NETWORK_DEFAULTS = {
    "n_head": 16,
    "attn_pdrop": 0,
    "resid_pdrop": 0,
    "mlp_hidden_times": 4,
    "block_activate": None,
    "timestep_type": "adalayernorm",
    "diffusion_step": None,
    "content_emb_config": None,
}
CONTENT_DEFAULTS = {
    "num_embed": 8192,
    "spatial_size": (32, 32),
    "embed_dim": 3968,
    "trainable": True,
    "pos_emb_type": "embedding",
}
DIFFUSION_DEFAULTS = {
    "content_emb_config": None,
    "condition_emb_config": None,
    "transformer_config": None,
    "diffusion_step": 100,
    "alpha_init_type": "cos",
    "auxiliary_loss_weight": 0,
    "adaptive_auxiliary_loss": False,
    "mask_weight": (1, 1),
    "learnable_cf": False,
}
ACTIVATIONS = {"GELU": "gelu", "GELU2": "quick_gelu"}
# Name in the original → name in `VQDiffusionTransformer2DModel`, outside of the blocks and in a block.
OUTER_KEYS = {
    "content_emb": "latent_image_embedding",
    "to_logits.0": "norm_out",
    "to_logits.1": "out",
}
BLOCK_KEYS = {
    "ln1": "norm1",
    "ln1_1": "norm2",
    "ln2": "norm3",
    "attn.query": "attn1.to_q",
    "attn.key": "attn1.to_k",
    "attn.value": "attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "attn1.query": "attn1.to_q",
    "attn1.key": "attn1.to_k",
    "attn1.value": "attn1.to_v",
    "attn1.proj": "attn1.to_out.0",
    "attn2.query": "attn2.to_q",
    "attn2.key": "attn2.to_k",
    "attn2.value": "attn2.to_v",
    "attn2.proj": "attn2.to_out.0",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
    "mlp.conv1": "ff.conv_in",
    "mlp.conv2": "ff.conv_out",
}
POSITION_KEYS = ("content_emb.height_emb", "content_emb.width_emb")
SCHEDULE_KEYS = ("log_at", "log_bt", "log_ct", "log_1_min_ct")
SCHEDULE_KEYS += ("log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct", "log_1_min_cumprod_ct")
# Tables beside the network, and why none becomes a weight.
TABLE_REASONS = {
    **dict.fromkeys(SCHEDULE_KEYS, "the noise schedule, which is computed"),
    **dict.fromkeys(("Lt_history", "Lt_count"), "statistics of the losses, for the choice of timesteps in training"),
}
NULL_CLASS = 1000  # the original's, whatever the data set


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_right, value))


# What an option must be: the check, how an error says it, and the options.
KINDS: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (
        is_count,
        "an int of at least 1",
        (
            *("n_embd", "n_head", "content_seq_len", "condition_seq_len", "condition_dim", "class_number"),
            *("num_embed", "embed_dim", "diffusion_step", "num_tokens", "context_length"),
        ),
    ),
    (is_depth, f"an int from 1 to {MAX_DEPTH}", ("n_layer",)),
    (lambda value: is_count(value, 0), "an int of at least 0", ("quantize_number", "pad_value")),
    (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)", ("attn_pdrop", "resid_pdrop")),
    (
        lambda value: _is_number(value) and value >= 0,
        "a number of at least 0",
        ("auxiliary_loss_weight", "guidance_scale"),
    ),
    (lambda value: _is_number(value) and value > 0, "a number above 0", ("mlp_hidden_times",)),
    (lambda value: _is_pair(value, _is_number), "two numbers", ("mask_weight",)),
    (
        lambda value: is_count(value) or _is_pair(value, is_count),
        "an int or two, of at least 1",
        ("spatial_size",),
    ),
    (
        lambda value: is_count(value) or value is None or _is_pair(value, is_count),
        "an int or two, of at least 1, or none",
        ("content_spatial_size",),
    ),
    (lambda value: _is_pair(value, is_count), "two ints of at least 1", ("token_shape",)),
    (
        lambda value: isinstance(value, bool),
        "true or false",
        (
            *("adaptive_auxiliary_loss", "learnable_cf", "checkpoint", "trainable", "identity", "normalize"),
            *("pick_last_embedding", "keep_seq_len_dim", "additional_last_embedding", "add_start_and_end"),
            *("just_token", "with_mask", "clip_embedding"),
        ),
    ),
    (
        lambda value: isinstance(value, str),
        "a name",
        ("attn_type", "class_type", "timestep_type", "mlp_type", "pos_emb_type", "alpha_init_type"),
    ),
    (
        lambda value: value is None or isinstance(value, dict),
        "a section",
        (
            *("content_emb_config", "condition_emb_config", "transformer_config", "condition_codec_config"),
            *("content_codec_config", "diffusion_config"),
        ),
    ),
)


def with_defaults(given: dict, defaults: dict, section: str) -> dict:
    """`given` over `defaults`.

    Raises:
        ValueError: for a name that has no default, which the original does not know; for a value that is not of the
            option's kind.
    """
    if not isinstance(given, dict):
        raise ValueError(f"`config` must have names and values as the params of {section}, got {given!r}.")
    unknown = sorted(set(map(str, given)) - set(defaults))
    if unknown:
        raise ValueError(f"`config` has names in {section} that are not known: {unknown}.")
    for is_right, wanted, names in KINDS:
        for name in names:
            if name in given and not is_right(given[name]):
                raise ValueError(f"`config` must have {wanted} as {name} in {section}, got {given[name]!r}.")
    return {**defaults, **given}


def transformer_config(diffusion: dict) -> dict:
    """
    The configuration of a denoiser, but for its class and null embeddings, which the weights tell.

    Args:
        diffusion: `params` of the YAML's `diffusion_config`, defaults included.

    Raises:
        ValueError: for an argument that the original does not take, or `VQDiffusionTransformer2DModel` has no
            equivalent of, and for arguments that contradict each other.
    """
    condition_type, params = _network_params(diffusion)
    content = with_defaults(
        _section(diffusion["content_emb_config"], "content_emb_config"), CONTENT_DEFAULTS, "content_emb_config"
    )
    if content["pos_emb_type"] not in ("embedding", "parameter"):
        raise ValueError(f"`config` must have pos_emb_type=embedding or parameter, got {content['pos_emb_type']!r}.")
    if content["embed_dim"] != params["n_embd"]:
        raise ValueError(
            f"`config` must have one width, got n_embd={params['n_embd']} in transformer_config and "
            f"embed_dim={content['embed_dim']} in content_emb_config."
        )
    if params["n_embd"] % params["n_head"]:
        raise ValueError(f"`config` must have n_embd a multiple of n_head={params['n_head']}, got {params['n_embd']}.")
    if params["block_activate"] not in [*ACTIVATIONS]:
        raise ValueError(f"`config` must have block_activate=GELU or GELU2, got {params['block_activate']!r}.")
    if "adalayernorm" not in params["timestep_type"]:
        raise ValueError(
            f"`config` must have timestep_type=adalayernorm or adalayernorm_abs, got {params['timestep_type']!r}: the "
            "original has no other."
        )
    return {
        "num_embeddings": content["num_embed"],
        "sample_size": _grid(params, content),
        "position_embedding_size": _pair(content["spatial_size"]),
        "num_layers": params["n_layer"],
        "num_attention_heads": params["n_head"],
        "attention_head_dim": params["n_embd"] // params["n_head"],
        "num_train_timesteps": diffusion["diffusion_step"],
        "condition_type": condition_type,
        "cross_attention_dim": params["condition_dim"] if condition_type == "text" else None,
        "mlp_type": "conv" if params["mlp_type"] == "conv_mlp" else "fc",
        "mlp_ratio": params["mlp_hidden_times"],
        "dropout": params["resid_pdrop"],
        "attention_dropout": params["attn_pdrop"],
        "activation": ACTIVATIONS[params["block_activate"]],
        "timestep_embedding": "sinusoidal" if "abs" in params["timestep_type"] else "learned",
    }


def _section(config: dict | None, name: str) -> dict:
    """`params` of a section."""
    if config is None:
        raise ValueError(f"`config` lacks the section {name}.")
    return config.get("params") or {}


def _network_params(diffusion: dict) -> tuple[str, dict]:
    """The kind of condition, and the arguments of the denoiser with the defaults of its class."""
    section = diffusion["transformer_config"]
    given = _section(section, "transformer_config")
    target = str(section.get("target", "")).rpartition(".")[2]
    if target not in NETWORKS:
        raise ValueError(f"`config` has the denoiser {target!r} in transformer_config; known: {sorted(NETWORKS)}.")
    condition_type, defaults = NETWORKS[target]
    params = with_defaults(given, {**NETWORK_DEFAULTS, **defaults}, "transformer_config")
    if params["attn_type"] != defaults["attn_type"]:
        raise ValueError(
            f"`config` must have attn_type={defaults['attn_type']} for {target}, got {params['attn_type']!r}."
        )
    if "content_seq_len" not in given:
        raise ValueError("`config` must have content_seq_len in transformer_config.")
    if "content_spatial_size" not in given:
        params["content_spatial_size"] = None  # the class's own default says nothing of this model
    return condition_type, params


def _grid(params: dict, content: dict) -> tuple[int, int]:
    """
    The codes' grid: of content_spatial_size, of the embedding's spatial_size, and of as many rows as the original's
    convolutions give it, the first with all the codes. The original reads none of the sizes: an old one does not hurt.
    """
    length = params["content_seq_len"]
    rows = math.isqrt(length)
    by_number = (rows, length // rows)
    sizes = [_pair(size) for size in (params["content_spatial_size"], content["spatial_size"]) if size is not None]
    size = next((size for size in (*sizes, by_number) if math.prod(size) == length), None)
    if size is None:
        raise ValueError(
            f"`config` must have as many positions in content_spatial_size or spatial_size as "
            f"content_seq_len={length}, got {' and '.join(map(str, sizes))}."
        )
    if params["mlp_type"] == "conv_mlp" and size != by_number:
        raise ValueError(
            f"`config` must have a grid of {rows} rows with mlp_type=conv_mlp, as the convolutions have for "
            f"content_seq_len={length}, got {size}."
        )
    return size


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def convert_transformer(
    diffusion: dict, state_dict: dict, learned_null: bool = False
) -> tuple[VQDiffusionTransformer2DModel, dict[str, str]]:
    """
    A denoiser.

    Args:
        diffusion: `params` of the YAML's `diffusion_config`.
        state_dict: the keys under `transformer.`, and the embedding `empty_text_embed` if there is one.
        learned_null: is that embedding what guidance leads away from (learnable_cf)?

    Returns:
        the model, and for each key that it does not use, why.

    Raises:
        ValueError: as `transformer_config`, or if the weights are not exactly those of the model.
    """
    config = transformer_config(diffusion)
    null_embedding = state_dict.get("empty_text_embed")
    weights = {key: value for key, value in state_dict.items() if key != "empty_text_embed"}
    masks = [key for key in weights if re.fullmatch(r"blocks\.\d+\.attn2\.mask", key)]
    weights, dropped = drop_keys(weights, dict.fromkeys(masks, "a causal mask that cross-attention does not read"))
    _check_masks(masks, config)
    # pos_emb_type "parameter" holds the same tables without a module, and with a dimension of 1 before them
    weights = {
        f"{key}.weight" if key in POSITION_KEYS else key: value[0] if key in POSITION_KEYS else value
        for key, value in weights.items()
    }
    new = {_new_name(key): value for key, value in weights.items()}
    if config["condition_type"] == "class":
        config |= _class_fields(_network_params(diffusion)[1], new)
    if learned_null and null_embedding is None:
        raise ValueError("`checkpoint` lacks empty_text_embed, which `config` says was learned (learnable_cf).")
    if learned_null:
        config |= {"learnable_null_embedding": True, "text_length": len(null_embedding)}
        new["null_embedding"] = null_embedding.float()
    elif null_embedding is not None:
        dropped["empty_text_embed"] = "what a text model learns for no text, which this one does not use"
    with torch.device("meta"):
        transformer = VQDiffusionTransformer2DModel(**config)
    load_exactly(transformer, new)
    return transformer.eval(), dropped


def _check_masks(masks: list[str], config: dict) -> None:
    expected = {f"blocks.{i}.attn2.mask" for i in range(config["num_layers"])}
    missing = sorted(expected - set(masks)) if config["condition_type"] == "text" else []
    if missing:
        raise ValueError(f"`checkpoint` lacks transformer.transformer.{missing[0]}.")


def _new_name(key: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    rest, table, prefix = key, OUTER_KEYS, ""
    if block is not None:
        rest, table, prefix = block[2], BLOCK_KEYS, f"transformer_blocks.{block[1]}."
    old = next((old for old in table if rest.startswith(f"{old}.")), None)
    if old is None:
        raise ValueError(f"`checkpoint` has the unknown key transformer.transformer.{key}.")
    return f"{prefix}{table[old]}{rest.removeprefix(old)}"


def _class_fields(params: dict, weights: dict) -> dict:
    """
    The configuration of the classes, and into `weights` the null class's row.

    The null class has the number 1000. A table that is too short for it is read by its mean (adalayernorm); in a
    longer one it is a row as any other, and comes here after the last once more. Sinusoids have a place for every
    number, but adalayernorm_abs looks for a table first and fails.
    """
    number, kind = params["class_number"], params["class_type"]
    instance, sinusoidal = "adalayernorm" not in kind, "abs" in kind
    names = [f"transformer_blocks.{i}.norm3.emb.weight" for i in range(params["n_layer"])]
    fields = {"num_classes": number, "class_norm": "instance" if instance else "layer"}
    if sinusoidal:
        fields |= {"class_embedding": "sinusoidal", "null_class": instance or number > NULL_CLASS}
        if fields["null_class"]:
            fields["null_class_position"] = float(NULL_CLASS)
        return fields
    for name in names:
        if name not in weights:
            raise ValueError(f"`checkpoint` lacks {_old_name(name)}, the classes.")
        if len(weights[name]) != number:
            raise ValueError(
                f"`checkpoint` has {len(weights[name])} classes in {_old_name(name)}, but `config` says "
                f"class_number={number}."
            )
    if number == NULL_CLASS + 1:  # trained with it as the last class
        return {**fields, "num_classes": NULL_CLASS, "null_class": True}
    if instance and number <= NULL_CLASS:
        return fields  # the original has no row for the null class, and no mean
    for name in names:
        table = weights[name]
        null = table[NULL_CLASS][None] if number > NULL_CLASS else table.mean(dim=0, keepdim=True)
        weights[name] = torch.cat([table, null])
    return {**fields, "null_class": True}


def _old_name(name: str) -> str:
    return f"transformer.transformer.blocks.{name.split('.')[1]}.ln2.emb.weight"


def convert_schedule(diffusion: dict, state_dict: dict) -> MaskReplaceScheduler:
    """
    The noise schedule.

    Args:
        diffusion: `params` of the YAML's `diffusion_config`.
        state_dict: the keys of `SCHEDULE_KEYS`.

    Raises:
        ValueError: for another schedule than "alpha1", or if the checkpoint's tables are not those of the
            configuration.
    """
    if diffusion["alpha_init_type"] != "alpha1":
        raise ValueError(
            f"`config` must have alpha_init_type=alpha1, the original's only one, got "
            f"{diffusion['alpha_init_type']!r}."
        )
    content = with_defaults(
        _section(diffusion["content_emb_config"], "content_emb_config"), CONTENT_DEFAULTS, "content_emb_config"
    )
    steps = diffusion["diffusion_step"]
    scheduler = MaskReplaceScheduler(
        num_embeddings=content["num_embed"],
        num_train_timesteps=steps,
        auxiliary_loss_weight=diffusion["auxiliary_loss_weight"],
        adaptive_auxiliary_loss=diffusion["adaptive_auxiliary_loss"],
        mask_loss_weights=tuple(diffusion["mask_weight"]),
    )
    expected = {
        "log_cumprod_at": scheduler.alphas_cumprod,
        "log_cumprod_bt": scheduler.betas_cumprod,
        "log_cumprod_ct": scheduler.gammas_cumprod,
    }
    for name, values in expected.items():
        if name not in state_dict:
            raise ValueError(f"`checkpoint` lacks {name}, the noise schedule that it was trained with.")
        table = state_dict[name]
        if table.is_meta:
            continue
        # the last entry stands for the data; the tables are float32 logarithms, or were saved in half precision
        atol = max(1e-6, torch.finfo(table.dtype).eps) if table.is_floating_point() else 0
        if table.shape != (steps + 1,) or not torch.allclose(table[:-1].double().exp(), values, atol=atol):
            raise ValueError(f"`checkpoint` has another {name} than `config` says (alpha_init_type, diffusion_step).")
    return scheduler
