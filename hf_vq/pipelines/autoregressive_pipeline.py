"""The base of the autoregressive pipelines: a causal LM over codes for each level of a tokenizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..images import to_pixel_values
from .code_sampling import KnownCodes, LevelSampling, for_each_level, sample_level
from .completion import complete
from .rejection_sampling import rejection_sample
from .vq_pipeline import VQPipeline, as_levels, check_codes, check_generator, check_part, onload


class AutoregressivePipeline(VQPipeline):
    """
    Base of the pipelines whose property `priors` holds a causal LM over codes for each level of the tokenizer `vqvae`, from
    top to bottom. All but the first take the codes of the level above as `condition_indices`.
    """

    _callback_tensor_inputs = ["indices", "level"]

    complete = complete
    rejection_sample = rejection_sample

    @property
    def priors(self) -> tuple[PreTrainedModel, ...]:
        """The priors of the levels, from top to bottom."""
        raise NotImplementedError

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        return {"class": "class_labels=0", "codes": "condition=codes"}.get(self.priors[0].config.condition_type, "")

    def prepare_prompts(self, class_labels: Any = None, condition: Any = None) -> tuple[torch.LongTensor, ...]:
        """Each prior's prefix for each class or condition, `(B, condition_length)`, or 1 row where it takes none.

        Raises:
            ValueError: a condition that no prior takes.
        """
        if class_labels is not None and condition is not None:
            raise ValueError("Only one of `class_labels` and `condition` can be given.")
        given = {"class": class_labels, "codes": condition}
        kinds = [prior.config.condition_type for prior in self.priors]
        for name, wanted in (("class_labels", "class"), ("condition", "codes")):
            if given[wanted] is not None and wanted not in kinds:
                raise ValueError(f"`{name}` needs a prior whose condition_type is {wanted!r}, got {kinds[0]!r}.")
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
        self, image: Any = None, indices: torch.LongTensor | tuple[torch.LongTensor, ...] | None = None
    ) -> tuple[torch.LongTensor, ...]:
        """The codes `(B, h, w)` of each level, from top to bottom, of images or of `indices`."""
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
        return tuple(self.check_level(name, codes, prior) for codes, prior in zip(levels, self.priors, strict=True))

    def check_level(self, name: str, codes: torch.LongTensor, prior: PreTrainedModel) -> torch.LongTensor:
        """`codes` on the pipeline's device, or a ValueError that names them if they are none of the prior's grids."""
        config = prior.config
        return check_codes(name, codes, config.grid_size, config.codebook_size).to(self._execution_device)

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
    ) -> tuple[torch.LongTensor, ...]:
        """
        The codes `(B, h, w)` of each level, given each prior's prefixes `(B, condition_length)` and the codes that are
        `known`. The other arguments are those of the call.
        """
        count = len(self.priors)
        known = [None] * count if known is None else known
        values = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        values = [for_each_level(name, value, count) for name, value in values.items()]
        settings = [LevelSampling(*of_level) for of_level in zip(*values, strict=True)]
        for prior, prompt, setting in zip(self.priors, prompts, settings, strict=True):
            setting.check_guidance(prior.config, prompt)
        check_generator(generator, len(prompts[0]))
        names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)

        missing = [
            prior.config.image_seq_length - (0 if codes is None else codes.first)
            for prior, codes in zip(self.priors, known, strict=True)
        ]
        step, grids = 0, []
        with self.progress_bar(total=sum(missing)) as progress_bar:
            for level, prior in enumerate(self.priors):

                def after_each_code(codes, level=level):
                    nonlocal step
                    progress_bar.update()
                    if callback_on_step_end is not None:
                        position = codes.shape[1] - 1
                        changed = self.call_back(
                            callback_on_step_end, names, step, position, "indices", codes, level=level
                        )
                        _check_last_code(codes, changed, self.vqvae.config.num_embeddings)
                        codes = changed
                    step += 1
                    return codes

                inputs = {"condition_indices": grids[-1]} if grids else {}
                grid = sample_level(
                    prior,
                    prompts[level],
                    known[level],
                    settings[level],
                    generator,
                    after_each_code,
                    use_cache=use_cache,
                    cache_implementation=cache_implementation,
                    **inputs,
                )
                grids.append(grid)
        return tuple(grids)


def _check_last_code(codes: torch.LongTensor, changed: torch.LongTensor, codebook_size: int):
    """A ValueError unless `changed` are `codes` with a code in the last place: the others have been read already."""
    if changed is codes:
        return
    if not torch.equal(changed[:, :-1], codes[:, :-1]):
        raise ValueError("`callback_on_step_end` must leave all `indices` but the last one of each row as they are.")
    if changed.min() < 0 or changed.max() >= codebook_size:
        raise ValueError(
            f"`callback_on_step_end` must return `indices` in 0 … {codebook_size - 1}, got values from {changed.min()} to "
            f"{changed.max()}."
        )


def check_prior(name: str, prior: Any):
    """A ValueError unless the component `name` is a causal LM over codes."""
    attributes = ("prepare_condition", "generate", "extract_indices", "config.codebook_size", "config.grid_size")
    wanted = "a causal LM over codes (VQGPTForCausalLM, PixelCNNForCausalLM, PixelSNAILForCausalLM)"
    check_part(name, prior, attributes, wanted)


__all__ = ["AutoregressivePipeline", "check_prior"]
