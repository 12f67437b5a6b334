"""Checkpoints of rosinality/vq-vae-2-pytorch to hf_vq.

    hf-vq convert rosinality --checkpoint vqvae.pt --output folder
    hf-vq convert rosinality --checkpoint pixelsnail_top.pt --output folder
    hf-vq convert rosinality --checkpoint vqvae.pt --top top.pt --bottom bottom.pt --output folder

A VQVAE becomes a `VQVAE2Model`, a PixelSNAIL a `PixelSNAILForCausalLM`, and all three together a `VQVAE2Pipeline`.
"""

import re
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..hub import push_folder, save_with_code
from ..models.autoencoders.configuration_vqvae2 import VQVAE2Config
from ..models.autoencoders.modeling_vqvae2 import VQVAE2Model
from ..models.priors.configuration_pixelsnail import PixelSNAILConfig
from ..models.priors.modeling_pixelsnail import PixelSNAILForCausalLM
from ..pipelines.pipeline_vqvae2 import VQVAE2Pipeline
from .checkpoints import (
    argument_parser,
    check_agrees,
    drop_keys,
    errors_name,
    load_exactly,
    print_dropped,
    save_image_processor,
    save_tokenizer,
    written_folder,
)
from .reading import Options, load_checkpoint, read_arguments, tensors_of


# ------------------------------------------------------------------------------------------------ reading


def load(path: str | Path, name: str = "checkpoint") -> tuple[dict[str, torch.Tensor], dict]:
    """The weights of a checkpoint, and the arguments of the training script.

    Raises:
        ValueError: naming the argument `name`, as `load_state_dict`.
    """
    checkpoint = load_checkpoint(path, name)
    state_dict = tensors_of(checkpoint, path, name, entries=("model",))
    arguments = checkpoint.get("args", {})
    arguments = arguments if isinstance(arguments, dict) else vars(arguments)
    return state_dict, arguments


def is_pixelsnail(state_dict: dict) -> bool:
    """Whether weights are the original's `PixelSNAIL`, which alone has a `background`."""
    return "background" in state_dict


def _shape(state_dict: dict, key: str) -> torch.Size:
    if key not in state_dict:
        raise ValueError(f"`checkpoint` lacks the key {key}.")
    return state_dict[key].shape


def _count(state_dict: dict, pattern: str) -> int:
    """How many numbers the group of `pattern` takes in the keys that it matches."""
    return len({match[1] for match in (re.match(pattern, key) for key in state_dict) if match})


# ------------------------------------------------------------------------------------------------ the tokenizer


def vqvae_modules(num_residual_layers: int) -> dict[str, str]:
    """Original module → ours. The layers are numbered along with the activations between them."""
    modules = {
        "enc_b.blocks.0": "encoder.1.down.0",
        "enc_b.blocks.2": "encoder.1.down.1",
        "enc_b.blocks.4": "encoder.1.conv_out",
        "enc_t.blocks.0": "encoder.0.down.0",
        "enc_t.blocks.2": "encoder.0.conv_out",
        "quantize_conv_t": "quant_conv.0",
        "quantize_conv_b": "quant_conv.1",
        "dec_t.blocks.0": "conditioner.0.conv_in",
        f"dec_t.blocks.{num_residual_layers + 2}": "conditioner.0.up.0",
        "upsample_t": "upsample.0",
        "dec.blocks.0": "decoder.conv_in",
        f"dec.blocks.{num_residual_layers + 2}": "decoder.up.0",
        f"dec.blocks.{num_residual_layers + 4}": "decoder.up.1",
    }
    stacks = {
        "enc_b": ("encoder.1", 5),
        "enc_t": ("encoder.0", 3),
        "dec_t": ("conditioner.0", 1),
        "dec": ("decoder", 1),
    }
    for source, (target, first) in stacks.items():
        for i in range(num_residual_layers):
            layer = f"{target}.residual_stack.layers.{i}"
            modules[f"{source}.blocks.{first + i}.conv.1"] = f"{layer}.conv1"
            modules[f"{source}.blocks.{first + i}.conv.3"] = f"{layer}.conv2"
    return modules


