"""Sampling images by diffusion in the latents of a tokenizer, before their quantization."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..argument_checks import check_integer, check_real, check_sequence
from ..images import images_as
from .completion import Given, check_painted, check_whole_size, grids_of, kept_codes, paste, random_mask, read_given
from .conditioning import (
    check_stages,
    class_names,
    count_inputs,
    repeat_inputs,
    repeat_to,
    resize_by_stages,
    resize_map,
    size_after_stages,
    to_map,
)
from .continuous_schedulers import KnownLatents, add_noise, check_scheduler, set_ddim_timesteps
from .denoising_pipeline import DenoisingPipeline, GuidanceInterval, last_steps
from .text_condition import check_text_parts
from .vq_pipeline import (
    check_decoded,
    check_generator,
    check_guidance_scale,
    check_part,
    check_tokenizer,
    onload,
    taking_turns,
)


LATENT_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class VQLatentDiffusionPipelineOutput(BaseOutput):
    """
    Args:
        images: by `output_type`, a list of `PIL.Image.Image` ("pil"), an array `(B, H, W, C)` in [0, 1] ("np"), a
            tensor `(B, C, H, W)` in [0, 1] ("pt"), or the latents ("latent": nothing is decoded).
        latents: `(B, D, h, w)`, as `vqvae.decode` takes them: not scaled, not quantized.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.FloatTensor


