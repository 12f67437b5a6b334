"""Checkpoints of the original VQ-Diffusion code (microsoft/VQ-Diffusion) to `VQDiffusionImagePipeline`s.

    hf-vq convert vq_diffusion --checkpoint human.pth --config human.yaml --codec_config codec.yaml \
        --mapping taming_vqvae_2887.pt --tokenizer clip --output folder
"""

from pathlib import Path

import torch
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from ..hub import push_folder, save_with_code
from ..pipelines.pipeline_vq_diffusion import VQDiffusionImagePipeline
from .checkpoints import (
    argument_parser,
    check_part,
    errors_name,
    print_dropped,
    read_tokenizer,
    save_image_processor,
    save_tokenizer,
    split_by_prefix,
    written_folder,
)
from .reading import check_finite, in_float32, load_checkpoint, read_model, without_wrapper
from .vq_diffusion_codec import convert_codec
from .vq_diffusion_network import (
    DIFFUSION_DEFAULTS,
    SCHEDULE_KEYS,
    TABLE_REASONS,
    convert_schedule,
    convert_transformer,
    transformer_config,
    with_defaults,
)
from .vq_diffusion_text import convert_text_encoder, text_options, with_single_states


PARTS = ("tokenizer", "transformer", "text_encoder", "pipeline")
# The original's whole models and their defaults.
SHARED_DEFAULTS = {"content_info": None, "content_codec_config": None, "diffusion_config": None}
MODELS = {
    "UC_DALLE": SHARED_DEFAULTS,
    "C_DALLE": {**SHARED_DEFAULTS, "condition_info": None, "guidance_scale": 1.0, "learnable_cf": False},
    "DALLE": {**SHARED_DEFAULTS, "condition_info": None, "learnable_cf": False, "condition_codec_config": None},
}
CLASS_EMBEDDING_DEFAULTS = {"num_embed": 1000, "embed_dim": 512, "identity": False, "trainable": True}
CODEC_DEFAULTS = {"trainable": False, "token_shape": (16, 16)}
FILE_DEFAULTS = {"config_path": None, "ckpt_path": None, "mapping_path": None}
CODECS = {
    "TamingFFHQVQVAE": {**CODEC_DEFAULTS, **FILE_DEFAULTS, "num_tokens": 1024, "quantize_number": 0},
    "TamingVQVAE": {**CODEC_DEFAULTS, **FILE_DEFAULTS, "num_tokens": 16384, "quantize_number": 974},
    "TamingGumbelVQVAE": {
        **CODEC_DEFAULTS,
        **FILE_DEFAULTS,
        "token_shape": (32, 32),
        "num_tokens": 8192,
        "quantize_number": 2887,
    },
    "PatchVQVAE": CODEC_DEFAULTS,
}


