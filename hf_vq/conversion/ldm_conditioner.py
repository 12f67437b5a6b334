"""The conditioning stages of the original latent diffusion code, as parts that stock pipelines hold."""

import re

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from ..pipelines.conditioning import RESIZE_METHODS
from .checkpoints import check_agrees, drop_keys, load_exactly
from .reading import Options
from .taming_tokenizer import convert_tokenizer
from .vq_diffusion_text import clip_text_model


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
# How each stage reaches the denoiser: the only `conditioning_key` with which the original runs it.
CONDITIONING_KEYS = {
    "BERTEmbedder": ("crossattn",),
    "ClassEmbedder": ("crossattn",),
    "FrozenCLIPEmbedder": ("crossattn",),
    "TransformerEmbedder": ("crossattn",),
    "SpatialRescaler": ("concat",),
    "VQModelInterface": ("concat",),
    "__is_first_stage__": ("concat",),
    "Identity": ("concat", "crossattn", "adm"),
    "__is_unconditional__": (None,),
}
REFUSED = {
    "BERTTokenizer": "it gives tokens, and no states for cross-attention",
    "FrozenCLIPTextEmbedder": "it gives one state for a whole text",
    "FrozenClipImageEmbedder": "its condition is an image for cross-attention",
    "FrozenOpenCLIPEmbedder": "its text encoder is open_clip's",
    "FrozenT5Embedder": "latent diffusion with a VQ first stage has no such model",
}
# Beginnings of `version` → the activation, which the weights do not show.
CLIP_ACTIVATIONS = {"openai/clip-vit-": "quick_gelu", "laion/CLIP-ViT-": "gelu"}


def conditioning_key(params: dict, stage: str) -> str | None:
    """How the condition reaches the denoiser: "concat", "crossattn", "adm" (as a class) or None.

    Args:
        params: of the original's `LatentDiffusion`.
        stage: the class of its `cond_stage_config`.

    Raises:
        ValueError: a stage that has no equivalent here, or one that the original cannot run in this way.
    """
    if stage not in CONDITIONING_KEYS:
        why = f", since {REFUSED[stage]}" if stage in REFUSED else ""
        raise ValueError(
            f"`config` has a cond_stage_config that has no equivalent here: {stage}{why}; known: "
            f"{', '.join(CONDITIONING_KEYS)}."
        )
    key = params.get("conditioning_key")
    if key is None:
        key = "concat" if params.get("concat_mode", True) else "crossattn"
    if stage == "__is_unconditional__":
        key = None
    if key not in CONDITIONING_KEYS[stage]:
        raise ValueError(
            f"`config` must have conditioning_key={' or '.join(map(str, CONDITIONING_KEYS[stage]))} "
            f"for its {stage}, got "
            f"{key!r} (conditioning_key={params.get('conditioning_key')!r}, "
            f"concat_mode={params.get('concat_mode', True)})."
        )
    unet = params["unet_config"].get("params") or {}
    for name, wanted in (("use_spatial_transformer", key == "crossattn"), ("num_classes", key == "adm")):
        if (unet.get(name) not in (None, False)) != wanted:
            raise ValueError(
                f"`config` must {'' if wanted else 'not '}have {name} in unet_config, since its "
                f"condition is {key!r}, got "
                f"{unet.get(name)!r}."
            )
    return key


