"""The image codecs of the original VQ-Diffusion code as tokenizers, whose indices are the diffusion model's."""

import torch

from ..models.autoencoders.configuration_vqgan import VQGANConfig
from ..models.autoencoders.modeling_vqgan import VQGANModel
from .checkpoints import load_exactly, split_by_prefix
from .reading import Options, is_count
from .taming_tokenizer import remapped, tokenizer_config


DECODER_FIELDS = ("num_res_blocks", "attn_resolutions", "latent_channels")
TRAINING_PARAMS = ("ckpt_path", "data_info", "ignore_keys", "lossconfig", "token_shape", "trainable")


def codec_config(model: dict) -> VQGANConfig:
    """The configuration of a codec with all its codes.

    Args:
        model: the `model` section of the codec's own YAML: a VQModel, a GumbelVQ, a Net2NetTransformer around one, or
            a PatchVQGAN.

    Raises:
        ValueError: for a class, or an argument, that `VQGANModel` has no equivalent of.
    """
    target = model["target"].rpartition(".")[2]
    params = Options(model.get("params"), "model.params", "codec_config")
    if target == "Net2NetTransformer":
        model = params.section("first_stage_config").values
    try:
        return _patch_config(params) if target == "PatchVQGAN" else tokenizer_config(model, argument="codec_config")
    except ValueError as error:  # of our own configuration
        text = str(error)
        raise ValueError(
            text if text.startswith(("`codec_config`", "`checkpoint`")) else f"`codec_config`: {text}"
        ) from error


def _patch_config(params: Options) -> VQGANConfig:
    """Its quantizer has moving averages, smoothed, that do not correct their start, and no weight on its one term."""
    params.training_only(*TRAINING_PARAMS)
    params.only("quantizer_type", "EMAVQ", default="VQ")  # the original's code has no other class, its default neither
    metric = params.only("quantizer_dis_type", "euclidean", "cosine", default="euclidean")
    quantizer = {
        "decay": params.number("decay", 0.99, below=1),
        "zero_debias": False,
        "restart_threshold": 0,
        "count_smoothing": "laplace",
        "epsilon": 1e-5,
        "by_angle": metric == "cosine",
    }
    embed_dim, num_embeddings = params.count("embed_dim"), params.count("n_embed")
    fields = _patch_networks(params)
    params.finish()
    return VQGANConfig(
        embed_dim=embed_dim,
        num_embeddings=num_embeddings,
        quantizer="ema",
        quantizer_kwargs=quantizer,
        commitment_cost=1.0,
        **fields,
    )


