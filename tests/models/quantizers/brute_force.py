"""References in plain code that the tests of the quantizers compare with."""

import torch


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def brute_force(vectors, codebook):
    difference = vectors.double().unsqueeze(1) - codebook.double().unsqueeze(0)
    return difference.square().sum(-1).argmin(1)


def rows(latents):
    """`(B, D, h, w) -> (B·h·w, D)`, written out."""
    return torch.stack([latents[b, :, i, j] for b in range(len(latents)) for i in range(latents.shape[2]) for j in range(latents.shape[3])])  # noqa: E501  # fmt: skip


def plain_lloyd(vectors, centres, iterations):
    vectors, centres = vectors.double(), centres.double().clone()
    for _ in range(iterations):
        nearest = brute_force(vectors, centres)
        for k in range(len(centres)):
            if (nearest == k).any():
                centres[k] = vectors[nearest == k].mean(0)
    return centres