def trainer_entries(checkpoint: dict) -> dict[str, dict]:
    """The entries `model` and `ema` of a checkpoint, which may also be flat, as a safetensors file is.

    Raises:
        ValueError: if there are no weights, or a weight is NaN.
    """
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(x, torch.Tensor) for x in checkpoint.values()):
        model = {key.removeprefix("model."): value for key, value in checkpoint.items() if not key.startswith("ema.")}
        averages = {key.removeprefix("ema."): value for key, value in checkpoint.items() if key.startswith("ema.")}
        checkpoint = {"model": model, "ema": averages}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        found = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise ValueError(f"`checkpoint` must hold the entry `model`, got {found}.")
    entries = {}
    for name in ("model", "ema"):
        entry = checkpoint.get(name) or {}
        others = [key for key, value in entry.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise ValueError(
                f"`checkpoint` must hold weights in its entry {name}, got a "
                f"{type(entry[others[0]]).__name__} as {others[0]}."
            )
        entry, where = without_wrapper(entry), f"`checkpoint`, in its entry {name},"
        weights = {key: value for key, value in entry.items() if not key.endswith(SCHEDULE_KEYS)}
        check_finite(weights, where)  # the schedule has logarithms of 0
        entries[name] = entry | in_float32(weights, where)
    return entries


def chosen_weights(checkpoint: dict, use_ema: bool) -> tuple[dict, dict, dict[str, str]]:
    """
    The codec's weights, the others' as asked for, and for each key that is dropped, why.

    Raises:
        ValueError: if there are no weights, or the averages are not those of the model's weights.
    """
    entries = trainer_entries(checkpoint)
    prefixes = ("content_codec.", "transformer.", "condition_codec.")
    codec, live, texts = split_by_prefix(entries["model"], prefixes).values()
    if texts:
        raise ValueError(
            f"`checkpoint` has the key condition_codec.{min(texts)}: a text encoder in the codec of "
            f"texts (clip_embedding), "
            "in place of condition_emb_config, has no equivalent here."
        )
    averages = entries["ema"]
    if averages and (set(averages) != set(live) or any(live[k].shape != averages[k].shape for k in live)):
        wrong = set(averages) ^ set(live)
        if wrong:
            message = f"has {min(wrong)} only in one of `model` and `ema`"
        else:
            message = f"has {next(k for k in live if live[k].shape != averages[k].shape)} in two shapes"
        raise ValueError(f"`checkpoint` {message}; its averages are not those of this model.")
    if not use_ema or not averages:
        return codec, live, {f"ema.{key}": "averages, which are taken without --live" for key in averages}
    return codec, dict(averages), {f"transformer.{key}": "weights before averaging; --live takes them" for key in live}


def codec_params(section: dict, grid: tuple[int, int]) -> dict:
    """
    The arguments of the YAML's `content_codec_config`, with the defaults of its class.

    Raises:
        ValueError: a class or an argument that the original does not have, or another grid than the denoiser's.
    """
    target = str(section.get("target", "")).rpartition(".")[2]
    if target not in CODECS:
        raise ValueError(f"`config` has the codec {target!r} in content_codec_config; known: {sorted(CODECS)}.")
    params = with_defaults(section.get("params") or {}, CODECS[target], "content_codec_config")
    if tuple(params["token_shape"]) != grid:
        raise ValueError(
            f"`config` must have the denoiser's grid {grid} as token_shape in content_codec_config, got "
            f"{tuple(params['token_shape'])}."
        )
    return params


def codes_in_use(content_codec: dict, mapping: torch.Tensor | None, num_embed: int) -> int | None:
    """
    How many codes the diffusion model knows, if not all.

    Args:
        content_codec: see `codec_params`.
        num_embed: of the denoiser.

    Raises:
        ValueError: a mapping that is missing or not asked for, or another number than the denoiser's.
    """
    number = content_codec.get("quantize_number", 0)
    if number and number != num_embed:
        raise ValueError(
            f"`config` must have one number of codes, got quantize_number={number} in content_codec_config and "
            f"num_embed={num_embed} in content_emb_config."
        )
    if number and mapping is None:
        raise ValueError(
            f"`mapping` is needed: the model knows {number} of the codec's "
            f"{content_codec['num_tokens']} codes, and the "
            f"file {content_codec['mapping_path']} says which."
        )
    if mapping is not None and not number:
        raise ValueError("`mapping` must not be given: `config` has no quantize_number, so every code is in use.")
    return number or None


def model_params(model: dict) -> tuple[dict, dict]:
    """`params` of the YAML's `model` section and of its `diffusion_config`, defaults included.

    Raises:
        ValueError: a class or an argument that the original does not have, or sections that do not go together.
    """
    target = str(model.get("target", "")).rpartition(".")[2]
    if target not in MODELS:
        raise ValueError(f"`config` has the model {target!r}; known: {sorted(MODELS)}.")
    params = with_defaults(model.get("params") or {}, MODELS[target], "model")
    if params["diffusion_config"] is None:
        raise ValueError("`config` lacks the section diffusion_config.")
    diffusion = with_defaults(params["diffusion_config"].get("params") or {}, DIFFUSION_DEFAULTS, "diffusion_config")
    wanted = {"UC_DALLE": "unconditional", "C_DALLE": "class", "DALLE": "text"}[target]
    found = transformer_config(diffusion)["condition_type"]
    if found != wanted:
        raise ValueError(f"`config` has a {target}, whose denoiser is {wanted}, with one that is {found}.")
    if wanted == "class":
        check_class_embedding(diffusion)
    return params, diffusion


def check_class_embedding(diffusion: dict) -> None:
    """ValueErrors unless classes reach the denoiser as numbers, as its norms read them."""
    section = diffusion["condition_emb_config"]
    if section is None:
        return  # the numbers are given as they are
    target = str(section.get("target", "")).rpartition(".")[2]
    params = with_defaults(section.get("params") or {}, CLASS_EMBEDDING_DEFAULTS, "condition_emb_config")
    if target != "ClassEmbedding" or not params["identity"]:
        raise ValueError(
            "`config` must have a ClassEmbedding with identity=True as condition_emb_config: the original's denoiser "
            f"reads the numbers of classes, got {target!r} with {section.get('params')}."
        )


def convert_model(
    model: dict,
    checkpoint: dict,
    codec: dict | None = None,
    mapping: torch.LongTensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    use_ema: bool = True,
):
    """
    A whole model.

    Args:
        model: the `model` section of the original's YAML.
        checkpoint: what its trainer saved, with the entries `model` and `ema`.
        codec (*optional*): the `model` section of its image codec's own YAML; without it the pipeline has no `vqvae`.
        mapping (int64 `(codes,)`, *optional*): the index of each of the codec's codes, where not all are in use.
        tokenizer (`CLIPTokenizer`, *optional*): of the text encoder.
        use_ema: take the averages of the weights, where the checkpoint has them.

    Returns:
        a `VQDiffusionImagePipeline`, and for each key that is not used, why.

    Raises:
        ValueError: for a part that has no equivalent here, or a key that is missing or unknown.
    """
    params, diffusion = model_params(model)
    codec_weights, weights, dropped = chosen_weights(checkpoint, use_ema)
    tables = {key: weights.pop(key) for key in list(weights) if key in TABLE_REASONS}
    null_embedding = {key: weights.pop(key) for key in list(weights) if key == "empty_text_embed"}
    network, text = split_by_prefix(weights, ("transformer.", "condition_emb.")).values()

    scheduler = convert_schedule(diffusion, tables)
    options, text_reasons = convert_text(params, diffusion, text, tokenizer)
    learned_null = "condition_codec_config" in params and bool(params["learnable_cf"] or diffusion["learnable_cf"])
    if text:
        diffusion, network = with_single_states(diffusion, network, text, learned_null)
    transformer, network_reasons = convert_transformer(diffusion, {**network, **null_embedding}, learned_null)
    if codec_weights and params["content_codec_config"] is None:
        raise ValueError("`config` lacks the section content_codec_config, of which `checkpoint` has weights.")
    content_codec = None
    if params["content_codec_config"] is not None:
        content_codec = codec_params(params["content_codec_config"], tuple(transformer.config.sample_size))
    if codec is not None and not codec_weights:
        raise ValueError("`codec_config` must not be given: `checkpoint` has no codec (no key content_codec.…).")
    if codec is None:
        if mapping is not None:
            raise ValueError("`mapping` needs `codec_config`: it is about the codec's codes.")
        vqvae, codec_reasons = None, dict.fromkeys(codec_weights, "the image codec; --codec_config converts it")
    else:
        num_used = codes_in_use(content_codec, mapping, transformer.config.num_embeddings)
        vqvae, codec_reasons = convert_codec(codec, codec_weights, mapping, num_used)
    pipeline = VQDiffusionImagePipeline(vqvae=vqvae, transformer=transformer, scheduler=scheduler, **options)

    prefix = "ema." if use_ema and checkpoint.get("ema") else "transformer."
    for inner, reasons in (
        (prefix, {key: TABLE_REASONS[key] for key in tables}),
        (prefix, {key: network_reasons.pop(key) for key in null_embedding if key in network_reasons}),
        (f"{prefix}transformer.", network_reasons),
        (f"{prefix}condition_emb.", text_reasons),
        ("content_codec.", codec_reasons),
    ):
        dropped |= {inner + key: reason for key, reason in reasons.items()}
    if params.get("guidance_scale", 1.0) != 1.0:
        scale = params["guidance_scale"]
        dropped["config.guidance_scale"] = f"an argument of each call: pipe(…, guidance_scale={scale})"
    return pipeline, dropped


def convert_text(
    params: dict, diffusion: dict, state_dict: dict, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict, dict[str, str]]:
    """
    What the pipeline needs for texts.

    Args:
        params, diffusion: `params` of the YAML's `model` section and of its `diffusion_config`.
        state_dict: the keys under `condition_emb.`; there are none for models without text.
        tokenizer: see `convert_model`.

    Returns:
        arguments of the pipeline, and for each key that is not used, why.

    Raises:
        ValueError: a tokenizer that the text encoder does not fit.
    """
    if tokenizer is not None and not state_dict:
        raise ValueError("`tokenizer` must not be given: `checkpoint` has no text encoder.")
    if "condition_codec_config" not in params:
        if state_dict:
            raise ValueError(f"`checkpoint` has the key condition_emb.{min(state_dict)}, but the model reads no text.")
        return {}, {}
    if params["condition_codec_config"] is None and not state_dict:
        return {}, {}
    options = text_options(params["condition_codec_config"], diffusion["condition_emb_config"])
    if not state_dict:
        return options, {}
    text_encoder, dropped = convert_text_encoder(state_dict, options["text_pooled"])
    for name, option, limit in (
        ("context_length", "text_max_length", text_encoder.config.max_position_embeddings),
        ("pad_value", "text_pad_token_id", text_encoder.config.vocab_size - 1),
    ):
        if options[option] > limit:
            raise ValueError(
                f"`config` must have a {name} of at most {limit} in condition_codec_config, as the text encoder has, "
                f"got {options[option]}."
            )
    if tokenizer is not None and len(tokenizer) != text_encoder.config.vocab_size:
        raise ValueError(
            f"`tokenizer` must have the text encoder's {text_encoder.config.vocab_size} tokens, got {len(tokenizer)}."
        )
    return {**options, "text_encoder": text_encoder, "tokenizer": tokenizer}, dropped


def convert(
    checkpoint: str | Path,
    config: str | Path,
    codec_config: str | Path | None = None,
    output: str | Path | None = None,
    mapping: str | Path | None = None,
    tokenizer: str | Path | None = None,
    use_ema: bool = True,
    part: str | None = None,
) -> dict[str, str]:
    """
    Writes the folder `output`: a pipeline, and its codec's image processor; or without `codec_config` a pipeline that
    has no tokenizer.

    Args:
        checkpoint, config, codec_config, mapping (`str` or `Path`): the original's files.
        tokenizer (`str` or `Path`, *optional*): a folder with CLIP's vocabulary.
        output (`str` or `Path`): the folder.
        use_ema: see `convert_model`.
        part (`str`, *optional*): one of `PARTS`; by default all that the files make.

    Returns:
        for each key that is not used, why.

    Raises:
        ValueError: as `convert_model`, for a file that cannot be read, or a part that the files do not make.
    """
    files = {"checkpoint": checkpoint, "config": config, "codec_config": codec_config, "mapping": mapping}
    with written_folder(output) as folder, errors_name(**files, tokenizer=tokenizer):
        pipeline, dropped = convert_model(
            read_model(config, "config"),
            load_checkpoint(checkpoint),
            None if codec_config is None else read_model(codec_config, "codec_config"),
            None if mapping is None else load_checkpoint(mapping, "mapping"),
            None if tokenizer is None else read_tokenizer(tokenizer, CLIPTokenizer),
            use_ema,
        )
        _save(pipeline, folder, part)
        return dropped


def _save(pipeline: VQDiffusionImagePipeline, folder: Path, part: str | None) -> None:
    found = {"tokenizer": pipeline.vqvae, "transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    check_part(part, tuple(name for name in PARTS if found.get(name, pipeline) is not None))
    if part == "tokenizer":
        save_tokenizer(pipeline.vqvae, folder)
    elif part == "transformer":
        save_with_code(pipeline.transformer, folder)
    elif part == "text_encoder":
        pipeline.text_encoder.save_pretrained(folder)
        if pipeline.tokenizer is not None:
            pipeline.tokenizer.save_pretrained(folder)
    else:
        save_with_code(pipeline, folder)
        if pipeline.vqvae is not None:
            save_image_processor(pipeline.vqvae, folder / "vqvae")


def main(arguments: list[str] | None = None) -> None:
    """Runs the converter by its command line arguments."""
    parser = argument_parser("An original VQ-Diffusion model to hf_vq.")
    parser.add_argument("--config", required=True, help="the YAML that the checkpoint was trained with")
    parser.add_argument("--codec_config", help="the YAML of its image codec, which is left out without")
    parser.add_argument("--mapping", help="the file that says which of the codec's codes are in use")
    parser.add_argument("--tokenizer", help="a folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--live", action="store_true", help="take the model's own weights, not their averages")
    parser.add_argument("--part", choices=PARTS, help="(default: all that the files make)")
    options = parser.parse_args(arguments)
    dropped = convert(
        options.checkpoint,
        options.config,
        options.codec_config,
        options.output,
        options.mapping,
        options.tokenizer,
        not options.live,
        options.part,
    )
    print_dropped(dropped)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub, "Upload converted weights"))
