"""The base of the autoregressive pipelines: a causal LM over codes for each level of a tokenizer."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..argument_checks import check_integer, check_real
from ..images import images_as, to_pixel_values
from ..models.priors.bounding_boxes import BoundingBoxTokenizer
from .code_sampling import (
    KnownCodes,
    LevelSampling,
    count_steps,
    for_each_level,
    sample_level,
    strides_of_levels,
)
from .completion import (
    Given,
    check_painted,
    check_whole_size,
    grids_of,
    kept_at_levels,
    paste,
    random_mask,
    read_given,
)
from .conditioning import class_ids, count_inputs, repeat_rows
from .rejection_sampling import rejection_sample
from .vq_pipeline import VQPipeline, as_levels, check_codes, check_generator, check_part, of_levels, onload


class AutoregressivePipeline(VQPipeline):
    """
    Base of the pipelines whose property `priors` holds a causal LM over codes for each level of the tokenizer `vqvae`,
    from top to bottom. All but the first take the codes of the level above as `condition_indices`.
    """

    _callback_tensor_inputs = ["indices", "level"]

    rejection_sample = rejection_sample

    @property
    def priors(self) -> tuple[PreTrainedModel, ...]:
        """The priors of the levels, from top to bottom."""
        raise NotImplementedError

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        calls = {"class": "class_labels=0", "codes": "condition=codes", "text": "prompt_embeds=states"}
        return calls.get(self.priors[0].config.condition_type, "")

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes, by their ids; None without classes or names."""
        config = self._class_config
        names = {} if config is None else config.id2label or {}
        return {i: name for i, name in names.items() if name != f"LABEL_{i}"} or None

    @property
    def _class_config(self) -> PreTrainedConfig | None:
        """Of the first prior with classes."""
        configs = (prior.config for prior in self.priors)
        return next((config for config in configs if config.condition_type == "class"), None)

    def prepare_prompts(self, class_labels: Any = None, condition: Any = None) -> tuple[torch.LongTensor, ...]:
        """Each prior's prefix for each class or condition, `(B, condition_length)`, or 1 row where it takes none.

        Raises:
            ValueError: a condition that no prior takes.
        """
        if class_labels is not None and condition is not None:
            raise ValueError("Only one of `class_labels` and `condition` can be given.")
        given = {"class": class_labels, "codes": condition, "coordinates": condition}
        kinds = [prior.config.condition_type for prior in self.priors]
        for name, wanted in (("class_labels", ("class",)), ("condition", ("codes", "coordinates"))):
            if given[wanted[0]] is not None and not set(wanted) & set(kinds):
                meant = " or ".join(map(repr, wanted))
                raise ValueError(f"`{name}` needs a prior whose condition_type is {meant}, got {kinds[0]!r}.")
        if class_labels is not None and self._class_config is not None:
            given["class"] = class_ids(class_labels, self._class_config.condition_vocab_size, self.id2label)
        return tuple(
            prior.prepare_condition(given.get(kind)).to(self._execution_device)
            for prior, kind in zip(self.priors, kinds, strict=True)
        )

    def class_ids(self, prompts: Sequence[torch.LongTensor]) -> torch.LongTensor:
        """The classes `(B,)` of prefixes from `prepare_prompts`."""
        prior, prompt = next(
            (prior, prompt)
            for prior, prompt in zip(self.priors, prompts, strict=True)
            if prior.config.condition_type == "class"
        )
        return prompt[:, 0] - prior.config.condition_token_offset

    def given_codes(
        self,
        image: Any = None,
        indices: torch.LongTensor | tuple[torch.LongTensor, ...] | None = None,
        grid_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.LongTensor, ...]:
        """
        The codes `(B, h, w)` of each level, from top to bottom, of images or of `indices`, on the pipeline's device.

        Raises:
            ValueError: not exactly one of both, or other grids than `grid_sizes`, by default the priors' own.
        """
        if (image is None) == (indices is None):
            raise ValueError("Exactly one of `image` and `indices` must be given.")
        name, levels = "indices", as_levels(indices)
        if image is not None:
            pixel_values = to_pixel_values(image, self.vqvae.config.in_channels)
            onload(self.vqvae)
            pixel_values = pixel_values.to(self._execution_device, self.vqvae.dtype)
            parts = [as_levels(self.vqvae.encode(part).indices) for part in pixel_values.split(16)]
            name, levels = "image", [torch.cat(of_level) for of_level in zip(*parts, strict=True)]
        if len(levels) != len(self.priors):
            raise ValueError(f"`{name}` must give codes of {len(self.priors)} levels, got {len(levels)}.")
        sizes = [prior.config.grid_size for prior in self.priors] if grid_sizes is None else grid_sizes
        codebook_size, device = self.vqvae.config.num_embeddings, self._execution_device
        return tuple(
            check_codes(name, codes, size, codebook_size).to(device) for codes, size in zip(levels, sizes, strict=True)
        )

    # The call

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the priors' grids decode to."""
        factor = self.vqvae.config.downsample_factors[0]
        return tuple(side * factor for side in self.priors[0].config.grid_size)

    def wanted_size(
        self,
        height: int | None,
        width: int | None,
        stride: int = 1,
        window: int | Sequence[int] | None = None,
    ) -> tuple[int, int] | None:
        """`height` and `width`, the priors' own where one of them is missing; None where both are.

        Raises:
            ValueError: a size that the priors' windows cannot sample, or no such window or stride.
        """
        strides_of_levels(stride, self.priors, window)
        if height is None and width is None:
            return None
        own = self.image_size
        pairs = (("height", height, own[0]), ("width", width, own[1]))
        size = tuple(default if value is None else check_integer(name, value, 1) for name, value, default in pairs)
        grid, least = grids_of(size, self.vqvae.config.downsample_factors)[0], self.priors[0].config.grid_size
        for name, length, side in zip(("height", "width"), grid, least, strict=True):
            if length < side:
                raise ValueError(
                    f"`{name}` must be at least the {side} codes of the prior's grid, got {length} codes."
                )
        return size

    def _read_given(self, image, indices, mask_image, keep_fraction, outpaint) -> Given | None:
        """What is completed, or a ValueError unless one argument says which part of it is kept."""
        factors = self.vqvae.config.downsample_factors

        def read_codes(pixels, indices, size):
            return self.given_codes(pixels, indices, grids_of(size, factors))

        given = read_given(self.vqvae.config, image, indices, mask_image, keep_fraction, outpaint, read_codes)
        if given is not None and given.mask is None and keep_fraction is None:
            raise ValueError(
                "Exactly one of `mask_image` and `keep_fraction`, or `outpaint`, must be given for an image."
            )
        return given

    def draw_images(
        self,
        prompts: dict[str, Sequence[torch.Tensor]],
        image: Any = None,
        indices: torch.LongTensor | tuple[torch.LongTensor, ...] | None = None,
        mask_image: Any = None,
        keep_fraction: float | None = None,
        outpaint: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        top_indices: Sequence[torch.LongTensor] = (),
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        decode_batch_size: int = 16,
        inputs: dict[str, torch.Tensor] | None = None,
        **sampling: Any,
    ) -> tuple[Any, torch.LongTensor | tuple[torch.LongTensor, ...]]:
        """
        The images and the codes of a call.

        Args:
            prompts: what each level is conditioned on, under the name of the argument that it comes from: prefixes, or
                the codes of a condition that windows are cut from.
            size: height and width in pixels.
            top_indices: codes of the first levels, which are not sampled.
            inputs: what else the first prior takes, a row for each prompt.
            sampling: further arguments of `sample_levels`. The others are those of the call.
        """
        times, decode_batch_size = self.check_output(num_images_per_prompt, output_type, decode_batch_size)
        keep_fraction = None if keep_fraction is None else check_real("keep_fraction", keep_fraction, 0, 1)
        given = self._read_given(image, indices, mask_image, keep_fraction, outpaint)
        whole = check_whole_size(given, size, self.image_size, "image" if indices is None else "indices")
        check_painted(given)
        sizes = grids_of(whole, self.vqvae.config.downsample_factors)
        ((name, prefixes),) = prompts.items()
        inputs = inputs or {}
        rows = {name: [*prefixes, *inputs.values()], "top_indices": top_indices}
        if given is not None:
            rows["image"] = [*given.codes, *([] if given.pixels is None else [given.pixels])]
            rows["mask_image"] = [] if given.mask is None else [given.mask]
        count = count_inputs(batch_size, *(tensor for tensors in rows.values() for tensor in tensors))
        rows = repeat_rows({name: tensors for name, tensors in rows.items() if tensors}, times, count)
        check_generator(generator, count * times)
        known: list[KnownCodes | None] = [None] * len(self.priors)
        for level, codes in enumerate(rows.get("top_indices", ())):
            known[level] = KnownCodes(codes, torch.ones_like(codes, dtype=torch.bool))
        if given is not None:
            if keep_fraction is None:
                mask = rows["mask_image"][0]
            else:
                mask = random_mask((count * times, *sizes[0]), keep_fraction, generator)
            kept = kept_at_levels(mask, sizes, self.vqvae.config.downsample_factors)
            levels = zip(rows["image"], kept, strict=False)  # the pixels come last
            known = [KnownCodes(codes, keep.to(codes.device)) for codes, keep in levels]
        levels = self.sample_levels(
            rows[name][: len(prefixes)],
            known,
            grid_sizes=sizes,
            generator=generator,
            **dict(zip(inputs, rows[name][len(prefixes) :], strict=True)),
            **sampling,
        )
        indices = of_levels(levels)
        if image is None or output_type in ("indices", "latent"):
            images = self.postprocess(indices, output_type, decode_batch_size)
        else:
            decoded = self.decode_indices(indices, decode_batch_size)
            images = images_as(paste(decoded, rows["image"][-1], mask), output_type)
        self.maybe_free_model_hooks()
        return images, indices

    def sample_levels(
        self,
        prompts: Sequence[torch.LongTensor],
        known: Sequence[KnownCodes | None] | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        use_cache: bool = True,
        cache_implementation: str | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("indices",),
        grid_sizes: Sequence[tuple[int, int]] | None = None,
        stride: int = 1,
        window: int | Sequence[int] | None = None,
        **inputs: torch.Tensor,
    ) -> tuple[torch.LongTensor, ...]:
        """
        The codes `(B, h, w)` of each level.

        Args:
            prompts: for each level the prior's prefixes `(B, condition_length)`, or the codes `(B, h', w')` of a
                condition that windows are cut from.
            known: for each level what is not sampled.
            grid_sizes: of each level, by default the priors' own.
            stride: of the top level, see [`window_runs`].
            window: see [`sample_level`].
            inputs: what else the first prior's `forward` takes. The other arguments are those of the call.
        """
        count = len(self.priors)
        strides = strides_of_levels(stride, self.priors, window)
        known = [None] * count if known is None else known
        sizes = [tuple(prior.config.grid_size) for prior in self.priors] if grid_sizes is None else grid_sizes
        values = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        values = [for_each_level(name, value, count) for name, value in values.items()]
        settings = [LevelSampling(*of_level) for of_level in zip(*values, strict=True)]
        prefixes = [_prefixes(*of_level) for of_level in zip(self.priors, prompts, sizes, strict=True)]
        for prior, prefix, setting in zip(self.priors, prefixes, settings, strict=True):
            setting.check_guidance(prior.config, prefix((0, 0)))
        batch_size = len(prompts[0])
        check_generator(generator, batch_size)
        names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        missing = sum(
            count_steps(*of_level, window) for of_level in zip(self.priors, known, sizes, strides, strict=True)
        )
        step, grids = 0, []
        with self.progress_bar(total=missing) as progress_bar:
            for level, prior in enumerate(self.priors):
                given, size = known[level], sizes[level]
                seen = torch.zeros(batch_size, 0, dtype=torch.long, device=self._execution_device)

                def after_each_code(code, level=level):
                    nonlocal step, seen
                    progress_bar.update()
                    if callback_on_step_end is not None:
                        seen = torch.cat([seen, code[:, None]], dim=1)
                        position = seen.shape[1] - 1
                        changed = self.call_back(
                            callback_on_step_end, names, step, position, "indices", seen, level=level
                        )
                        _check_last_code(seen, changed, self.vqvae.config.num_embeddings)
                        seen = changed
                        code = changed[:, -1]
                    step += 1
                    return code

                def on_known(codes):
                    nonlocal seen
                    seen = torch.cat([seen, codes], dim=1)

                grid = sample_level(
                    prior,
                    prefixes[level],
                    given,
                    settings[level],
                    generator,
                    after_each_code,
                    on_known=on_known,
                    grid_size=size,
                    stride=strides[level],
                    window=window,
                    inputs=_codes_above(prior, grids[-1]) if grids else lambda origin: inputs,
                    use_cache=use_cache,
                    cache_implementation=cache_implementation,
                )
                grids.append(grid)
        return tuple(grids)


