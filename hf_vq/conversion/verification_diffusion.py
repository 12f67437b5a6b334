"""What converted diffusion models compute of an original program's outputs, by its names; see `verification`."""

import math
from typing import Any

import torch

from ..models.autoencoders.modeling_vqgan import VQGANModel
from ..models.priors.transformer_vq_diffusion import VQDiffusionTransformer2DModel
from ..pipelines.continuous_schedulers import ddim_steps
from ..pipelines.pipeline_vq_latent_diffusion import VQLatentDiffusionPipeline
from ..schedulers.scheduling_mask_replace import MaskReplaceScheduler
from ..training.objectives.gaussian_bound import GaussianBound


Tensors = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Latent diffusion
# ---------------------------------------------------------------------------------------------------------------------


def of_latent_diffusion(pipe: VQLatentDiffusionPipeline, tensors: Any, live: bool) -> Tensors:
    """Of an unconditional model; with its averages only what the original computed with them."""
    vqvae, scale, scheduler = pipe.vqvae, pipe.vqvae.config.scaling_factor, pipe.scheduler
    computed = {}
    if tensors.has("x"):
        computed["z"] = pipe.encode_image(tensors["x"]) * scale
    if tensors.has("z"):
        computed["dec_z"] = vqvae.decode(tensors["z"] / scale).sample
    if tensors.has("codes"):
        vectors = vqvae.quantize.indices_to_latents(tensors["codes"])
        computed["dec_codes"] = vqvae.decode(vectors / scale, quantize=False).sample
    bound = GaussianBound(scheduler.betas)
    kind = scheduler.config.prediction_type
    computed["lvlb_weights"] = bound.weights(kind)
    if tensors.has("z", "x_t", "t"):
        mean, _, log_variance = bound.posterior(tensors["z"], tensors["x_t"], tensors["t"])
        computed |= {"post_mean": mean, "post_logvar": log_variance}
    if tensors.has("z", "noise", "t"):
        computed["q_sample"] = scheduler.add_noise(tensors["z"], tensors["noise"], tensors["t"])
    computed |= _of_denoiser(pipe, tensors, live) if pipe.condition_kind is None else {}
    return computed


def _of_denoiser(pipe: VQLatentDiffusionPipeline, tensors: Any, live: bool) -> Tensors:
    computed, suffix = {}, "" if live else "_ema"
    has_averages = any(name.endswith("_ema") for name in tensors)
    suffix = suffix if has_averages else ""
    if tensors.has("x_t", "t"):
        prediction = pipe.unet(tensors["x_t"], tensors["t"]).sample
        computed["eps" + suffix] = prediction
    if not suffix and tensors.has("z", "noise", "t"):
        kind = pipe.scheduler.config.prediction_type
        noisy = pipe.scheduler.add_noise(tensors["z"], tensors["noise"], tensors["t"])
        target = tensors["noise"] if kind == "epsilon" else tensors["z"]
        squares = (pipe.unet(noisy, tensors["t"]).sample - target).square().mean(dim=(1, 2, 3))
        weights = GaussianBound(pipe.scheduler.betas).weights(kind)[tensors["t"]]
        computed |= {"loss_simple": squares.mean(), "loss_vlb": (weights * squares).mean()}
        computed["loss"] = computed["loss_simple"]
    if tensors.has("x_t", "t", "eps"):
        alphas = pipe.scheduler.alphas_cumprod[tensors["t"]].view(-1, 1, 1, 1)
        computed["x0_from_eps"] = (tensors["x_t"] - (1 - alphas).sqrt() * tensors["eps"]) / alphas.sqrt()
    if tensors.has("x_T", "ddim_timesteps"):
        computed |= _ddim(pipe, tensors, suffix)
    return computed


def _ddim(pipe: VQLatentDiffusionPipeline, tensors, suffix: str) -> Tensors:
    """The deterministic chain, whose last latents the original gives scaled, and what it passes through."""
    seen, timesteps = [tensors["x_T"]], tensors["ddim_timesteps"].flip(0).tolist()
    # a number of steps that does not divide the timesteps gives more of them in the original
    given = {"num_inference_steps": len(timesteps)}
    is_usual = pipe.set_timesteps(pipe.own_scheduler(), **given).tolist() == timesteps
    if not is_usual and ddim_steps(timesteps, pipe.scheduler.config.num_train_timesteps):
        given = {"timesteps": timesteps}

    def remember(pipe, i, t, inner):
        seen.append(inner["latents"])

    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        num_images_per_prompt=len(tensors["x_T"]),
        latents=tensors["x_T"],
        output_type="pt",
        callback_on_step_end=remember,
        **given,
    )
    pipe.set_progress_bar_config(**bar)
    computed = {f"ddim_eta0{suffix}": output.latents * pipe.vqvae.config.scaling_factor}
    if not suffix:
        computed["ddim_eta0_x_inter"] = torch.stack(seen)
    computed["ddim_timesteps"] = pipe.set_timesteps(pipe.own_scheduler(), **given).flip(0)
    computed["ddim_alphas"] = pipe.scheduler.alphas_cumprod[tensors["ddim_timesteps"]]
    return computed