class VQLatentDiffusionPipeline(DenoisingPipeline):
    """
    Latent diffusion (Rombach et al. 2022) with a vector-quantized first stage ("VQ-reg"): `unet` denoises latents
    multiplied by `vqvae.config.scaling_factor`, and `vqvae.decode` quantizes them before it decodes.

    The condition follows from the parts: class labels (`num_class_embeds`, or a table of class vectors as the
    `encoder_hid_proj` of a `UNet2DConditionModel` without text encoder), text (`text_encoder` and `tokenizer`, or
    `prompt_embeds`), and maps that are concatenated to the latents (as many channels as `unet` has beyond the
    latents').

    Args:
        vqvae ([`VQGANModel`] or another tokenizer): its codes are one map of vectors.
        unet (`UNet2DModel` or `UNet2DConditionModel`): predicts what the scheduler's `prediction_type` says.
        scheduler: any scheduler of diffusers for continuous data.
        text_encoder, tokenizer (*optional*): a text encoder of transformers.
        id2label (*optional*): names of the classes.
        null_class_id (*optional*): the class that stands for none, which guidance needs.
        text_max_length, text_lower_case, text_normalize, text_pad_token_id: see `encode_text`.
        text_mask: cross-attention passes over padding, as the text encoder does.
        condition_stages (*optional*): how maps that no tokenizer encodes come to the size of the latents, as the
            arguments of [`~conditioning.resize_by_stages`]; by default see [`~conditioning.resize_map`].
        condition_ones: the maps are followed by a channel of ones, which carries a bias up to their borders.
        condition_vqvae (*optional*): a tokenizer whose latents of `condition_image`, or of the masked image, are
            concatenated in place of the image.
        encode_condition: `vqvae` encodes `condition_image`, where there is no `condition_vqvae`.

    Raises:
        ValueError: parts that do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->condition_vqvae->unet->vqvae"
    _optional_components = ["text_encoder", "tokenizer", "condition_vqvae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vqvae: PreTrainedModel,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[str, str] | None = None,  # ids are strings in JSON
        null_class_id: int | None = None,
        text_max_length: int | None = None,
        text_lower_case: bool = False,
        text_normalize: bool = False,
        text_mask: bool = True,
        text_pad_token_id: int | None = None,
        condition_stages: dict[str, str | float | int] | None = None,
        condition_ones: bool = False,
        condition_vqvae: PreTrainedModel | None = None,
        encode_condition: bool = False,
    ):
        super().__init__()
        check_tokenizer(vqvae)
        check_tokenizer(condition_vqvae, "condition_vqvae")
        attributes = ("config.in_channels", "config.out_channels", "time_embedding", "down_blocks")
        check_part("unet", unet, attributes, "a UNet2DModel or a UNet2DConditionModel")
        check_part("scheduler", scheduler, ("set_timesteps", "step", "config"), "a scheduler of diffusers")
        if hasattr(scheduler, "mask_index"):
            raise ValueError(f"`scheduler` must be one for continuous data, got a {type(scheduler).__name__}.")
        check_text_parts(text_encoder, tokenizer)
        if vqvae is not None and unet is not None:
            wanted = vqvae.config.embed_dim
            if unet.config.out_channels != wanted or unet.config.in_channels < wanted:
                raise ValueError(
                    f"`unet` must have {wanted} output channels and at least as many input channels, as the latents "
                    f"of `vqvae` have, got {unet.config.out_channels} and {unet.config.in_channels}."
                )
            if condition_ones and unet.config.in_channels < wanted + 2:
                raise ValueError(
                    "`condition_ones` needs a `unet` that takes a map and the ones beside the latents, got one of "
                    f"{unet.config.in_channels} input channels for latents of {wanted}."
                )
        if unet is not None and unet.config.get("cross_attention_dim") and unet.config.get("num_class_embeds"):
            raise ValueError(
                "`unet` must have either cross-attention or a class embedding, not both: classes for cross-attention "
                "are its `encoder_hid_proj`."
            )
        self.register_modules(
            vqvae=vqvae,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            condition_vqvae=condition_vqvae,
        )
        self.id2label = class_names(id2label)
        if unet is not None and null_class_id is not None:
            if self.condition_kind not in ("class", "class_token") or not 0 <= null_class_id < self.class_rows:
                raise ValueError(f"`null_class_id` must be one of the classes of `unet`, got {null_class_id}.")
        self.register_to_config(
            id2label=self.id2label,
            null_class_id=null_class_id,
            text_max_length=text_max_length,
            text_lower_case=text_lower_case,
            text_normalize=text_normalize,
            text_mask=text_mask,
            text_pad_token_id=text_pad_token_id,
            condition_stages=None if condition_stages is None else check_stages("condition_stages", condition_stages),
            condition_ones=condition_ones,
            encode_condition=encode_condition,
        )

    # The condition

    @property
    def lora_components(self) -> tuple[str, ...]:
        """The name of the denoiser."""
        return ("unet",)

    @property
    def denoiser(self) -> UNet2DModel | UNet2DConditionModel:
        """The U-Net."""
        return self.unet

    @property
    def condition_kind(self) -> str | None:
        """
        How the denoiser is conditioned: "class" (its class embedding), "class_token" (one-hot classes through its
        `encoder_hid_proj`, a table of vectors for cross-attention), "text" or None.
        """
        config = self.unet.config
        if config.get("num_class_embeds") is not None:
            return "class"
        if config.get("cross_attention_dim") is None:
            return None
        is_token = config.get("encoder_hid_dim_type") == "text_proj" and self.text_encoder is None
        return "class_token" if is_token else "text"

    @property
    def class_rows(self) -> int:
        """Rows of the denoiser's table of classes, the null class included if there is one."""
        config = self.unet.config
        return config.num_class_embeds if self.condition_kind == "class" else config.encoder_hid_dim

    @property
    def null_class_id(self) -> int | None:
        """The class that stands for none, if there is one."""
        return self.config.null_class_id

    @property
    def encoder_passes_over_padding(self) -> bool:
        """As the denoiser's cross-attention; the text encoders of the original latent diffusion read padding."""
        return self.config.text_mask

    def class_inputs(self, ids: torch.LongTensor) -> dict[str, torch.Tensor]:
        """The denoiser's keyword arguments for classes `(B,)`."""
        if self.condition_kind == "class":
            return super().class_inputs(ids)
        tokens = F.one_hot(ids, self.class_rows)[:, None]
        return {"encoder_hidden_states": tokens.to(self._execution_device, self.unet.dtype)}

    @property
    def condition_encoder(self) -> PreTrainedModel | None:
        """The tokenizer that encodes `condition_image`, if one does."""
        return self.vqvae if self.condition_vqvae is None and self.config.encode_condition else self.condition_vqvae

    def encode_image(
        self, pixel_values: torch.Tensor, batch_size: int = 16, encoder: PreTrainedModel | None = None
    ) -> torch.Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to latents before quantization, unscaled, float32; `batch_size` at a
        time; by `vqvae`, or by `encoder`.
        """
        encoder = self.vqvae if encoder is None else encoder
        onload(encoder)
        pixels = pixel_values.to(self._execution_device, encoder.dtype)
        return torch.cat([encoder.encode(part).latents.float() for part in pixels.split(batch_size)])

    def prepare_concatenated(
        self,
        size: tuple[int, int],
        condition_image: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        The maps `(B, C, h, w)` that are concatenated to the noisy latents, or None.

        Inpainting (`mask` `(B, 1, H, W)`, or of latents, 1 is painted): the latents of the image with its masked
        pixels black, not scaled, and the mask in {-1, 1}, nearest. Otherwise `condition_image`, encoded or resized
        to the latents. A channel of ones follows with `condition_ones`.

        Raises:
            ValueError: maps of other channels than the denoiser has beside the latents, or of a size that is not
                brought to theirs.
        """
        ones = int(self.config.condition_ones)
        channels = self.unet.config.in_channels - self.vqvae.config.embed_dim - ones
        maps = None
        if mask is not None:
            mask = F.interpolate(mask, size=image.shape[-2:])
            masked = (1 - mask) * (image + 1) - 1
            hidden = F.interpolate(mask * 2 - 1, size=size, mode="nearest")
            encoded = self.encode_image(masked, encoder=self.condition_vqvae)
            maps = torch.cat([encoded, hidden.to(self._execution_device)], dim=1)
        elif condition_image is not None:
            to_size = self.resize_condition if self.condition_encoder is None else self.condition_latents
            maps = to_size(condition_image.to(self._execution_device), size)
        if maps is None and channels:
            raise ValueError(
                f"`condition_image`, or `image` with `mask_image`, must be given: the denoiser takes {channels} "
                "channels beside the latents."
            )
        found = 0 if maps is None else maps.shape[1]
        if found != channels:
            name = "mask_image" if mask is not None else "condition_image"
            raise ValueError(
                f"`{name}` must give the {channels} channels that the denoiser takes beside the latents, got {found}."
            )
        return torch.cat([maps, torch.ones_like(maps[:, :1])], dim=1) if ones else maps

    def condition_latents(self, condition_image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Images `(B, C, H, W)` to latents `(B, D', h, w)` of `condition_encoder`, or these as they are.

        Raises:
            ValueError: neither images that it encodes to the size `(h, w)`, nor latents of it.
        """
        config, given = self.condition_encoder.config, tuple(condition_image.shape[1:])
        wanted = (config.in_channels, *(side * config.downsample_factor for side in size))
        if given == wanted:
            return self.encode_image(condition_image, encoder=self.condition_encoder)
        if given[1:] == tuple(size):
            return condition_image
        raise ValueError(
            f"`condition_image` must be (B, {', '.join(map(str, wanted))}), which a tokenizer encodes to the size "
            f"{size[0]}x{size[1]} of the latents, or latents of that size, got {tuple(condition_image.shape)}."
        )

    def resize_condition(self, condition_image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A map `(B, C, H, W)` to the size `(h, w)` of the latents.

        Raises:
            ValueError: it has other proportions, or `condition_stages` bring it to another size.
        """
        stages, given = self.config.condition_stages, tuple(condition_image.shape[-2:])
        if stages is not None:
            multiplier, times = stages["multiplier"], stages["n_stages"]
            if size_after_stages(given, multiplier, times) != tuple(size):
                raise ValueError(
                    f"`condition_image` must have a size that {times} times {multiplier:g} is the {size[0]}x{size[1]} "
                    f"of the latents (`condition_stages`), got {given[0]}x{given[1]}; resize it, or give `height` and "
                    "`width`."
                )
            return resize_by_stages(condition_image, **stages)
        if given[0] * size[1] != given[1] * size[0]:
            raise ValueError(
                f"`condition_image` must have the proportions of the {size[0]}x{size[1]} latents, got "
                f"{given[0]}x{given[1]}; crop it, or give `height` and `width`."
            )
        return resize_map(condition_image, size)

    # Preparing

    def check_inputs(self, image: Any, completes: bool, strength: float, quantize_denoised: bool):
        """ValueErrors for arguments that exclude or need each other."""
        if strength != 1 and image is None:
            raise ValueError("`strength` needs an `image` to start from.")
        if completes and strength != 1:
            raise ValueError("`strength` must be 1 with `mask_image`, `keep_fraction` or `outpaint`.")
        if quantize_denoised and not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(f"`quantize_denoised` needs a DDIMScheduler, got {type(self.scheduler).__name__}.")

    def set_timesteps(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        tokens: int = 0,
    ) -> torch.Tensor:
        """
        Sets the scheduler's steps, given in number or as `timesteps` or `sigmas`, and returns its timesteps.

        Raises:
            ValueError: steps that the scheduler does not take.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("Only one of `timesteps` and `sigmas` can be given.")
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        own = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
        is_ddim = isinstance(scheduler, DDIMScheduler)
        for name, values in own.items():
            if name not in accepted and not (name == "timesteps" and is_ddim):
                raise ValueError(f"`{name}` cannot be given to a {type(scheduler).__name__}.")
            numbers = [check_real(name, value, minimum=0) for value in check_sequence(name, values)]
            most = scheduler.config.num_train_timesteps if name == "timesteps" else math.inf
            if any(a <= b for a, b in pairwise(numbers)) or numbers[0] > most:
                limit = f" from at most {most}" if name == "timesteps" else ""
                raise ValueError(f"`{name}` must fall{limit}, got {numbers}.")
            own[name] = [
                int(number) if name == "timesteps" and number == int(number) else number for number in numbers
            ]
        if "timesteps" in own and is_ddim:
            return set_ddim_timesteps(scheduler, own["timesteps"], self._execution_device)
        if not own:
            own["num_inference_steps"] = check_integer("num_inference_steps", num_inference_steps, 1)
        config = scheduler.config
        if "mu" in accepted and config.get("use_dynamic_shifting"):
            # linear in the number of latents, between the two lengths of the configuration
            first, last = config.base_image_seq_len, config.max_image_seq_len
            slope = (config.max_shift - config.base_shift) / (last - first)
            own["mu"] = config.base_shift + slope * (tokens - first)
        try:
            scheduler.set_timesteps(**own, device=self._execution_device)
        except (ValueError, IndexError) as error:  # too few for a method of several steps, or not those it can take
            given = ", ".join(f"{name}={value}" for name, value in own.items())
            raise ValueError(f"`{next(iter(own))}`: a {type(scheduler).__name__} takes no {given}: {error}") from error
        return scheduler.timesteps

    def prepare_noise(
        self,
        shape: Sequence[int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.FloatTensor | None = None,
    ) -> torch.FloatTensor:
        """Standard normal noise, float32, or `latents` in place of it."""
        device = self._execution_device
        if latents is None:
            return randn_tensor(tuple(shape), generator=generator, device=device, dtype=torch.float32)
        is_float = isinstance(latents, torch.Tensor) and latents.is_floating_point()
        if not is_float or latents.shape != torch.Size(shape):
            got = f"{latents.dtype} {tuple(latents.shape)}" if torch.is_tensor(latents) else type(latents).__name__
            raise ValueError(f"`latents` must be floating and have shape {tuple(shape)}, got {got}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` must be finite, got nan or infinity.")
        return latents.to(device, torch.float32)

    def prepare_latents(
        self,
        scheduler: SchedulerMixin,
        noise: torch.FloatTensor,
        image_latents: torch.FloatTensor | None = None,
        first_timestep: torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """What denoising starts from: the noise, or `image_latents` (scaled) with that of `first_timestep`."""
        if image_latents is None:
            return noise * getattr(scheduler, "init_noise_sigma", 1.0)
        return add_noise(scheduler, image_latents, noise, first_timestep)

    # One step

    def predict(
        self,
        latents: torch.FloatTensor,
        timestep: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        null_inputs: dict[str, torch.Tensor] | None = None,
        maps: torch.FloatTensor | None = None,
        guidance_scale: float = 1.0,
    ) -> torch.FloatTensor:
        """The denoiser's output for latents that its scheduler has scaled, guided: `null + scale * (cond - null)`
        (Ho & Salimans, 2022)."""
        sample = latents if maps is None else torch.cat([latents, maps], dim=1)
        if null_inputs is not None:
            sample = torch.cat([sample, sample])
            inputs = {name: torch.cat([null_inputs[name], inputs[name]]) for name in inputs}
        output = self.unet(sample.to(self.unet.dtype), timestep, **inputs).sample.float()
        if null_inputs is None:
            return output
        null, conditional = output.chunk(2)
        return null + guidance_scale * (conditional - null)

    def quantize_step(self, scheduler: DDIMScheduler, output: Any, timestep: int) -> torch.FloatTensor:
        """
        The step of DDIM with the predicted clean latents quantized, the direction to the noise unchanged
        (`quantize_denoised` of the original).
        """
        onload(self.vqvae)
        scale = self.vqvae.config.scaling_factor
        clean = output.pred_original_sample
        quantized = self.vqvae.quantize((clean / scale).to(self.vqvae.dtype)).quantized.float() * scale
        previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alphas = scheduler.alphas_cumprod
        alpha = alphas[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        return output.prev_sample + alpha.to(clean.device).sqrt() * (quantized - clean)

    def step_arguments(self, scheduler: SchedulerMixin, generator: Any, eta: float) -> dict:
        """What `scheduler.step` takes beside its inputs."""
        check_scheduler(scheduler)
        accepted = inspect.signature(scheduler.step).parameters
        eta = check_real("eta", eta, 0, 1)
        if eta != 0 and "eta" not in accepted:
            raise ValueError(f"`eta` has no meaning for a {type(scheduler).__name__}; leave it at 0.")
        values = {"eta": eta, "generator": generator}
        return {name: value for name, value in values.items() if name in accepted}

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, batch_size: int = 16) -> torch.FloatTensor:
        """Latents `(B, D, h, w)`, not scaled, to images `(B, C, H, W)` in [-1, 1]: quantized, then decoded."""
        batch_size = check_integer("batch_size", batch_size, 1)
        onload(self.vqvae)
        parts = latents.to(self.vqvae.dtype).split(batch_size)
        return check_decoded(torch.cat([self.vqvae.decode(part).sample.float() for part in parts])).clamp(-1, 1)

    @taking_turns
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        condition_image: Any = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        keep_fraction: float | None = None,
        outpaint: Sequence[int] | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        eta: float = 0.0,
        quantize_denoised: bool = False,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VQLatentDiffusionPipelineOutput | tuple:
        """
        Args:
            prompt: a text or a list of texts.
            class_labels: a class or a list of classes, ids or names of `id2label`; None is the null class.
            condition_image: a map for each image that is resized to the latents, whose proportions it has, and
                concatenated: a tensor `(B, C, H, W)` (one-hot classes of a semantic map; a low-resolution image in
                [-1, 1]), or images, see [`~images.to_pixel_values`]. Where a tokenizer encodes it, images of the size
                whose latents are as large as those that are drawn, or its latents, unscaled.
            image: images, see [`~images.to_pixel_values`]: with `strength`, where sampling starts; with `mask_image`,
                what is painted into.
            mask_image: a mask of pixels or of latents, see [`~conditioning.to_mask`]: 1 (white) is painted anew, the
                other pixels are kept. A denoiser that takes a masked image beside the latents is given it; any other
                has, at every step, the noised latents of the image where none of their pixels is painted.
            height, width: of the images, multiples of the tokenizer's downsample factor; by default the denoiser's
                `sample_size`, or the size of `image`.
            negative_prompt: what guidance leads away from, "" by default.
            keep_fraction: in place of a mask, the share of the latents that is kept, in random places: a variation.
            outpaint: pixels `(top, bottom, left, right)` to add around the image.
            strength: for `image` without mask, the share of the steps that is taken.
            num_inference_steps, timesteps, sigmas: the scheduler's steps. A DDIMScheduler takes `timesteps` that fall
                evenly, see [`~continuous_schedulers.ddim_steps`]. Those of the original for S steps of T timesteps are
                `range(1, T + 1, T // S)[::-1]`, which are more than S where S does not divide T.
            guidance_scale: see `predict`; 1 is off.
            guidance_start, guidance_end: the share of the schedule's steps that is guided, whatever `strength` leaves
                of them; the others see the condition alone, and cost half. Guidance at the noisiest steps costs
                variety, and at the last ones it changes little (Kynkäänniemi et al. 2024).
            eta: DDIM's η.
            quantize_denoised: quantize the predicted clean latents in each step; DDIM only.
            num_images_per_prompt: images for each class, prompt or condition; those of one are adjacent.
            batch_size: how many inputs there are where no argument says it: without class, prompt and image.
            generator: one `torch.Generator` for the call, or a list with one for each image, which makes an image
                independent of the others in its batch.
            latents: the standard normal noise `(B, D, h, w)` to start from.
            prompt_embeds, negative_prompt_embeds: `(B, S, D)`, in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: `(B, S)`, false where these are padded; by default
                nowhere.
            output_type: "pil", "np", "pt" or "latent", see [`VQLatentDiffusionPipelineOutput`].
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each step as `callback(pipe, step, timestep, {"latents": (B, D, h,
                w)})`, scaled; it may return a dict with other `latents`.
            callback_on_step_end_tensor_inputs: the names of what it is given, of `_callback_tensor_inputs`.

        Raises:
            ValueError: an argument out of range, or a condition that the denoiser does not take.
        """
        times, decode_batch_size = self.check_output(
            num_images_per_prompt, output_type, decode_batch_size, LATENT_OUTPUT_TYPES
        )
        guidance_scale = check_guidance_scale(guidance_scale)
        interval = GuidanceInterval(guidance_start, guidance_end)
        strength = check_real("strength", strength, 0, 1, above=0)
        keep_fraction = None if keep_fraction is None else check_real("keep_fraction", keep_fraction, 0, 1)
        completes = any(value is not None for value in (mask_image, keep_fraction, outpaint))
        self.check_inputs(image, completes, strength, quantize_denoised)
        callback_names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        given = read_given(self.vqvae.config, image, None, mask_image, keep_fraction, outpaint)
        condition_image = None if condition_image is None else to_map(condition_image)
        class_labels = None if class_labels is None else self.class_ids(class_labels)
        pixels, mask = (None, None) if given is None else (given.pixels, given.mask)
        count = count_inputs(batch_size, class_labels, prompt, prompt_embeds, condition_image, pixels, mask)
        check_generator(generator, count * times)
        size = self._latent_size(height, width, given)
        check_painted(given)
        pixels = None if pixels is None else repeat_to(pixels, count, "image", times)
        mask = None if mask is None else repeat_to(mask, count, "mask_image", times)
        if keep_fraction is not None:
            mask = random_mask((count * times, *size), keep_fraction, generator)
        inputs, null_inputs = self.prepare_condition(
            count,
            prompt,
            class_labels,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            guided=guidance_scale != 1,
        )
        inputs, null_inputs = repeat_inputs(inputs, times), repeat_inputs(null_inputs, times)
        takes_image = mask is not None and self.unet.config.in_channels != self.vqvae.config.embed_dim
        if condition_image is not None:
            condition_image = repeat_to(condition_image, count, "condition_image", times)
        maps = self.prepare_concatenated(size, condition_image, pixels, mask if takes_image else None)
        scheduler = self.own_scheduler()
        step_arguments = self.step_arguments(scheduler, generator, eta)
        steps = self.set_timesteps(scheduler, num_inference_steps, timesteps, sigmas, tokens=size[0] * size[1])
        image_latents = None
        if pixels is not None and not takes_image:
            image_latents = self.encode_image(pixels) * self.vqvae.config.scaling_factor
            steps = steps if mask is not None else self._last_steps(scheduler, steps, strength)
        guided = [False] * len(steps)
        if null_inputs is not None:
            guided = interval.guided(len(scheduler.timesteps), scheduler.order)[-len(steps) :]
        shape = (count * times, self.vqvae.config.embed_dim, *size)
        noise = self.prepare_noise(shape, generator, latents)
        known = None
        if mask is not None and not takes_image:
            kept = kept_codes(mask, size, self.vqvae.config.downsample_factor)[:, None]
            known = KnownLatents(image_latents, kept.to(noise.device), noise)
        start = None if known is not None else image_latents
        latents = self.prepare_latents(scheduler, noise, start, steps[:1])
        latents = self._denoise(
            scheduler,
            latents,
            steps,
            lambda x, t, i: self.predict(x, t, inputs, null_inputs if guided[i] else None, maps, guidance_scale),
            step_arguments,
            quantize_denoised,
            callback_on_step_end,
            callback_names,
            known,
        )
        latents = latents / self.vqvae.config.scaling_factor
        images = self._images(latents, output_type, decode_batch_size, pixels, mask)
        self.maybe_free_model_hooks()
        return VQLatentDiffusionPipelineOutput(images, latents) if return_dict else (images, latents)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images that the denoiser's `sample_size` decodes to; None without one."""
        sides = self.unet.config.sample_size
        sides = (sides, sides) if isinstance(sides, int) else sides
        return None if sides is None else tuple(side * self.vqvae.config.downsample_factor for side in sides)

    def _latent_size(self, height, width, given: Given | None) -> tuple[int, int]:
        factor = self.vqvae.config.downsample_factor
        default = self.image_size if given is None else tuple(side // factor * factor for side in given.size)
        if default is None and (height is None or width is None):
            raise ValueError("`height` and `width` must be given: the denoiser has no sample_size.")
        pairs = zip(("height", "width"), (height, width), default or (None, None), strict=True)
        size = tuple(own if value is None else check_integer(name, value, 1) for name, value, own in pairs)
        check_whole_size(given, size, (1, 1))
        grid = grids_of(size, [factor])[0]
        halvings = 2 ** (len(self.unet.config.block_out_channels) - 1)
        # a UNet2DConditionModel pads what does not divide
        if not isinstance(self.unet, UNet2DConditionModel) and any(side % halvings for side in grid):
            raise ValueError(
                f"`height` and `width` must be multiples of {factor * halvings}, the downsample factor times the "
                f"halvings of the denoiser, got {size[0]}x{size[1]}."
            )
        return grid

    def _last_steps(self, scheduler: SchedulerMixin, steps: torch.Tensor, strength: float) -> torch.Tensor:
        """The last share `strength` of the steps, for an image that is to be changed."""
        order = scheduler.order
        count = -(-len(steps) // order)  # a step of second order takes two timesteps, but the last takes one
        start = (count - last_steps(count, strength)) * order
        if start and len(getattr(scheduler, "prk_timesteps", ())):
            raise ValueError(
                "`strength` below 1 needs a PNDMScheduler with skip_prk_steps=True: its first steps differ."
            )
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        return steps[start:]

    def _denoise(
        self,
        scheduler,
        latents,
        steps,
        predict,
        step_arguments: dict,
        quantize_denoised: bool,
        callback,
        names,
        known: "KnownLatents | None" = None,
    ):
        latents = latents if known is None else known.put_into(latents, scheduler, steps[:1])
        with self.progress_bar(total=len(steps)) as progress_bar:
            for i, t in enumerate(steps):
                scaled = latents
                if hasattr(scheduler, "scale_model_input"):
                    scaled = scheduler.scale_model_input(latents, t)
                output = scheduler.step(predict(scaled, t, i), t, latents, **step_arguments)
                latents = self.quantize_step(scheduler, output, int(t)) if quantize_denoised else output.prev_sample
                if known is not None:
                    latents = known.put_into(latents, scheduler, steps[i + 1 : i + 2])
                if callback is not None:
                    latents = self.call_back(callback, names, i, t, "latents", latents)
                progress_bar.update()
        if not latents.isfinite().all():  # once for a call: a loop does not wait for the accelerator
            raise ValueError(
                "`latents`, the embeddings, or what `callback_on_step_end` returns must be numbers that the denoiser "
                "can compute with, got latents that became nan or infinite."
            )
        return latents

    def _images(self, latents, output_type: str, decode_batch_size: int, image, mask):
        if output_type == "latent":
            return latents
        pixels = self.decode_latents(latents, decode_batch_size)
        images = pixels / 2 + 0.5
        return images_as(images if mask is None else paste(images, image, mask), output_type)


__all__ = ["VQLatentDiffusionPipeline", "VQLatentDiffusionPipelineOutput"]
