"""First stages of the original VQGAN code (CompVis/taming-transformers), and of latent diffusion, as `VQGANModel`s."""

import torch

from ..models.autoencoders.configuration_vqgan import VQGANConfig
from ..models.autoencoders.modeling_vqgan import VQGANModel
from ..training.objectives.discriminator import PatchDiscriminator
from .checkpoints import drop_keys, load_exactly


# Name in `ddconfig` → name in `VQGANConfig`. The weights need no table: `VQGANModel` has the original's names.
NETWORK_FIELDS = {
    "attn_resolutions": "attn_resolutions",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "dropout": "dropout",
    "in_channels": "in_channels",
    "num_res_blocks": "num_res_blocks",
    "out_ch": "out_channels",
    "resolution": "resolution",
    "z_channels": "latent_channels",
}
# Arguments of the original's models that do not change what a trained model computes.
TRAINING_PARAMS = {
    "ckpt_path",
    "colorize_nlabels",
    "ignore_keys",
    "image_key",
    "kl_weight",
    "lossconfig",
    "monitor",
    "n_labels",
    "remap",
    "sane_index_shape",
    "temperature_scheduler_config",
}
TARGETS = ("VQModel", "VQModelInterface", "VQNoDiscModel", "VQSegmentationModel", "GumbelVQ")
DROPPED_KEYS = {
    "loss.perceptual_loss.": "the perceptual network, which is not part of the model",
    "loss.discriminator.": "the discriminator, which only training needs; --discriminator saves it",
    "colorize": "random colours for logging segmentation maps",
    "quantize.used": "the table of a renumbering: the model gives the codebook's own indices, and "
    "hf_vq.models.quantizers.index_remap.IndexRemap renumbers them",
}


def tokenizer_config(model: dict) -> VQGANConfig:
    """The configuration of a first stage.

    Args:
        model: the `model` section of the original's YAML, with `target` and `params`.

    Raises:
        ValueError: for a class, or an argument, that `VQGANModel` has no equivalent of.
    """
    target, params = model["target"].rpartition(".")[2], model["params"]
    if target not in TARGETS:
        raise ValueError(f"`config` has a first stage of the class {model['target']}; known: {', '.join(TARGETS)}.")
    unknown = sorted(set(params) - TRAINING_PARAMS - {"ddconfig", "embed_dim", "n_embed"})
    if unknown:
        raise ValueError(f"`config` has parameters of {target} that are not known: {unknown}.")

    network = dict(params["ddconfig"])
    attention = network.pop("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise ValueError(f"`config` must have attn_type vanilla or none in ddconfig, got {attention}.")
    if attention == "none":  # the mid block's too
        network["attn_resolutions"] = []
    for name, default, wanted in (("double_z", True, False), ("resamp_with_conv", True, True)):
        if network.pop(name, default) != wanted:
            raise ValueError(f"`config` must have {name}={wanted} in ddconfig: VQGANModel has no other.")
    unknown = sorted(set(network) - set(NETWORK_FIELDS))
    if unknown:
        raise ValueError(f"`config` has names in ddconfig that are not known: {unknown}.")
    fields = {NETWORK_FIELDS[name]: value for name, value in network.items()}
    fields["mid_attention"] = attention == "vanilla"

    if target == "GumbelVQ":
        if fields["latent_channels"] != params["embed_dim"]:
            raise ValueError(
                "`config` must have embed_dim = z_channels for a GumbelVQ, which feeds one to the other, got "
                f"{params['embed_dim']} and {fields['latent_channels']}."
            )
        # the defaults are the original's
        quantizer = {"quantizer": "gumbel", "quantizer_kwargs": {"kl_weight": params.get("kl_weight", 1e-8)}}
    else:
        # fixed in the original's code: β = 0.25, on the codebook's term
        quantizer = {"quantizer": "vq", "commitment_cost": 0.25, "legacy_beta": True}
    return VQGANConfig(embed_dim=params["embed_dim"], num_embeddings=params["n_embed"], **fields, **quantizer)


def convert_tokenizer(model: dict, state_dict: dict) -> tuple[VQGANModel, dict[str, str]]:
    """A first stage from the `model` section of its YAML and its weights.

    Returns:
        the model, and for each key that it does not use, why.

    Raises:
        ValueError: as `tokenizer_config`, or if the weights are not exactly those of the model.
    """
    weights, dropped = drop_keys(state_dict, DROPPED_KEYS)
    with torch.device("meta"):
        tokenizer = VQGANModel(tokenizer_config(model))
    load_exactly(tokenizer, weights)
    return tokenizer.eval(), dropped


def convert_discriminator(model: dict, state_dict: dict) -> tuple[PatchDiscriminator, dict]:
    """The discriminator in a first stage's checkpoint, and its constructor's arguments.

    Raises:
        ValueError: if there is none, or one with another normalisation.
    """
    prefix = "loss.discriminator."
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not weights:
        raise ValueError("`checkpoint` holds no discriminator (no key starts with loss.discriminator.).")
    params = model["params"]["lossconfig"].get("params", {})
    if params.get("use_actnorm", False):
        raise ValueError("`config` has use_actnorm=True, a normalisation that PatchDiscriminator does not have.")
    arguments = {
        "in_channels": params.get("disc_in_channels", 3),
        "base_channels": params.get("disc_ndf", 64),
        "num_layers": params.get("disc_num_layers", 3),
        "norm": "batch",
    }
    with torch.device("meta"):
        discriminator = PatchDiscriminator(**arguments)
    load_exactly(discriminator, weights)
    return discriminator.eval(), arguments