def _prefixes(
    prior: PreTrainedModel, prompt: torch.LongTensor, grid_size: tuple[int, int]
) -> Callable[[tuple[int, int]], torch.LongTensor]:
    """A function from the origin of a window on the grid to the prior's prefixes `(B, condition_length)` there."""
    if prompt.ndim == 2:
        null = prior.config.null_class_token_id
        is_null = null is not None and bool((prompt == null).all())
        if getattr(prior.config, "bounding_boxes", None) is not None and not is_null:
            return _prefixes_of_boxes(prior, prompt, grid_size)
        if (
            prior.config.condition_type in ("codes", "coordinates")
            and tuple(grid_size) != tuple(prior.config.grid_size)
            and not is_null
        ):
            raise ValueError(
                f"`condition` must be a grid (B, h', w') in proportion to the {tuple(grid_size)} codes, got the codes "
                "of one window."
            )
        return lambda origin: prompt
    window, length = prior.config.grid_size, prior.config.condition_length
    found = []
    for side, whole, given in zip(window, grid_size, prompt.shape[1:], strict=True):
        share = Fraction(given, whole) * side  # codes of the condition along a side of a window
        found.append((int(share), Fraction(given, whole)) if share.denominator == 1 else None)
    if None in found or found[0][0] * found[1][0] != length:
        raise ValueError(
            f"`condition` must have as many codes for each window as the prior's {length} condition ids, got a grid "
            f"of {tuple(prompt.shape[1:])} for {tuple(grid_size)} codes."
        )

    def prefix(origin):
        first = [position * ratio for position, (_, ratio) in zip(origin, found, strict=True)]
        if any(place.denominator != 1 for place in first):
            raise ValueError(
                "`stride` and the distance to the sides must move the window by whole codes of the condition, got a "
                f"window at {origin}, which is {tuple(map(str, first))} there."
            )
        top, left = map(int, first)
        part = prompt[:, top : top + found[0][0], left : left + found[1][0]]
        return prior.prepare_condition(part.flatten(1)).to(prompt.device)

    return prefix


