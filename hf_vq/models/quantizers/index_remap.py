"""Codes renumbered to those that are used."""

import torch
from torch import nn

from .codebook_search import nearest_codes
from .codebook_statistics import check_indices


class IndexRemap(nn.Module):
    """Renumbers the codes that a data set really uses to 0 … len(used)-1, and back.

    Args:
        used: distinct codes, int64 `(U,)`; code `used[i]` becomes i.
        num_embeddings: K of the tokenizer.
        unknown: what `to_used` does with a code that is not in `used`: "error" (the default), "extra" (all become the
            one index U, which `to_full` refuses), "random" (a random used one), or "nearest" (the used code with the
            nearest vector; needs `codebook` `(K, D)`).
    """

    def __init__(
        self,
        used: torch.Tensor,
        num_embeddings: int,
        unknown: str = "error",
        codebook: torch.Tensor | None = None,
    ):
        super().__init__()
        used = torch.as_tensor(used, dtype=torch.int64).cpu().flatten()
        check_indices(used, num_embeddings)
        if used.numel() == 0 or used.unique().numel() != used.numel():
            raise ValueError("`used` must be a non-empty list of distinct codes.")
        if unknown not in ("error", "extra", "random", "nearest"):
            raise ValueError(f"`unknown` must be 'error', 'extra', 'random' or 'nearest', got {unknown!r}.")
        if unknown == "nearest" and (codebook is None or codebook.shape[0] != num_embeddings):
            shape = None if codebook is None else tuple(codebook.shape)
            raise ValueError(f"`unknown='nearest'` needs a `codebook` of shape ({num_embeddings}, D), got {shape}.")
        self.unknown, self.num_used, self.num_embeddings = unknown, used.numel(), num_embeddings
        table = torch.full((num_embeddings,), -1, dtype=torch.int64)
        table[used] = torch.arange(used.numel())
        if unknown == "nearest":
            missing = table < 0
            table[missing] = nearest_codes(codebook[missing], codebook[used]).cpu()
        elif unknown == "extra":
            table[table < 0] = used.numel()
        self.register_buffer("used", used)
        self.register_buffer("table", table)

    @property
    def num_indices(self) -> int:
        """How many values `to_used` can give."""
        return self.num_used + (self.unknown == "extra")

    def to_used(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes of the tokenizer (any shape) to 0 … `num_indices` - 1."""
        check_indices(indices, self.num_embeddings)
        mapped = self.table[indices.long()]
        missing = mapped < 0
        if self.unknown == "error" and missing.any():
            codes = indices[missing].unique()[:5].tolist()
            raise ValueError(
                f"`indices` hold codes that are not among the {self.num_used} used ones, such as {codes}."
            )
        if self.unknown == "random":
            mapped = torch.where(missing, torch.randint_like(mapped, self.num_used), mapped)
        return mapped

    def to_full(self, indices: torch.Tensor) -> torch.Tensor:
        """Renumbered indices 0 … U-1 to codes of the tokenizer."""
        check_indices(indices, self.num_used)
        return self.used[indices.long()]


__all__ = ["IndexRemap"]