def _patch_networks(params: Options) -> dict:
    """The fields of `VQGANConfig` for the encoder and the decoder."""
    encoder, decoder = (_patch_network(params, f"{part}_config") for part in ("encoder", "decoder"))
    widths = [decoder["base_channels"] * multiplier for multiplier in decoder.pop("channel_multiplier")]
    multipliers, base = encoder.pop("channel_multiplier"), encoder["base_channels"]
    if len(widths) != len(multipliers) or any(width % base for width in widths):
        raise ValueError(
            f"`codec_config` must have as many widths in its decoder as in its encoder, all multiples of "
            f"{base} (the encoder's ch), got {widths}."
        )
    shorter = min(encoder["resolution"])
    for network in (encoder, decoder):  # the sizes say where attention is, and nothing else
        network["attn_resolutions"] = [shorter // 2**level for level in network.pop("attended_levels")]
    own = {f"decoder_{name}": decoder[name] for name in DECODER_FIELDS if decoder[name] != encoder[name]}
    decoder |= {name: encoder[name] for name in (*DECODER_FIELDS, "base_channels", "in_channels", "resolution")}
    encoder["out_channels"] = decoder["out_channels"]  # which the encoder does not read, as the decoder the other
    differing = [name for name, value in encoder.items() if decoder[name] != value]
    if differing:
        raise ValueError(
            f"`codec_config` must have one encoder and decoder but for their widths, depths and attention; they "
            f"differ in {differing}."
        )
    own["decoder_channel_multiplier"] = [width // base for width in widths]
    return {**encoder, "channel_multiplier": multipliers, **own}


def _patch_network(params: Options, name: str) -> dict:
    target, network = params.node(name)
    wanted = name.removesuffix("_config").capitalize()
    if target != wanted:
        raise ValueError(f"`codec_config` must have the class {wanted} as model.params.{name}, got {target}.")
    network.training_only("activate_output")  # no class of the original reads it
    multipliers = network.counts("ch_mult", [1, 2, 4, 8])
    network.only("double_z", False, default=False)
    halves = [i < len(multipliers) - 1 for i in range(len(multipliers))]
    scaled = network.take("scale_by_2", None)
    if scaled is not None and [bool(half) for half in scaled] != (halves if name[0] == "e" else halves[::-1]):
        raise ValueError(
            f"`codec_config` must have scale_by_2=None, or one that halves between all levels, in {network.where}, "
            f"got {scaled}: hf_vq has no other."
        )
    resolution = _sides(network.take("resolution"), "resolution")
    if name[0] == "d":  # which begins at the lowest level
        factor = 2 ** (len(multipliers) - 1)
        resolution = [side // factor * factor for side in resolution]
    fields = {
        "channel_multiplier": multipliers,
        "base_channels": network.count("ch"),
        "num_res_blocks": network.depth("num_res_blocks"),
        "latent_channels": network.count("z_channels"),
        "in_channels": network.count("in_channels", 3) if name[0] == "d" else network.count("in_channels"),
        "out_channels": network.count("out_ch"),
        "dropout": network.number("dropout", 0.0, below=1),
        "resamp_with_conv": network.flag("resamp_with_conv", True),
        "resolution": resolution,
        "attended_levels": _attended_levels(network.take("attn_resolutions"), resolution, len(multipliers)),
    }
    network.finish()
    return fields


def _attended_levels(sizes: list, resolution: list[int], num_levels: int) -> list[int]:
    """The levels, 0 the highest, whose height and width are among the sizes."""
    if not isinstance(sizes, (list, tuple)):
        raise ValueError(f"`codec_config` must have a list as attn_resolutions, got {sizes!r}.")
    pairs = [_sides(size, "attn_resolutions") for size in sizes]
    return [level for level in range(num_levels) if [side // 2**level for side in resolution] in pairs]


def _sides(size: int | list[int], name: str) -> list[int]:
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(map(is_count, sides)):
        raise ValueError(f"`codec_config` must have an int or [height, width] as {name}, got {size!r}.")
    return sides


def first_codes(mapping: torch.Tensor, num_embeddings: int, num_used: int) -> torch.LongTensor:
    """
    The code of the codebook that each index in use is decoded to: the first that `mapping` sends there.

    Args:
        mapping (int64 `(num_embeddings,)`): the index of each code; codes that are not in use have index 0.
        num_used: how many indices there are.

    Raises:
        ValueError: for a mapping of another length, or that leaves out an index.
    """
    if mapping.shape != (num_embeddings,) or mapping.is_floating_point():
        raise ValueError(
            f"`mapping` must hold {num_embeddings} integers, one for each code, got {mapping.dtype} of shape "
            f"{tuple(mapping.shape)}."
        )
    if mapping.unique().tolist() != list(range(num_used)):
        raise ValueError(f"`mapping` must hold every index from 0 to {num_used - 1} and no other.")
    codes = torch.arange(num_embeddings)
    return torch.full((num_used,), num_embeddings).scatter_reduce(0, mapping, codes, "amin")


def convert_codec(
    model: dict, state_dict: dict, mapping: torch.Tensor | None = None, num_used: int | None = None
) -> tuple[VQGANModel, dict[str, str]]:
    """
    A codec, whose checkpoint holds its quantizer twice.

    With a mapping, the tokenizer looks among all its codes as the original does, and its indices are the diffusion
    model's: a code that is not in use has index 0, whatever it looks like.

    Args:
        model: see `codec_config`.
        state_dict: keys under `enc.` and `dec.`.
        mapping, num_used: see `first_codes`.

    Returns:
        the tokenizer, and for each key that it does not use, why.

    Raises:
        ValueError: as `codec_config` and `first_codes`, or if the weights are not exactly those of the tokenizer.
    """
    config = codec_config(model)
    encoder, decoder = split_by_prefix(state_dict, ("enc.", "dec.")).values()
    copies = {key: value for key, value in decoder.items() if key.startswith("quantize.")}
    for key, value in copies.items():
        if key not in encoder or not (value.is_meta or torch.equal(value, encoder[key])):
            raise ValueError(f"`checkpoint` has a dec.{key} that is not enc.{key}, though they are one quantizer.")
    weights = {**decoder, **encoder}
    dropped = dict.fromkeys([f"dec.{key}" for key in copies], "the quantizer once more")
    if config.quantizer == "ema":
        weights = {key.replace("embedding_avg", "embed_avg"): value for key, value in weights.items()}
        # read only where the averages' start is corrected
        weights["quantize.num_updates"] = torch.zeros((), dtype=torch.int64)
    if mapping is not None:
        weights = remapped(weights, first_codes(mapping, config.num_embeddings, num_used), mapping)
        config.remapped_from, config.num_embeddings, config.unknown_code = config.num_embeddings, num_used, 0
    with torch.device("meta"):
        tokenizer = VQGANModel(config)
    load_exactly(tokenizer, weights)
    return tokenizer.eval(), dropped
