"""Checkpoints of the original VQGAN code (CompVis/taming-transformers) to hf_vq."""

import torch


# Original name inside a block → (GPT-2 name, transposed): GPT-2 keeps its projections as (in, out).
GPT_BLOCK_KEYS = {
    "ln1.weight": ("ln_1.weight", False),
    "ln1.bias": ("ln_1.bias", False),
    "ln2.weight": ("ln_2.weight", False),
    "ln2.bias": ("ln_2.bias", False),
    "attn.proj.weight": ("attn.c_proj.weight", True),
    "attn.proj.bias": ("attn.c_proj.bias", False),
    "mlp.0.weight": ("mlp.c_fc.weight", True),
    "mlp.0.bias": ("mlp.c_fc.bias", False),
    "mlp.2.weight": ("mlp.c_proj.weight", True),
    "mlp.2.bias": ("mlp.c_proj.bias", False),
}
GPT_OUTER_KEYS = {
    "tok_emb.weight": "transformer.wte.weight",
    "ln_f.weight": "transformer.ln_f.weight",
    "ln_f.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}


def convert_gpt_state_dict(state_dict, codebook_size=None) -> tuple[dict, dict]:
    """
    The GPT of a `Net2NetTransformer` as a `VQGPTForCausalLM`.

    Args:
        state_dict (`dict`): the checkpoint's `state_dict`; only its `transformer.*` keys are read.
        codebook_size (`int`, *optional*): number of codes of the image tokenizer where the GPT's vocabulary is larger, which
            cuts the head to them; the whole vocabulary by default.

    Returns:
        the arguments of `VQGPTConfig` that follow from the weights (all but the number of heads, the grid and the
        condition), and the new state dict.

    Raises:
        ValueError: a key that is missing or unknown, or more codes than the vocabulary has.
    """
    old = {k.removeprefix("transformer."): v for k, v in state_dict.items() if k.startswith("transformer.")}
    depth = len({key.split(".")[1] for key in old if key.startswith("blocks.")})
    masks = [old.pop(f"blocks.{i}.attn.mask", None) for i in range(depth)]
    try:
        new = {target: old.pop(source) for source, target in GPT_OUTER_KEYS.items()}
        new["transformer.wpe.weight"] = old.pop("pos_emb")[0]
        for i in range(depth):
            new.update(_convert_gpt_block(old, i))
    except KeyError as error:
        raise ValueError(f"`state_dict` lacks the key transformer.{error.args[0]} of an original GPT.") from error
    if old:
        raise ValueError(f"`state_dict` has keys that no original GPT has: {sorted(old)[:5]}.")

    vocab_size, n_embd = new["transformer.wte.weight"].shape
    codebook_size = vocab_size if codebook_size is None else codebook_size
    if codebook_size > vocab_size:
        raise ValueError(f"`codebook_size` must be at most the GPT's vocabulary of {vocab_size}, got {codebook_size}.")
    new["lm_head.weight"] = new["lm_head.weight"][:codebook_size]
    kwargs = {
        "codebook_size": codebook_size,
        "vocab_size": vocab_size,
        "share_condition_embedding": True,
        "n_positions": new["transformer.wpe.weight"].shape[0],
        "n_embd": n_embd,
        "n_layer": depth,
        "n_unmasked": _n_unmasked(masks),
    }
    return kwargs, {key: value.contiguous() for key, value in new.items()}


def _convert_gpt_block(old: dict, i: int) -> dict:
    source, target = f"blocks.{i}.", f"transformer.h.{i}."
    new = {}
    for name, (new_name, transposed) in GPT_BLOCK_KEYS.items():
        tensor = old.pop(source + name)
        new[target + new_name] = tensor.T if transposed else tensor
    for kind in ("weight", "bias"):
        parts = [old.pop(f"{source}attn.{name}.{kind}") for name in ("query", "key", "value")]
        joined = torch.cat(parts)
        new[f"{target}attn.c_attn.{kind}"] = joined.T if kind == "weight" else joined
    return new


def _n_unmasked(masks) -> int:
    """The width of the bidirectional prefix, read from the attention mask that the original keeps as a buffer."""
    if not masks or masks[0] is None:
        return 0
    visible_to_first = int(masks[0][0, 0, 0].sum())
    return visible_to_first if visible_to_first > 1 else 0
