"""Sampling images by mask-and-replace diffusion over code indices."""

import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin
from transformers import PreTrainedModel

from ..images import images_as, to_pixel_values
from .class_conditioning import class_names
from .code_conditions import CodeConditionMixin
from .latent_conditions import repeat_inputs, repeat_to, to_mask
from .pipeline_output import VQPipelineOutput
from .pipeline_utils import (
    VQPipeline,
    changed_by_callback,
    check_generator,
    check_single_codes,
    last_steps,
    onload,
)


class VQDiffusionImagePipeline(CodeConditionMixin, VQPipeline):
    """
    VQ-Diffusion (Gu et al. 2022): a grid of masked codes is revealed step by step by `transformer` and `scheduler`, and
    decoded by `vqvae`. With an image it makes variations of it, or paints a part of it anew.

    The condition is the transformer's `condition_type`: nothing, classes, or text. The null condition of guidance is what
    the transformer has learned (Tang et al. 2022) or its null class; a text model without it takes the empty
    prompt.

    Args:
        vqvae ([`VQGANModel`] or another tokenizer): its codes are one grid `(h, w)`.
        transformer ([`VQDiffusionTransformer2DModel`]): predicts the codes without noise.
        scheduler ([`MaskReplaceScheduler`]): with as many codes and timesteps as the transformer.
        text_encoder, tokenizer (*optional*): a text encoder of transformers.
        id2label (*optional*): names of the classes.
        text_max_length, text_lower_case, text_normalize, text_pad_token_id: see `encode_text`. The original's CLIP
            normalises, and pads with id 0.
        text_mask: the text encoder and the transformer's cross-attention pass over padding; the original's do not.

    Raises:
        ValueError: parts that do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        vqvae: PreTrainedModel,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer=None,
        id2label: dict[str, str] | None = None,  # ids are strings in JSON
        text_max_length: int | None = None,
        text_lower_case: bool = False,
        text_normalize: bool = False,
        text_mask: bool = True,
        text_pad_token_id: int | None = None,
    ):
        super().__init__()
        if vqvae is not None:
            check_single_codes(vqvae)
            levels = len(vqvae.config.downsample_factors)
            if levels > 1:
                raise ValueError(f"`vqvae` must have one level, got {levels}.")
        for name, part in (("transformer", transformer), ("scheduler", scheduler)):
            if part is not None and vqvae is not None and part.config.num_embeddings != vqvae.config.num_embeddings:
                raise ValueError(
                    f"`{name}` must have as many codes as `vqvae`: got {part.config.num_embeddings} and "
                    f"{vqvae.config.num_embeddings}."
                )
        if transformer is not None and scheduler is not None:
            steps, wanted = scheduler.config.num_train_timesteps, transformer.config.num_train_timesteps
            if steps != wanted:
                raise ValueError(
                    f"`scheduler` must have as many timesteps as `transformer`: got {steps} and {wanted}."
                )
        self.register_modules(
            vqvae=vqvae, transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.id2label = class_names(id2label)
        self.register_to_config(
            id2label=self.id2label,
            text_max_length=text_max_length,
            text_lower_case=text_lower_case,
            text_normalize=text_normalize,
            text_mask=text_mask,
            text_pad_token_id=text_pad_token_id,
        )

    @classmethod
    def from_diffusers(cls, pretrained_model_name_or_path: str, **options) -> "VQDiffusionImagePipeline":
        """
        Converts a folder or Hub repository of diffusers' deprecated `VQDiffusionPipeline`, such as
        microsoft/vq-diffusion-ithq.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's id.
            options: of `huggingface_hub.snapshot_download`, such as `revision`, `token` and `cache_dir`.

        Raises:
            ValueError: another pipeline, or a part that has no equivalent here.
        """
        # by its name: a shared folder carries the pipeline's code, and the converter needs all of hf_vq
        converter = importlib.import_module("hf_vq.pipelines.vq_diffusion_from_diffusers")
        return cls(**converter.load_parts(pretrained_model_name_or_path, **options))

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        return {"class": "class_labels=0", "text": 'prompt="…"'}.get(self.transformer.config.condition_type, "")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        factor = self.vqvae.config.downsample_factor
        height, width = self.transformer.sample_size
        return height * factor, width * factor

    # Preparing

    def check_inputs(self, guidance_scale, strength, image, indices, mask_image, callback):
        """ValueErrors for the arguments that need no other part."""
        if not isinstance(guidance_scale, (int, float)) or not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be a number that is not negative, got {guidance_scale!r}.")
        if image is not None and indices is not None:
            raise ValueError("Only one of `image` and `indices` can be given.")
        given = image is not None or indices is not None
        for name, value in (("strength", strength), ("mask_image", mask_image)):
            if value is not None and not given:
                raise ValueError(f"`{name}` needs an `image`, or `indices`, that it is for.")
        if strength is not None and not (isinstance(strength, (int, float)) and 0 < strength <= 1):
            raise ValueError(f"`strength` must lie in (0, 1], got {strength!r}.")
        if callback is not None and not callable(callback):
            raise ValueError("`callback_on_step_end` must be callable.")

    def encode_image(self, image: torch.FloatTensor, batch_size: int = 16) -> torch.LongTensor:
        """Images `(B, C, H, W)` in [-1, 1] to codes `(B, h, w)`, `batch_size` at a time."""
        if tuple(image.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"`image` must be {height} high and {width} wide, got {tuple(image.shape[-2:])}; resize it first."
            )
        onload(self.vqvae)
        pixels = image.to(self._execution_device, self.vqvae.dtype)
        return torch.cat([self.vqvae.encode(part).indices for part in pixels.split(batch_size)])

    def check_indices(self, indices: torch.LongTensor) -> torch.LongTensor:
        """`indices` on the pipeline's device, or a ValueError if they are no grids of codes."""
        shape, codes = self.transformer.sample_size, self.transformer.config.num_embeddings
        if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64 or indices.shape[1:] != shape:
            found = f"{indices.dtype} of shape {tuple(indices.shape)}" if torch.is_tensor(indices) else type(indices)
            raise ValueError(f"`indices` must be int64 of shape (B, {shape[0]}, {shape[1]}), got {found}.")
        if not len(indices):
            raise ValueError("`indices` must hold at least one grid, got none.")
        if indices.min() < 0 or indices.max() >= codes:
            raise ValueError(
                f"`indices` must lie in 0 … {codes - 1}, got values from {indices.min()} to {indices.max()}."
            )
        return indices.to(self._execution_device)

    def kept_codes(self, mask: torch.FloatTensor) -> torch.BoolTensor:
        """
        The codes `(B, h, w)` that a mask `(B, 1, H, W)` of pixels, or `(B, 1, h, w)` of codes, keeps: those without a
        painted pixel.
        """
        grid, size = tuple(self.transformer.sample_size), tuple(mask.shape[-2:])
        if size not in (grid, self.image_size):
            raise ValueError(
                f"`mask_image` must have the size {self.image_size} of the images, or {grid} of the codes, got {size}."
            )
        if size != grid:
            mask = F.max_pool2d(mask, self.vqvae.config.downsample_factor)
        return (mask[:, 0] == 0).to(self._execution_device)

    def set_timesteps(self, num_inference_steps: int | None, timesteps, strength: float) -> torch.LongTensor:
        """Sets the scheduler's steps, all of training's by default, and returns the last share `strength` of them."""
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps, timesteps=timesteps)
        steps = self.scheduler.timesteps
        return steps[len(steps) - last_steps(len(steps), strength) :]

    def prepare_sample(self, batch_size: int, indices, kept, first_timestep, strength: float, generator):
        """The grids that denoising starts from: without codes, or noised ones of `indices`, and `kept` ones as they are."""
        if indices is None or strength == 1:
            shape = (batch_size, *self.transformer.sample_size)
            sample = self.scheduler.initial_sample(shape, self._execution_device, generator)
        else:
            sample = self.scheduler.add_noise(indices, first_timestep, generator)
        return sample if kept is None else torch.where(kept, indices, sample)

    # One step

    def predict(self, sample, timestep, inputs: dict, guidance_scale: float) -> torch.FloatTensor:
        """
        The logits `(B, h, w, K)`, guided: `null + scale * (conditional - null)` (Tang et al. 2022).

        The paper has log-probabilities. They are logits less a constant at each position, and so is the guided sum.
        """
        if guidance_scale == 1:
            return self.transformer(sample, timestep, **inputs).sample
        null, conditional = self.transformer(torch.cat([sample, sample]), timestep, **inputs).sample.float().chunk(2)
        return null.lerp_(conditional, guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        negative_prompt: str | list[str] | None = None,
        image=None,
        mask_image=None,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 1.0,
        truncation_rate: float = 1.0,
        prior_rule: int = 0,
        prior_weight: float = 0.0,
        temperature: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        indices: torch.LongTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        decode_batch_size: int = 16,
        callback_on_step_end: Callable | None = None,
    ) -> VQPipelineOutput | tuple:
        """
        Args:
            prompt, negative_prompt: texts; `negative_prompt` is what guidance leads away from, in place of the null
                condition.
            class_labels: a class or a list of classes, ids or names of `id2label`; None is the null class.
            image: PIL images, or a tensor `(B, C, H, W)` in [-1, 1], to make variations of or to paint into.
            mask_image: PIL images, or a tensor `(B, 1, H, W)` in [0, 1]: 1 is painted anew. A code is kept, at every step,
                if none of its pixels is painted; pixels that are not painted are those of `image` in the end.
            strength: the share of the steps that is taken, in (0, 1]: the image's codes are noised to the first of these
                timesteps. 1, the default with a mask, leaves nothing of what is painted; the default without is 0.7.
            num_inference_steps, timesteps: how many steps, all T of training by default, or which ones.
            guidance_scale: see `predict`; 1 is off.
            truncation_rate: the probability mass of the codes that are drawn from, in (0, 1]; 1 draws from all.
            prior_rule, prior_weight: the purity prior, see [`MaskReplaceScheduler.step`].
            temperature: divides the logits.
            num_images_per_prompt: images for each class, prompt or image; those of one are adjacent. Arguments with several
                entries have the same number of them, and one with a single entry goes with all of theirs.
            generator: one `torch.Generator` for the call, or a list with one for each image, which makes an image
                independent of the others in its batch.
            indices: codes `(B, h, w)` in place of `image`; a mask may then have their size.
            prompt_embeds, negative_prompt_embeds: `(B, S, D)`, in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: `(B, S)`, false where these are padded; by default nowhere.
            output_type: "pil", "np", "pt" or "indices", see [`VQPipelineOutput`].
            return_dict: a [`VQPipelineOutput`] or the tuple `(images, indices)`.
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each step as `callback(pipe, step, timestep, {"indices": (B, h, w)})`, with
                the index K where a code is masked; it may return a dict with other `indices`.

        Raises:
            ValueError: an argument out of range, or a condition that the transformer does not take.
        """
        self.check_output(num_images_per_prompt, output_type, decode_batch_size)
        self.check_inputs(guidance_scale, strength, image, indices, mask_image, callback_on_step_end)
        class_labels = None if class_labels is None else self.class_ids(class_labels)
        if image is not None:
            image = to_pixel_values(image, self.vqvae.config.in_channels)
            indices = self.encode_image(image)
        elif indices is not None:
            indices = self.check_indices(indices)
        mask = None if mask_image is None else to_mask(mask_image)
        count = max(_count(value) for value in (prompt, prompt_embeds, class_labels, indices, mask))
        batch_size = count * num_images_per_prompt
        check_generator(generator, batch_size)
        inputs = self.prepare_condition(
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
        # also where the null conditions come first: each row is repeated in its place
        inputs = repeat_inputs(inputs, num_images_per_prompt)
        if indices is not None:
            indices = repeat_to(indices, count, "indices" if image is None else "image", num_images_per_prompt)
        if image is not None:
            image = repeat_to(image, count, "image", num_images_per_prompt)
        if mask is not None:
            mask = repeat_to(mask, count, "mask_image", num_images_per_prompt)
        kept = None if mask is None else self.kept_codes(mask)
        if strength is None:
            strength = 0.7 if indices is not None and kept is None else 1.0
        steps = self.set_timesteps(num_inference_steps, timesteps, strength)
        sample = self.prepare_sample(batch_size, indices, kept, int(steps[0]), strength, generator)
        step_arguments = {
            "generator": generator,
            "truncation_rate": truncation_rate,
            "prior_rule": prior_rule,
            "prior_weight": prior_weight,
            "temperature": temperature,
            "known_indices": None if kept is None else indices,
            "known_mask": kept,
        }
        sample = self._denoise(sample, steps, inputs, guidance_scale, step_arguments, callback_on_step_end)
        images = self._images(sample, output_type, decode_batch_size, image, mask)
        self.maybe_free_model_hooks()
        return VQPipelineOutput(images=images, indices=sample) if return_dict else (images, sample)

    def _denoise(self, sample, steps, inputs, guidance_scale: float, step_arguments: dict, callback):
        with self.progress_bar(total=len(steps)) as progress_bar:
            for i, t in enumerate(steps):
                logits = self.predict(sample, t, inputs, guidance_scale)
                sample = self.scheduler.step(logits, t, sample, **step_arguments).prev_sample
                if callback is not None:
                    changed = changed_by_callback(callback(self, i, t, {"indices": sample}), "indices", sample)
                    highest = self.scheduler.mask_index - (i == len(steps) - 1)  # no mask after the last step
                    if changed is not sample and (changed.min() < 0 or changed.max() > highest):
                        raise ValueError(
                            f"`callback_on_step_end` must return `indices` in 0 … {highest} after step {i}, got values "
                            f"from {changed.min()} to {changed.max()}."
                        )
                    sample = changed
                progress_bar.update()
        return sample

    def _images(self, indices, output_type: str, decode_batch_size: int, image, mask):
        if output_type == "indices":
            return None
        if image is None or mask is None:
            return self.postprocess(indices, output_type, decode_batch_size)
        images = self.decode_indices(indices, decode_batch_size)
        mask = F.interpolate(mask, size=self.image_size)  # of codes, if it is no mask of pixels
        images = torch.where(mask.to(images.device) == 1, images, image.to(images.device) / 2 + 0.5)
        return images_as(images, output_type)


def _count(value) -> int:
    """How many conditions an argument holds."""
    return len(value) if isinstance(value, (list, tuple, torch.Tensor)) else 1


__all__ = ["VQDiffusionImagePipeline"]
