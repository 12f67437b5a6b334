"""First stages of the original VQGAN code (CompVis/taming-transformers), and of latent diffusion, as `VQGANModel`s."""

from pathlib import Path

import torch

from ..models.autoencoders.configuration_vqgan import VQGANConfig
from ..models.autoencoders.modeling_vqgan import VQGANModel
from ..training.objectives.discriminator import PatchDiscriminator
from .checkpoints import drop_keys, load_exactly
from .reading import Options


# Name in `ddconfig` → name in `VQGANConfig`. The weights need no table: `VQGANModel` has the original's names.
NETWORK_COUNTS = {
    "ch": "base_channels",
    "in_channels": "in_channels",
    "out_ch": "out_channels",
    "resolution": "resolution",
    "z_channels": "latent_channels",
}
# Arguments of every first stage that do not change what a trained model computes.
TRAINING_PARAMS = (
    "batch_resize_range",
    "ckpt_path",
    "colorize_nlabels",
    "ignore_keys",
    "image_key",
    "lossconfig",
    "lr_g_factor",
    "monitor",
    "sane_index_shape",
    "scheduler_config",
)
# VQ-Diffusion has a copy of the code.
TAMING_MODULES = ("taming.", "image_synthesis.taming.")
TARGETS = ("VQModel", "VQModelInterface", "VQNoDiscModel", "VQSegmentationModel", "EMAVQ", "GumbelVQ")
DISCRIMINATOR = "loss.discriminator."
DROPPED_KEYS = {
    "loss.perceptual_loss.": "the perceptual network, which is not part of the model",
    DISCRIMINATOR: "the discriminator, which only training needs; --discriminator saves it",
    "colorize": "random colours for logging segmentation maps",
}
AVERAGES = "model_ema."
# A codebook of moving averages as the original updates it (EMAVQ).
EMA_CODEBOOK = {
    "quantize.embedding.weight": "quantize.embedding",
    "quantize.embedding.embed_avg": "quantize.embed_avg",
    "quantize.embedding.cluster_size": "quantize.cluster_size",
}


def tokenizer_config(model: dict, num_used: int | None = None, argument: str = "config") -> VQGANConfig:
    """The configuration of a first stage.

    Args:
        model: the `model` section of the original's YAML, with `target` and `params`.
        num_used: length of the checkpoint's table of the codes in use, for a configuration with `remap`.
        argument: that `model` comes from, for errors.

    Raises:
        ValueError: for a class, or an argument, that `VQGANModel` has no equivalent of.
    """
    node = Options(model, "model", argument)
    path = str(node.take("target"))
    target = path.rpartition(".")[2]
    if target not in TARGETS:
        raise ValueError(f"`{argument}` has a first stage of the class {path}; known: {', '.join(TARGETS)}.")
    params = node.section("params")
    params.training_only(*TRAINING_PARAMS)
    if params.values.get("lossconfig") is not None:
        params.node("lossconfig")
    embed_dim, num_embeddings = params.count("embed_dim"), params.count("n_embed")
    fields = network_fields(params.section("ddconfig"), is_taming=path.startswith(TAMING_MODULES))
    if target == "VQSegmentationModel":
        params.training_only("n_labels")
    if path.startswith("ldm."):
        params.training_only("use_ema")  # the averages are found in the checkpoint
    remap = params.take("remap", None)
    if (remap is None) != (num_used is None):
        has = (
            "lacks quantize.used, the table" if num_used is None else "has quantize.used, a table that `config` lacks"
        )
        raise ValueError(f"`checkpoint` {has} of the codes in use; `{argument}` has remap={remap!r}.")
    if target == "GumbelVQ":
        if fields["latent_channels"] != embed_dim:
            raise ValueError(
                f"`{argument}` must have embed_dim = z_channels for a GumbelVQ, which feeds one to the other, got "
                f"{embed_dim} and {fields['latent_channels']}."
            )
        kwargs = {"kl_weight": params.number("kl_weight", 1e-8), **temperature_schedule(params)}
        quantizer = {"quantizer": "gumbel", "quantizer_kwargs": kwargs}
        if num_used is not None:  # its draw is among the codes in use alone, its prior is uniform over all
            kwargs["prior_size"], num_embeddings = num_embeddings, num_used
    elif target == "EMAVQ":
        kwargs = {"decay": 0.99, "zero_debias": False, "restart_threshold": 0.0, "count_smoothing": "laplace"}
        quantizer = {"quantizer": "ema", "quantizer_kwargs": kwargs, "commitment_cost": 0.25}
    else:
        # fixed in the original's code: β = 0.25, on the codebook's term
        quantizer = {"quantizer": "vq", "commitment_cost": 0.25, "legacy_beta": True}
    if num_used is not None and target != "GumbelVQ":
        quantizer |= {"remapped_from": num_embeddings, "unknown_code": "random"}
        num_embeddings = num_used
    params.finish()
    return VQGANConfig(embed_dim=embed_dim, num_embeddings=num_embeddings, **fields, **quantizer)


