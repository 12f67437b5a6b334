"""The conditioning stages of the original latent diffusion code, as parts that stock pipelines hold."""

import re

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from .checkpoints import load_exactly


BERT_KEYS = {
    "token_emb.": "model.embed_tokens.",
    "pos_emb.emb.": "model.embed_positions.",
    "norm.": "model.layer_norm.",
    "to_logits.": "to_logits.",
}
# Name inside a layer of the original, which alternate, → name inside a layer of LDMBertModel.
BERT_ATTENTION_KEYS = {
    "0.": "self_attn_layer_norm.",
    "1.to_q.": "self_attn.q_proj.",
    "1.to_k.": "self_attn.k_proj.",
    "1.to_v.": "self_attn.v_proj.",
    "1.to_out.": "self_attn.out_proj.",
}
BERT_FEEDFORWARD_KEYS = {"0.": "final_layer_norm.", "1.net.0.0.": "fc1.", "1.net.2.": "fc2."}


def convert_bert_embedder(params: dict, state_dict: dict) -> LDMBertModel:
    """The transformer over tokens (BERTEmbedder), which diffusers has as `LDMBertModel`.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    new = {}
    for key, weight in state_dict.items():
        name = key.removeprefix("transformer.")
        layer = re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.+)", name)
        table = BERT_KEYS
        prefix = ""
        if layer is not None:
            number, name = int(layer[1]), layer[2]
            table = BERT_FEEDFORWARD_KEYS if number % 2 else BERT_ATTENTION_KEYS
            prefix = f"model.layers.{number // 2}."
        old = next((old for old in table if name.startswith(old)), None)
        if old is None:
            raise ValueError(f"`checkpoint` has the unknown key cond_stage_model.{key}.")
        new[prefix + table[old] + name.removeprefix(old)] = weight
    width = params["n_embed"]
    config = LDMBertConfig(
        vocab_size=params["vocab_size"],
        max_position_embeddings=params.get("max_seq_len", 77),
        d_model=width,
        encoder_layers=params["n_layer"],
        encoder_ffn_dim=4 * width,
        encoder_attention_heads=8,
        head_dim=64,
    )
    with torch.device("meta"):
        encoder = LDMBertModel(config)
    load_exactly(encoder, new)
    return encoder.eval()


def convert_conditioner(params: dict, cond_stage: dict, live: dict, null_class_id: int | None):
    """
    The conditioning stage as changes of the denoiser, since stock denoisers can hold it: a table of classes
    (ClassEmbedder) becomes `encoder_hid_proj`, which one-hot classes go through; the 1×1 convolution of a semantic map
    (SpatialRescaler) goes into `conv_in`.

    Returns:
        arguments of `convert_unet`, arguments of the pipeline, and for each key that is not used, why.

    Raises:
        ValueError: for a stage that has no equivalent here.
    """
    stage = params.get("cond_stage_config", "__is_unconditional__")
    target = stage if isinstance(stage, str) else stage["target"].rpartition(".")[2]
    if target == "ClassEmbedder":
        table = cond_stage["embedding.weight"]
        if null_class_id is None and len(table) == 1001:  # ImageNet's classes, and one for none
            null_class_id = 1000
        weights = {"encoder_hid_proj.weight": table.T, "encoder_hid_proj.bias": torch.zeros(table.shape[1])}
        changes = {"encoder_hid_dim": len(table), "encoder_hid_dim_type": "text_proj", "weights": weights}
        return changes, {"null_class_id": null_class_id}, {}
    if null_class_id is not None:
        raise ValueError(f"`null_class_id` needs a model with a table of classes (ClassEmbedder), got {target}.")
    if target == "SpatialRescaler":
        arguments = stage.get("params", {})
        if "channel_mapper.bias" in cond_stage or arguments.get("method", "bilinear") != "bilinear":
            raise ValueError("`config` must have bias=False and method='bilinear' for its SpatialRescaler.")
        if arguments.get("multiplier", 0.5) != 0.5:
            raise ValueError("`config` must have multiplier=0.5 for its SpatialRescaler.")
        if "channel_mapper.weight" not in cond_stage:
            return {}, {}, {}
        weight, mapper = live["input_blocks.0.0.weight"], cond_stage["channel_mapper.weight"][:, :, 0, 0]
        latents = weight.shape[1] - mapper.shape[0]
        mapped = torch.einsum("oikl,ic->ockl", weight[:, latents:], mapper)
        folded = torch.cat([weight[:, :latents], mapped], dim=1)
        return {"in_channels": folded.shape[1], "weights": {"conv_in.weight": folded}}, {}, {}
    if target == "__is_first_stage__":
        return {}, {}, dict.fromkeys(cond_stage, "the first stage once more")
    if target == "BERTEmbedder":
        if stage["params"].get("use_tokenizer", True):
            raise ValueError(
                "`config` must have use_tokenizer=False for its BERTEmbedder: the tokenizer is not in it."
            )
        return {}, {"text_encoder": convert_bert_embedder(stage["params"], cond_stage), "text_mask": False}, {}
    if target in ("__is_unconditional__", "Identity"):
        if cond_stage:
            raise ValueError(
                f"`checkpoint` has keys that {target} does not have: cond_stage_model.{next(iter(cond_stage))}."
            )
        return {}, {}, {}
    raise ValueError(
        f"`config` has a cond_stage_config that has no equivalent here: {target}; known: BERTEmbedder, ClassEmbedder, "
        "SpatialRescaler, Identity, __is_first_stage__, __is_unconditional__."
    )