CODEBOOK = {"embed": "embedding", "embed_avg": "embed_avg", "cluster_size": "cluster_size"}


def convert_vqvae(state_dict: dict, resolution: int = 256) -> VQVAE2Model:
    """
    The original's `VQVAE`. Its codebooks go on learning as they did: decay 0.99 whatever the arguments of its training
    said, and smoothed counts (`count_smoothing="laplace"`). A code whose count is 0 keeps its vector, which the
    original divides by almost 0.

    Args:
        state_dict (`dict`): the original's `model.state_dict()`.
        resolution (`int`): side of the images it was trained on, in pixels, which the checkpoint does not hold.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    depth = _count(state_dict, r"enc_b\.blocks\.(\d+)\.conv\.1\.weight")
    modules = vqvae_modules(depth)
    new = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition(".")
        if module in ("quantize_t", "quantize_b") and name in CODEBOOK:
            # the original keeps a codebook as (D, K)
            new[f"quantize.{'tb'.index(module[-1])}.{CODEBOOK[name]}"] = value.t() if value.ndim == 2 else value
        elif module in modules:
            new[f"{modules[module]}.{name}"] = value
        else:
            raise ValueError(f"`checkpoint` has the key {key}, which no VQVAE of the original has.")
    for level in range(2):
        new[f"quantize.{level}.num_updates"] = torch.zeros(
            (), dtype=torch.int64
        )  # only zero-debiased codebooks read it
    hidden_size, in_channels = (
        _shape(state_dict, "enc_b.blocks.4.weight")[0],
        _shape(state_dict, "enc_b.blocks.0.weight")[1],
    )
    embed_dim, num_embeddings = _shape(state_dict, "quantize_t.embed")
    config = VQVAE2Config(
        hidden_size=hidden_size,
        num_residual_layers=depth,
        **({"residual_hidden_size": _shape(state_dict, "enc_b.blocks.5.conv.1.weight")[0]} if depth else {}),
        in_channels=in_channels,
        embed_dim=embed_dim,
        num_embeddings=num_embeddings,
        resolution=resolution,
        quantizer_kwargs={"decay": 0.99, "zero_debias": False, "restart_threshold": 0.0, "count_smoothing": "laplace"},
    )
    with torch.device("meta"):
        model = VQVAE2Model(config)
    load_exactly(model, new)
    return model.eval()


# ------------------------------------------------------------------------------------------------ the priors


def _as_linear(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1)


def _as_taps(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(2)


def _as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _conditioning_block(match: re.Match) -> str:
    """The original numbers the first convolution along with the blocks."""
    return f"conditioning.residual_blocks.{int(match[1]) - 1}.{match[2]}.conv"


# A pattern of the original's modules, ours, and how the weight is laid out here (`None`: in two parts, see
# `_split_taps`).
PIXELSNAIL_MODULES = (
    (r"horizontal\.conv\.conv", r"stem.above", _as_taps),
    (r"vertical\.conv\.conv", r"stem.left", _as_taps),
    (
        r"blocks\.(\d+)\.resblocks\.(\d+)\.(conv[12])\.conv\.conv",
        r"blocks.\1.residual_blocks.\2.\3",
        None,
    ),
    (r"blocks\.(\d+)\.resblocks\.(\d+)\.condition\.conv", r"blocks.\1.residual_blocks.\2.condition", _as_linear),
    (r"blocks\.(\d+)\.(key|query|out)_resblock\.(conv[12])\.conv", r"blocks.\1.\2_block.\3", _as_linear),
    (r"blocks\.(\d+)\.out_resblock\.aux_conv\.conv", r"blocks.\1.out_block.auxiliary", _as_linear),
    (r"blocks\.(\d+)\.causal_attention\.(query|key|value)", r"blocks.\1.attention.\2", _as_linear),
    (r"blocks\.(\d+)\.out\.conv", r"blocks.\1.out", _as_linear),
    (r"cond_resnet\.blocks\.0\.conv", r"conditioning.codes", _as_taps),
    (r"cond_resnet\.blocks\.(\d+)\.(conv[12])\.conv", _conditioning_block, _as_is),
    (r"out\.(\d+)\.(conv[12])\.conv", r"output_blocks.\1.\2", _as_linear),
    (r"out\.\d+\.conv", r"head.out", _as_linear),
)


# The length and the direction of a weight, by the original's name and by torch's.
WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def convert_pixelsnail_module(module: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names and layout of the `weights` of a module of the original; an unknown one is a `ValueError`."""
    found = [entry for entry in PIXELSNAIL_MODULES if re.fullmatch(entry[0], module)]
    unknown = weights.keys() - {*WEIGHT_NORM, "bias"} if found else weights.keys()
    if unknown:
        raise ValueError(f"`checkpoint` has the key {module}.{min(unknown)}, which no PixelSNAIL of the original has.")
    pattern, target, layout = found[0]
    name = re.sub(pattern, target, module)
    missing = WEIGHT_NORM.keys() - weights.keys()
    if missing:
        raise ValueError(f"`checkpoint` lacks the key {module}.{min(missing)}.")
    if layout is None:
        new = _split_taps(name, weights["weight_g"], weights["weight_v"])
        name = f"{name}.above"
    else:
        direction = layout(weights["weight_v"])
        length = weights["weight_g"].reshape(-1, *[1] * (direction.ndim - 1))
        new = _weight_norm(name, length, direction)
    return new | ({f"{name}.bias": weights["bias"]} if "bias" in weights else {})