def network_fields(network: Options, is_taming: bool) -> dict:
    """The fields of `VQGANConfig` for a `ddconfig`. The code of taming-transformers ignores the later options."""
    fields = {ours: network.count(name) for name, ours in NETWORK_COUNTS.items()}
    fields["num_res_blocks"] = network.depth("num_res_blocks")
    fields["attn_resolutions"] = network.counts("attn_resolutions")
    fields["channel_multiplier"] = network.counts("ch_mult", [1, 2, 4, 8])
    fields["dropout"] = network.number("dropout", 0.0, below=1)
    network.only("double_z", False, default=True)
    fields["resamp_with_conv"] = network.flag("resamp_with_conv", True)
    fields["give_pre_end"] = network.flag("give_pre_end", False)
    if is_taming:
        network.training_only("attn_type", "use_linear_attn", "tanh_out")
    else:
        attention = network.only("attn_type", "vanilla", "none", "linear", default="vanilla")
        attention = "linear" if network.flag("use_linear_attn", False) else attention
        if attention == "none":  # the mid block's too
            fields |= {"attn_resolutions": [], "mid_attention": False}
        else:
            fields["attention_type"] = attention
        fields["tanh_out"] = network.flag("tanh_out", False)
    network.finish()
    return fields


def temperature_schedule(params: Options) -> dict:
    """The arguments of `GumbelQuantizer` for the schedule of its temperature; without one it stays at 1."""
    if params.take("temperature_scheduler_config", None) is None:
        return {"temperature": 1.0}
    target, schedule = params.node("temperature_scheduler_config")
    if target != "LambdaWarmUpCosineScheduler":
        raise ValueError(
            f"`{params.argument}` has the schedule {target} for its temperature; known: LambdaWarmUpCosineScheduler."
        )
    schedule.training_only("verbosity_interval")
    arguments = {
        "temperature_start": schedule.number("lr_start"),
        "temperature": schedule.number("lr_max"),
        "temperature_end": schedule.number("lr_min"),
        "warmup_steps": schedule.count("warm_up_steps", minimum=0),
        "decay_steps": schedule.count("max_decay_steps"),
    }
    schedule.finish()
    if not arguments["warmup_steps"]:
        del arguments["temperature_start"]  # which no step has
    return arguments


def convert_tokenizer(model: dict, state_dict: dict, use_ema: bool = True) -> tuple[VQGANModel, dict[str, str]]:
    """A first stage from the `model` section of its YAML and its weights.

    Args:
        model: with `target` and `params`.
        state_dict: the checkpoint's.
        use_ema: take the averages of the weights, where the checkpoint has them (`use_ema` of latent diffusion).

    Returns:
        the model, and for each key that it does not use, why.

    Raises:
        ValueError: as `tokenizer_config`, or if the weights are not exactly those of the model.
    """
    weights, dropped = drop_keys(state_dict, DROPPED_KEYS)
    weights, reasons = choose_averages(weights, use_ema)
    dropped |= reasons
    used = weights.pop("quantize.used", None)
    config = tokenizer_config(model, None if used is None else len(used))
    if config.quantizer == "ema":
        weights = {EMA_CODEBOOK.get(key, key): value for key, value in weights.items()}
        weights["quantize.num_updates"] = torch.zeros((), dtype=torch.int64)  # only zero-debiased codebooks read it
    if used is not None:
        if config.quantizer == "gumbel":
            weights = _restricted(weights, used)
        else:
            weights = remapped(weights, used, _indices_of(used, config.remapped_from))
    with torch.device("meta"):
        tokenizer = VQGANModel(config)
    load_exactly(tokenizer, weights)
    return tokenizer.eval(), dropped


