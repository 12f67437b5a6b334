"""Random numbers that belong to a sample and not to a process: the same for any number of processes and restarts."""

from collections.abc import Iterable

import numpy as np
import torch


def sample_generators(seed: int, positions: Iterable[int]) -> list[torch.Generator]:
    """One generator on the CPU for each sample, seeded by `(seed, position)`.

    Args:
        seed: of the run, 0 or more.
        positions: of the samples in the endless sequence that a run reads, see `hf_vq.training.data.samplers`; or
            their rows in a validation set.
    """
    generators = []
    for position in positions:
        (word,) = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
        generators.append(torch.Generator().manual_seed(int(word)))
    return generators


def rand_of_samples(generators: list[torch.Generator], *shape: int) -> torch.Tensor:
    """Uniform in [0, 1), float32 `(B, *shape)` on the CPU: row `i` from `generators[i]`."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def randn_of_samples(generators: list[torch.Generator], *shape: int) -> torch.Tensor:
    """Normal, float32 `(B, *shape)` on the CPU: row `i` from `generators[i]`."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


__all__ = ["rand_of_samples", "randn_of_samples", "sample_generators"]
