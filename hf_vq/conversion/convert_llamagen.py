"""Image tokenizers and priors of LlamaGen (FoundationVision/LlamaGen) to hf_vq.

    hf-vq convert llamagen --checkpoint vq_ds16_c2i.pt --output folder
    hf-vq convert llamagen --checkpoint c2i_B_256.pt --tokenizer vq_ds16_c2i.pt --output folder

A tokenizer becomes a `VQGANModel`, a prior a `VQLlamaForCausalLM`, and both together a `VQAutoregressivePipeline`.
Nearly everything follows from the weights; `--config` is a JSON file with the arguments of the original's `VQModel`
or, of a prior, `ModelArgs`, which are checked against them. Those of the tokenizer beside a prior are
`--codec_config`.
"""

from pathlib import Path
from typing import Any

from ..argument_checks import check_integer
from ..hub import push_folder, save_with_code
from ..models.autoencoders.modeling_vqgan import VQGANModel
from ..pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from .checkpoints import (
    argument_parser,
    check_agrees,
    drop_keys,
    errors_name,
    print_dropped,
    save_image_processor,
    save_tokenizer,
    written_folder,
)
from .layouts import build, from_llamagen
from .llamagen_prior import convert_prior, is_prior
from .reading import Options, load_state_dict, read_arguments


ENTRIES = ("ema", "model", "module", "state_dict")  # "module" is DeepSpeed's
PARTS = ("tokenizer", "prior", "pipeline")
DROPPED_KEYS = {"quantize.codebook_used": "the history of the codes in use, which the original logs"}
# Arguments of the original's `VQModel` that follow from its weights → field of `VQGANConfig`.
ARGUMENT_FIELDS = {
    "codebook_size": "num_embeddings",
    "codebook_embed_dim": "embed_dim",
    "encoder_ch_mult": "channel_multiplier",
    "decoder_ch_mult": "decoder_channel_multiplier",
    "z_channels": "latent_channels",
    "ch": "base_channels",
    "num_res_blocks": "num_res_blocks",
}


def tokenizer_arguments(path: str | Path | None, name: str = "config") -> tuple[dict, dict]:
    """The arguments of the original's `VQModel` in a JSON or YAML file.

    Returns:
        fields of `VQGANConfig` that are not in the weights, and arguments that must agree with them.

    Raises:
        ValueError: as `read_config`, or for an argument that the original's `VQModel` does not have.
    """
    options = Options(read_arguments(path, name), "the arguments of VQModel", name)
    agreeing = {name: options.take(name) for name in ARGUMENT_FIELDS if name in options.values}
    fields = {
        "quantizer": "cosine" if options.flag("codebook_l2_norm", True) else "vq",
        "commitment_cost": options.number("commit_loss_beta", 0.25),
        "dropout": options.number("dropout_p", 0.0, below=1),
    }
    entropy_weight = options.number("entropy_loss_ratio", 0.0)
    if entropy_weight:
        fields["quantizer_kwargs"] = {"entropy_weight": entropy_weight}
    options.training_only("codebook_show_usage")  # what is logged
    options.finish()
    return fields, agreeing


