"""Checkpoints of the original VQ-Diffusion code (microsoft/VQ-Diffusion) to `VQDiffusionImagePipeline`s.

    hf-vq convert vq_diffusion --checkpoint human.pth --config human.yaml --codec_config codec.yaml \
        --mapping taming_vqvae_2887.pt --tokenizer clip --output folder
"""

from pathlib import Path

import torch
from transformers import CLIPTokenizer

from ..hub import save_with_code
from ..models.autoencoders.image_processing_vq import VQImageProcessor
from ..pipelines.pipeline_vq_diffusion import VQDiffusionImagePipeline
from .checkpoints import argument_parser, print_dropped, push_folder, split_by_prefix
from .reading import load_checkpoint, read_model
from .vq_diffusion_codec import convert_codec
from .vq_diffusion_network import TABLE_REASONS, convert_schedule, convert_transformer
from .vq_diffusion_text import convert_text_encoder, text_options


def chosen_weights(checkpoint: dict, use_ema: bool) -> tuple[dict, dict, dict[str, str]]:
    """
    The codec's weights, the others' as asked for, and for each key that is dropped, why.

    Raises:
        ValueError: if there are no weights, or the averages are not those of the model's weights.
    """
    if "model" not in checkpoint:
        raise ValueError(f"`checkpoint` must hold the entry `model`, got {list(checkpoint)[:5]}.")
    codec, live = split_by_prefix(checkpoint["model"], ("content_codec.", "transformer.")).values()
    averages = checkpoint.get("ema", {})
    if not use_ema or not averages:
        return codec, live, {f"ema.{key}": "averages, which are taken without --live" for key in averages}
    if set(averages) != set(live):
        key = min(set(averages) ^ set(live))
        raise ValueError(f"`checkpoint` has {key} only in one of `model` and `ema`; convert its own weights (--live).")
    return codec, dict(averages), {f"transformer.{key}": "weights before averaging; --live takes them" for key in live}


def codes_in_use(content_codec: dict, mapping: torch.Tensor | None) -> int | None:
    """
    How many codes the diffusion model knows, if not all.

    Args:
        content_codec: `params` of the YAML's `content_codec_config`.

    Raises:
        ValueError: a mapping that is missing or not asked for.
    """
    number = content_codec.get("quantize_number", 0)
    if number and mapping is None:
        raise ValueError(
            f"`mapping` is needed: the model knows {number} of the codec's {content_codec['num_tokens']} codes, and the file "
            f"{content_codec.get('mapping_path')} says which."
        )
    if mapping is not None and not number:
        raise ValueError("`mapping` must not be given: `config` has no quantize_number, so every code is in use.")
    return number or None


def convert_model(model: dict, checkpoint: dict, codec: dict, mapping=None, tokenizer=None, use_ema: bool = True):
    """
    A whole model.

    Args:
        model: the `model` section of the original's YAML.
        checkpoint: what its trainer saved, with the entries `model` and `ema`.
        codec: the `model` section of its image codec's own YAML.
        mapping (int64 `(codes,)`, *optional*): the index of each of the codec's codes, where not all are in use.
        tokenizer (`CLIPTokenizer`, *optional*): of the text encoder.
        use_ema: take the averages of the weights, where the checkpoint has them.

    Returns:
        a `VQDiffusionImagePipeline`, and for each key that is not used, why.

    Raises:
        ValueError: for a part that has no equivalent here, or a key that is missing or unknown.
    """
    params = model["params"]
    diffusion = params["diffusion_config"]["params"]
    num_used = codes_in_use(params["content_codec_config"]["params"], mapping)
    codec_weights, weights, dropped = chosen_weights(checkpoint, use_ema)
    tables = {key: weights.pop(key) for key in list(weights) if key in TABLE_REASONS}
    null_embedding = {key: weights.pop(key) for key in list(weights) if key == "empty_text_embed"}
    network, text = split_by_prefix(weights, ("transformer.", "condition_emb.")).values()

    scheduler = convert_schedule(diffusion, tables)
    transformer, network_reasons = convert_transformer(diffusion, {**network, **null_embedding})
    options, text_reasons = convert_text(params, text, tokenizer)
    vqvae, codec_reasons = convert_codec(codec, codec_weights, mapping, num_used)
    pipeline = VQDiffusionImagePipeline(vqvae=vqvae, transformer=transformer, scheduler=scheduler, **options)

    prefix = "ema." if use_ema and checkpoint.get("ema") else "transformer."
    for inner, reasons in (
        (prefix, {key: TABLE_REASONS[key] for key in tables}),
        (f"{prefix}transformer.", network_reasons),
        (f"{prefix}condition_emb.", text_reasons),
        ("content_codec.", codec_reasons),
    ):
        dropped |= {inner + key: reason for key, reason in reasons.items()}
    return pipeline, dropped


def convert_text(params: dict, state_dict: dict, tokenizer) -> tuple[dict, dict[str, str]]:
    """
    What the pipeline needs for texts.

    Args:
        params: `params` of the YAML's `model` section.
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
        return {}, {}
    condition = params["diffusion_config"]["params"]["condition_emb_config"]["params"]
    options = text_options(params["condition_codec_config"]["params"], condition)
    if not state_dict:
        return options, {}
    text_encoder, dropped = convert_text_encoder(state_dict)
    if tokenizer is not None and len(tokenizer) != text_encoder.config.vocab_size:
        raise ValueError(
            f"`tokenizer` must have the text encoder's {text_encoder.config.vocab_size} tokens, got {len(tokenizer)}."
        )
    return {**options, "text_encoder": text_encoder, "tokenizer": tokenizer}, dropped


def convert(
    checkpoint, config, codec_config, output, mapping=None, tokenizer=None, use_ema: bool = True
) -> dict[str, str]:
    """
    Writes the folder `output`: a pipeline, and its codec's image processor.

    Args:
        checkpoint, config, codec_config, mapping (`str` or `Path`): the original's files.
        tokenizer (`str` or `Path`, *optional*): a folder with CLIP's vocabulary.
        output (`str` or `Path`): the folder.
        use_ema: see `convert_model`.

    Returns:
        for each key that is not used, why.
    """
    output = Path(output)
    pipeline, dropped = convert_model(
        read_model(config, "config"),
        load_checkpoint(checkpoint),
        read_model(codec_config, "codec_config"),
        None if mapping is None else load_checkpoint(mapping),
        None if tokenizer is None else CLIPTokenizer.from_pretrained(tokenizer),
        use_ema,
    )
    save_with_code(pipeline, output)
    save_with_code(VQImageProcessor(size=pipeline.vqvae.config.resolution), output / "vqvae")
    return dropped


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("An original VQ-Diffusion model to hf_vq.")
    parser.add_argument("--config", required=True, help="the YAML that the checkpoint was trained with")
    parser.add_argument("--codec_config", required=True, help="the YAML of its image codec")
    parser.add_argument("--mapping", help="the file that says which of the codec's codes are in use")
    parser.add_argument("--tokenizer", help="a folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--live", action="store_true", help="take the model's own weights, not their averages")
    options = parser.parse_args(arguments)
    dropped = convert(
        options.checkpoint,
        options.config,
        options.codec_config,
        options.output,
        options.mapping,
        options.tokenizer,
        not options.live,
    )
    print_dropped(dropped)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub))
