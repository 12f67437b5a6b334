"""Checkpoints of the VQ-VAE notebook of zalandoresearch/pytorch-vq-vae to `VQVAEModel`.

    hf-vq convert zalando --checkpoint model.pt --output folder

The file is the notebook's `model.state_dict()`. Its images lie in [-0.5, 0.5], those of hf_vq in [-1, 1]: the first
and the last convolution take up the factor of 2, which is exact, and the squared errors and `data_variance` grow by 4.
"""

import re
from pathlib import Path

import torch

from ..argument_checks import check_real
from ..hub import push_folder
from ..models.autoencoders.configuration_vqvae import VQVAEConfig
from ..models.autoencoders.modeling_vqvae import VQVAEModel
from .checkpoints import argument_parser, check_agrees, errors_name, load_exactly, save_tokenizer, written_folder
from .reading import Options, load_state_dict, read_arguments


# Original module → ours; {i} is the number of a residual block.
MODULES = {
    "_encoder._conv_1": "encoder.down.0",
    "_encoder._conv_2": "encoder.down.1",
    "_encoder._conv_3": "encoder.conv_out",
    "_encoder._residual_stack._layers.{i}._block.1": "encoder.residual_stack.layers.{i}.conv1",
    "_encoder._residual_stack._layers.{i}._block.3": "encoder.residual_stack.layers.{i}.conv2",
    "_pre_vq_conv": "quant_conv",
    "_decoder._conv_1": "decoder.conv_in",
    "_decoder._residual_stack._layers.{i}._block.1": "decoder.residual_stack.layers.{i}.conv1",
    "_decoder._residual_stack._layers.{i}._block.3": "decoder.residual_stack.layers.{i}.conv2",
    "_decoder._conv_trans_1": "decoder.up.0",
    "_decoder._conv_trans_2": "decoder.up.1",
}
EMA_CODEBOOK = {
    "_vq_vae._embedding.weight": "quantize.embedding",
    "_vq_vae._ema_w": "quantize.embed_avg",
    "_vq_vae._ema_cluster_size": "quantize.cluster_size",
}
GRADIENT_CODEBOOK = {"_vq_vae._embedding.weight": "quantize.embedding.weight"}


def rename(key: str, codebook: dict[str, str]) -> str:
    """Our name of an original key; an unknown one is a `ValueError`."""
    if key in codebook:
        return codebook[key]
    module, _, kind = key.rpartition(".")
    number = re.search(r"(?<=_layers\.)\d+", module)
    pattern = module.replace(f"_layers.{number[0]}.", "_layers.{i}.") if number else module
    if pattern not in MODULES:
        raise ValueError(f"`checkpoint` has the key {key}, which the notebook's model does not have.")
    return f"{MODULES[pattern].format(i=number[0] if number else '')}.{kind}"


def convert_state_dict(state_dict: dict) -> tuple[dict, dict]:
    """
    The notebook's weights as those of a `VQVAEModel`.

    Returns:
        the arguments of `VQVAEConfig` that follow from the weights, and the new state dict.

    Raises:
        ValueError: for a key that is missing or unknown.
    """
    is_ema = "_vq_vae._ema_w" in state_dict
    codebook = EMA_CODEBOOK if is_ema else GRADIENT_CODEBOOK
    new = {rename(key, codebook): value for key, value in state_dict.items()}
    needed = ["encoder.down.0.weight", "encoder.conv_out.weight", "decoder.up.1.weight", "decoder.up.1.bias"]
    needed += codebook.values()
    missing = [key for key in needed if key not in new]
    if missing:
        raise ValueError(f"`checkpoint` lacks the weights of {missing[0]}.")
    codes = new[codebook["_vq_vae._embedding.weight"]]
    layers = [key for key in new if re.fullmatch(r"encoder\.residual_stack\.layers\.\d+\.conv1\.weight", key)]
    inner = {"residual_hidden_size": new[layers[0]].shape[0]} if layers else {}
    arguments = {
        "hidden_size": new["encoder.conv_out.weight"].shape[0],
        **inner,
        "num_residual_layers": len(layers),
        "in_channels": new["encoder.down.0.weight"].shape[1],
        "num_embeddings": codes.shape[0],
        "embed_dim": codes.shape[1],
        "quantizer": "ema" if is_ema else "vq",
        "rectified_residual": True,
    }
    # images twice as large, in and out
    new["encoder.down.0.weight"] = new["encoder.down.0.weight"] / 2
    new["decoder.up.1.weight"] = new["decoder.up.1.weight"] * 2
    new["decoder.up.1.bias"] = new["decoder.up.1.bias"] * 2
    if is_ema:
        new["quantize.num_updates"] = torch.zeros((), dtype=torch.int64)  # only a zero-debiased codebook reads it
    return arguments, new


