"""What the pipeline of latent diffusion asks of a scheduler of diffusers: which it takes, their steps, their noise."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import DDIMScheduler, SchedulerMixin


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuses a scheduler whose step needs what the pipeline has not, or that takes the denoiser's output for another.

    Raises:
        ValueError: it is such a one.
    """
    given = {"model_output", "timestep", "sample"}
    needed = [
        name
        for name, parameter in inspect.signature(scheduler.step).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if unknown := set(needed) - given:
        raise ValueError(
            f"`scheduler`: the step of a {type(scheduler).__name__} needs {sorted(unknown)}, which this pipeline has "
            "not; give one that steps as a DDIMScheduler does."
        )
    prediction = scheduler.config.get("prediction_type")  # of the scheduler that it was made from
    if type(scheduler).__name__.startswith("FlowMatch") and prediction in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"`scheduler`: a {type(scheduler).__name__} takes a velocity from data to noise, which this denoiser, of "
            f"prediction_type={prediction!r}, does not predict."
        )


def ddim_steps(timesteps: Sequence[float], num_train_timesteps: int) -> int | None:
    """
    The number n of steps with which a `DDIMScheduler` goes through falling `timesteps`: each step leads down by T // n
    of its T timesteps, and one from below that to the data. None if there is no such n.
    """
    strides = {a - b for a, b in pairwise(timesteps)} or {num_train_timesteps}
    stride = strides.pop()
    if strides or not all(isinstance(t, int) for t in timesteps) or not timesteps[-1] < stride:
        return None
    steps = num_train_timesteps // stride
    return steps if timesteps[0] < num_train_timesteps and num_train_timesteps // steps == stride else None


def set_ddim_timesteps(scheduler: DDIMScheduler, timesteps: Sequence[float], device: torch.device) -> torch.Tensor:
    """Sets falling timesteps, which `DDIMScheduler.set_timesteps` itself does not take, and returns them.

    Raises:
        ValueError: those that its step does not go through.
    """
    total = scheduler.config.num_train_timesteps
    steps = ddim_steps(timesteps, total)
    if steps is None:
        raise ValueError(
            f"`timesteps` of a {type(scheduler).__name__} must be ints that fall evenly by {total} // n, for an int "
            f"n, from at most {total - 1} to one below that stride, got {list(timesteps)}."
        )
    scheduler.set_timesteps(steps, device=device)  # its step reads nothing but the stride from the number of steps
    scheduler.timesteps = torch.tensor(timesteps, device=device)
    return scheduler.timesteps


def add_noise(
    scheduler: SchedulerMixin, latents: torch.FloatTensor, noise: torch.FloatTensor, timestep: torch.Tensor
) -> torch.FloatTensor:
    """Latents with the noise of `timestep`, of one element.

    Raises:
        ValueError: a scheduler that cannot add noise.
    """
    timesteps = timestep.repeat(len(latents))
    if hasattr(scheduler, "scale_noise"):  # of flow matching
        return scheduler.scale_noise(latents, timesteps, noise)
    if not hasattr(scheduler, "add_noise"):
        raise ValueError(f"`image` needs a scheduler that adds noise to it; a {type(scheduler).__name__} does not.")
    return scheduler.add_noise(latents, noise, timesteps)


@dataclass
class KnownLatents:
    """
    Latents that are kept at every step, with the noise of that step, as in the original's DDIM sampler.

    Args:
        latents: `(B, D, h, w)`, scaled.
        kept: bool `(B, 1, h, w)`.
        noise: `(B, D, h, w)`.
    """

    latents: torch.FloatTensor
    kept: torch.BoolTensor
    noise: torch.FloatTensor

    def put_into(
        self, sample: torch.FloatTensor, scheduler: SchedulerMixin, timestep: torch.Tensor
    ) -> torch.FloatTensor:
        """`sample` with the known latents at `timestep`, of one element, or of none for the data."""
        known = add_noise(scheduler, self.latents, self.noise, timestep) if len(timestep) else self.latents
        return torch.where(self.kept, known, sample)


__all__ = ["KnownLatents", "add_noise", "check_scheduler", "ddim_steps", "set_ddim_timesteps"]
