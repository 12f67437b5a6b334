"""The likelihood that mask-and-replace diffusion gives to codes, from below, in the form that `evaluate_prior`
takes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import nn

from ..argument_checks import check_integer
from ..schedulers.sample_checks import check_indices
from ..schedulers.scheduling_mask_replace import MaskReplaceScheduler


class DiffusionLikelihood(nn.Module):
    """
    The variational bound of log p(x_0) (Gu et al. 2022, equation 7): less the sum of `vlb_terms` over all timesteps
    and of `prior_kl`, so that its bits per index stand beside those of autoregressive priors, as an upper bound.

    ```python
    likelihood = DiffusionLikelihood(pipe.transformer, pipe.scheduler)
    evaluate_prior(likelihood, DataLoader(load_indices(folder), batch_size=64, collate_fn=collate), "label")
    ```

    Args:
        transformer ([`VQDiffusionTransformer2DModel`] or another module): called with x_t, timesteps and the
            condition; has logits `(B, *, K)` as `sample`.
        scheduler ([`MaskReplaceScheduler`]): the chain that it was trained on.
        prepare_condition (*optional*): from the condition of a batch to keyword arguments of the transformer, for
            example `lambda prompts: pipe.prepare_condition(len(prompts), prompt=prompts)[0]`; by default a condition
            is classes, int64 `(B,)`.
        num_timesteps (*optional*): evaluate the transformer at so many timesteps of each image in place of all T: one
            drawn from each of as many parts of 0…T-1, and weighted by the part's length. An unbiased estimate.
        generator (*optional*): of these draws and of the noise, by default torch's global randomness; or a function of
            the batch size B, called once for a batch, that gives a list with one generator for each sample. A bound is
            the mean over this noise; each timestep has one draw of it.
        num_inference_steps (*optional*): the bound of the chain that is sampled with so many steps, in place of all T;
            not together with `num_timesteps`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        scheduler: MaskReplaceScheduler,
        prepare_condition: Callable[..., dict] | None = None,
        num_timesteps: int | None = None,
        generator: torch.Generator | Callable[[int], list[torch.Generator]] | None = None,
        num_inference_steps: int | None = None,
    ):
        super().__init__()
        steps = scheduler.config.num_train_timesteps
        self.chain = None
        if num_inference_steps is not None:
            if num_timesteps is not None:
                raise ValueError("Only one of `num_timesteps` and `num_inference_steps` can be given.")
            skipping = copy.copy(scheduler)
            skipping.set_timesteps(num_inference_steps)
            self.chain = [*skipping.timesteps.tolist(), -1]
        if num_timesteps is None:
            num_timesteps = steps
        num_timesteps = check_integer("num_timesteps", num_timesteps, minimum=1, maximum=steps)
        self.transformer = transformer
        self.scheduler = scheduler
        self.prepare_condition = prepare_condition
        self.generator = generator
        self.edges = torch.arange(num_timesteps + 1) * steps // num_timesteps

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def config(self) -> SimpleNamespace:
        """`codebook_size`, K."""
        return SimpleNamespace(codebook_size=self.scheduler.config.num_embeddings)

    @torch.no_grad()
    def log_likelihood(
        self,
        indices: torch.LongTensor,
        condition: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """
        A lower bound of the log-likelihood of each grid of codes.

        Args:
            indices: int64 `(B, *)` in 0…K-1.
            condition: what `prepare_condition` takes; None is no condition.

        Returns:
            float32 `(B,)`, nats.

        Raises:
            ValueError: `indices` are no codes, or none.
        """
        check_indices("indices", indices, self.scheduler.mask_index - 1)
        inputs = {} if condition is None else self._inputs(condition)
        bound = torch.full((len(indices),), -self.scheduler.prior_kl() * indices[0].numel(), device=indices.device)
        generator = self.generator(len(indices)) if callable(self.generator) else self.generator
        for timesteps, prev_timesteps, weight in self._transitions(len(indices), generator):
            noised = self.scheduler.add_noise(indices, timesteps, generator)
            logits = self.transformer(noised, timesteps.to(indices.device), **inputs).sample
            terms = self.scheduler.vlb_terms(logits, indices, noised, timesteps, prev_timesteps)
            bound -= weight * terms.flatten(1).sum(dim=1)
        return bound

    def _transitions(self, count: int, generator) -> Iterator[tuple[torch.LongTensor, torch.LongTensor, int]]:
        """The timesteps `(count,)` that are evaluated, those that follow in the chain, and how often they count."""
        if self.chain is not None:
            for now, following in zip(self.chain, self.chain[1:], strict=False):
                yield torch.full((count,), now), torch.full((count,), following), 1
            return
        for first, end in zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True):
            timesteps = _draw_integers(first, end, count, generator)
            yield timesteps, timesteps - 1, end - first

    def _inputs(self, condition) -> dict:
        return {"class_labels": condition} if self.prepare_condition is None else self.prepare_condition(condition)


def _draw_integers(
    first: int, end: int, count: int, generator: torch.Generator | list[torch.Generator] | None
) -> torch.LongTensor:
    """`count` integers in first…end-1; with a list of generators, the i-th by the i-th of them."""
    if isinstance(generator, list):
        return torch.stack([torch.randint(first, end, (), generator=source) for source in generator])
    device = None if generator is None else generator.device
    return torch.randint(first, end, (count,), generator=generator, device=device)


__all__ = ["DiffusionLikelihood"]