def convert_conditioner(
    params: dict,
    cond_stage: dict,
    live: dict,
    latent_channels: int,
    null_class_id: int | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
):
    """
    The conditioning stage as changes of the denoiser, since stock denoisers can hold it: a table of classes
    (ClassEmbedder) becomes `encoder_hid_proj`, which one-hot classes go through; the 1×1 convolution of a semantic map
    (SpatialRescaler) goes into `conv_in`. Transformers over tokens become the pipeline's text encoder, and a tokenizer
    of the condition (VQModelInterface) its `condition_vqvae`.

    Args:
        params: of the original's `LatentDiffusion`.
        cond_stage: the weights of the stage.
        live: those of the denoiser.
        latent_channels: of the first stage.
        null_class_id: the class that stands for none; by default the last of 1001, or of those with `ucg_rate`.
        tokenizer: of a text encoder that has one.

    Returns:
        arguments of `convert_unet`, arguments of the pipeline, and for each key that is not used, why.

    Raises:
        ValueError: for a stage that has no equivalent here, or that the weights contradict.
    """
    stage = params.get("cond_stage_config", "__is_unconditional__")
    target, options = str(stage), Options({}, "model.params.cond_stage_config.params")
    if isinstance(stage, dict):
        target, options = Options(params, "model.params").node("cond_stage_config")
    key = conditioning_key(params, target)
    if null_class_id is not None and target != "ClassEmbedder" and key != "adm":
        raise ValueError(f"`null_class_id` needs a model with a table of classes (ClassEmbedder), got {target}.")
    reads_text = target == "FrozenCLIPEmbedder" or (target == "BERTEmbedder" and options.take("use_tokenizer", True))
    if tokenizer is not None and not reads_text:
        raise ValueError(f"`tokenizer` must not be given: {target} reads no text.")
    changes, arguments, dropped, width = {}, {}, {}, None
    if target == "__is_first_stage__":
        dropped = dict.fromkeys(cond_stage, "the first stage once more")
        arguments = {"encode_condition": True}
    elif target == "VQModelInterface":
        weights, dropped = drop_keys(cond_stage, {"model_ema.": "averages that the denoiser was not trained with"})
        arguments["condition_vqvae"], reasons = convert_tokenizer(stage, weights)
        dropped |= reasons
        options.training_only(*options.values)  # which that has read
    elif target == "ClassEmbedder":
        changes, arguments = _class_table(options, cond_stage, null_class_id)
        width = changes["weights"]["encoder_hid_proj.bias"].shape[0]
    elif target == "SpatialRescaler":
        changes, arguments = _spatial_rescaler(options, cond_stage, live, latent_channels)
    elif target == "FrozenCLIPEmbedder":
        encoder, arguments, dropped = convert_clip_embedder(options, cond_stage)
        width = encoder.config.hidden_size
    elif target in ("BERTEmbedder", "TransformerEmbedder"):
        encoder, arguments = convert_bert_embedder(options, cond_stage)
        width = encoder.config.d_model
    else:
        if cond_stage:
            raise ValueError(
                f"`checkpoint` has keys that {target} does not have: cond_stage_model.{next(iter(cond_stage))}."
            )
        arguments = {} if null_class_id is None else {"null_class_id": null_class_id}
    options.finish()
    if width is not None:
        check_agrees("context_dim", params["unet_config"]["params"].get("context_dim"), width)
    if reads_text:
        arguments["tokenizer"] = tokenizer
        tokens = encoder.config.vocab_size
        if tokenizer is not None and len(tokenizer) != tokens:
            raise ValueError(f"`tokenizer` must have the text encoder's {tokens} tokens, got {len(tokenizer)}.")
    return changes, arguments, dropped


def _only_keys(target: str, cond_stage: dict, *names: str) -> None:
    """A `ValueError` unless the stage has the weights `names` and no others."""
    for name in names:
        if name not in cond_stage:
            raise ValueError(f"`checkpoint` lacks the key cond_stage_model.{name} of its {target}.")
    others = sorted(set(cond_stage) - set(names))
    if others:
        raise ValueError(f"`checkpoint` has the unknown key cond_stage_model.{others[0]} beside its {target}.")


def _class_table(options: Options, cond_stage: dict, null_class_id: int | None) -> tuple[dict, dict]:
    options.training_only("key")
    _only_keys("ClassEmbedder", cond_stage, "embedding.weight")
    table = cond_stage["embedding.weight"]
    check_agrees("n_classes", options.take("n_classes", 1000), len(table))
    check_agrees("embed_dim", options.take("embed_dim"), table.shape[1])
    drops_classes = options.take("ucg_rate", 0) > 0
    if null_class_id is None and (len(table) == 1001 or drops_classes):  # ImageNet's classes, and one for none
        null_class_id = len(table) - 1
    weights = {"encoder_hid_proj.weight": table.T, "encoder_hid_proj.bias": torch.zeros(table.shape[1])}
    changes = {"encoder_hid_dim": len(table), "encoder_hid_dim_type": "text_proj", "weights": weights}
    return changes, {"null_class_id": null_class_id}


