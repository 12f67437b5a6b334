"""The autoregressive prior of LlamaGen as a `VQLlamaForCausalLM`."""

import math
import re

import torch

from ..models.priors.configuration_vq_llama import VQLlamaConfig
from ..models.priors.modeling_vq_llama import VQLlamaForCausalLM
from .checkpoints import check_agrees, drop_keys, load_exactly
from .layouts import count
from .reading import Options, is_count


DROPPED_KEYS = {"freqs_cis": "the rotary positions, which are computed"}
# In the original's names → in ours.
NAMES = {
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "cls_embedding.cap_proj.fc1.weight": "text_projection.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "text_projection.fc2.weight",
    "cls_embedding.uncond_embedding": "text_projection.null",
}
BLOCK_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
CLASSES = "cls_embedding.embedding_table.weight"
# Blocks and width of the published priors → heads, which the weights do not show.
PUBLISHED_HEADS = {
    (12, 768): 12,
    (24, 1024): 16,
    (36, 1280): 20,
    (48, 1536): 24,
    (48, 2560): 40,
    (22, 2048): 32,
    (24, 3200): 32,
    (32, 4096): 32,
}
# Arguments of the original's `ModelArgs` that follow from its weights → field of `VQLlamaConfig`.
ARGUMENT_FIELDS = {
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_kv_head": "num_key_value_heads",
    "num_classes": "condition_vocab_size",
    "caption_dim": "text_embed_dim",
    "vocab_size": "codebook_size",
    "cls_token_num": "condition_length",
}


def is_prior(state_dict: dict) -> bool:
    """Whether these are weights of the original's `Transformer`, and not of a tokenizer."""
    return any(key.startswith(("tok_embeddings.", "cls_embedding.")) for key in state_dict)


def convert_prior(
    state_dict: dict, arguments: dict | None = None, grid_size: int | None = None
) -> tuple[VQLlamaForCausalLM, dict[str, str]]:
    """A prior from the original's `Transformer.state_dict()`.

    Args:
        state_dict: the weights.
        arguments: of the original's `ModelArgs`; those that are not given have its defaults. `n_head` is needed for a
            prior of another size than the published ones.
        grid_size: codes on a side of the image; by default that of the argument `block_size`, of which 256 is the
            default.

    Returns:
        the model, and for each key and argument that it does not use, why.

    Raises:
        ValueError: for a key or an argument that is missing or unknown, or an argument that contradicts the weights.
    """
    weights, dropped = drop_keys(state_dict, DROPPED_KEYS)
    for name in ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"):
        if name not in weights:
            raise ValueError(f"`checkpoint` lacks the key {name} of a prior of LlamaGen.")
    is_text = CLASSES not in weights
    depth, width = count(weights, r"layers\.(\d+)\."), weights["tok_embeddings.weight"].shape[1]
    options = Options(arguments, "the arguments of ModelArgs")
    heads = options.take("n_head", PUBLISHED_HEADS.get((depth, width)))
    if not is_count(heads) or width % heads:
        raise ValueError(
            f"`config` must have n_head, a divisor of the width {width} of this prior of {depth} blocks, got {heads}."
        )
    fields, reasons = _fields(options, weights, heads, grid_size, is_text)
    agreeing = {name: options.take(name) for name in ARGUMENT_FIELDS if options.take(name, None) is not None}
    _drop_training_arguments(options, dropped, reasons)
    config = VQLlamaConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, **fields)
    unused = {"text": {"num_classes"}, "class": {"caption_dim"}}[config.condition_type]
    for name in agreeing.keys() - unused:
        check_agrees(name, agreeing[name], getattr(config, ARGUMENT_FIELDS[name]))
    with torch.device("meta"):
        model = VQLlamaForCausalLM(config)
    load_exactly(model, _renamed(weights, config))
    return model.eval(), dropped