def choose_averages(state_dict: dict, use_ema: bool) -> tuple[dict, dict[str, str]]:
    """The averages of weights (`model_ema.*`) under the names of the live ones, or these, and why which keys are
    dropped.

    The original's names of averages lack the dots. Buffers have no averages.
    """
    averages = {key.removeprefix(AVERAGES): key for key in state_dict if key.startswith(AVERAGES)}
    live = {key: value for key, value in state_dict.items() if not key.startswith(AVERAGES)}
    if not averages or not use_ema:
        return live, dict.fromkeys(averages.values(), "averages, which are taken without --live")
    found = {key: averages[key.replace(".", "")] for key in live if key.replace(".", "") in averages}
    missing = [key for key in live if key not in found and key.endswith((".weight", ".bias"))]
    if missing:
        raise ValueError(f"`checkpoint` lacks the average of {missing[0]}; convert its own weights (--live).")
    dropped = dict.fromkeys(found, "weights before averaging; --live takes them")
    dropped |= dict.fromkeys(set(averages.values()) - set(found.values()), "the average of a weight that is not used")
    return {key: state_dict[found.get(key, key)] for key in live}, dropped


def _restricted(weights: dict, used: torch.Tensor) -> dict:
    """A Gumbel codebook with its codes in use alone, which its draw is among."""
    names = ("quantize.proj.weight", "quantize.proj.bias", "quantize.embed.weight")
    return {name: value[used] if name in names else value for name, value in weights.items()}


def _indices_of(used: torch.Tensor, num_codes: int) -> torch.LongTensor:
    """The index of each code; -1 stands for one that is not in use."""
    table = torch.full((num_codes,), -1, dtype=torch.int64)
    table[used] = torch.arange(len(used))
    return table


def remapped(weights: dict, used: torch.Tensor, table: torch.Tensor) -> dict:
    """The weights of a tokenizer with `remapped_from`: all codes, and the tables that renumber them.

    Args:
        weights: of the tokenizer without the tables.
        used: int64 `(num_used,)`, the code of each index.
        table: int64 `(num_codes,)`, the index of each code.
    """
    new = {
        name.replace("quantize.", "quantize.quantizer.", 1) if name.startswith("quantize.") else name: value
        for name, value in weights.items()
    }
    return {**new, "quantize.remap.used": used.long(), "quantize.remap.table": table.long()}


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator
# ---------------------------------------------------------------------------------------------------------------------


def convert_discriminator(model: dict, state_dict: dict) -> PatchDiscriminator:
    """The discriminator in a first stage's checkpoint.

    ActNorm, an offset and a scale of each channel, goes into the convolution before it.

    Raises:
        ValueError: if there is none, or the configuration contradicts it.
    """
    weights = {k.removeprefix(DISCRIMINATOR): v for k, v in state_dict.items() if k.startswith(DISCRIMINATOR)}
    if not weights:
        raise ValueError(f"`checkpoint` holds no discriminator (no key starts with {DISCRIMINATOR}).")
    loss = Options(model["params"], "model.params").node("lossconfig")[1]
    has_actnorm = loss.take("use_actnorm", False)
    arguments = {
        "in_channels": loss.take("disc_in_channels", 3),
        "base_channels": loss.take("disc_ndf", 64),
        "num_layers": loss.take("disc_num_layers", 3),
        "norm": "none" if has_actnorm else "batch",
    }
    if has_actnorm:
        weights = _fold_actnorm(weights)
    with torch.device("meta"):
        discriminator = PatchDiscriminator(**arguments)
    load_exactly(discriminator, weights)
    return discriminator.eval()


def save_discriminator(model: dict, state_dict: dict, output: Path, dropped: dict[str, str]) -> dict[str, str]:
    """Writes the discriminator to `output/discriminator`, where `PatchDiscriminator.from_folder` and the training
    script find it, and returns what is still dropped.
    """
    convert_discriminator(model, state_dict).save(output / "discriminator")
    return {key: why for key, why in dropped.items() if not key.startswith(DISCRIMINATOR)}


def _fold_actnorm(weights: dict) -> dict:
    """scale · (W x + b + loc) = (scale · W) x + scale · (b + loc), of the convolution just before each ActNorm."""
    new = {key: value for key, value in weights.items() if not key.endswith((".loc", ".scale", ".initialized"))}
    for key in weights:
        if not key.endswith(".loc"):
            continue
        number = int(key.split(".")[1])
        scale, offset = weights[f"main.{number}.scale"].flatten(), weights[key].flatten()
        weight, bias = f"main.{number - 1}.weight", f"main.{number - 1}.bias"
        new[weight] = weights[weight] * scale[:, None, None, None]
        new[bias] = scale * (weights[bias] + offset)
    return new
