"""Sampling images from an autoregressive prior over code indices."""

from collections.abc import Callable

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .completion import CompletionMixin, KeptCodes
from .pipeline_output import VQPipelineOutput
from .pipeline_utils import VQPipeline, check_generator, draw_codes
from .rejection_sampling import RejectionSamplingMixin


class DrawnCode(LogitsProcessor):
    """Leaves only the code that `draw_codes` draws, so that greedy decoding takes it."""

    def __init__(self, generator=None):
        self.generator = generator

    def __call__(self, input_ids, scores):
        codes = draw_codes(scores, self.generator)
        return torch.full_like(scores, float("-inf")).scatter(1, codes[:, None], 0.0)


class AfterEachCode(StoppingCriteria):
    """Calls `function(input_ids)` after each code, and never stops."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores, **kwargs):
        self.function(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class VQAutoregressivePipeline(CompletionMixin, RejectionSamplingMixin, VQPipeline):
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
        self.register_modules(vqvae=vqvae, prior=prior)

    def prepare_prompt(self, class_labels=None, condition=None) -> torch.LongTensor:
        """The prior's prefix for each class or condition, `(B, condition_length)`."""
        if class_labels is not None and condition is not None:
            raise ValueError("Only one of `class_labels` and `condition` can be given.")
        for name, value, wanted in (("class_labels", class_labels, "class"), ("condition", condition, "codes")):
            if value is not None and self.prior.config.condition_type != wanted:
                raise ValueError(
                    f"`{name}` needs a prior whose condition_type is {wanted!r}, got {self.prior.config.condition_type!r}."
                )
        prompt = self.prior.prepare_condition(class_labels if condition is None else condition)
        return prompt.to(self._execution_device)

    def check_sampling(self, prompt, guidance_scale, temperature, top_k, top_p, generator, callback_on_step_end):
        """ValueErrors for the sampling arguments."""
        if not isinstance(guidance_scale, (int, float)) or guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must be a number that is not negative, got {guidance_scale!r}.")
        null = self.prior.config.null_class_token_id
        if guidance_scale != 1 and (null is None or (prompt[:, : self.prior.config.condition_length] == null).all()):
            raise ValueError("`guidance_scale` other than 1 needs a condition, and a prior that has a null condition.")
        if not isinstance(temperature, (int, float)) or temperature <= 0:
            raise ValueError(f"`temperature` must be positive (`top_k=1` is greedy), got {temperature!r}.")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` must be a positive int or None, got {top_k!r}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1] or be None, got {top_p!r}.")
        check_generator(generator, len(prompt))
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError("`callback_on_step_end` must be callable.")

    def sample_sequences(
        self,
        prompt: torch.LongTensor,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator=None,
        use_cache: bool = True,
        cache_implementation: str | None = None,
        callback_on_step_end: Callable | None = None,
        kept: KeptCodes | None = None,
    ) -> torch.LongTensor:
        """
        Full sequences that continue `prompt` `(B, T)`, which may hold first codes after its prefix. `kept` forces codes
        further on. The other arguments are those of the call.
        """
        self.check_sampling(prompt, guidance_scale, temperature, top_k, top_p, generator, callback_on_step_end)
        start = self.prior.config.condition_length
        steps = start + self.prior.config.image_seq_length - prompt.shape[1]
        if steps == 0:
            return prompt
        processors = LogitsProcessorList([kept] if kept is not None else [])
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(DrawnCode(generator))

        with self.progress_bar(total=steps) as progress_bar:

            def after_each_code(input_ids):
                progress_bar.update()
                if callback_on_step_end is not None:
                    step = input_ids.shape[1] - prompt.shape[1] - 1
                    callback_on_step_end(self, step, input_ids.shape[1] - start - 1, {"indices": input_ids[:, start:]})

            return self.prior.generate(
                prompt,
                do_sample=False,
                num_beams=1,
                max_new_tokens=steps,
                guidance_scale=float(guidance_scale),
                use_cache=use_cache,
                cache_implementation=cache_implementation,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([AfterEachCode(after_each_code)]),
            )

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
            callback_on_step_end: called after each code as `callback(pipe, step, position, {"indices": (B, position + 1)})`.

        Raises:
            ValueError: an argument out of range, or a condition that the prior does not take.
        """
        self.check_output(num_images_per_prompt, output_type)
        prompt = self.prepare_prompt(class_labels, condition).repeat_interleave(num_images_per_prompt, dim=0)
        sequences = self.sample_sequences(
            prompt,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            use_cache=use_cache,
            cache_implementation=cache_implementation,
            callback_on_step_end=callback_on_step_end,
        )
        indices = self.prior.extract_indices(sequences)
        images = self.postprocess(indices, output_type, decode_batch_size)
        self.maybe_free_model_hooks()
        return VQPipelineOutput(images=images, indices=indices) if return_dict else (images, indices)


__all__ = ["VQAutoregressivePipeline"]