def _weight_norm(name: str, length: torch.Tensor, direction: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = {"weight_g": length, "weight_v": direction}
    return {f"{name}.{WEIGHT_NORM[part]}": value.contiguous() for part, value in parts.items()}


def _split_taps(name: str, length: torch.Tensor, direction: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    A causal k×k convolution as that over the rows above and that over the columns on the left, each with its share of
    the length. The taps from the middle of the last row on, which the original sets to 0 whenever it uses the weight,
    drop out.
    """
    k = direction.shape[-1]
    parts = {"above": direction[:, :, :-1], "left": direction[:, :, -1:, : k // 2]}
    norms = {part: taps.flatten(1).norm(dim=1) for part, taps in parts.items()}
    whole = torch.stack(list(norms.values())).norm(dim=0)
    new = {}
    for part, taps in parts.items():
        share = length.flatten() * norms[part] / whole
        new |= _weight_norm(f"{name}.{part}", share.view(-1, 1, 1, 1), taps)
    return new


def convert_pixelsnail(state_dict: dict, dropout: float = 0.1) -> tuple[PixelSNAILForCausalLM, dict[str, str]]:
    """
    The original's `PixelSNAIL`, of which all but the dropout and the 8 heads follows from the weights.

    Args:
        state_dict (`dict`): the original's `model.state_dict()`.
        dropout (`float`): that of its training, which goes on with it.

    Returns:
        the model, and for each key that is not used, why.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    unused = {"background": "the positions on the grid, which are computed"}
    is_conditional = "cond_resnet.blocks.0.conv.weight_v" in state_dict
    if not is_conditional:
        unused |= {key: "of a level above, which this prior has not" for key in state_dict if ".condition." in key}
    weights, dropped = drop_keys(state_dict, unused)
    grid_size = tuple(_shape(state_dict, "background")[2:])
    hidden_size, codebook_size, _, kernel_size = _shape(state_dict, "horizontal.conv.conv.weight_v")
    above = {}
    if is_conditional:
        channels, codes, _, conditioning_kernel_size = _shape(state_dict, "cond_resnet.blocks.0.conv.weight_v")
        above = {
            "conditioning_codebook_size": codes,
            "conditioning_grid_size": tuple(side // 2 for side in grid_size),
            "num_conditioning_res_blocks": _count(state_dict, r"cond_resnet\.blocks\.(\d+)\.conv1\."),
            "conditioning_channels": channels,
            "conditioning_kernel_size": conditioning_kernel_size,
        }
    config = PixelSNAILConfig(
        codebook_size=codebook_size,
        grid_size=grid_size,
        hidden_size=hidden_size,
        kernel_size=kernel_size,
        num_blocks=_count(state_dict, r"blocks\.(\d+)\."),
        num_res_blocks=_count(state_dict, r"blocks\.0\.resblocks\.(\d+)\."),
        res_channels=_res_channels(state_dict),
        attention="blocks.0.causal_attention.query.weight_v" in state_dict,
        num_output_res_blocks=_count(state_dict, r"out\.(\d+)\.conv1\."),
        dropout=dropout,
        **above,
    )
    with torch.device("meta"):
        model = PixelSNAILForCausalLM(config)
    modules = {}
    for key, value in weights.items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = value
    new = {}
    for module, of_module in modules.items():
        new |= convert_pixelsnail_module(module, of_module)
    load_exactly(model, new)
    return model.eval(), dropped


def _res_channels(state_dict: dict) -> int:
    """Those within a gated block; a PixelSNAIL without such blocks has none, and any number fits."""
    firsts = ("blocks.0.resblocks.0.conv1.conv.conv.weight_v", "out.0.conv1.conv.weight_v")
    return next((state_dict[key].shape[0] for key in firsts if key in state_dict), 1)


# ------------------------------------------------------------------------------------------------ all together


# Arguments of the original's classes that follow from the weights → what they are in the converted model.
VQVAE_ARGUMENTS = {
    "in_channel": lambda config: config.in_channels,
    "channel": lambda config: config.hidden_size,
    "n_res_block": lambda config: config.num_residual_layers,
    "n_res_channel": lambda config: config.residual_hidden_size,
    "embed_dim": lambda config: config.embed_dim,
    "n_embed": lambda config: config.num_embeddings,
}
PIXELSNAIL_ARGUMENTS = {
    "shape": lambda config: list(config.grid_size),
    "n_class": lambda config: config.codebook_size,
    "channel": lambda config: config.hidden_size,
    "kernel_size": lambda config: config.kernel_size,
    "n_block": lambda config: config.num_blocks,
    "n_res_block": lambda config: config.num_res_blocks,
    "res_channel": lambda config: config.res_channels,
    "attention": lambda config: config.attention,
    "n_cond_res_block": lambda config: config.num_conditioning_res_blocks,
    "cond_res_channel": lambda config: config.conditioning_channels,
    "cond_res_kernel": lambda config: config.conditioning_kernel_size,
    "n_out_res_block": lambda config: config.num_output_res_blocks,
}
OF_CONDITION = ("n_cond_res_block", "cond_res_channel", "cond_res_kernel")


def _check_arguments(options: Options, config: PreTrainedConfig, fields: dict) -> None:
    """A `ValueError` for an argument that contradicts the weights, or that the original does not have."""
    of_nothing = []  # they name what the network has not
    if "n_res_channel" in fields and not config.num_residual_layers:
        of_nothing.append("n_res_channel")
    if "cond_res_channel" in fields and config.conditioning_codebook_size is None:
        options.only("n_cond_res_block", 0, default=0)
        of_nothing += OF_CONDITION
    if "res_channel" in fields and not config.num_res_blocks + config.num_output_res_blocks:
        of_nothing.append("res_channel")
    options.training_only(*of_nothing)
    for name, field in fields.items():
        if name in options.values and name not in of_nothing:
            given = options.take(name)
            check_agrees(name, list(given) if isinstance(given, tuple) else given, field(config))
    options.training_only("decay")  # which the original's code does not hand on
    options.finish()


def _load_pixelsnail(path, name: str, config=None) -> tuple[PixelSNAILForCausalLM, dict[str, str]]:
    state_dict, arguments = load(path, name)
    if not is_pixelsnail(state_dict):
        raise ValueError(f"`{name}` {path} holds no PixelSNAIL: it lacks the key background.")
    options = Options(read_arguments(config), "the arguments of PixelSNAIL")
    dropout = options.number("dropout", arguments.get("dropout", 0.1), below=1)
    with errors_name(checkpoint=path if name != "checkpoint" else None):
        model, dropped = convert_pixelsnail(state_dict, dropout)
    _check_arguments(options, model.config, PIXELSNAIL_ARGUMENTS)
    return model, {f"{name}: {key}": why for key, why in dropped.items()}


def convert(
    checkpoint: str | Path,
    output: str | Path,
    top: str | Path | None = None,
    bottom: str | Path | None = None,
    resolution: int | None = None,
    config: str | Path | None = None,
) -> dict[str, str]:
    """
    Writes the folder `output`: a model, or with `top` and `bottom` a pipeline.

    Args:
        checkpoint, output (`str` or `Path`): the original's file, and the folder.
        top, bottom (`str` or `Path`, *optional*): the files of the priors that belong to a VQVAE.
        resolution (`int`, *optional*): side of the VQVAE's images in pixels; by default that of the priors, or 256.
        config (`str` or `Path`, *optional*): a JSON file with the arguments of the class in `checkpoint`, which are
            checked against its weights; the dropout of a PixelSNAIL is not in them.

    Returns:
        for each key that is not used, why.

    Raises:
        ValueError: one of the priors without the other or without a VQVAE, keys that are missing or unknown, or models
            that do not fit together.
    """
    if (top is None) != (bottom is None):
        raise ValueError("`top` and `bottom` must be given together.")
    if resolution is not None and resolution < 1:
        raise ValueError(f"`resolution` must be positive, got {resolution}.")
    files = {"checkpoint": checkpoint, "config": config, "top": top, "bottom": bottom, "resolution": None}
    with written_folder(output) as folder, errors_name(**files):
        return _convert(checkpoint, folder, top, bottom, resolution, config)


def _convert(checkpoint, output: Path, top, bottom, resolution: int | None, config) -> dict[str, str]:
    state_dict, _ = load(checkpoint)
    if is_pixelsnail(state_dict):
        if top is not None or resolution is not None:
            raise ValueError("`checkpoint` must hold a VQVAE where `top`, `bottom` or `resolution` are given.")
        model, dropped = _load_pixelsnail(checkpoint, "checkpoint", config)
        save_with_code(model, output)
        return dropped
    options = Options(read_arguments(config), "the arguments of VQVAE")
    if top is None:
        vqvae = convert_vqvae(state_dict, resolution or 256)
        _check_arguments(options, vqvae.config, VQVAE_ARGUMENTS)
        save_tokenizer(vqvae, output)
        return {}
    top_prior, dropped = _load_pixelsnail(top, "top")
    bottom_prior, dropped_too = _load_pixelsnail(bottom, "bottom")
    vqvae = convert_vqvae(state_dict, resolution or 8 * top_prior.config.grid_size[0])
    _check_arguments(options, vqvae.config, VQVAE_ARGUMENTS)
    save_with_code(VQVAE2Pipeline(vqvae=vqvae, top_prior=top_prior, bottom_prior=bottom_prior), output)
    save_image_processor(vqvae, output / "vqvae")
    return dropped | dropped_too


def main(arguments: list[str] | None = None) -> None:
    """Runs the converter by its command line arguments."""
    parser = argument_parser("A VQVAE, a PixelSNAIL or both of rosinality/vq-vae-2-pytorch to hf_vq.")
    parser.add_argument("--top", help="the top prior of a VQVAE")
    parser.add_argument("--bottom", help="its bottom prior")
    parser.add_argument("--resolution", type=int, help="of the VQVAE's images; by default that of the priors, or 256")
    parser.add_argument("--config", help="JSON with the arguments of the class in --checkpoint, to be checked")
    options = parser.parse_args(arguments)
    given = (options.checkpoint, options.output, options.top, options.bottom, options.resolution, options.config)
    print_dropped(convert(*given))
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub, "Upload converted weights"))
