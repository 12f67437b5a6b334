"""A converted folder against what the original program computed: tensors by their names, in one safetensors file."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..models.autoencoders.modeling_vqvae2 import VQVAE2Model
from ..models.priors.modeling_pixelsnail import PixelSNAILForCausalLM
from .reading import file_format


# Names that outputs have in such files → what a tokenizer gives for `x`, in the order of computation.
TOKENIZER_OUTPUTS: dict[str, Callable] = {
    "h": lambda model, x, scale: model.encode(x).latents,
    "quant": lambda model, x, scale: model.encode(x).quantized,
    "quantized": lambda model, x, scale: model.encode(x).quantized,
    "indices": lambda model, x, scale: model.encode(x).indices,
    "xrec": lambda model, x, scale: model(x).sample,
    "x_recon": lambda model, x, scale: model(x).sample / scale,
}


@torch.no_grad()
def largest_errors(
    model: PreTrainedModel | DiffusionPipeline, path: str | Path, live: bool = False
) -> dict[str, float]:
    """For each output in a file that `model` computes, the largest difference; of indices, the share that differs.

    Args:
        model: a tokenizer, an autoregressive prior or a pipeline.
        path: a safetensors file of inputs and outputs, named as the original programs name them: of a tokenizer `x`,
            and any of `h`, `quant`, `indices`, `xrec` (of VQ-VAE-2 `id_t`, `id_b`, `dec`); of a GPT `z_indices`,
            `c_indices` and `all_logits`; of a PixelSNAIL `codes`, `condition` and `logits`; of latent diffusion `x_t`,
            `t` and `eps`, or `eps_ema` of the averages; of VQ-Diffusion's codec `img` and `codec_tokens`.
        live: whether the weights themselves were converted, not their averages.

    Raises:
        ValueError: if the file cannot be read, or holds no output that the model computes.
    """
    if file_format(path, "verify") != "safetensors":
        raise ValueError(f"`verify` {path} must be a safetensors file.")
    tensors = load_file(path)
    tensors |= {name.removeprefix("fs."): value for name, value in tensors.items() if name.startswith("fs.")}
    computed = {}
    parts = model.components if hasattr(model, "components") else {"model": model}
    for part in parts.values():
        if hasattr(part, "decode_indices"):
            computed |= _of_tokenizer(part.eval(), tensors)
        elif isinstance(part, PixelSNAILForCausalLM) and {"codes", "logits"} <= tensors.keys():
            computed |= _of_pixelsnail(part, tensors)
        elif hasattr(part, "prepare_inputs") and {"z_indices", "all_logits"} <= tensors.keys():
            condition = None if part.config.condition_type == "unconditional" else tensors["c_indices"]
            inputs = part.eval().prepare_inputs(_in_grid(part, tensors["z_indices"]), condition)["input_ids"]
            computed["all_logits"] = part(input_ids=inputs[:, :-1]).logits
    prediction = "eps" if live or "eps_ema" not in tensors else "eps_ema"
    if {"x_t", "t", prediction} <= tensors.keys() and "unet" in parts:
        computed[prediction] = parts["unet"](tensors["x_t"], tensors["t"]).sample
    errors = {name: _error(value, tensors[name]) for name, value in computed.items() if name in tensors}
    if not errors:
        raise ValueError(f"`verify` {path} holds no output that this model computes; it has {sorted(tensors)[:8]}.")
    return errors


def _of_tokenizer(model, tensors: dict) -> dict:
    is_gumbel = model.config.quantizer == "gumbel"
    if {"img", "codec_tokens"} <= tensors.keys():  # the original draws a Gumbel codec's tokens
        name = "codec_tokens_argmax" if is_gumbel else "codec_tokens"
        return {name: model.encode(tensors["img"]).indices}
    x = tensors.get("x")
    if x is None or x.ndim != 4:
        return {}
    if is_gumbel:
        return _of_gumbel(model, x, tensors.get("gumbel_noise"))
    if isinstance(model, VQVAE2Model):
        indices = model.encode(x).indices
        return {"id_t": indices[0], "id_b": indices[1], "dec": model(x).sample}
    scale = 2 if "x_recon" in tensors else 1  # the images of the VQ-VAE notebook lie in [-0.5, 0.5]
    return {name: output(model, scale * x, scale) for name, output in TOKENIZER_OUTPUTS.items() if name in tensors}


def _of_gumbel(model, x: torch.Tensor, noise: torch.Tensor | None) -> dict:
    """The original draws its codes at every encoding; without its noise the most likely ones are compared."""
    latents = model.encode(x).latents
    most_likely = model.quantize(latents).indices
    computed = {
        "h": latents,
        "indices_argmax": most_likely,
        "xrec_from_argmax": model.decode_indices(most_likely).sample,
    }
    if noise is None:
        return computed
    drawn = model.quantize(latents, noise=noise)
    sample = model.decode(drawn.quantized, quantize=False).sample
    return {**computed, "indices": drawn.indices, "z_q": drawn.quantized, "xrec": sample}


def _of_pixelsnail(model, tensors: dict) -> dict:
    above = {"condition_indices": tensors["condition"]} if "condition" in tensors else {}
    logits = model.eval()(**model.prepare_inputs(tensors["codes"]), **above).logits
    return {"logits": logits.unflatten(1, (-1, model.config.grid_size[1])).movedim(-1, 1)}


def _in_grid(prior, sequence: torch.Tensor) -> torch.Tensor:
    """Codes in the order in which the prior reads them, as a grid."""
    grid = torch.empty_like(sequence)
    grid[:, prior.config.code_order] = sequence
    return grid.unflatten(1, tuple(prior.config.grid_size))


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    if value.numel() != expected.numel():
        return float("inf")
    difference = value.reshape(expected.shape).double() - expected.double()
    if expected.is_floating_point():
        return difference.abs().max().item()
    return (difference != 0).double().mean().item()


__all__ = ["largest_errors"]
