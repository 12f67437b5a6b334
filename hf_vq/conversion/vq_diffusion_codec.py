"""The image codecs of the original VQ-Diffusion code as tokenizers that have only the codes in use."""

import torch

from ..models.autoencoders.configuration_vqgan import VQGANConfig
from ..models.autoencoders.modeling_vqgan import VQGANModel
from .checkpoints import load_exactly, split_by_prefix
from .taming_tokenizer import NETWORK_FIELDS, tokenizer_config


# Arguments of PatchVQGAN, and of its encoder and decoder, that do not change what a trained one computes.
PATCH_PARAMS = {
    "ckpt_path",
    "data_info",
    "decoder_config",
    "encoder_config",
    "ignore_keys",
    "lossconfig",
    "token_shape",
    "trainable",
}
UNREAD_NETWORK_PARAMS = {"activate_output"}
FIXED_NETWORK_PARAMS = {"double_z": False, "resamp_with_conv": True, "scale_by_2": None}


def codec_config(model: dict) -> VQGANConfig:
    """The configuration of a codec with all its codes.

    Args:
        model: the `model` section of the codec's own YAML: a VQModel, a GumbelVQ, a Net2NetTransformer around one, or
            a PatchVQGAN.

    Raises:
        ValueError: for a class, or an argument, that `VQGANModel` has no equivalent of.
    """
    target = model["target"].rpartition(".")[2]
    if target == "Net2NetTransformer":
        return tokenizer_config(model["params"]["first_stage_config"])
    return _patch_config(model["params"]) if target == "PatchVQGAN" else tokenizer_config(model)


def _patch_config(params: dict) -> VQGANConfig:
    """Its quantizer has moving averages, smoothed, that do not correct their start, and no weight on its one term."""
    fixed = {"quantizer_type": "EMAVQ", "quantizer_dis_type": "euclidean"}
    for name, wanted in fixed.items():
        if params.get(name, wanted) != wanted:
            raise ValueError(f"`codec_config` must have {name}={wanted}, got {params[name]}.")
    unknown = sorted(set(params) - PATCH_PARAMS - set(fixed) - {"decay", "embed_dim", "n_embed"})
    if unknown:
        raise ValueError(f"`codec_config` has parameters of PatchVQGAN that are not known: {unknown}.")
    networks = [_patch_network(params[f"{part}_config"]["params"]) for part in ("encoder", "decoder")]
    differing = [name for name, value in networks[1].items() if networks[0].get(name) != value]
    if differing:
        raise ValueError(f"`codec_config` must have one encoder and decoder, but they differ in {differing}.")
    quantizer = {
        "decay": params.get("decay", 0.99),
        "zero_debias": False,
        "restart_threshold": 0,
        "count_smoothing": "laplace",
        "epsilon": 1e-5,
    }
    return VQGANConfig(
        embed_dim=params["embed_dim"],
        num_embeddings=params["n_embed"],
        quantizer="ema",
        quantizer_kwargs=quantizer,
        commitment_cost=1.0,
        **networks[0],
    )


def _patch_network(params: dict) -> dict:
    for name, wanted in FIXED_NETWORK_PARAMS.items():
        if params.get(name, wanted) != wanted:
            raise ValueError(f"`codec_config` must have {name}={wanted}, got {params[name]}.")
    unknown = sorted(set(params) - set(NETWORK_FIELDS) - UNREAD_NETWORK_PARAMS - set(FIXED_NETWORK_PARAMS))
    if unknown:
        raise ValueError(f"`codec_config` has names of a network that are not known: {unknown}.")
    fields = {NETWORK_FIELDS[name]: value for name, value in params.items() if name in NETWORK_FIELDS}
    fields["resolution"] = _side(fields["resolution"])
    fields["attn_resolutions"] = [_side(size) for size in fields["attn_resolutions"]]
    return fields


def _side(size: int | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"`codec_config` must have square resolutions, got {size}.")
    return sides.pop()


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

    With a mapping, the tokenizer has only the codes in use, in its order, so that its indices are those of the
    diffusion model. The original looks among all codes and turns one that is not in use into index 0, whatever it
    looks like; here the nearest code in use is found.

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
        codes = first_codes(mapping, config.num_embeddings, num_used)
        weights |= {key: value[codes] for key, value in weights.items() if key.startswith("quantize.") and value.ndim}
        config.num_embeddings = num_used
    with torch.device("meta"):
        tokenizer = VQGANModel(config)
    load_exactly(tokenizer, weights)
    return tokenizer.eval(), dropped