def _fields(options: Options, weights: dict, heads: int, grid_size: int | None, is_text: bool) -> tuple[dict, dict]:
    """The fields of `VQLlamaConfig`, and what else is to be said."""
    codes, width = weights["tok_embeddings.weight"].shape
    joined = weights["layers.0.attention.wqkv.weight"].shape[0]
    kv_heads, rest = divmod(joined - width, 2 * width // heads)
    if rest or kv_heads < 1:
        raise ValueError(f"`config` has n_head={heads}, which does not fit the attention of {joined} channels.")
    block_size = options.count("block_size", 256 if grid_size is None else grid_size**2)
    side = math.isqrt(block_size)
    if side**2 != block_size or grid_size not in (None, side):
        wanted = "a square number" if grid_size is None else f"{grid_size**2}, the codes of an image"
        raise ValueError(f"`config` must have as block_size {wanted}, got {block_size}.")
    options.only("model_type", "t2i" if is_text else "c2i", default="t2i" if is_text else "c2i")
    condition_dropout = options.number("class_dropout_prob", 0.1)
    reasons = {}
    if is_text:
        for name in ("cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight"):
            if name not in weights:
                raise ValueError(f"`checkpoint` lacks the key {name} of a prior of LlamaGen.")
        rows, channels = weights["cls_embedding.uncond_embedding"].shape
        # the table has 120 rows whatever the length, and the first are used
        length = options.count("cls_token_num", rows)
        if length > rows:
            raise ValueError(
                f"`config` must have a cls_token_num of at most the {rows} rows of the weights, got {length}."
            )
        condition = {"condition_type": "text", "condition_length": length, "text_embed_dim": channels}
    else:
        num_classes = len(weights[CLASSES]) - (condition_dropout > 0)
        condition = {"condition_type": "class", "condition_vocab_size": num_classes}
        if condition_dropout == 0:
            reasons["--config class_dropout_prob"] = "0: the null class, which it was not trained with, is the mean"
    return {
        **condition,
        "codebook_size": codes,
        "grid_size": side,
        "num_key_value_heads": kv_heads,
        "intermediate_size": weights["layers.0.feed_forward.w1.weight"].shape[0],
        "condition_dropout": condition_dropout,
        "embd_pdrop": options.number("token_dropout_p", 0.1, below=1),
        "attention_dropout": options.number("attn_dropout_p", 0.0, below=1),
        "rope_base": options.number("rope_base", 10000, minimum=1),
        "rms_norm_eps": options.number("norm_eps", 1e-5),
        "initializer_range": options.number("initializer_range", 0.02),
    }, reasons


def _drop_training_arguments(options: Options, dropped: dict, reasons: dict) -> None:
    """Arguments without an equivalent, which change nothing of what a trained prior computes."""
    dropped |= reasons
    for name in ("resid_dropout_p", "ffn_dropout_p", "drop_path_rate"):
        if options.take(name, 0.0):
            dropped[f"--config {name}"] = "a regularisation of its training, which hf_vq does not have"
    # the width of the feed-forward network is read from the weights; the others size buffers
    options.training_only("multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len")
    options.finish()


def _renamed(weights: dict, config: VQLlamaConfig) -> dict:
    """The weights under our names, of a class or text prior alike."""
    weights = {key: value.float() for key, value in weights.items()}
    codes = weights.pop("tok_embeddings.weight")
    if config.condition_type == "class":
        conditions = weights.pop(CLASSES)
        if len(conditions) == config.condition_vocab_size:
            conditions = torch.cat([conditions, conditions.mean(dim=0, keepdim=True)])
    else:
        conditions = torch.zeros_like(codes[:2])  # a text and the null text have no rows of their own
        null = weights["cls_embedding.uncond_embedding"]
        weights["cls_embedding.uncond_embedding"] = null[: config.condition_length]
    new = {"model.embed_tokens.weight": torch.cat([codes, conditions])}
    for name, value in weights.items():
        block = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        if block is None:
            new[NAMES.get(name, name)] = value
            continue
        number, inner = block.groups()
        if inner == "attention.wqkv":
            for part, weight in _split_projections(value, config).items():
                new[f"model.layers.{number}.self_attn.{part}.weight"] = weight
        else:
            new[f"model.layers.{number}.{BLOCK_NAMES.get(inner, inner)}.weight"] = value
    return new


def _split_projections(joined: torch.Tensor, config: VQLlamaConfig) -> dict[str, torch.Tensor]:
    """Queries, keys and values; the original turns neighbouring channels of a head, Llama those half a head apart."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    sizes = [heads * config.head_dim, groups * config.head_dim, groups * config.head_dim]
    query, key, value = joined.split(sizes)
    query, key = (
        part.unflatten(0, (number, -1, 2)).transpose(1, 2).flatten(0, 2)
        for part, number in ((query, heads), (key, groups))
    )
    return {"q_proj": query, "k_proj": key, "v_proj": value}


__all__ = ["convert_prior", "is_prior"]