def _prefixes_of_boxes(
    prior: PreTrainedModel, prompt: torch.LongTensor, grid_size: tuple[int, int]
) -> Callable[[tuple[int, int]], torch.LongTensor]:
    """`_prefixes` of the boxes in a whole picture, which are cut along a window that is smaller than it."""
    window, offset = prior.config.grid_size, prior.config.condition_token_offset
    if tuple(window) == tuple(grid_size):
        return lambda origin: prompt
    boxes = BoundingBoxTokenizer(**prior.config.bounding_boxes)
    (rows, columns), (height, width) = window, grid_size

    def prefix(origin):
        crop = (origin[1] / width, origin[0] / height, columns / width, rows / height)
        return torch.stack([boxes.of_crop(ids - offset, crop) for ids in prompt]) + offset

    return prefix


def _codes_above(prior: PreTrainedModel, above: torch.LongTensor) -> Callable[[tuple[int, int]], dict]:
    """A function from the origin of a window to the codes of the level above that belong to it."""
    own, sides = prior.config.grid_size, prior.config.conditioning_grid_size

    def inputs(origin):
        top, left = (first * part // whole for first, part, whole in zip(origin, sides, own, strict=True))
        return {"condition_indices": above[:, top : top + sides[0], left : left + sides[1]]}

    return inputs


def _check_last_code(codes: torch.LongTensor, changed: torch.LongTensor, codebook_size: int):
    """A ValueError unless `changed` are `codes` with a code in the last place: the others have been read already."""
    if changed is codes:
        return
    if not torch.equal(changed[:, :-1], codes[:, :-1]):
        raise ValueError("`callback_on_step_end` must leave all `indices` but the last one of each row as they are.")
    if changed.min() < 0 or changed.max() >= codebook_size:
        raise ValueError(
            f"`callback_on_step_end` must return `indices` in 0 … {codebook_size - 1}, got values from "
            f"{changed.min()} to {changed.max()}."
        )


def check_prior(name: str, prior: Any):
    """A ValueError unless the component `name` is a causal LM over codes."""
    attributes = ("prepare_condition", "generate", "extract_indices", "config.codebook_size", "config.grid_size")
    wanted = "a causal LM over codes (VQGPTForCausalLM, PixelCNNForCausalLM, PixelSNAILForCausalLM)"
    check_part(name, prior, attributes, wanted)


__all__ = ["AutoregressivePipeline", "check_prior"]
