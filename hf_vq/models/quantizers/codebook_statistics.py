"""How a codebook is used: counts, perplexity, usage, and whether indices belong to it."""

from dataclasses import dataclass

import torch

from ...argument_checks import check_tensor


@dataclass
class CodebookStatistics:
    """`perplexity`: exp of the entropy of the code frequencies, 1 to K. `usage`: the share of codes used at least
    once, 0 to 1. `dead_codes`: the number of codes never used.
    """

    perplexity: torch.Tensor
    usage: torch.Tensor
    dead_codes: torch.Tensor


def codebook_statistics(counts: torch.Tensor) -> CodebookStatistics:
    """Statistics of code counts `(K,)`, over a batch or summed over a data set; each field is a 0-dim tensor."""
    check_tensor("counts", counts)
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"`counts` must have shape (num_embeddings,), got {tuple(counts.shape)}.")
    counts = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)  # mps has no float64
    probabilities = counts / counts.sum().clamp_min(1)
    entropy = -torch.xlogy(probabilities, probabilities).sum()
    used = counts > 0
    return CodebookStatistics(entropy.exp().float(), used.float().mean(), (~used).sum())


def code_counts(indices: torch.Tensor, num_embeddings: int, counted: torch.Tensor | None = None) -> torch.Tensor:
    """How often each code occurs in `indices`.

    Args:
        indices: any shape, in [0, K).
        num_embeddings: K.
        counted: bool, of a shape that broadcasts to that of `indices`: only these are counted.

    Returns:
        float32 `(K,)`.
    """
    flat = indices.reshape(-1)
    if counted is None:
        weights = torch.ones(flat.shape, dtype=torch.float32, device=flat.device)
    else:
        weights = counted.expand(indices.shape).reshape(-1).float()
    return torch.zeros(num_embeddings, device=flat.device).index_add_(0, flat, weights)


def are_finite(vectors: torch.Tensor) -> torch.Tensor:
    """Which of the vectors `(N, D)` or `(B, D, h, w)` may enter a statistic: bool `(N,)` or `(B, h, w)`.

    Those with a finite squared length in float32: no NaN, no infinity, and nothing that overflows when many of them
    are added up, or whose distance to a code does.
    """
    return vectors.float().square().sum(dim=1).isfinite()


def check_indices(indices: torch.Tensor, num_embeddings: int) -> None:
    """Raise a `ValueError` unless `indices` is an integer tensor with values in [0, num_embeddings)."""
    check_tensor("indices", indices)
    if indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"`indices` must be an integer tensor, got {indices.dtype}.")
    if torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = indices.min().item(), indices.max().item()
    if low < 0 or high >= num_embeddings:
        raise ValueError(f"`indices` must lie in [0, {num_embeddings}), got values from {low} to {high}.")


__all__ = ["CodebookStatistics", "are_finite", "check_indices", "code_counts", "codebook_statistics"]
