"""Image tokenizers of LlamaGen (FoundationVision/LlamaGen) to `VQGANModel`.

    hf-vq convert llamagen --checkpoint vq_ds16_c2i.pt --output folder

Everything but the resolution follows from the weights; `--config` is a JSON file with the arguments of the original's
`VQModel`, which are checked against them.
"""

from pathlib import Path

from ..models.autoencoders.modeling_vqgan import VQGANModel
from .checkpoints import (
    argument_parser,
    check_agrees,
    drop_keys,
    print_dropped,
    push_folder,
    save_tokenizer,
)
from .layouts import build, from_llamagen
from .reading import Options, load_state_dict, read_config


ENTRIES = ("ema", "model", "state_dict")  # the original takes them in this order
DROPPED_KEYS = {"quantize.codebook_used": "the history of the codes in use, which the original logs"}
# Arguments of the original's `VQModel` that follow from its weights → field of `VQGANConfig`.
ARGUMENT_FIELDS = {
    "codebook_size": "num_embeddings",
    "codebook_embed_dim": "embed_dim",
    "encoder_ch_mult": "channel_multiplier",
    "decoder_ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "ch": "base_channels",
    "num_res_blocks": "num_res_blocks",
}


def read_arguments(path: str | Path | None) -> tuple[dict, dict, dict[str, str]]:
    """The arguments of the original's `VQModel` in a JSON or YAML file.

    Returns:
        fields of `VQGANConfig` that are not in the weights; arguments that must agree with them; and for each argument that
        is not used, why.

    Raises:
        ValueError: as `read_config`, or for an argument that the original's `VQModel` does not have.
    """
    content = {} if path is None else read_config(path)
    flat = {name: value for name, value in content.items() if name not in ("params", "target")} | content.get(
        "params", {}
    )
    options = Options(flat, "the arguments of VQModel")
    agreeing = {name: options.take(name) for name in ARGUMENT_FIELDS if name in flat}
    fields = {
        "quantizer": "cosine" if options.take("codebook_l2_norm", True) else "vq",
        "commitment_cost": options.take("commit_loss_beta", 0.25),
        "dropout": options.take("dropout_p", 0.0),
    }
    dropped = {}
    if options.take("entropy_loss_ratio", 0.0):
        dropped["--config entropy_loss_ratio"] = "the weight of a loss of its training, which hf_vq does not have"
    options.training_only("codebook_show_usage")  # what is logged
    options.finish()
    return fields, agreeing, dropped


def convert_tokenizer(state_dict: dict, resolution: int = 256, **fields) -> tuple[VQGANModel, dict[str, str]]:
    """A tokenizer from the original's `VQModel.state_dict()`.

    Args:
        state_dict: the weights.
        resolution: side of the images, in pixels, which the weights do not hold; other sizes work.
        fields: of `VQGANConfig`, such as `commitment_cost`.

    Returns:
        the model, and for each key that it does not use, why.

    Raises:
        ValueError: for a key that is missing or unknown, or a decoder of other widths than the encoder's.
    """
    weights, dropped = drop_keys(state_dict, DROPPED_KEYS)
    return build(from_llamagen(weights), resolution, **{"quantizer": "cosine", **fields}), dropped


def convert(checkpoint, output, config=None, resolution: int = 256, live: bool = False) -> dict[str, str]:
    """
    Writes the folder `output`: the model and its image processor.

    Args:
        checkpoint, output (`str` or `Path`): the original's file, and the folder.
        config (`str` or `Path`, *optional*): a JSON file with the arguments of the original's `VQModel`.
        resolution (`int`): side of the images in pixels.
        live (`bool`): take the weights themselves where the file has their averages also.

    Returns:
        for each key that is not used, why.
    """
    fields, agreeing, reasons = read_arguments(config)
    state_dict = load_state_dict(checkpoint, entries=ENTRIES[1:] if live else ENTRIES)
    tokenizer, dropped = convert_tokenizer(state_dict, resolution, **fields)
    for name, value in agreeing.items():
        check_agrees(name, value, getattr(tokenizer.config, ARGUMENT_FIELDS[name]))
    save_tokenizer(tokenizer, output)
    return dropped | reasons


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("An image tokenizer of LlamaGen to hf_vq.")
    parser.add_argument("--config", help="JSON with the arguments of the original's VQModel, to be checked")
    parser.add_argument("--resolution", type=int, default=256, help="of the images (default: %(default)s)")
    parser.add_argument("--live", action="store_true", help="take the weights themselves, not their averages")
    options = parser.parse_args(arguments)
    print_dropped(convert(options.checkpoint, options.output, options.config, options.resolution, options.live))
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub))