def convert_model(
    state_dict: dict, decay: float = 0.99, commitment_cost: float = 0.25, data_variance: float | None = None
) -> VQVAEModel:
    """
    The notebook's model. What its checkpoint does not hold are arguments, with the notebook's values as defaults.

    Args:
        state_dict (`dict`): the notebook's `model.state_dict()`.
        decay, commitment_cost (`float`): of the codebook; `decay` is not used by one that is trained by gradients.
        data_variance (`float`, *optional*): of pixels in [-0.5, 0.5], which divides the squared error in training.
    """
    arguments, weights = convert_state_dict(state_dict)
    if data_variance is not None:
        data_variance = check_real("data_variance", data_variance, above=0)
    kwargs = {}
    if arguments["quantizer"] == "ema":
        kwargs = {"decay": decay, "zero_debias": False, "count_smoothing": "laplace_stored", "restart_threshold": 0.0}
    config = VQVAEConfig(
        **arguments,
        quantizer_kwargs=kwargs,
        commitment_cost=commitment_cost,
        data_variance=None if data_variance is None else 4 * data_variance,
    )
    with torch.device("meta"):
        model = VQVAEModel(config)
    load_exactly(model, weights)
    return model.eval()


# Arguments of the notebook's `Model` that follow from its weights → the field of `VQVAEConfig` that must agree.
ARGUMENT_FIELDS = {
    "num_hiddens": "hidden_size",
    "num_residual_layers": "num_residual_layers",
    "num_residual_hiddens": "residual_hidden_size",
    "num_embeddings": "num_embeddings",
    "embedding_dim": "embed_dim",
}


def model_arguments(path: str | Path | None) -> tuple[dict, dict]:
    """The training arguments, and those that must agree with the weights, in a JSON or YAML file of the notebook's
    arguments.

    Raises:
        ValueError: as `read_config`, or for an argument that the notebook's `Model` does not have.
    """
    options = Options(read_arguments(path), "the arguments of Model")
    training = {name: options.number(name) for name in ("decay", "commitment_cost") if name in options.values}
    agreeing = {name: options.count(name, minimum=0) for name in ARGUMENT_FIELDS if name in options.values}
    options.finish()
    return training, agreeing


def convert(
    checkpoint: str | Path, output: str | Path, config: str | Path | None = None, data_variance: float | None = None
) -> None:
    """
    Writes the folder `output`: the model and its image processor.

    Args:
        checkpoint, output, config (`str` or `Path`): the original's file, the folder, and optionally a JSON file with
            the arguments of the notebook's `Model`, of which `decay` and `commitment_cost` are not in the weights.
        data_variance (`float`, *optional*): see `convert_model`.

    Raises:
        ValueError: if a file cannot be read, or the arguments contradict the weights.
    """
    with written_folder(output) as folder, errors_name(checkpoint=checkpoint, config=config):
        training, agreeing = model_arguments(config)
        model = convert_model(load_state_dict(checkpoint), **training, data_variance=data_variance)
        if not model.config.num_residual_layers:
            agreeing.pop("num_residual_hiddens", None)  # a width of nothing
        for name, value in agreeing.items():
            check_agrees(name, value, getattr(model.config, ARGUMENT_FIELDS[name]))
        if "decay" in training and (training["decay"] > 0) != (model.config.quantizer == "ema"):
            raise ValueError(
                f"`config` has decay={training['decay']}, but the weights are of a codebook that is "
                f"{'a moving average' if model.config.quantizer == 'ema' else 'trained by gradients'}."
            )
        save_tokenizer(model, folder)


def main(arguments: list[str] | None = None) -> None:
    """Runs the converter by its command line arguments."""
    parser = argument_parser("The VQ-VAE notebook's model to hf_vq.")
    parser.add_argument("--config", help="JSON with the arguments of the notebook's Model; its defaults otherwise")
    parser.add_argument("--data_variance", type=float, help="of the training pixels in [-0.5, 0.5]")
    options = parser.parse_args(arguments)
    convert(options.checkpoint, options.output, options.config, options.data_variance)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub, "Upload converted weights"))
