"""Sampling images by diffusion in the latents of a tokenizer, before their quantization."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMScheduler, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel

from ..images import images_as, to_pixel_values
from .class_conditioning import class_names
from .latent_conditions import LatentConditionMixin, repeat_inputs, repeat_to, to_map, to_mask
from .pipeline_utils import VQPipeline, changed_by_callback, check_generator, last_steps, onload


LATENT_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class VQLatentDiffusionPipelineOutput(BaseOutput):
    """
    Args:
        images: by `output_type`, a list of `PIL.Image.Image` ("pil"), an array `(B, H, W, C)` in [0, 1] ("np"), a tensor
            `(B, C, H, W)` in [0, 1] ("pt"), or None ("latent": nothing is decoded).
        latents: `(B, D, h, w)`, as `vqvae.decode` takes them: not scaled, not quantized.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None
    latents: torch.FloatTensor


class VQLatentDiffusionPipeline(LatentConditionMixin, VQPipeline):
    """
    Latent diffusion (Rombach et al. 2022) with a vector-quantized first stage ("VQ-reg"): `unet` denoises latents
    multiplied by `vqvae.config.scaling_factor`, and `vqvae.decode` quantizes them before it decodes.

    The condition follows from the parts: class labels (`num_class_embeds`, or a table of class vectors as the
    `encoder_hid_proj` of a `UNet2DConditionModel` without text encoder), text (`text_encoder` and `tokenizer`, or
    `prompt_embeds`), and maps that are concatenated to the latents (as many channels as `unet` has beyond the latents').

    Args:
        vqvae ([`VQGANModel`] or another tokenizer): its codes are one map of vectors.
        unet (`UNet2DModel` or `UNet2DConditionModel`): predicts what the scheduler's `prediction_type` says.
        scheduler: any scheduler of diffusers for continuous data.
        text_encoder, tokenizer (*optional*): a text encoder of transformers.
        id2label (*optional*): names of the classes.
        null_class_id (*optional*): the class that stands for none, which guidance needs.
        text_max_length, text_lower_case, text_normalize: see `encode_text`.
        text_mask: cross-attention passes over padding.
    """

    model_cpu_offload_seq = "text_encoder->unet->vqvae"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        vqvae: PreTrainedModel,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer=None,
        id2label: dict[str, str] | None = None,  # ids are strings in JSON
        null_class_id: int | None = None,
        text_max_length: int | None = None,
        text_lower_case: bool = False,
        text_normalize: bool = False,
        text_mask: bool = True,
    ):
        super().__init__()
        if vqvae is not None and hasattr(vqvae.config, "num_levels"):
            raise ValueError(f"`vqvae` must have one level of codes, got a {type(vqvae).__name__}.")
        if vqvae is not None and unet is not None:
            wanted = vqvae.config.embed_dim
            if unet.config.out_channels != wanted or unet.config.in_channels < wanted:
                raise ValueError(
                    f"`unet` must have {wanted} output channels and at least as many input channels, as the latents of "
                    f"`vqvae` have, got {unet.config.out_channels} and {unet.config.in_channels}."
                )
        if unet is not None and unet.config.get("cross_attention_dim") and unet.config.get("num_class_embeds"):
            raise ValueError(
                "`unet` must have either cross-attention or a class embedding, not both: classes for cross-attention are "
                "its `encoder_hid_proj`."
            )
        self.register_modules(
            vqvae=vqvae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.id2label = class_names(id2label)
        if unet is not None and null_class_id is not None:
            if self.condition_kind not in ("class", "class_token") or not 0 <= null_class_id < self.num_classes:
                raise ValueError(f"`null_class_id` must be one of the classes of `unet`, got {null_class_id}.")
        self.register_to_config(
            id2label=self.id2label,
            null_class_id=null_class_id,
            text_max_length=text_max_length,
            text_lower_case=text_lower_case,
            text_normalize=text_normalize,
            text_mask=text_mask,
        )

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        kind = self.condition_kind
        return {"class": "class_labels=0", "class_token": "class_labels=0", "text": 'prompt="…"'}.get(kind, "")

    # Preparing

    def check_inputs(self, output_type, guidance_scale, strength, image, mask_image, callback):
        """ValueErrors for the arguments that need no other part."""
        if output_type not in LATENT_OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {LATENT_OUTPUT_TYPES}, got {output_type!r}.")
        if not isinstance(guidance_scale, (int, float)) or not guidance_scale >= 0:
            raise ValueError(f"`guidance_scale` must be a number that is not negative, got {guidance_scale!r}.")
        if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must lie in (0, 1], got {strength!r}.")
        if strength != 1 and image is None:
            raise ValueError("`strength` needs an `image` to start from.")
        if mask_image is not None and (image is None or strength != 1):
            raise ValueError("`mask_image` needs the `image` that it is a part of, and no `strength`.")
        if callback is not None and not callable(callback):
            raise ValueError("`callback_on_step_end` must be callable.")

    def set_timesteps(self, num_inference_steps: int, timesteps=None, sigmas=None, tokens: int = 0) -> torch.Tensor:
        """Sets the scheduler's steps, given in number or as `timesteps` or `sigmas`, and returns its timesteps."""
        if timesteps is not None and sigmas is not None:
            raise ValueError("Only one of `timesteps` and `sigmas` can be given.")
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        own = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
        for name in own:
            if name not in accepted:
                raise ValueError(f"`{name}` cannot be given to a {type(self.scheduler).__name__}.")
        if not own:
            if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps` must be a positive int, got {num_inference_steps!r}.")
            own["num_inference_steps"] = num_inference_steps
        config = self.scheduler.config
        if "mu" in accepted and config.get("use_dynamic_shifting"):
            # linear in the number of latents, between the two lengths of the configuration
            first, last = config.base_image_seq_len, config.max_image_seq_len
            slope = (config.max_shift - config.base_shift) / (last - first)
            own["mu"] = config.base_shift + slope * (tokens - first)
        self.scheduler.set_timesteps(**own, device=self._execution_device)
        return self.scheduler.timesteps

    def prepare_latents(self, shape, generator, latents=None, image_latents=None, first_timestep=None):
        """The noise that denoising starts from, or `image_latents` (scaled) with the noise of `first_timestep`."""
        device = self._execution_device
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or latents.shape != torch.Size(shape):
                got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
                raise ValueError(f"`latents` must have shape {tuple(shape)}, got {got}.")
            noise = latents.to(device, torch.float32)
        else:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if image_latents is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        timesteps = first_timestep.repeat(shape[0])
        if hasattr(self.scheduler, "scale_noise"):  # of flow matching
            return self.scheduler.scale_noise(image_latents, timesteps, noise)
        if not hasattr(self.scheduler, "add_noise"):
            raise ValueError(
                f"`image` needs a scheduler that adds noise to it; a {type(self.scheduler).__name__} does not."
            )
        return self.scheduler.add_noise(image_latents, noise, timesteps)

    # One step

    def predict(self, latents, timestep, inputs, null_inputs, maps, guidance_scale: float) -> torch.FloatTensor:
        """The denoiser's output, guided: `null + scale * (conditional - null)` (Ho & Salimans, 2022)."""
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, timestep)
        sample = latents if maps is None else torch.cat([latents, maps], dim=1)
        if null_inputs is not None:
            sample = torch.cat([sample, sample])
            inputs = {name: torch.cat([null_inputs[name], inputs[name]]) for name in inputs}
        output = self.unet(sample.to(self.unet.dtype), timestep, **inputs).sample.float()
        if null_inputs is None:
            return output
        null, conditional = output.chunk(2)
        return null + guidance_scale * (conditional - null)

    def quantize_step(self, output, timestep) -> torch.FloatTensor:
        """
        The step of DDIM with the predicted clean latents quantized, the direction to the noise unchanged
        (`quantize_denoised` of the original).
        """
        onload(self.vqvae)
        scale = self.vqvae.config.scaling_factor
        clean = output.pred_original_sample
        quantized = self.vqvae.quantize((clean / scale).to(self.vqvae.dtype)).quantized.float() * scale
        previous = timestep - self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        alphas = self.scheduler.alphas_cumprod
        alpha = alphas[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod
        return output.prev_sample + alpha.to(clean.device).sqrt() * (quantized - clean)

    def step_arguments(self, generator, eta: float) -> dict:
        """What `scheduler.step` takes beside its inputs."""
        accepted = inspect.signature(self.scheduler.step).parameters
        if not isinstance(eta, (int, float)) or not eta >= 0:
            raise ValueError(f"`eta` must be a number that is not negative, got {eta!r}.")
        if eta != 0 and "eta" not in accepted:
            raise ValueError(f"`eta` has no meaning for a {type(self.scheduler).__name__}; leave it at 0.")
        values = {"eta": eta, "generator": generator}
        return {name: value for name, value in values.items() if name in accepted}

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, batch_size: int = 16) -> torch.FloatTensor:
        """Latents `(B, D, h, w)`, not scaled, to images `(B, C, H, W)` in [-1, 1]: quantized, then decoded."""
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        onload(self.vqvae)
        parts = latents.to(self.vqvae.dtype).split(batch_size)
        return torch.cat([self.vqvae.decode(part).sample.float() for part in parts]).clamp(-1, 1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        condition_image=None,
        image=None,
        mask_image=None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        quantize_denoised: bool = False,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.FloatTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        decode_batch_size: int = 16,
        callback_on_step_end: Callable | None = None,
    ) -> VQLatentDiffusionPipelineOutput | tuple:
        """
        Args:
            class_labels: a class or a list of classes, ids or names of `id2label`; None is the null class.
            prompt, negative_prompt: texts; `negative_prompt` is what guidance leads away from, "" by default.
            condition_image: a map for each image that is resized to the latents, whose proportions it has, and
                concatenated: a tensor `(B, C, H, W)` (one-hot classes of a semantic map; a low-resolution image in
                [-1, 1]), or PIL images.
            image: PIL images, or a tensor `(B, C, H, W)` in [-1, 1]: with `strength`, where sampling starts; with
                `mask_image`, what is painted into.
            mask_image: PIL images, or a tensor `(B, 1, H, W)` in [0, 1]: 1 is painted anew, the other pixels are kept.
            strength: for `image` without mask, the share of the steps that is taken.
            num_inference_steps, timesteps, sigmas: the scheduler's steps.
            guidance_scale: see `predict`; 1 is off.
            eta: DDIM's η.
            quantize_denoised: quantize the predicted clean latents in each step; DDIM only.
            num_images_per_prompt: images for each class, prompt or condition; those of one are adjacent.
            height, width: of the images, multiples of the tokenizer's downsample factor; by default the denoiser's
                `sample_size`, or the size of `image`.
            generator: one `torch.Generator` for the call, or a list with one for each image, which makes an image
                independent of the others in its batch.
            latents: the standard normal noise `(B, D, h, w)` to start from.
            prompt_embeds, negative_prompt_embeds: `(B, S, D)`, in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: `(B, S)`, false where these are padded; by default nowhere.
            output_type: "pil", "np", "pt" or "latent", see [`VQLatentDiffusionPipelineOutput`].
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each step as `callback(pipe, step, timestep, {"latents": (B, D, h, w)})`,
                scaled; it may return a dict with other `latents`.

        Raises:
            ValueError: an argument out of range, or a condition that the denoiser does not take.
        """
        self.check_inputs(output_type, guidance_scale, strength, image, mask_image, callback_on_step_end)
        kind = "indices" if output_type == "latent" else output_type  # not decoded either
        self.check_output(num_images_per_prompt, kind, decode_batch_size)
        if quantize_denoised and not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(f"`quantize_denoised` needs a DDIMScheduler, got {type(self.scheduler).__name__}.")
        image = None if image is None else to_pixel_values(image, self.vqvae.config.in_channels)
        mask = None if mask_image is None else to_mask(mask_image)
        condition_image = None if condition_image is None else to_map(condition_image)
        class_labels = None if class_labels is None else self.class_ids(class_labels)
        conditions = (class_labels, prompt, prompt_embeds, condition_image, image, mask)
        count = max(_length(value) for value in conditions)
        batch_size = count * num_images_per_prompt
        factor = self.vqvae.config.downsample_factor
        size = self._latent_size(height, width, image, factor)
        image, mask = self._match(image, mask, (size[0] * factor, size[1] * factor))
        if mask is not None:
            image, mask = repeat_to(image, count, "image"), repeat_to(mask, count, "mask_image")
        check_generator(generator, batch_size)

        inputs, null_inputs = self.prepare_condition(
            count,
            class_labels,
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            guided=guidance_scale != 1,
        )
        inputs, null_inputs = (repeat_inputs(rows, num_images_per_prompt) for rows in (inputs, null_inputs))
        maps = self.prepare_concatenated(count, size, condition_image, image, mask, num_images_per_prompt)
        steps = self.set_timesteps(num_inference_steps, timesteps, sigmas, tokens=size[0] * size[1])
        image_latents = None
        if image is not None and mask is None:
            image_latents = self.encode_image(image) * self.vqvae.config.scaling_factor
            image_latents = repeat_to(image_latents, count, "image", num_images_per_prompt)
            steps = self._last_steps(steps, strength)
        shape = (batch_size, self.vqvae.config.embed_dim, *size)
        latents = self.prepare_latents(shape, generator, latents, image_latents, steps[:1])
        latents = self._denoise(
            latents,
            steps,
            lambda x, t: self.predict(x, t, inputs, null_inputs, maps, guidance_scale),
            self.step_arguments(generator, eta),
            quantize_denoised,
            callback_on_step_end,
        )
        latents = latents / self.vqvae.config.scaling_factor
        if mask is not None:
            image, mask = (value.repeat_interleave(num_images_per_prompt, dim=0) for value in (image, mask))
        images = self._images(latents, output_type, decode_batch_size, image, mask)
        self.maybe_free_model_hooks()
        return VQLatentDiffusionPipelineOutput(images, latents) if return_dict else (images, latents)

    def _latent_size(self, height, width, image, factor: int) -> tuple[int, int]:
        default = self.unet.config.sample_size
        default = (default, default) if isinstance(default, int) else default
        if image is not None:
            default = image.shape[-2] // factor, image.shape[-1] // factor
        if default is None and (height is None or width is None):
            raise ValueError("`height` and `width` must be given: the denoiser has no sample_size.")
        sides = []
        for name, value, grid in (("height", height, 0), ("width", width, 1)):
            value = default[grid] * factor if value is None else value
            if not isinstance(value, int) or value < factor or value % factor:
                raise ValueError(f"`{name}` must be a multiple of {factor} (the downsample factor), got {value!r}.")
            sides.append(value // factor)
        return sides[0], sides[1]

    @staticmethod
    def _match(image, mask, size: tuple[int, int]):
        for name, value in (("image", image), ("mask_image", mask)):
            if value is not None and tuple(value.shape[-2:]) != size:
                raise ValueError(
                    f"`{name}` must be {size[0]} high and {size[1]} wide, got {tuple(value.shape[-2:])}; resize it first."
                )
        return image, mask

    def _last_steps(self, steps: torch.Tensor, strength: float) -> torch.Tensor:
        """The last share `strength` of the steps, for an image that is to be changed."""
        order = self.scheduler.order
        count = -(-len(steps) // order)  # a step of second order takes two timesteps, but the last takes one
        start = (count - last_steps(count, strength)) * order
        if start and len(getattr(self.scheduler, "prk_timesteps", ())):
            raise ValueError(
                "`strength` below 1 needs a PNDMScheduler with skip_prk_steps=True: its first steps differ."
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        return steps[start:]

    def _denoise(self, latents, steps, predict, step_arguments: dict, quantize_denoised: bool, callback):
        with self.progress_bar(total=len(steps)) as progress_bar:
            for i, t in enumerate(steps):
                output = self.scheduler.step(predict(latents, t), t, latents, **step_arguments)
                latents = self.quantize_step(output, int(t)) if quantize_denoised else output.prev_sample
                if callback is not None:
                    latents = changed_by_callback(callback(self, i, t, {"latents": latents}), "latents", latents)
                progress_bar.update()
        return latents

    def _images(self, latents, output_type: str, decode_batch_size: int, image, mask):
        if output_type == "latent":
            return None
        pixels = self.decode_latents(latents, decode_batch_size)
        if mask is not None:
            mask, image = mask.to(pixels.device), image.to(pixels.device)
            pixels = mask * pixels + (1 - mask) * image
        return images_as(pixels / 2 + 0.5, output_type)


def _length(value) -> int:
    """How many conditions an argument holds."""
    return 1 if value is None or isinstance(value, str) else len(value)


__all__ = ["VQLatentDiffusionPipeline", "VQLatentDiffusionPipelineOutput"]
