"""Sampling images by mask-and-replace diffusion over code indices."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..argument_checks import check_integer, check_real
from ..images import images_as
from ..models.autoencoders.tiling import tile_starts
from .completion import Given, check_painted, check_whole_size, grids_of, kept_codes, paste, random_mask, read_given
from .conditioning import TextCondition, class_names, count_inputs, repeat_inputs, repeat_to
from .denoising_pipeline import DenoisingPipeline, GuidanceInterval, last_steps
from .pipeline_output import VQPipelineOutput
from .text_condition import check_text_parts
from .vq_pipeline import (
    check_codes,
    check_generator,
    check_guidance_scale,
    check_part,
    check_temperature,
    check_tokenizer,
    onload,
    taking_turns,
)


@dataclass
class KnownImages:
    """
    What a call varies or completes, a row for each image.

    Args:
        indices: int64 `(B, h, w)`.
        kept: bool `(B, h, w)`, codes that stay; None without a mask.
        pixels: `(B, C, H, W)` in [-1, 1], if an image was given.
        mask: `(B, 1, H, W)`, or of codes; 1 is painted.
    """

    indices: torch.LongTensor
    kept: torch.BoolTensor | None
    pixels: torch.FloatTensor | None
    mask: torch.FloatTensor | None


class VQDiffusionImagePipeline(DenoisingPipeline):
    """
    VQ-Diffusion (Gu et al. 2022): a grid of masked codes is revealed step by step by `transformer` and `scheduler`,
    and decoded by `vqvae`. With an image it makes variations of it, or paints a part of it anew.

    The condition is the transformer's `condition_type`: nothing, classes, or text. The null condition of guidance is
    what the transformer has learned (Tang et al. 2022) or its null class; a text model without it takes the empty
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
        text_pooled: a text is its one projected vector, of a `CLIPTextModelWithProjection`.

    Raises:
        ValueError: parts that do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _callback_tensor_inputs = ["indices"]
    # without a tokenizer it draws indices alone
    _optional_components = ["vqvae", "text_encoder", "tokenizer"]
    needs_tokens = True

    def __init__(
        self,
        vqvae: PreTrainedModel,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[str, str] | None = None,  # ids are strings in JSON
        text_max_length: int | None = None,
        text_lower_case: bool = False,
        text_normalize: bool = False,
        text_mask: bool = True,
        text_pad_token_id: int | None = None,
        text_pooled: bool = False,
    ):
        super().__init__()
        check_tokenizer(vqvae)
        attributes = ("config.num_embeddings", "config.num_train_timesteps", "sample_size", "config.condition_type")
        check_part("transformer", transformer, attributes, "a VQDiffusionTransformer2DModel")
        attributes = ("config.num_embeddings", "config.num_train_timesteps", "initial_sample", "step")
        check_part("scheduler", scheduler, attributes, "a MaskReplaceScheduler")
        check_text_parts(text_encoder, tokenizer)
        if text_pooled and text_encoder is not None and not hasattr(text_encoder, "text_projection"):
            raise ValueError(
                f"`text_pooled` needs a text encoder with a projection, got a {type(text_encoder).__name__}."
            )
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
            text_pooled=text_pooled,
        )

    @classmethod
    def from_diffusers(cls, pretrained_model_name_or_path: str, **options: Any) -> "VQDiffusionImagePipeline":
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

    # The condition

    @property
    def lora_components(self) -> tuple[str, ...]:
        """The name of the denoiser."""
        return ("transformer",)

    @property
    def denoiser(self) -> ModelMixin:
        """The transformer."""
        return self.transformer

    @property
    def condition_kind(self) -> str | None:
        """The transformer's `condition_type`: "class", "text" or None."""
        kind = self.transformer.config.condition_type
        return None if kind == "unconditional" else kind

    @property
    def class_rows(self) -> int:
        """Rows of the transformer's class embedding, the null class included if there is one."""
        null = self.null_class_id
        return self.transformer.config.num_classes if null is None else null + 1

    @property
    def null_class_id(self) -> int | None:
        """The class that stands for none, if the transformer has one."""
        return self.transformer.null_class_id

    @property
    def encoder_passes_over_padding(self) -> bool:
        """As the transformer's cross-attention; the original's CLIP does not."""
        return self.config.text_mask

    def null_text(self, name: str) -> TextCondition:
        """The states of no text, which the transformer may have learned; otherwise those of the empty text."""
        learned = self.transformer.null_embedding
        if learned is None:
            return super().null_text(name)
        embeddings = learned[None].to(self._execution_device)
        return TextCondition(embeddings, torch.ones_like(embeddings[..., 0], dtype=torch.bool))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels; without a tokenizer, of the grid of codes."""
        factor = self._code_config.downsample_factor
        height, width = self.transformer.sample_size
        return height * factor, width * factor

    @property
    def _code_config(self) -> Any:
        """The tokenizer's config; without a tokenizer a code takes the place of a pixel."""
        if self.vqvae is None:
            return SimpleNamespace(downsample_factor=1, downsample_factors=(1,))
        return self.vqvae.config

    # Preparing

    def read_given(self, image: Any, indices: Any, mask_image: Any, keep_fraction: Any, outpaint: Any) -> Given | None:
        """What a call varies or completes, see [`~completion.read_given`]."""

        def read_codes(pixels, indices, size):
            if pixels is not None:
                return (self.encode_image(pixels),)
            (grid,) = grids_of(size, self._code_config.downsample_factors)
            codes = check_codes("indices", indices, grid, self.scheduler.mask_index)
            return (codes.to(self._execution_device),)

        return read_given(self._code_config, image, indices, mask_image, keep_fraction, outpaint, read_codes)

    def wanted_size(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        """`height` and `width`, `image_size` where one of them is missing; None where both are.

        Raises:
            ValueError: no multiples of the downsample factor, or less than the transformer's grid.
        """
        if height is None and width is None:
            return None
        pairs = zip(("height", "width"), (height, width), self.image_size, strict=True)
        size = tuple(own if value is None else check_integer(name, value, 1) for name, value, own in pairs)
        grids_of(size, self._code_config.downsample_factors)
        for name, side, own in zip(("height", "width"), size, self.image_size, strict=True):
            if side < own:
                raise ValueError(f"`{name}` must be at least {own}, the transformer's grid in pixels, got {side}.")
        return size

    def encode_image(self, image: torch.FloatTensor, batch_size: int = 16) -> torch.LongTensor:
        """Images `(B, C, H, W)` in [-1, 1] to codes `(B, h, w)`, `batch_size` at a time."""
        onload(self.vqvae)
        pixels = image.to(self._execution_device, self.vqvae.dtype)
        return torch.cat([self.vqvae.encode(part).indices for part in pixels.split(batch_size)])

    def set_timesteps(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> torch.LongTensor:
        """Sets the scheduler's steps, all of training's by default, and returns the last share `strength` of them."""
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = scheduler.config.num_train_timesteps
        if num_inference_steps is not None:
            most = scheduler.config.num_train_timesteps
            num_inference_steps = check_integer("num_inference_steps", num_inference_steps, 1, most)
        if timesteps is not None and not isinstance(timesteps, torch.Tensor):
            timesteps = [check_integer("timesteps", timestep, 0) for timestep in timesteps]
        scheduler.set_timesteps(num_inference_steps, timesteps=timesteps)
        steps = scheduler.timesteps
        return steps[len(steps) - last_steps(len(steps), strength) :]

    def prepare_sample(
        self,
        scheduler: SchedulerMixin,
        batch_size: int,
        indices: torch.LongTensor | None = None,
        kept: torch.BoolTensor | None = None,
        first_timestep: int | None = None,
        strength: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """The grids that denoising starts from: without codes, or noised ones of `indices`, but `kept` ones as
        given.
        """
        if indices is None or strength == 1:
            shape = (batch_size, *self.transformer.sample_size)
            sample = scheduler.initial_sample(shape, self._execution_device, generator)
        else:
            sample = scheduler.add_noise(indices, first_timestep, generator)
        return sample if kept is None else torch.where(kept, indices, sample)

    # One step

    def predict(
        self,
        sample: torch.LongTensor,
        timestep: torch.LongTensor | int,
        inputs: dict[str, torch.Tensor],
        null_inputs: dict[str, torch.Tensor] | None = None,
        guidance_scale: float = 1.0,
    ) -> torch.FloatTensor:
        """
        The logits `(B, h, w, K)`, guided: `null + scale * (conditional - null)` (Tang et al. 2022).

        The paper has log-probabilities. They are logits less a constant at each position, and so is the guided sum.
        """
        if null_inputs is None:
            return self.transformer(sample, timestep, **inputs).sample
        inputs = {name: torch.cat([null_inputs[name], inputs[name]]) for name in inputs}
        null, conditional = self.transformer(torch.cat([sample, sample]), timestep, **inputs).sample.float().chunk(2)
        return null.lerp_(conditional, guidance_scale)

    @taking_turns
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        keep_fraction: float | None = None,
        outpaint: Sequence[int] | None = None,
        stride: int | None = None,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        truncation_rate: float = 1.0,
        prior_rule: int = 0,
        prior_weight: float = 0.0,
        temperature: float = 1.0,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("indices",),
    ) -> VQPipelineOutput | tuple:
        """
        Args:
            prompt: a text or a list of texts.
            class_labels: a class or a list of classes, ids or names of `id2label`; None is the null class.
            image: images to make variations of or to paint into, see [`~images.to_pixel_values`].
            mask_image: a mask of pixels or of codes, see [`~conditioning.to_mask`]: 1 (white) is painted anew. A code
                is kept, at every step, if none of its pixels is painted; pixels that are not painted are those of
                `image` in the end.
            height, width: of the images, multiples of the tokenizer's downsample factor; by default `image_size`, or
                the size of the image. Larger ones are sampled in windows as large as the transformer's grid, one after
                another: what earlier ones have sampled is kept, as with a mask, see [`window_order`].
            negative_prompt: what guidance leads away from, in place of the null condition.
            keep_fraction: in place of a mask, the share of the codes that is kept, in random places: a variation.
            outpaint: pixels `(top, bottom, left, right)` to add around the image.
            stride: codes that a window moves by; by default half of its side. Fewer show a window more of what is
                there, and take more windows.
            strength: the share of the steps that is taken, in (0, 1]: the image's codes are noised to the first of
                these timesteps. 1, the default with a mask, leaves nothing of what is painted; the default without is
                0.7.
            num_inference_steps, timesteps: how many steps, all T of training by default, or which ones.
            guidance_scale: see `predict`; 1 is off.
            guidance_start, guidance_end: the share of the schedule's steps that is guided, whatever `strength` leaves
                of them; the others see the condition alone, and cost half (Kynkäänniemi et al. 2024, for continuous
                diffusion).
            truncation_rate: the probability mass of the codes that are drawn from, in (0, 1]; 1 draws from all.
            prior_rule, prior_weight: the purity prior, see [`MaskReplaceScheduler.step`].
            temperature: divides the logits.
            num_images_per_prompt: images for each class, prompt or image; those of one are adjacent. Arguments with
                several entries have the same number of them, and one with a single entry goes with all of theirs.
            batch_size: how many inputs there are where no argument says it: without class, prompt and image.
            generator: one `torch.Generator` for the call, or a list with one for each image, which makes an image
                independent of the others in its batch.
            indices: codes `(B, h, w)` in place of `image`; a mask may then have their size.
            prompt_embeds, negative_prompt_embeds: `(B, S, D)`, in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: `(B, S)`, false where these are padded; by default
                nowhere.
            output_type: "pil", "np", "pt", "latent" or "indices", see [`VQPipelineOutput`].
            return_dict: a [`VQPipelineOutput`] or the tuple `(images, indices)`.
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each step as `callback(pipe, step, timestep, {"indices": (B, h, w)})`,
                with the index K where a code is masked; it may return a dict with other `indices`. Of images larger
                than the transformer's grid they are those of one window, of all images that keep the same codes.
            callback_on_step_end_tensor_inputs: the names of what it is given, of `_callback_tensor_inputs`.

        Raises:
            ValueError: an argument out of range, or a condition that the transformer does not take.
        """
        if self.vqvae is None and (image is not None or output_type != "indices"):
            raise ValueError(
                "`output_type` must be 'indices', and `image` None: this pipeline has no image tokenizer (`vqvae`)."
            )
        times, decode_batch_size = self.check_output(num_images_per_prompt, output_type, decode_batch_size)
        guidance_scale, temperature = check_guidance_scale(guidance_scale), check_temperature(temperature)
        interval = GuidanceInterval(guidance_start, guidance_end)
        callback_names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        keep_fraction = None if keep_fraction is None else check_real("keep_fraction", keep_fraction, 0, 1)
        class_labels = None if class_labels is None else self.class_ids(class_labels)
        wanted = self.wanted_size(height, width)
        given = self.read_given(image, indices, mask_image, keep_fraction, outpaint)
        size = check_whole_size(given, wanted, self.image_size, "image" if indices is None else "indices")
        strength = self.check_strength(strength, given, keep_fraction)
        own = {} if given is None else {"indices" if image is None else "image": given.codes[0]}
        own |= {} if given is None or given.mask is None else {"mask_image": given.mask}
        count = count_inputs(batch_size, prompt, prompt_embeds, class_labels, *own.values())
        check_generator(generator, count * times)
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
        (grid,) = grids_of(size, self._code_config.downsample_factors)
        known = self.prepare_known(given, own, grid, count, times, keep_fraction, generator)
        check_painted(given)
        scheduler = self.own_scheduler()
        steps = self.set_timesteps(scheduler, num_inference_steps, timesteps, strength)
        guided = [False] * len(steps)
        if null_inputs is not None:
            guided = interval.guided(len(scheduler.timesteps))[-len(steps) :]
        step_arguments = {
            "generator": generator,
            "truncation_rate": truncation_rate,
            "prior_rule": prior_rule,
            "prior_weight": prior_weight,
            "temperature": temperature,
        }
        sample = self._sample_windows(
            scheduler,
            (count * times, *grid),
            known,
            stride,
            steps,
            strength,
            lambda x, t, i, rows: self.predict(
                x, t, rows_of(inputs, rows), rows_of(null_inputs, rows) if guided[i] else None, guidance_scale
            ),
            step_arguments,
            callback_on_step_end,
            callback_names,
        )
        images = self._images(sample, output_type, decode_batch_size, known)
        self.maybe_free_model_hooks()
        return VQPipelineOutput(images=images, indices=sample) if return_dict else (images, sample)

    def check_strength(self, strength: float | None, given: Given | None, keep_fraction: float | None) -> float:
        """The share of the steps that is taken, by default 0.7 for a variation without a mask, and all otherwise."""
        if strength is None:
            return 0.7 if given is not None and given.mask is None and keep_fraction is None else 1.0
        if given is None:
            raise ValueError("`strength` needs an `image`, or `indices`, that it is for.")
        return check_real("strength", strength, above=0, maximum=1)

    def prepare_known(
        self,
        given: Given | None,
        rows: dict[str, torch.Tensor],
        grid_size: tuple[int, int],
        count: int,
        times: int,
        keep_fraction: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> KnownImages | None:
        """The codes, pixels, mask and kept codes of `count` inputs with `times` images each; None without an image.

        Args:
            rows: the codes and the mask, by the arguments that they come from.
        """
        if given is None:
            return None
        repeated = {name: repeat_to(values, count, name, times) for name, values in rows.items()}
        pixels = None if given.pixels is None else repeat_to(given.pixels, count, "image", times)
        mask = repeated.pop("mask_image", None)
        ((_, codes),) = repeated.items()
        if keep_fraction is not None:
            mask = random_mask((count * times, *grid_size), keep_fraction, generator)
        kept = None
        if mask is not None:
            kept = kept_codes(mask, grid_size, self._code_config.downsample_factor).to(self._execution_device)
        return KnownImages(codes.to(self._execution_device), kept, pixels, mask)

    def _sample_windows(
        self, scheduler, shape, known, stride, steps, strength, predict, step_arguments, callback, names
    ) -> torch.LongTensor:
        """The codes `(B, h, w)` of `shape`, window by window."""
        window, device = tuple(self.transformer.sample_size), self._execution_device
        indices, kept = (None, None) if known is None else (known.indices, known.kept)
        is_plain = tuple(shape[1:]) == window
        grid = torch.zeros(shape, dtype=torch.long, device=device) if indices is None else indices.clone()
        done = torch.zeros(shape, dtype=torch.bool, device=device) if kept is None else kept.clone()
        # images that keep different codes have windows of their own, so that none depends on the others in its batch
        groups = [torch.arange(shape[0], device=device)] if is_plain else equal_rows(done)
        plans = [(rows, window_order(shape[1:], window, done[rows], stride)) for rows in groups]
        first = 0
        with self.progress_bar(total=len(steps) * sum(len(origins) for _, origins in plans)) as progress_bar:
            for rows, origins in plans:
                generator = step_arguments["generator"]
                if isinstance(generator, list):
                    generator = [generator[row] for row in rows.tolist()]
                for top, left in origins:
                    view = rows, slice(top, top + window[0]), slice(left, left + window[1])
                    codes, own_kept = grid[view], None if is_plain and kept is None else done[view]
                    sample = self.prepare_sample(
                        scheduler, len(rows), codes, own_kept, int(steps[0]), strength, generator
                    )
                    own = {**step_arguments, "generator": generator}
                    own |= {} if own_kept is None else {"known_indices": codes, "known_mask": own_kept}
                    grid[view] = self._denoise(
                        scheduler,
                        sample,
                        steps,
                        lambda x, t, i, rows=rows: predict(x, t, i, rows),
                        own,
                        callback,
                        names,
                        progress_bar,
                        first,
                    )
                    done[view] = True
                    first += len(steps)
        return grid

    def _denoise(
        self, scheduler, sample, steps, predict, step_arguments: dict, callback, names, progress_bar, first: int = 0
    ):
        """One window from noise to codes; `first` steps of a call have been taken before."""
        for i, t in enumerate(steps):
            sample = scheduler.step(predict(sample, t, i), t, sample, **step_arguments).prev_sample
            if callback is not None:
                changed = self.call_back(callback, names, first + i, t, "indices", sample)
                highest = scheduler.mask_index - (i == len(steps) - 1)  # no mask after the last step
                if changed is not sample and (changed.min() < 0 or changed.max() > highest):
                    raise ValueError(
                        f"`callback_on_step_end` must return `indices` in 0 … {highest} after step {i}, got "
                        f"values from {changed.min()} to {changed.max()}."
                    )
                sample = changed
            progress_bar.update()
        return sample

    def _images(self, indices, output_type: str, decode_batch_size: int, known: KnownImages | None):
        if known is None or known.pixels is None or known.mask is None or output_type in ("indices", "latent"):
            return self.postprocess(indices, output_type, decode_batch_size)
        decoded = self.decode_indices(indices, decode_batch_size)
        return images_as(paste(decoded, known.pixels, known.mask), output_type)


def equal_rows(kept: torch.BoolTensor) -> list[torch.LongTensor]:
    """The rows of a mask `(B, h, w)`, those that are equal together."""
    _, group = kept.flatten(1).unique(dim=0, return_inverse=True)
    return [(group == number).nonzero().flatten() for number in range(int(group.max()) + 1)]


def rows_of(inputs: dict[str, torch.Tensor] | None, rows: torch.LongTensor) -> dict[str, torch.Tensor] | None:
    """Those rows of a denoiser's keyword arguments, or None."""
    return inputs and {name: values[rows] for name, values in inputs.items()}


def window_order(
    grid_size: Sequence[int], window: Sequence[int], kept: torch.BoolTensor | None = None, stride: int | None = None
) -> list[tuple[int, int]]:
    """
    Where the windows begin that cover a grid, in the order in which they are sampled: next comes the one that sees
    most of what is there already, so that all grow together from what is kept. Windows in which every image keeps all
    codes are left out.

    Args:
        grid_size, window: `(h, w)`.
        kept (bool `(B, h, w)`, *optional*): codes that are not sampled; by default none.
        stride: codes between neighbouring windows, by default half a side.

    Raises:
        ValueError: a stride that leaves codes between windows.
    """
    if stride is not None:
        stride = check_integer("stride", stride, 1, None if tuple(grid_size) == tuple(window) else min(window))
    steps = [max(side // 2, 1) if stride is None else stride for side in window]
    rows, columns = (
        tile_starts(length, side, side - step) for length, side, step in zip(grid_size, window, steps, strict=True)
    )
    origins = [(top, left) for top in rows for left in columns]
    there = torch.zeros(1, *grid_size, dtype=torch.bool) if kept is None else kept.cpu().clone()
    order = []
    while origins:
        seen = [there[:, top : top + window[0], left : left + window[1]] for top, left in origins]
        open_ones = [(int(part.sum()), -number) for number, part in enumerate(seen) if not part.all()]
        if not open_ones:
            break
        number = -max(open_ones)[1]
        order.append(origins.pop(number))
        seen[number].fill_(True)
    return order


__all__ = ["VQDiffusionImagePipeline"]