def convert_tokenizer(state_dict: dict, resolution: int = 256, **fields: Any) -> tuple[VQGANModel, dict[str, str]]:
    """A tokenizer from the original's `VQModel.state_dict()`.

    Args:
        state_dict: the weights.
        resolution: side of the images, in pixels, which the weights do not hold; other sizes work.
        fields: of `VQGANConfig`, such as `commitment_cost`.

    Returns:
        the model, and for each key that it does not use, why.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    weights, dropped = drop_keys(state_dict, DROPPED_KEYS)
    return build(from_llamagen(weights), resolution, **{"quantizer": "cosine", **fields}), dropped


def convert(
    checkpoint: str | Path,
    output: str | Path,
    config: str | Path | None = None,
    resolution: int = 256,
    live: bool = False,
    part: str | None = None,
    tokenizer: str | Path | None = None,
    codec_config: str | Path | None = None,
) -> dict[str, str]:
    """
    Writes the folder `output`: a tokenizer and its image processor, a prior, or a pipeline.

    Args:
        checkpoint, output (`str` or `Path`): the original's file, and the folder.
        config (`str` or `Path`, *optional*): a JSON file with the arguments of the original's `VQModel`, or of a prior
            `ModelArgs`.
        resolution (`int`): side of the images in pixels.
        live (`bool`): take the weights themselves where the file has their averages also.
        part (`str`, *optional*): "tokenizer", "prior" or "pipeline"; by default what the files make.
        tokenizer, codec_config (`str` or `Path`, *optional*): beside a prior, the tokenizer's file and its arguments.

    Returns:
        for each key that is not used, why.

    Raises:
        ValueError: files that do not make the part, or do not fit each other.
    """
    files = {"checkpoint": checkpoint, "config": config, "tokenizer": tokenizer, "codec_config": codec_config}
    files["resolution"] = None
    with written_folder(output) as folder, errors_name(**files):
        return _convert(checkpoint, folder, config, resolution, live, part, tokenizer, codec_config)


def _convert(
    checkpoint, output: Path, config, resolution: int, live: bool, part: str | None, tokenizer, codec_config
) -> dict[str, str]:
    resolution = check_integer("resolution", resolution, minimum=1)
    state_dict = load_state_dict(checkpoint, entries=ENTRIES[1:] if live else ENTRIES)
    found = "tokenizer" if not is_prior(state_dict) else "prior" if tokenizer is None else "pipeline"
    if part not in (None, found) and not (part == "prior" and found == "pipeline"):
        raise ValueError(
            f"`--part` must be one of {PARTS}, and one that the files hold: `--checkpoint` {checkpoint} "
            f"{'with' if tokenizer is not None else 'without'} `--tokenizer` makes a {found}, got {part!r}."
        )
    if found == "tokenizer":
        if tokenizer is not None:
            raise ValueError(f"`--tokenizer` goes with a prior, but `--checkpoint` {checkpoint} is a tokenizer.")
        model, dropped = _read_tokenizer(state_dict, config, resolution)
        save_tokenizer(model, output)
        return dropped
    arguments = read_arguments(config)
    if part == "prior" or tokenizer is None:
        prior, dropped = convert_prior(state_dict, arguments)
        save_with_code(prior, output)
        return dropped
    codec = load_state_dict(tokenizer, "tokenizer", entries=ENTRIES[1:] if live else ENTRIES)
    vqvae, codec_dropped = _read_tokenizer(codec, codec_config, resolution, "codec_config")
    prior, dropped = convert_prior(state_dict, arguments, resolution // vqvae.config.downsample_factor)
    save_with_code(VQAutoregressivePipeline(vqvae=vqvae, prior=prior), output)
    save_image_processor(vqvae, output / "vqvae")
    return dropped | {f"tokenizer {key}": why for key, why in codec_dropped.items()}


def _read_tokenizer(
    state_dict: dict, config, resolution: int, name: str = "config"
) -> tuple[VQGANModel, dict[str, str]]:
    """The tokenizer, whose arguments are checked, and what is not used."""
    fields, agreeing = tokenizer_arguments(config, name)
    tokenizer, dropped = convert_tokenizer(state_dict, resolution, **fields)
    for argument, value in agreeing.items():
        check_agrees(argument, value, getattr(tokenizer.config, ARGUMENT_FIELDS[argument]), name)
    return tokenizer, dropped


def main(arguments: list[str] | None = None) -> None:
    """Runs the converter by its command line arguments."""
    parser = argument_parser("An image tokenizer or a prior of LlamaGen, or both, to hf_vq.")
    parser.add_argument(
        "--config", help="JSON with the arguments of the original's VQModel or ModelArgs, to be checked"
    )
    parser.add_argument("--part", choices=PARTS, help="(default: what the files make)")
    parser.add_argument("--tokenizer", help="of a prior: the file of its tokenizer, for a pipeline")
    parser.add_argument("--codec_config", help="JSON with the arguments of the VQModel in --tokenizer")
    parser.add_argument("--resolution", type=int, default=256, help="of the images (default: %(default)s)")
    parser.add_argument("--live", action="store_true", help="take the weights themselves, not their averages")
    options = parser.parse_args(arguments)
    dropped = convert(
        options.checkpoint,
        options.output,
        options.config,
        options.resolution,
        options.live,
        options.part,
        options.tokenizer,
        options.codec_config,
    )
    print_dropped(dropped)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub, "Upload converted weights"))
