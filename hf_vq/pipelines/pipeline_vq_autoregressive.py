"""Sampling images from an autoregressive prior over code indices."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..images import to_pixel_values
from ..models.priors.bounding_boxes import BoundingBoxTokenizer, ObjectBox
from ..models.priors.coordinates import coordinate_grid, coordinate_ids
from .autoregressive_pipeline import AutoregressivePipeline, check_prior
from .code_sampling import check_window
from .completion import size_of_given
from .conditioning import TextCondition
from .pipeline_output import VQPipelineOutput
from .spatial_condition import check_condition_parts, encode_condition
from .text_condition import aligned_right, check_text_parts, encode_prompt, text_states
from .vq_pipeline import check_codes, check_tokenizer, taking_turns


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
        text_encoder, tokenizer (*optional*): a text encoder of transformers, for a prior whose `condition_type` is
            "text" ([`VQLlamaForCausalLM`]); its states have the prior's `text_embed_dim` channels.
        text_max_length, text_lower_case, text_normalize, text_pad_token_id: see `encode_text`; the length is by
            default the prior's `condition_length`.
        text_mask: the text encoder and the prior pass over padding.
    """

    model_cpu_offload_seq = "text_encoder->condition_tokenizer->prior->vqvae"
    _optional_components = ["condition_tokenizer", "condition_processor", "text_encoder", "tokenizer"]

    encode_prompt = encode_prompt
    text_states = text_states

    def __init__(
        self,
        vqvae: PreTrainedModel,
        prior: PreTrainedModel,
        condition_tokenizer: PreTrainedModel | None = None,
        condition_processor: BaseImageProcessor | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_max_length: int | None = None,
        text_lower_case: bool = False,
        text_normalize: bool = False,
        text_mask: bool = True,
        text_pad_token_id: int | None = None,
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
        check_text_parts(text_encoder, tokenizer)
        if text_encoder is not None and config is not None and config.condition_type != "text":
            raise ValueError(
                f"`text_encoder` needs a prior whose condition_type is 'text', got {config.condition_type!r}."
            )
        if text_max_length is None and getattr(config, "condition_type", None) == "text":
            text_max_length = config.condition_length
        self.register_modules(
            vqvae=vqvae,
            prior=prior,
            condition_tokenizer=condition_tokenizer,
            condition_processor=condition_processor,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            text_max_length=text_max_length,
            text_lower_case=text_lower_case,
            text_normalize=text_normalize,
            text_mask=text_mask,
            text_pad_token_id=text_pad_token_id,
        )

    @property
    def lora_components(self) -> tuple[str, ...]:
        """The name of the prior."""
        return ("prior",)

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        if self.text_encoder is not None:
            return 'prompt="…"'
        return super().example_call if self.condition_processor is None else "condition_image=picture"

    @property
    def encoder_passes_over_padding(self) -> bool:
        """Whether the text encoder is given the mask of padding: as the prior."""
        return self.config.text_mask

    @property
    def priors(self) -> tuple[PreTrainedModel]:
        """The one prior."""
        return (self.prior,)

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
        annotator: str | Callable | None = None,
        condition: torch.LongTensor | None = None,
        boxes: Sequence[ObjectBox] | Sequence[Sequence[ObjectBox]] | None = None,
        indices: torch.LongTensor | None = None,
        keep_fraction: float | None = None,
        outpaint: Sequence[int] | None = None,
        stride: int = 1,
        window: int | Sequence[int] | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
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
            prompt: a text or a list of texts, for a prior that is conditioned on text; `None` is its null condition.
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
                proportion. For "coordinates" the coordinates of a crop; by default those of a whole picture.
            boxes: the objects of a picture or a list of pictures, for a prior whose config has `bounding_boxes`:
                [`ObjectBox`]es, or `(label, (left, top, width, height))` in shares of the picture; labels as ids or as
                names of the prior's `id2label`. Of images larger than its grid each window gets its part of the boxes.
            indices: codes `(B, h, w)` in place of `image`.
            keep_fraction: in place of a mask, the share of the codes that is kept, in random places: a variation.
            outpaint: pixels `(top, bottom, left, right)` to add around the image.
            stride: codes that the window moves by. More than 1 is faster, with a little less in view of each code.
            window: rows and columns of the codes that are read before a new one, by default the prior's grid, which is
                also the most; fewer are faster. They keep the places that they have in a window as large as the grid,
                as the condition does. Convolutional priors read whole grids.
            prompt_embeds, prompt_attention_mask: the states `(B, S, D)` of texts in place of `prompt`, S at most the
                prior's `condition_length`, and `(B, S)`, false where these are padded; by default nowhere.
            num_images_per_prompt: images for each prompt, class, condition or image; those of one are adjacent.
            batch_size: how many inputs there are where no argument says it: without text, class, condition and image.
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
        size = self.wanted_size(height, width, stride, window)
        is_small = check_window(window, self.prior) != tuple(self.prior.config.grid_size)
        if is_small and (cache_implementation is not None or not use_cache):
            raise ValueError(
                "`window` smaller than the prior's grid needs `use_cache`, and no `cache_implementation`."
            )
        if condition_image is not None:
            if condition is not None:
                raise ValueError("Only one of `condition_image` and `condition` can be given.")
            whole = self._whole_size(size, image, indices, outpaint)
            condition = encode_condition(self, condition_image, whole, annotator)
        elif annotator is not None:
            raise ValueError("`annotator` needs a `condition_image`, the photo that it is for.")
        if boxes is not None:
            if condition is not None:
                raise ValueError("Only one of `boxes`, `condition` and `condition_image` can be given.")
            condition = self.prepare_boxes(boxes)
        self._check_text(prompt, prompt_embeds)
        text = self.text_states("prompt", prompt, prompt_embeds, prompt_attention_mask)
        given = {"prompt": prompt, "prompt_embeds": prompt_embeds, "class_labels": class_labels}
        names = [name for name, value in given.items() if value is not None]
        if self.prior.config.condition_type == "coordinates" and condition is None and not names:
            condition = self.prepare_coordinates(*self._whole_size(size, image, indices, outpaint))
        if condition is not None:
            names.append(
                "boxes" if boxes is not None else "condition" if condition_image is None else "condition_image"
            )
        if len(names) > 1:
            raise ValueError(f"Only one of {' and '.join(f'`{name}`' for name in names)} can be given.")
        prompts, inputs = self._prompts(class_labels, condition, text)
        images, indices = self.draw_images(
            {names[0] if names else "class_labels": prompts},
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
            window=window,
            inputs=inputs,
        )
        return VQPipelineOutput(images=images, indices=indices) if return_dict else (images, indices)

    def _whole_size(self, size, image, indices, outpaint) -> tuple[int, int]:
        """Height and width of the images: `size`, or that of what is completed, or the prior's own."""
        if size is None and (image is not None or indices is not None):
            pixels = None if image is None else to_pixel_values(image, self.vqvae.config.in_channels)
            size = size_of_given(pixels, indices, self.vqvae.config.downsample_factor, outpaint)
        is_grid = size is not None and all(size)  # what is none is refused when it is read
        return size if is_grid else self.image_size

    def prepare_coordinates(self, height: int | None = None, width: int | None = None) -> torch.LongTensor:
        """
        The coordinates `(1, h', w')` of a whole picture, for a prior whose `condition_type` is "coordinates".

        Args:
            height, width: in pixels, by default the size of the prior's grid.

        Raises:
            ValueError: another kind of prior, or a size that it cannot sample.
        """
        config = self.prior.config
        if config.condition_type != "coordinates":
            raise ValueError(f"`prior` must have the condition_type 'coordinates', got {config.condition_type!r}.")
        size = self.wanted_size(height, width) or self.image_size
        cells = [
            Fraction(length * side, own)
            for length, side, own in zip(size, coordinate_grid(config), self.image_size, strict=True)
        ]
        if any(count.denominator != 1 for count in cells):
            raise ValueError(f"`height` and `width` must hold whole cells of the coordinates, got {tuple(size)}.")
        return coordinate_ids(config, size, [int(count) for count in cells])[None]

    def prepare_boxes(self, boxes: Sequence[ObjectBox] | Sequence[Sequence[ObjectBox]]) -> torch.LongTensor:
        """
        The condition ids `(B, condition_length)` of the objects of each picture.

        Args:
            boxes: see the call.

        Raises:
            ValueError: a prior without `bounding_boxes`, no picture, or objects that are none.
        """
        config = self.prior.config
        if getattr(config, "bounding_boxes", None) is None:
            raise ValueError("`boxes` needs a prior whose config has `bounding_boxes`, which a prior of boxes saves.")
        if not isinstance(boxes, (list, tuple)) or not boxes:
            raise ValueError(f"`boxes` must be a list of objects, or of such lists, and not empty, got {boxes!r}.")
        are_pictures = all(
            isinstance(one, (list, tuple)) and (not one or isinstance(one[0], (list, tuple))) for one in boxes
        )
        tokenizer = BoundingBoxTokenizer(**config.bounding_boxes)
        numbers = {name: number for number, name in (config.id2label or {}).items()}
        rows = []
        for picture in boxes if are_pictures else [boxes]:
            try:
                objects = [ObjectBox(*one) for one in picture]
            except TypeError as error:
                raise ValueError(f"`boxes` must hold objects (label, box), got {picture!r}.") from error
            unknown = [one.label for one in objects if isinstance(one.label, str) and one.label not in numbers]
            if unknown:
                raise ValueError(f"`boxes` must have labels of {sorted(numbers)}, got {unknown[0]!r}.")
            objects = [one._replace(label=numbers.get(one.label, one.label)) for one in objects]
            rows.append(tokenizer.encode(objects))
        return torch.stack(rows)

    def _prompts(
        self, class_labels: Any, condition: Any, text: TextCondition | None
    ) -> tuple[Sequence[torch.LongTensor], dict[str, torch.Tensor]]:
        """
        The prefixes `(B, condition_length)`, or the codes `(B, h', w')` of a condition that windows are cut from; and
        what else the prior takes.
        """
        config = self.prior.config
        if text is not None:
            return self._text_prompts(text)
        condition = torch.as_tensor(condition) if isinstance(condition, np.ndarray) else condition
        is_grid = torch.is_tensor(condition) and condition.ndim == 3 and len(condition)
        if not is_grid or condition[0].numel() <= config.condition_length:
            return self.prepare_prompts(class_labels, condition), {}
        self.prepare_prompts(class_labels, condition.flatten(1)[:, : config.condition_length])  # its kind and dtype
        grid = check_codes("condition", condition.long(), condition.shape[1:], config.condition_vocab_size)
        return [grid.to(self._execution_device)], {}

    def _check_text(self, prompt: Any, prompt_embeds: Any) -> None:
        """A ValueError for a text that the prior is not conditioned on."""
        kind = self.prior.config.condition_type
        for name, value in (("prompt", prompt), ("prompt_embeds", prompt_embeds)):
            if value is not None and kind != "text":
                instead = ": give `class_labels`" if kind == "class" else ""
                raise ValueError(f"`{name}` needs a prior whose condition_type is 'text', got {kind!r}{instead}.")

    def _text_prompts(self, text: TextCondition) -> tuple[Sequence[torch.LongTensor], dict[str, torch.Tensor]]:
        """The prefixes of texts, their states, and which of them are no padding."""
        config = self.prior.config
        if text.embeddings.shape[2] != config.text_embed_dim:
            raise ValueError(
                f"`prompt_embeds`, or what the text encoder gives, must have the {config.text_embed_dim} channels of "
                f"the prior's text_embed_dim, got {text.embeddings.shape[2]}."
            )
        if not text.mask.any(dim=1).all():
            raise ValueError("`prompt_attention_mask` must leave a token that is not padding in each row.")
        if not self.config.text_mask:
            text = TextCondition(text.embeddings, torch.ones_like(text.mask))
        text = aligned_right(text, config.condition_length)
        states = text.embeddings.to(self._execution_device, self.prior.dtype)
        inputs = {"condition_states": states}
        if not text.mask.all():
            inputs["attention_mask"] = text.mask.to(states.device).long()
        return [self.prior.prepare_condition(states).to(states.device)], inputs


__all__ = ["VQAutoregressivePipeline"]
