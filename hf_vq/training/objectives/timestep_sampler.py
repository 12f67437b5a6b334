"""Which timesteps a diffusion over codes is trained on: the more often, the larger their part of the bound."""

import torch

from ...argument_checks import check_integer
from ...distributed import all_reduced


SMOOTHING = 0.1  # the weight of a new square in the history
WARM_UP = 10  # every timestep is met more often than this before their losses count


class ImportanceTimestepSampler:
    """
    Timesteps with probability in proportion to √E[L_t²], L_t being a sample's term of the bound (Nichol & Dhariwal,
    "Improved Denoising Diffusion Probabilistic Models", 2021, equation 18), as VQ-Diffusion is trained.

    E[L_t²] is a moving average. Until every timestep has been met more than 10 times, the draws are uniform. Timestep
    0, whose term is a likelihood and not a divergence, is drawn as often as timestep 1.

    Its state is on the CPU in float64. The history is of all processes and the same in each.

    Args:
        num_train_timesteps: T, at least 2.

    Attributes:
        history (float64 `(T,)`): the moving average of L_t².
        counts (int64 `(T,)`): how often each timestep has been met.
    """

    def __init__(self, num_train_timesteps: int):
        num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, minimum=2)
        self.num_train_timesteps = num_train_timesteps
        self.history = torch.zeros(num_train_timesteps, dtype=torch.float64)
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.int64)

    @property
    def probabilities(self) -> torch.DoubleTensor:
        """Of each timestep, float64 `(T,)`."""
        if not (self.counts > WARM_UP).all():
            return torch.full_like(self.history, 1 / self.num_train_timesteps)
        weights = (self.history + 1e-10).sqrt() + 1e-4
        weights[0] = weights[1]
        return weights / weights.sum()

    def sample(
        self,
        batch_size: int,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """
        Draws timesteps.

        Args:
            batch_size: B.
            device: of what is returned.
            generator: on the CPU, or a list with one for each sample, whose timesteps then do not depend on the other
                samples; by default torch's global randomness.

        Returns:
            Timesteps, int64 `(B,)` in 0…T-1, and their probabilities, float32 `(B,)`, which losses are to be divided
            by.
        """
        batch_size = check_integer("batch_size", batch_size, minimum=1)
        probabilities = self.probabilities
        if isinstance(generator, list):
            if len(generator) != batch_size:
                raise ValueError(f"`generator` must hold one for each of {batch_size} samples, got {len(generator)}.")
            draws = [torch.multinomial(probabilities, 1, generator=source) for source in generator]
            timesteps = torch.cat(draws)
        else:
            timesteps = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        return timesteps.to(device), probabilities[timesteps].float().to(device)

    def update(self, timesteps: torch.LongTensor, losses: torch.Tensor) -> None:
        """
        Adds the terms of one batch to the history; every process calls this with its own part of the batch.

        A timestep that several samples share moves its average once, by the mean of their squares, whatever their
        order.

        Args:
            timesteps (int64 `(B,)`): in 0…T-1.
            losses (`(B,)`): their terms of the bound in nats, summed over positions and not divided by probabilities.
        """
        for name, value in (("timesteps", timesteps), ("losses", losses)):
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"`{name}` must be a tensor, got a {type(value).__name__}.")
        if timesteps.dtype != torch.int64:
            raise ValueError(f"`timesteps` must be int64, got {timesteps.dtype}.")
        timesteps, losses = timesteps.detach().cpu(), losses.detach().cpu().double()
        if timesteps.ndim != 1 or losses.shape != timesteps.shape:
            raise ValueError(
                f"`timesteps` and `losses` must have one shape (B,), got {tuple(timesteps.shape)} and "
                f"{tuple(losses.shape)}."
            )
        if len(timesteps) and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < self.num_train_timesteps:
            raise ValueError(
                f"`timesteps` must lie in 0…{self.num_train_timesteps - 1}, got {int(timesteps.min())} to "
                f"{int(timesteps.max())}."
            )
        if not losses.isfinite().all():
            raise ValueError(f"`losses` must be finite, got {losses.tolist()}.")
        length = self.num_train_timesteps
        squares = torch.bincount(timesteps, losses.square(), minlength=length)
        counts = torch.bincount(timesteps, minlength=length)
        squares, counts = all_reduced(torch.stack([squares, counts.double()]))
        met = counts > 0
        self.history[met] += SMOOTHING * (squares[met] / counts[met] - self.history[met])
        self.counts += counts.long()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"history": self.history.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"`state` is of {len(state['history'])} timesteps, this sampler has {self.num_train_timesteps}."
            )
        self.history, self.counts = state["history"].clone(), state["counts"].clone()


__all__ = ["ImportanceTimestepSampler"]
