"""Sampling images from an autoregressive prior over code indices."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from .autoregressive_pipeline import AutoregressivePipeline, check_prior
from .pipeline_output import VQPipelineOutput
from .vq_pipeline import check_tokenizer


class VQAutoregressivePipeline(AutoregressivePipeline):
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
        check_tokenizer(vqvae)
        check_prior("prior", prior)
        if vqvae is not None and prior is not None and prior.config.codebook_size != vqvae.config.num_embeddings:
            raise ValueError(
                f"`prior` must have as many codes as `vqvae`: got {prior.config.codebook_size} and "
                f"{vqvae.config.num_embeddings}."
            )
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("indices",),
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
            output_type: "pil", "np", "pt", "latent" or "indices", see [`VQPipelineOutput`].
            return_dict: a [`VQPipelineOutput`] or the tuple `(images, indices)`.
            use_cache, cache_implementation: key-value cache of `generate`; "static" is compiled on accelerators.
            decode_batch_size: images decoded at a time.
            callback_on_step_end: called after each code as `callback(pipe, step, position, {"indices": (B, position + 1)})`; it
                may return a dict with `indices` that have other codes in the last place.
            callback_on_step_end_tensor_inputs: the names of what it is given, of `_callback_tensor_inputs`.

        Raises:
            ValueError: an argument out of range, or a condition that the prior does not take.
        """
        times, decode_batch_size = self.check_output(num_images_per_prompt, output_type, decode_batch_size)
        (prompt,) = self.prepare_prompts(class_labels, condition)
        (indices,) = self.sample_levels(
            [prompt.repeat_interleave(times, dim=0)],
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            use_cache=use_cache,
            cache_implementation=cache_implementation,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        images = self.postprocess(indices, output_type, decode_batch_size)
        self.maybe_free_model_hooks()
        return VQPipelineOutput(images=images, indices=indices) if return_dict else (images, indices)


__all__ = ["VQAutoregressivePipeline"]
