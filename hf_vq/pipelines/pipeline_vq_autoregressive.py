"""Sampling images from an autoregressive prior over code indices."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .code_sampling import CodeSamplingMixin
from .completion import CompletionMixin
from .pipeline_output import VQPipelineOutput
from .pipeline_utils import VQPipeline, check_single_codes
from .rejection_sampling import RejectionSamplingMixin


class VQAutoregressivePipeline(CodeSamplingMixin, CompletionMixin, RejectionSamplingMixin, VQPipeline):
    """
    Samples a grid of codes with `prior`, row by row, and decodes it with `vqvae`: a call samples whole images, `complete`
    keeps a part of a given image, `rejection_sample` keeps the best of many by a classifier.

    Args:
        vqvae ([`VQGANModel`] or another tokenizer): decodes the codes.
        prior ([`VQGPTForCausalLM`] or another causal LM over codes): with its `prepare_condition`, `generate` and
            `extract_indices`, and in its config `codebook_size` (the tokenizer's), `grid_size`, `image_seq_length`,
            `condition_type`, `condition_length`, `condition_token_offset` and `null_class_token_id`.
    """

    model_cpu_offload_seq = "prior->vqvae"

    def __init__(self, vqvae: PreTrainedModel, prior: PreTrainedModel):
        super().__init__()
        if vqvae is not None and prior is not None and prior.config.codebook_size != vqvae.config.num_embeddings:
            raise ValueError(
                f"`prior` must have as many codes as `vqvae`: got {prior.config.codebook_size} and "
                f"{vqvae.config.num_embeddings}."
            )
        if vqvae is not None:
            check_single_codes(vqvae)
            if len(vqvae.config.downsample_factors) > 1:
                raise ValueError("`vqvae` must have one level: several need a prior for each, see `VQVAE2Pipeline`.")
        self.register_modules(vqvae=vqvae, prior=prior)

    @property
    def priors(self) -> tuple[PreTrainedModel]:
        """The one prior."""
        return (self.prior,)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        condition: torch.LongTensor | None = None,
        num_images_per_prompt: int = 1,
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
    ) -> VQPipelineOutput | tuple:
        """
        Args:
            class_labels: a class or a list of classes, as ids or as names of the prior's `id2label`; `None` samples
                unconditionally (with the null condition, where the prior is conditional).
            condition (int `(B, h', w')` or `(B, condition_length)`, *optional*): for a prior whose `condition_type` is
                "codes", the codes of the conditions.
            num_images_per_prompt: images for each class or condition; those of one class are adjacent.
            guidance_scale: classifier-free guidance, `null + scale * (conditional - null)` on the log-probabilities
                (Ho & Salimans, 2022); 1 is off.
            temperature, top_k, top_p: reshape each code's distribution, in this order.
            generator: one `torch.Generator` for the call, or a list with one for each image, which makes an image
                independent of the others in its batch. The global random state is used, and moved, only without one.
            output_type: "pil", "np", "pt" or "indices", see [`VQPipelineOutput`].
            return_dict: a [`VQPipelineOutput`] or the tuple `(images, indices)`.
            use_cache, cache_implementation: key-value cache of `generate`; "static" is compiled on accelerators.
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each code as `callback(pipe, step, position, {"indices": (B, position + 1),
                "level": 0})`.

        Raises:
            ValueError: an argument out of range, or a condition that the prior does not take.
        """
        self.check_output(num_images_per_prompt, output_type, decode_batch_size)
        (prompt,) = self.prepare_prompts(class_labels, condition)
        (indices,) = self.sample_levels(
            [prompt.repeat_interleave(num_images_per_prompt, dim=0)],
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            use_cache=use_cache,
            cache_implementation=cache_implementation,
            callback_on_step_end=callback_on_step_end,
        )
        images = self.postprocess(indices, output_type, decode_batch_size)
        self.maybe_free_model_hooks()
        return VQPipelineOutput(images=images, indices=indices) if return_dict else (images, indices)


__all__ = ["VQAutoregressivePipeline"]
