"""A converted folder against what the original program computed: tensors by their names, in one safetensors file.

The names are those of the original's own variables.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..models.autoencoders.modeling_vqgan import VQGANModel
from ..models.autoencoders.modeling_vqvae import VQVAEModel
from ..models.autoencoders.modeling_vqvae2 import VQVAE2Model
from ..models.priors.modeling_pixelsnail import PixelSNAILForCausalLM
from ..models.priors.modeling_vq_gpt import VQGPTForCausalLM
from ..models.priors.modeling_vq_llama import VQLlamaForCausalLM
from ..models.priors.transformer_vq_diffusion import VQDiffusionTransformer2DModel
from ..pipelines.pipeline_vq_latent_diffusion import VQLatentDiffusionPipeline
from ..schedulers.scheduling_mask_replace import MaskReplaceScheduler
from ..training.objectives.discriminator import PatchDiscriminator
from .reading import file_format
from .verification_diffusion import (
    of_codec,
    of_latent_diffusion,
    of_mask_replace_diffusion,
    of_mask_replace_schedule,
)


Tensors = dict[str, torch.Tensor]


@torch.no_grad()
def verify(
    model: PreTrainedModel | DiffusionPipeline | torch.nn.Module,
    path: str | Path,
    folder: str | Path | None = None,
    live: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """The largest error of each output in a file that `model` computes; of indices, the share that differs.

    Args:
        model: a tokenizer, a prior, a denoiser or a pipeline.
        path: a safetensors file of inputs and outputs, named as the original programs name them: of a tokenizer `x`,
            and any of `h`, `quant`, `indices`, `xrec`; of a GPT `x`, `z_indices`, `c`, `c_indices`, `all_logits`; of
            LlamaGen's prior `idx`, `cond_idx`, `logits`; of a PixelSNAIL `codes`, `condition`, `logits`; of latent
            diffusion `x_t`, `t` and `eps`, or `eps_ema` of the averages; of VQ-Diffusion `x_t.a`, `t.a`, `logits.a`,
            and of its codec `img`, `codec_tokens`; and more of each.
        folder: what was converted, for a `condition_tokenizer` and a `discriminator` in it.
        live: whether the weights themselves were converted, not their averages.

    Returns:
        the errors by name, and the names of the file that stand in neither them nor the inputs that were used.

    Raises:
        ValueError: if the file cannot be read, or holds no output that the model computes.
    """
    if file_format(path, "verify") != "safetensors":
        raise ValueError(f"`verify` {path} must be a safetensors file.")
    try:
        tensors = load_file(path)
    except Exception as error:  # of the format or of the file
        raise ValueError(f"`verify` {path} is not a whole safetensors file; get it again.") from error
    seen = _Seen(tensors)
    computed = _computed(model, seen, Path(folder) if folder is not None else None, live)
    errors = {name: _error(value, tensors[name]) for name, value in computed.items() if name in tensors}
    if not errors:
        raise ValueError(f"`verify` {path} holds no output that this model computes; it has {sorted(tensors)[:8]}.")
    return errors, [name for name in tensors if name not in errors and name not in seen.used]


class _Seen(dict):
    """Tensors by name, and which were used as inputs."""

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.used = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return super().__getitem__(name)

    def has(self, *names: str) -> bool:
        return all(name in self for name in names)


def _computed(model, tensors: _Seen, folder: Path | None, live: bool) -> Tensors:
    parts = model.components if hasattr(model, "components") else {"model": model}
    computed = {}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
        for kind, outputs in OUTPUTS.items():
            if isinstance(part, kind):
                computed |= outputs(part, tensors)
        if isinstance(part, MaskReplaceScheduler):
            computed |= of_mask_replace_schedule(part)
    if isinstance(model, VQLatentDiffusionPipeline):
        computed |= of_latent_diffusion(model, tensors, live)
    prior = parts.get("prior")
    if isinstance(prior, VQGPTForCausalLM) and tensors.has("x") and tensors["x"].ndim == 4:
        computed |= _of_gpt_and_tokenizer(prior, parts["vqvae"], tensors)
    if folder is not None and (folder / "condition_tokenizer").is_dir() and tensors.has("c"):
        tokenizer = VQGANModel.from_pretrained(folder / "condition_tokenizer").eval()
        indices = tokenizer.encode(tensors["c"]).indices
        computed |= {"c_indices": indices, "cond_rec": tokenizer.decode_indices(indices).sample}
    if folder is not None and (folder / "discriminator").is_dir() and tensors.has("x"):
        computed["disc_logits_x"] = PatchDiscriminator.from_folder(folder / "discriminator").eval()(tensors["x"])
    return computed


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    if value.numel() != expected.numel():
        return float("inf")
    value = value.reshape(expected.shape)
    if not expected.is_floating_point():
        return (value != expected).double().mean().item()
    # logarithms of 0 are equal, and have no difference
    difference = torch.where(value == expected, 0, (value.double() - expected.double()).abs())
    return difference.max().nan_to_num(float("inf")).item()


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def _of_vqgan(model: VQGANModel, tensors: _Seen) -> Tensors:
    if tensors.has("img"):
        return of_codec(model, tensors)
    prefix = "fs." if tensors.has("fs.h") else ""  # the first stage of latent diffusion
    if not tensors.has("x") or tensors["x"].ndim != 4 or tensors.has("z_indices"):
        return {}
    x = tensors["x"]
    latents = model.encode(x).latents
    if model.config.quantizer == "gumbel":
        return _of_gumbel(model, latents, tensors)
    quantized = model.quantize(latents)
    computed = {
        "h_enc": model.encoder(x),
        "h": latents,
        "quant": quantized.quantized,
        "indices": quantized.indices,
        "emb_loss": quantized.loss,
        "xrec": model.decode(latents).sample,
        "xrec_noquant": model.decode(latents, quantize=False).sample,
        "quant_from_code": model.quantize.indices_to_latents(quantized.indices),
        "xrec_from_code": model.decode_indices(quantized.indices).sample,
    }
    computed["quant_from_code_channels_last"] = computed["quant_from_code"].movedim(1, -1)
    if quantized.codebook_loss is not None:
        cost, codebook, commitment = model.config.commitment_cost, quantized.codebook_loss, quantized.commitment_loss
        computed |= {
            "emb_loss_legacy_false": codebook + cost * commitment,
            "train.vq_loss": codebook,
            "train.commit_loss": cost * commitment,
            "train.entropy_loss": quantized.loss - codebook - cost * commitment,
            "train.xrec": computed["xrec"],
        }
    return {prefix + name: value for name, value in computed.items()}


def _of_gumbel(model: VQGANModel, latents: torch.Tensor, tensors: _Seen) -> Tensors:
    """The original draws its codes at every encoding; without its noise the most likely ones are compared."""
    most_likely = model.quantize(latents)
    computed = {
        "h": latents,
        "logits": model.quantize.proj(latents),
        "kl": most_likely.loss,
        "indices_argmax": most_likely.indices,
        "xrec_from_argmax": model.decode_indices(most_likely.indices).sample,
    }
    if not tensors.has("gumbel_noise"):
        return computed
    drawn = model.quantize(latents, noise=tensors["gumbel_noise"])
    return {
        **computed,
        "indices": drawn.indices,
        "z_q": drawn.quantized,
        "xrec": model.decode(drawn.quantized, quantize=False).sample,
        "z_q_from_code": model.quantize.indices_to_latents(drawn.indices),
        "xrec_from_code": model.decode_indices(drawn.indices).sample,
    }


def _of_vqvae(model: VQVAEModel, tensors: _Seen) -> Tensors:
    """The images of the VQ-VAE notebook lie in [-0.5, 0.5], those of hf_vq in [-1, 1]."""
    if not tensors.has("x") or tensors["x"].ndim != 4:
        return {}
    x = 2 * tensors["x"]
    encoded, output = model.encode(x), model(x)
    loss = model.quantize(encoded.latents).loss
    return {
        "h": encoded.latents,
        "quantized": encoded.quantized,
        "indices": encoded.indices,
        "x_recon": output.sample / 2,
        "vq_loss": loss,
        "loss": loss,
        "perplexity": output.perplexity,
        "perplexity_fwd": output.perplexity,
    }


def _of_vqvae2(model: VQVAE2Model, tensors: _Seen) -> Tensors:
    if not tensors.has("x") or tensors["x"].ndim != 4:
        return {}
    x = tensors["x"]
    bottom, encoded, output = model.encoder[1](x), model.encode(x), model(x)
    computed = {"enc_b": bottom, "enc_t": model.encoder[0](bottom), "train_loss": output.loss}
    for level, letter in enumerate("tb"):
        computed |= {
            f"h_{letter}": encoded.latents[level],
            f"quant_{letter}": encoded.quantized[level],
            f"id_{letter}": encoded.indices[level],
        }
    computed |= dict.fromkeys(("diff", "latent_loss"), output.commitment_loss)
    computed |= {
        "dec": output.sample,
        "dec_from_quant": model.decode(encoded.quantized, quantize=False).sample,
        "dec_from_code": model.decode_indices(encoded.indices).sample,
    }
    if tensors.has("codes_t", "codes_b"):
        computed["codes_dec"] = model.decode_indices((tensors["codes_t"], tensors["codes_b"])).sample
    return computed


# ---------------------------------------------------------------------------------------------------------------------
# Priors
# ---------------------------------------------------------------------------------------------------------------------


def _of_pixelsnail(prior: PixelSNAILForCausalLM, tensors: _Seen) -> Tensors:
    if not tensors.has("codes", "logits"):
        return {}
    above = {"condition_indices": tensors["condition"]} if tensors.has("condition") else {}
    inputs = prior.prepare_inputs(tensors["codes"])
    output = prior(**inputs, **above)
    as_map = output.logits.unflatten(1, (-1, prior.config.grid_size[1])).movedim(-1, 1)
    return {"logits": as_map, "loss": F.cross_entropy(as_map, tensors["codes"])}


def _of_gpt(prior: VQGPTForCausalLM, tensors: _Seen) -> Tensors:
    if not tensors.has("z_indices", "all_logits"):
        return {}
    codes, prefix = tensors["z_indices"], _prefix(prior, tensors)
    ids = torch.cat([prefix, codes], dim=1)[:, :-1]
    logits = prior(input_ids=ids).logits
    own = logits[:, prefix.shape[1] - 1 :]
    loss = F.cross_entropy(own.flatten(0, 1), codes.flatten())
    greedy = prior.generate(prefix, do_sample=False)[:, prefix.shape[1] :]
    half = torch.cat([prefix, codes[:, : codes.shape[1] // 2]], dim=1)
    return {
        "all_logits": logits,
        "logits": own,
        "target": codes,
        "loss": loss,
        "shared_step_loss": loss,
        **dict.fromkeys(("greedy", "greedy_topk1", "greedy_with_past"), greedy),
        "greedy_half": prior.generate(half, do_sample=False)[:, prefix.shape[1] :],
    }


def _prefix(prior: VQGPTForCausalLM, tensors: _Seen) -> torch.Tensor:
    if prior.config.condition_type == "unconditional" or not tensors.has("c_indices"):
        return prior.prepare_condition(None, batch_size=len(tensors["z_indices"]))
    return prior.prepare_condition(tensors["c_indices"])


def _of_gpt_and_tokenizer(prior: VQGPTForCausalLM, vqvae: VQGANModel, tensors: _Seen) -> Tensors:
    encoded = vqvae.encode(tensors["x"])
    computed = {
        "quant_z": encoded.quantized,
        "z_indices": prior.to_reading_order(encoded.indices),
        "img_rec": vqvae.decode_indices(encoded.indices).sample,
    }
    if tensors.has("greedy"):
        greedy = tensors["greedy"].clamp(max=prior.config.codebook_size - 1)
        computed["img_greedy"] = vqvae.decode_indices(prior.from_reading_order(greedy)).sample
    return computed


def _of_llama(prior: VQLlamaForCausalLM, tensors: _Seen) -> Tensors:
    """`idx` are the codes before the last at most; a class or a text's features are `cond_idx`."""
    if not tensors.has("idx", "logits"):
        return {}
    condition = tensors["cond_idx"] if tensors.has("cond_idx") else None
    states = {}
    if condition is not None and condition.is_floating_point():
        condition = states["condition_states"] = condition[:, : prior.config.condition_length]
    prefix = prior.prepare_condition(condition, batch_size=len(tensors["idx"]))
    logits = prior(input_ids=torch.cat([prefix, tensors["idx"]], dim=1), **states).logits
    length = tensors["logits"].shape[1]  # in training the original leaves out the condition's own
    return {"logits": logits[:, -length:]}


OUTPUTS: dict[type, Callable[..., Tensors]] = {
    VQGANModel: _of_vqgan,
    VQVAEModel: _of_vqvae,
    VQVAE2Model: _of_vqvae2,
    PixelSNAILForCausalLM: _of_pixelsnail,
    VQGPTForCausalLM: _of_gpt,
    VQLlamaForCausalLM: _of_llama,
    VQDiffusionTransformer2DModel: of_mask_replace_diffusion,
}


__all__ = ["verify"]
