"""Sampling images from an autoregressive prior over code indices."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..argument_checks import check_integer
from .autoregressive_pipeline import AutoregressivePipeline, check_prior
from .code_sampling import window_runs
from .pipeline_output import VQPipelineOutput
from .spatial_condition import check_condition_parts, encode_condition
from .vq_pipeline import check_codes, check_tokenizer


class VQAutoregressivePipeline(AutoregressivePipeline):
    """
    Samples a grid of codes with `prior`, row by row, and decodes it with `vqvae`: a call samples whole images, of any
    size, or completes a part of given ones; `rejection_sample` keeps the best of many by a classifier.

    Args:
        vqvae ([`VQGANModel`] or another tokenizer): decodes the codes.
        prior ([`VQGPTForCausalLM`] or another causal LM over codes): with its `prepare_condition`, `generate` and
            `extract_indices`, and in its config `codebook_size` (the tokenizer's), `grid_size`, `image_seq_length`,
            `condition_type`, `condition_length`, `condition_token_offset` and `null_class_token_id`.
        condition_tokenizer ([`VQGANModel`] or another tokenizer, *optional*): of the conditions of a prior whose
            `condition_type` is "codes": label maps, depth maps, edges or drawings.
        condition_processor ([`VQConditionProcessor`], *optional*): makes its `pixel_values` of them.
    """

    model_cpu_offload_seq = "condition_tokenizer->prior->vqvae"
    _optional_components = ["condition_tokenizer", "condition_processor"]

    def __init__(
        self,
        vqvae: PreTrainedModel,
        prior: PreTrainedModel,
        condition_tokenizer: PreTrainedModel | None = None,
        condition_processor: BaseImageProcessor | None = None,
    ):
        super().__init__()
        check_tokenizer(vqvae)
        check_prior("prior", prior)
        if vqvae is not None and prior is not None and prior.config.codebook_size != vqvae.config.num_embeddings:
            raise ValueError(
                f"`prior` must have as many codes as `vqvae`: got {prior.config.codebook_size} and "
                f"{vqvae.config.num_embeddings}."
            )
        config = None if prior is None else prior.config
        check_condition_parts(condition_tokenizer, condition_processor, config)
        self.register_modules(
            vqvae=vqvae,
            prior=prior,
            condition_tokenizer=condition_tokenizer,
            condition_processor=condition_processor,
        )

    @property
    def lora_components(self) -> tuple[str, ...]:
        """The name of the prior."""
        return ("prior",)

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        return super().example_call if self.condition_processor is None else "condition_image=picture"

    @property
    def priors(self) -> tuple[PreTrainedModel]:
        """The one prior."""
        return (self.prior,)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        condition_image: Any = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        annotator: str | Callable | None = None,
        condition: torch.LongTensor | None = None,
        indices: torch.LongTensor | None = None,
        keep_fraction: float | None = None,
        outpaint: Sequence[int] | None = None,
        stride: int = 1,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        use_cache: bool = True,
        cache_implementation: str | None = None,
        decode_batch_size: int = 16,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("indices",),
    ) -> VQPipelineOutput | tuple:
        """
        With an image, the codes of a part of it are kept unchanged, and the others are sampled. A prior reads its
        codes in one order: a sampled code is conditioned on the codes before it, kept or sampled, and never on kept
        codes that come after it. Row by row, the top half is therefore completed from all of it, while what is sampled
        above a kept bottom half does not know it. The encoder has seen all of the image, so a kept code near the
        border may hold traces of the pixels beyond.

        Images larger than the prior's grid are sampled by a window of its size that moves over them, see
        [`window_runs`]. `vqvae.enable_tiling()` decodes them in tiles.

        Args:
            class_labels: a class or a list of classes, as ids or as names of the prior's `id2label`; `None` samples
                unconditionally (with the null condition, where the prior is conditional).
            condition_image: one or a list of label maps, depth maps, edge maps or drawings, as the pipeline's
                `condition_processor` reads them; or, with an `annotator`, photos. They are scaled to the images' size.
            image: images to keep a part of, see [`~images.to_pixel_values`].
            mask_image: a mask of pixels or of codes, see [`~conditioning.to_mask`]: 1 (white) is painted anew. A code
                is kept if none of its pixels is painted; pixels that are not painted are those of `image` in the end.
            height, width: of the images, multiples of the tokenizer's downsample factor; by default the size of the
                prior's grid, or of the image.
            annotator: makes conditions of photos: "segmentation", "depth", "edges", "pose", or a callable that gives
                the conditions of a list of Pillow images, such as [`EdgeAnnotator`] or [`SegmentationAnnotator`].
            condition (int `(B, h', w')` or `(B, condition_length)`, *optional*): for a prior whose `condition_type` is
                "codes", the codes of the conditions; for images larger than its grid, a grid that is larger in
                proportion.
            indices: codes `(B, h, w)` in place of `image`.
            keep_fraction: in place of a mask, the share of the codes that is kept, in random places: a variation.
            outpaint: pixels `(top, bottom, left, right)` to add around the image.
            stride: codes that the window moves by. More than 1 is faster, with a little less in view of each code.
            num_images_per_prompt: images for each class, condition or image; those of one are adjacent.
            batch_size: how many inputs there are where no argument says it: without class, condition and image.
            guidance_scale: classifier-free guidance, `null + scale * (conditional - null)` on the log-probabilities
                (Ho & Salimans, 2022); 1 is off.
            temperature, top_k, top_p: reshape each code's distribution, in this order.
            generator: one `torch.Generator` for the call, or a list with one for each image, which makes an image
                independent of the others in its batch. The global random state is used, and moved, only without one.
            output_type: "pil", "np", "pt", "latent" or "indices", see [`VQPipelineOutput`].
            return_dict: a [`VQPipelineOutput`] or the tuple `(images, indices)`.
            use_cache, cache_implementation: key-value cache of `generate`; "static" is compiled on accelerators.
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each code as `callback(pipe, step, position, {"indices": (B, position +
                1)})`; it may return a dict with `indices` that have other codes in the last place.
            callback_on_step_end_tensor_inputs: the names of what it is given, of `_callback_tensor_inputs`.

        Raises:
            ValueError: an argument out of range, or a condition that the prior does not take.
        """
        size = self._size(height, width)
        if size is not None:
            window_runs(self._grid_sizes(size)[0], self.prior.config.grid_size, stride)  # its errors come first
        name = "class_labels" if condition is None else "condition"
        if condition_image is not None:
            if condition is not None:
                raise ValueError("Only one of `condition_image` and `condition` can be given.")
            name = "condition_image"
            whole = size or self._size_of_given(image, indices, outpaint) or self._own_size()
            condition = encode_condition(self, condition_image, whole, annotator)
        elif annotator is not None:
            raise ValueError("`annotator` needs a `condition_image`, the photo that it is for.")
        images, indices = self.draw_images(
            {name: self._prompts(class_labels, condition)},
            image,
            indices,
            mask_image,
            keep_fraction,
            outpaint,
            size,
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
            stride=stride,
        )
        return VQPipelineOutput(images=images, indices=indices) if return_dict else (images, indices)

    def _prompts(self, class_labels: Any, condition: Any) -> Sequence[torch.LongTensor]:
        """The prefixes `(B, condition_length)`, or the codes `(B, h', w')` of a condition that windows are cut
        from.
        """
        config = self.prior.config
        condition = torch.as_tensor(condition) if isinstance(condition, np.ndarray) else condition
        is_grid = torch.is_tensor(condition) and condition.ndim == 3 and len(condition)
        if not is_grid or condition[0].numel() <= config.condition_length:
            return self.prepare_prompts(class_labels, condition)
        self.prepare_prompts(class_labels, condition.flatten(1)[:, : config.condition_length])  # its kind and dtype
        grid = check_codes("condition", condition.long(), condition.shape[1:], config.condition_vocab_size)
        return [grid.to(self._execution_device)]

    def _size(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        """`height` and `width`, the prior's own where one of them is missing; None where both are."""
        if height is None and width is None:
            return None
        own = self._own_size()
        pairs = (("height", height, own[0]), ("width", width, own[1]))
        return tuple(default if value is None else check_integer(name, value, 1) for name, value, default in pairs)

    def _own_size(self) -> tuple[int, int]:
        """Height and width of the images that the prior's grid decodes to."""
        return tuple(side * self.vqvae.config.downsample_factor for side in self.prior.config.grid_size)


__all__ = ["VQAutoregressivePipeline"]
