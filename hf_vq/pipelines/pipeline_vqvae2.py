"""Sampling images from the hierarchy of priors of VQ-VAE-2."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .autoregressive_pipeline import AutoregressivePipeline, check_prior
from .completion import grids_of
from .conditioning import repeat_rows
from .pipeline_output import VQPipelineOutput
from .vq_pipeline import as_levels, check_any_tokenizer, check_codes, taking_turns


class VQVAE2Pipeline(AutoregressivePipeline):
    """
    Samples the codes of each level from top to bottom, `top_prior` without and the others with the codes of the level
    above, and decodes them with `vqvae` (Razavi, van den Oord and Vinyals 2019, section 3.2): a call samples whole
    images, the lower levels of given top codes, or a part of given images; `rejection_sample` keeps the best of many
    by a classifier.

    Args:
        vqvae ([`VQVAE2Model`]): decodes the codes.
        top_prior ([`PixelSNAILForCausalLM`] or another causal LM over codes): the prior of the top level.
        bottom_prior ([`PixelSNAILForCausalLM`]): that of the bottom level, with a `conditioning_grid_size`.
        middle_prior ([`PixelSNAILForCausalLM`], *optional*): that of the level between them, of a tokenizer of three
            levels.
    """

    model_cpu_offload_seq = "top_prior->middle_prior->bottom_prior->vqvae"
    _optional_components = ["middle_prior"]

    def __init__(
        self,
        vqvae: PreTrainedModel,
        top_prior: PreTrainedModel,
        bottom_prior: PreTrainedModel,
        middle_prior: PreTrainedModel | None = None,
    ):
        super().__init__()
        check_any_tokenizer(vqvae)
        priors = {"top_prior": top_prior, "middle_prior": middle_prior, "bottom_prior": bottom_prior}
        for name, prior in priors.items():
            check_prior(name, prior)
        self.register_modules(vqvae=vqvae, top_prior=top_prior, bottom_prior=bottom_prior, middle_prior=middle_prior)
        if not any(part is None for part in (vqvae, top_prior, bottom_prior)):
            self._check_components()

    @property
    def lora_components(self) -> tuple[str, ...]:
        """The names of the priors, from top to bottom."""
        return ("top_prior", *(() if self.middle_prior is None else ("middle_prior",)), "bottom_prior")

    @property
    def priors(self) -> tuple[PreTrainedModel, ...]:
        """The priors of the levels, from top to bottom."""
        middle = () if self.middle_prior is None else (self.middle_prior,)
        return (self.top_prior, *middle, self.bottom_prior)

    def _check_components(self):
        names = ["top_prior", *(["middle_prior"] if self.middle_prior is not None else []), "bottom_prior"]
        levels, num_codes = len(self.vqvae.config.downsample_factors), self.vqvae.config.num_embeddings
        if len(names) != levels:
            raise ValueError(f"`vqvae` must have as many levels as there are priors, got {levels} and {len(names)}.")
        num_classes = {p.config.condition_vocab_size for p in self.priors if p.config.condition_type == "class"}
        if len(num_classes) > 1:
            raise ValueError(
                f"`top_prior` and the others must have the same classes, got {sorted(num_classes)} of them."
            )
        above = None
        for name, prior in zip(names, self.priors, strict=True):
            config = prior.config
            if config.codebook_size != num_codes:
                raise ValueError(
                    f"`{name}` must have as many codes as `vqvae`: got {config.codebook_size} and {num_codes}."
                )
            grid = tuple(config.grid_size)
            if above is not None and grid != (2 * above[0], 2 * above[1]):
                raise ValueError(f"`{name}` must have twice the grid of the level above, {above}, got {grid}.")
            conditioning = getattr(config, "conditioning_grid_size", None)
            if (conditioning is None) != (above is None) or (above is not None and tuple(conditioning) != above):
                raise ValueError(
                    f"`{name}` must have conditioning_grid_size={above}, the grid of the level above, got "
                    f"{conditioning}."
                )
            if above is not None and config.conditioning_codebook_size != num_codes:
                raise ValueError(
                    f"`{name}` must have conditioning_codebook_size={num_codes}, the codes of the level above, got "
                    f"{config.conditioning_codebook_size}."
                )
            above = grid

    @taking_turns
    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        top_indices: torch.LongTensor | tuple[torch.LongTensor, ...] | None = None,
        indices: tuple[torch.LongTensor, ...] | None = None,
        keep_fraction: float | None = None,
        outpaint: Sequence[int] | None = None,
        stride: int = 1,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        use_cache: bool = True,
        cache_implementation: str | None = None,
        decode_batch_size: int = 16,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("indices", "level"),
    ) -> VQPipelineOutput | tuple:
        """
        Args:
            class_labels: a class or a list of classes, as ids or as names of the top prior's `id2label`; `None`
                samples unconditionally (with the null condition, where the priors are conditional).
            image: images to keep a part of, see [`~images.to_pixel_values`].
            mask_image: a mask of pixels, or of codes of the top level, see [`~conditioning.to_mask`]: 1 (white) is
                painted anew. At every level a code is kept if none of its pixels is painted; pixels that are not
                painted are those of `image` in the end.
            height, width: of the images, multiples of the tokenizer's largest downsample factor; by default the size
                of the priors' grids, or of the image. Larger ones are sampled by windows that move over the grid of
                each level, see [`window_runs`], with the codes of the level above cut out along.
            top_indices (int64 `(B, h, w)`, *optional*): codes of the top level, which are not sampled; or a tuple of
                those of several levels from the top on. One grid goes with several classes, and one class with several
                grids.
            indices: codes of all levels, from top to bottom, in place of `image`.
            keep_fraction: in place of a mask, the share of the codes that is kept, in random places: a variation.
            outpaint: pixels `(top, bottom, left, right)` to add around the image.
            stride: codes of the top level that the windows move by; at each level below, twice as many.
            num_images_per_prompt: images for each class, grid or image; those of one are adjacent.
            batch_size: how many inputs there are where no argument says it: without class, codes and image.
            guidance_scale: classifier-free guidance, `null + scale * (conditional - null)` on the log-probabilities
                (Ho & Salimans, 2022); 1 is off. The null condition has no class, but the codes of the level above.
            temperature, top_k, top_p: reshape each code's distribution, in this order. These and `guidance_scale` are
                one value, or a list or tuple of one for each level from top to bottom.
            generator: one `torch.Generator` for the call, or a list with one for each image, which makes an image
                independent of the others in its batch. The global random state is used, and moved, only without one.
            output_type: "pil", "np", "pt", "latent" or "indices", see [`VQPipelineOutput`].
            return_dict: a [`VQPipelineOutput`] or the tuple `(images, indices)`, where `indices` is a tuple of levels.
            use_cache, cache_implementation: cache of `generate`.
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each code as `callback(pipe, step, position, {"indices": (B, position +
                1), "level": level})`; steps are counted over the levels, positions within one. It may return a dict
                with `indices` that have other codes in the last place.
            callback_on_step_end_tensor_inputs: the names of what it is given, of `_callback_tensor_inputs`.

        Raises:
            ValueError: an argument out of range, or a condition that the priors do not take.
        """
        if top_indices is not None and (image is not None or indices is not None):
            raise ValueError("`top_indices` and `image`, or `indices`, exclude each other.")
        size = self.wanted_size(height, width, stride)
        images, indices = self.draw_images(
            {"class_labels": self.prepare_prompts(class_labels)},
            image,
            indices,
            mask_image,
            keep_fraction,
            outpaint,
            size,
            top_indices=self._check_top(top_indices, size),
            stride=stride,
            num_images_per_prompt=num_images_per_prompt,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            output_type=output_type,
            decode_batch_size=decode_batch_size,
            use_cache=use_cache,
            cache_implementation=cache_implementation,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return VQPipelineOutput(images=images, indices=indices) if return_dict else (images, indices)

    def _check_top(self, top_indices, size: tuple[int, int] | None) -> list[torch.LongTensor]:
        if top_indices is None:
            return []
        levels = as_levels(top_indices)
        if not 1 <= len(levels) < len(self.priors):
            raise ValueError(
                f"`top_indices` must hold the codes of 1 to {len(self.priors) - 1} levels, got {len(levels)}."
            )
        # fewer levels than priors: those from the top on
        sizes = grids_of(self.image_size if size is None else size, self.vqvae.config.downsample_factors)
        grids = [
            check_codes("top_indices", codes, grid, self.vqvae.config.num_embeddings)
            for codes, grid in zip(levels, sizes, strict=False)
        ]
        return [grid.to(self._execution_device) for grid in grids]

    @taking_turns
    @torch.no_grad()
    def log_likelihood(
        self,
        image: Any = None,
        indices: torch.LongTensor | tuple[torch.LongTensor, ...] | None = None,
        class_labels: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """
        log p(codes | class) of images in nats, the sum over the levels: of the discrete codes, not of the pixels.

        Args:
            image: PIL images or a tensor `(B, C, H, W)` in [-1, 1], of the size that the priors' grids stand for.
            indices (a tuple of int64 `(B, h, w)` from top to bottom, *optional*): codes, in place of `image`.
            class_labels: as in the call; one goes with several images, and one image with several classes.

        Returns:
            float32 `(B,)`.

        Raises:
            ValueError: both or none of `image` and `indices`, wrong shapes, or classes that the priors do not take.
        """
        given = {"indices": self.given_codes(image, indices), "class_labels": self.prepare_prompts(class_labels)}
        levels = repeat_rows(given, 1)["indices"]
        total, above = 0, {}
        for prior, codes in zip(self.priors, levels, strict=True):
            labels = class_labels if prior.config.condition_type == "class" else None
            total = total + prior.log_likelihood(codes, labels, **above).to(codes.device)
            above = {"condition_indices": codes}
        self.maybe_free_model_hooks()
        return total


__all__ = ["VQVAE2Pipeline"]
