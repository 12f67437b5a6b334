"""Codebook health over a data set: how often each code is used."""

import math

import torch

from ..argument_checks import check_integer
from ..distributed import all_reduced
from ..models.quantizers.codebook_statistics import CodebookStatistics, codebook_statistics


class CodebookCounts:
    """Counts how often each code occurs, batch by batch and over processes.

    Args:
        num_embeddings: K, the number of codes.

    Attributes:
        counts: int64 `(K,)` on the CPU, what this process has seen.
    """

    def __init__(self, num_embeddings: int):
        self.num_embeddings = num_embeddings = check_integer("num_embeddings", num_embeddings, 1)
        self.counts = torch.zeros(num_embeddings, dtype=torch.int64)

    def update(self, indices: torch.Tensor) -> None:
        """Count the codes in `indices`, an integer tensor of any shape with values in [0, K)."""
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"`indices` must be integers, got {indices.dtype}")
        flat = indices.detach().flatten().to("cpu", torch.int64)
        if flat.numel() == 0:
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self.num_embeddings:
            raise ValueError(f"`indices` must be in [0, {self.num_embeddings}), got values from {low} to {high}")
        self.counts += torch.bincount(flat, minlength=self.num_embeddings)

    def total(self) -> torch.Tensor:
        """int64 `(K,)`: the counts over all processes."""
        return all_reduced(self.counts)

    def compute(self) -> CodebookStatistics:
        """Perplexity, usage and number of dead codes over everything seen by all processes."""
        total = self.total()
        if int(total.sum()) == 0:
            raise ValueError("no code has been counted: call `update(indices)` before `compute()`")
        return codebook_statistics(total)


class PositionCounts:
    """Counts the codes at each position of the grid, batch by batch and over processes.

    Args:
        num_embeddings: K, the number of codes.
    """

    def __init__(self, num_embeddings: int):
        self.num_embeddings = check_integer("num_embeddings", num_embeddings, 1)
        self.counts: torch.Tensor | None = None

    def update(self, indices: torch.Tensor) -> None:
        """Count a batch of grids `(B, h, w)`, all batches of one size."""
        rows = indices.detach().flatten(1).to("cpu", torch.int64)
        if self.counts is None:
            self.counts = torch.zeros(rows.shape[1], self.num_embeddings, dtype=torch.int64)
        if rows.shape[1] != self.counts.shape[0]:
            raise ValueError(f"`indices` must have {self.counts.shape[0]} positions as before, got {rows.shape[1]}.")
        places = torch.arange(rows.shape[1]) * self.num_embeddings
        self.counts += torch.bincount((rows + places).flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def entropy(self) -> torch.Tensor:
        """float64 `(h·w,)`: the entropy of the codes at each position, in bits, from 0 to log2 K."""
        if self.counts is None:
            raise ValueError("no code has been counted: call `update(indices)` before `entropy()`")
        counts = all_reduced(self.counts).double()
        probabilities = counts / counts.sum(1, keepdim=True)
        return torch.special.entr(probabilities).sum(1) / math.log(2)


__all__ = ["CodebookCounts", "PositionCounts"]
