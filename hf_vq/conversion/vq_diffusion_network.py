"""The denoiser and the noise schedule of the original VQ-Diffusion code."""

import re

import torch

from ..models.priors.transformer_vq_diffusion import VQDiffusionTransformer2DModel
from ..schedulers.scheduling_mask_replace import MaskReplaceScheduler
from .checkpoints import drop_keys, load_exactly


# Arguments of the original's transformers that do not change what they compute, or are read elsewhere.
KNOWN_PARAMS = {
    "attn_type",
    "checkpoint",
    "class_number",
    "condition_dim",
    "condition_seq_len",
    "content_emb_config",
    "content_seq_len",
    "content_spatial_size",
    "diffusion_step",
    "mlp_hidden_times",
    "mlp_type",
    "n_embd",
    "n_head",
    "n_layer",
    "resid_pdrop",
}
# Arguments that `VQDiffusionTransformer2DModel` has no equivalent of, unless they have this value.
FIXED_PARAMS = {
    "attn_pdrop": 0.0,
    "block_activate": "GELU2",
    "class_type": "adalayernorm",
    "timestep_type": "adalayernorm",
}
CONDITION_TYPES = {"self": "unconditional", "selfcondition": "class", "selfcross": "text"}
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
SCHEDULE_KEYS = ("log_at", "log_bt", "log_ct", "log_1_min_ct")
SCHEDULE_KEYS += ("log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct", "log_1_min_cumprod_ct")
# Tables beside the network, and why none becomes a weight.
TABLE_REASONS = {
    **dict.fromkeys(SCHEDULE_KEYS, "the noise schedule, which is computed"),
    **dict.fromkeys(("Lt_history", "Lt_count"), "statistics of the losses, for the choice of timesteps in training"),
}
NULL_CLASS = 1000  # the original's, whatever the data set


def transformer_config(diffusion: dict) -> dict:
    """
    The configuration of a denoiser, but for its class and null embeddings, which the weights tell.

    Args:
        diffusion: `params` of the YAML's `diffusion_config`.

    Raises:
        ValueError: for an argument that `VQDiffusionTransformer2DModel` has no equivalent of.
    """
    params = diffusion["transformer_config"]["params"]
    for name, wanted in FIXED_PARAMS.items():
        if params.get(name, wanted) != wanted:
            raise ValueError(f"`config` must have {name}={wanted} in transformer_config, got {params[name]}.")
    unknown = sorted(set(params) - KNOWN_PARAMS - set(FIXED_PARAMS))
    if unknown:
        raise ValueError(f"`config` has names in transformer_config that are not known: {unknown}.")
    if params["attn_type"] not in CONDITION_TYPES:
        raise ValueError(f"`config` has the attn_type {params['attn_type']!r}; known: {sorted(CONDITION_TYPES)}.")
    content = diffusion["content_emb_config"]["params"]
    if content.get("pos_emb_type", "embedding") != "embedding":
        raise ValueError(f"`config` must have pos_emb_type=embedding, got {content['pos_emb_type']}.")
    condition_type = CONDITION_TYPES[params["attn_type"]]
    return {
        "num_embeddings": content["num_embed"],
        "sample_size": tuple(params["content_spatial_size"]),
        "position_embedding_size": tuple(content["spatial_size"]),
        "num_layers": params["n_layer"],
        "num_attention_heads": params["n_head"],
        "attention_head_dim": params["n_embd"] // params["n_head"],
        "num_train_timesteps": diffusion["diffusion_step"],
        "condition_type": condition_type,
        "cross_attention_dim": params["condition_dim"] if condition_type == "text" else None,
        "mlp_type": "conv" if params.get("mlp_type", "fc") == "conv_mlp" else "fc",
        "mlp_ratio": params["mlp_hidden_times"],
        "dropout": params["resid_pdrop"],
    }


def convert_transformer(diffusion: dict, state_dict: dict) -> tuple[VQDiffusionTransformer2DModel, dict[str, str]]:
    """
    A denoiser.

    Args:
        diffusion: `params` of the YAML's `diffusion_config`.
        state_dict: the keys under `transformer.`, and the learned embedding `empty_text_embed` if there is one.

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
    new = {_new_name(key): value for key, value in weights.items()}
    if config["condition_type"] == "class":
        config |= _with_null_class(new)
    if null_embedding is not None:
        config |= {"learnable_null_embedding": True, "text_length": len(null_embedding)}
        new["null_embedding"] = null_embedding.float()
    with torch.device("meta"):
        transformer = VQDiffusionTransformer2DModel(**config)
    load_exactly(transformer, new)
    return transformer.eval(), dropped


def _new_name(key: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    rest, table, prefix = key, OUTER_KEYS, ""
    if block is not None:
        rest, table, prefix = block[2], BLOCK_KEYS, f"transformer_blocks.{block[1]}."
    old = next((old for old in table if rest.startswith(f"{old}.")), None)
    if old is None:
        raise ValueError(f"`checkpoint` has the unknown key transformer.transformer.{key}.")
    return f"{prefix}{table[old]}{rest.removeprefix(old)}"


def _with_null_class(weights: dict) -> dict:
    """
    The configuration of the classes. The null class has the number 1000; where the table is too short for it, the original
    takes the mean of the table, which is added here as its last row.
    """
    names = [name for name in weights if name.endswith(".norm3.emb.weight")]
    if not names:
        raise ValueError("`checkpoint` lacks transformer.transformer.blocks.0.ln2.emb.weight, the classes.")
    for name in names:
        table = weights[name]
        if len(table) != NULL_CLASS + 1:
            weights[name] = torch.cat([table, table.mean(dim=0, keepdim=True)])
    return {"num_classes": len(weights[names[0]]) - 1, "null_class": True}


def convert_schedule(diffusion: dict, state_dict: dict) -> MaskReplaceScheduler:
    """
    The noise schedule.

    Args:
        diffusion: `params` of the YAML's `diffusion_config`.
        state_dict: the keys of `SCHEDULE_KEYS`.

    Raises:
        ValueError: for another schedule than "alpha1", or if the checkpoint's tables are not those of the configuration.
    """
    if diffusion.get("alpha_init_type") != "alpha1":
        raise ValueError(f"`config` must have alpha_init_type=alpha1, got {diffusion.get('alpha_init_type')!r}.")
    codes, steps = diffusion["content_emb_config"]["params"]["num_embed"], diffusion["diffusion_step"]
    scheduler = MaskReplaceScheduler(num_embeddings=codes, num_train_timesteps=steps)
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
        # the last entry stands for the data; the tables are float32 logarithms
        if table.shape != (steps + 1,) or not torch.allclose(table[:-1].double().exp(), values, atol=1e-6):
            raise ValueError(f"`checkpoint` has another {name} than `config` says (alpha_init_type, diffusion_step).")
    return scheduler