def _spatial_rescaler(options: Options, cond_stage: dict, live: dict, latent_channels: int) -> tuple[dict, dict]:
    """The 1×1 convolution goes into the denoiser's first one. Its bias becomes the weight of a channel of ones: at the
    borders of the map, where the denoiser pads with zeros, no bias of the denoiser can stand for it.
    """
    arguments = _stages(options)
    inputs, outputs = options.count("in_channels", 3), options.take("out_channels", None)
    bias = options.flag("bias", False)
    if outputs is None:  # there is no convolution, whatever its options
        _only_keys("SpatialRescaler", cond_stage)
        return {}, arguments
    _only_keys("SpatialRescaler", cond_stage, "channel_mapper.weight", *["channel_mapper.bias"] * bias)
    mapper = cond_stage["channel_mapper.weight"][:, :, 0, 0]
    check_agrees("in_channels", inputs, mapper.shape[1])
    check_agrees("out_channels", outputs, mapper.shape[0])
    weight = live["input_blocks.0.0.weight"]
    if weight.shape[1] != latent_channels + outputs:
        raise ValueError(
            f"`checkpoint` has a denoiser of {weight.shape[1]} channels, which must be the "
            f"{latent_channels} of the latents "
            f"and out_channels={outputs} of the SpatialRescaler in `config`."
        )
    if bias:
        mapper = torch.cat([mapper, cond_stage["channel_mapper.bias"][:, None]], dim=1)
        arguments["condition_ones"] = True
    mapped = torch.einsum("oikl,ic->ockl", weight[:, latent_channels:], mapper.to(weight))
    folded = torch.cat([weight[:, :latent_channels], mapped], dim=1)
    return {"in_channels": folded.shape[1], "weights": {"conv_in.weight": folded}}, arguments


def _stages(options: Options) -> dict:
    """The pipeline's argument for how maps are resized: none where the stages together are the mean of the pixels that
    fall on a latent, which it takes of maps of any size (`resize_map`).
    """
    stages = {
        "method": options.only("method", *RESIZE_METHODS, default="bilinear"),
        "multiplier": options.number("multiplier", 0.5),
        "n_stages": options.count("n_stages", 1, minimum=0),
    }
    method, multiplier, count = stages.values()
    if not count or (method == "bilinear" and multiplier == 0.5):
        return {}
    if method == "area" and 0 < multiplier <= 1 and (1 / multiplier).is_integer():
        return {}
    return {"condition_stages": stages}


def convert_bert_embedder(options: Options, state_dict: dict) -> tuple[LDMBertModel, dict]:
    """The transformer over tokens (BERTEmbedder, TransformerEmbedder), which diffusers has as `LDMBertModel`.

    Returns:
        the model, and arguments of the pipeline.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    options.training_only("device", "embedding_dropout", "use_tokenizer")
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
    width, length = options.take("n_embed"), options.take("max_seq_len", 77)
    config = LDMBertConfig(
        vocab_size=options.take("vocab_size", 30522),
        max_position_embeddings=length,
        d_model=width,
        encoder_layers=options.take("n_layer"),
        encoder_ffn_dim=4 * width,
        encoder_attention_heads=8,
        head_dim=64,
    )
    with torch.device("meta"):
        encoder = LDMBertModel(config)
    load_exactly(encoder, new)
    return encoder.eval(), {"text_encoder": encoder, "text_mask": False, "text_max_length": length}


def convert_clip_embedder(options: Options, state_dict: dict) -> tuple[CLIPTextModel, dict, dict[str, str]]:
    """CLIP's text transformer (FrozenCLIPEmbedder), whose last states are the condition.

    Returns:
        the model, arguments of the pipeline, and for each key that is not used, why.

    Raises:
        ValueError: for a version whose activation is not known, other states than the last, a key that is missing or
            unknown.
    """
    options.training_only("device", "freeze", "layer_idx")  # read with other layers only
    version, length = str(options.take("version", "openai/clip-vit-large-patch14")), options.take("max_length", 77)
    options.only("layer", "last", default="last")
    activation = next((name for start, name in CLIP_ACTIVATIONS.items() if version.startswith(start)), None)
    if activation is None:
        raise ValueError(
            f"`config` has a FrozenCLIPEmbedder of the version {version!r}, whose activation is not known; known: "
            f"{', '.join(start + '…' for start in CLIP_ACTIVATIONS)}."
        )
    prefix = "transformer.text_model."
    weights, dropped = drop_keys(state_dict, {f"{prefix}embeddings.position_ids": "positions, which are computed"})
    outside = [key for key in weights if not key.startswith(prefix)]
    if outside:
        raise ValueError(f"`checkpoint` has the unknown key cond_stage_model.{outside[0]}.")
    encoder = clip_text_model({key.removeprefix(prefix): value for key, value in weights.items()}, activation)
    positions = encoder.config.max_position_embeddings
    if length > positions:
        raise ValueError(f"`config` must have a max_length of at most {positions} positions, got {length}.")
    return encoder, {"text_encoder": encoder, "text_mask": False, "text_max_length": length}, dropped


__all__ = ["conditioning_key", "convert_bert_embedder", "convert_clip_embedder", "convert_conditioner"]