# ---------------------------------------------------------------------------------------------------------------------
# VQ-Diffusion
# ---------------------------------------------------------------------------------------------------------------------


def of_codec(model: VQGANModel, tensors: Any) -> Tensors:
    """Of `img` in 0 … 255. The original draws a Gumbel codec's tokens, so the most likely ones are compared."""
    names = ("codec_tokens_argmax", "codec_tokens")
    name = next((name for name in names if name in tensors), names[1])
    latents = model.encode(tensors["img"] / 127.5 - 1).latents
    indices = model.quantize(latents).indices.flatten(1)
    computed = {"patch.h": latents, "patch.index": indices, name: indices}
    grid = tuple(side // model.config.downsample_factor for side in model.config.image_size)
    for source, target in (("codec_tokens", "codec_decoded"), ("gen.tokens", "gen.content")):
        if source in tensors and tensors[source].shape[1] == math.prod(grid):
            sample = model.decode_indices(tensors[source].unflatten(1, grid)).sample
            computed[target] = (sample.clamp(-1, 1) + 1) * 127.5
    return computed


def of_mask_replace_diffusion(transformer: VQDiffusionTransformer2DModel, tensors: Any) -> Tensors:
    """Predictions of noised tokens."""
    computed = {}
    names = {f"x_t.{letter}": (f"t.{letter}", f"logits.{letter}", f"log_x_start.{letter}") for letter in "ab"}
    names["score_x_t"] = ("score_t", "score_logits", "score_log_x_recon")
    for tokens, (times, of_logits, of_log_x_start) in names.items():
        condition = _condition(transformer, tensors)
        if condition is None or not tensors.has(tokens, times):
            continue
        grid = tensors[tokens].unflatten(1, tuple(transformer.sample_size))
        logits = transformer(grid, tensors[times], **condition).sample.flatten(1, 2)
        log_probabilities = logits.double().log_softmax(dim=-1).float().mT
        mask = torch.full_like(log_probabilities[:, :1], -70)
        log_x_start = torch.cat([log_probabilities, mask], dim=1).clamp(-70, 0)
        computed |= {of_logits: logits.mT, of_log_x_start: log_x_start}
    return computed


def of_mask_replace_schedule(scheduler: MaskReplaceScheduler) -> Tensors:
    """The logarithms of the tables, whose cumulative ones end with the data."""
    cumulative = {
        "at": (scheduler.alphas_cumprod, 1.0),
        "bt": (scheduler.betas_cumprod, 0.0),
        "ct": (scheduler.gammas_cumprod, 0.0),
    }
    computed = {name: torch.cat([table, table.new_tensor([data])]) for name, (table, data) in cumulative.items()}
    computed["1_min_ct"] = 1 - computed["ct"]
    kept, unmasked = computed["at"], computed["1_min_ct"]
    steps = {"at": kept[:-1] / kept.roll(1)[:-1], "1_min_ct": unmasked[:-1] / unmasked.roll(1)[:-1]}
    steps["ct"] = 1 - steps["1_min_ct"]
    steps["bt"] = (1 - steps["at"] - steps["ct"]) / scheduler.config.num_embeddings
    logarithms = {f"tab.log_{name}": table.log().float() for name, table in steps.items()}
    for name, table in computed.items():
        name = name.replace("1_min_", "1_min_cumprod_") if name.startswith("1") else f"cumprod_{name}"
        logarithms[f"tab.log_{name}"] = table.log().float()
    return logarithms


def _condition(transformer: VQDiffusionTransformer2DModel, tensors: Any) -> dict | None:
    kind = transformer.config.condition_type
    if kind == "unconditional":
        return {}
    if kind == "class":
        return {"class_labels": tensors["label"]} if "label" in tensors else None
    if "cond_emb" not in tensors:
        return None
    return {"encoder_hidden_states": _single_states(tensors["cond_emb"], transformer.config.cross_attention_dim)}


def _single_states(states: torch.Tensor, width: int) -> torch.Tensor:
    """States of `width` channels, of the original's, which may have each of them twice."""
    if states.shape[-1] != 2 * width:
        return states
    lengths = states.float().norm(dim=-1)
    is_normalized = torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2)
    return states[..., :width] * (2**0.5 if is_normalized else 1)


__all__ = ["of_codec", "of_latent_diffusion", "of_mask_replace_diffusion", "of_mask_replace_schedule"]
