"""Codes renumbered to those that are used."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ...argument_checks import check_integer
from ..modeling_outputs import QuantizerOutput
from .codebook_search import nearest_codes
from .codebook_statistics import check_indices
from .quantizer import Quantizer


UNKNOWN_CODES = ("error", "extra", "random", "nearest")


class IndexRemap(nn.Module):
    """Renumbers the codes that a data set really uses to 0 … len(used)-1, and back.

    Args:
        used: distinct codes, int64 `(U,)`; code `used[i]` becomes i. Or U itself: the first U codes, until `set_used`
            or a checkpoint says which.
        num_embeddings: K of the tokenizer.
        unknown: what `to_used` does with a code that is not in `used`: "error" (the default), "extra" (all become the
            one index U, which `to_full` takes for index 0, as the original VQGAN code does), "random" (a random used
            one), "nearest" (the used code with the nearest vector; needs `codebook`), or the index that all become.
        codebook: `(K, D)`, for "nearest".
    """

    def __init__(
        self,
        used: torch.Tensor | int,
        num_embeddings: int,
        unknown: str | int = "error",
        codebook: torch.Tensor | None = None,
    ):
        super().__init__()
        is_count = not isinstance(used, torch.Tensor) and not hasattr(used, "__len__")
        self.num_embeddings = check_integer("num_embeddings", num_embeddings, minimum=1)
        if is_count:
            self.num_used = check_integer("used", used, minimum=1, maximum=num_embeddings)
        else:
            self.num_used = len(used)
        if not isinstance(unknown, str):
            unknown = check_integer("unknown", unknown, minimum=0, maximum=self.num_used - 1)
        elif unknown not in UNKNOWN_CODES:
            raise ValueError(f"`unknown` must be an index, 'error', 'extra', 'random' or 'nearest', got {unknown!r}.")
        self.unknown = unknown
        self.register_buffer("used", torch.arange(self.num_used))
        self.register_buffer("table", torch.arange(num_embeddings))
        self.reset_parameters()
        if not is_count:
            self.set_used(used, codebook)

    def reset_parameters(self) -> None:
        """The first `num_used` codes are the used ones."""
        init.copy_(self.used, torch.arange(self.num_used))
        own = torch.arange(self.num_embeddings)
        init.copy_(self.table, torch.where(own < self.num_used, own, self._missing))

    @property
    def _missing(self) -> int:
        if isinstance(self.unknown, str):
            return {"extra": self.num_used, "nearest": 0}.get(self.unknown, -1)
        return self.unknown

    @torch.no_grad()
    def set_used(self, used: torch.Tensor, codebook: torch.Tensor | None = None) -> None:
        """Say which codes are used.

        Args:
            used: distinct codes, int64 `(U,)` with the U that the remap was built for.
            codebook: `(K, D)`, for `unknown="nearest"`.
        """
        used = torch.as_tensor(used, dtype=torch.int64).cpu().flatten()
        check_indices(used, self.num_embeddings)
        if used.numel() == 0 or used.unique().numel() != used.numel():
            raise ValueError("`used` must be a non-empty list of distinct codes.")
        if used.numel() != self.num_used:
            raise ValueError(f"`used` must hold {self.num_used} codes, got {used.numel()}.")
        table = torch.full((self.num_embeddings,), self._missing, dtype=torch.int64)
        table[used] = torch.arange(used.numel())
        if self.unknown == "nearest":
            if codebook is None or codebook.shape[0] != self.num_embeddings:
                shape = None if codebook is None else tuple(codebook.shape)
                raise ValueError(
                    f"`unknown='nearest'` needs a `codebook` of shape ({self.num_embeddings}, D), got {shape}."
                )
            missing = torch.ones(self.num_embeddings, dtype=torch.bool)
            missing[used] = False
            table[missing] = nearest_codes(codebook[missing], codebook[used]).cpu()
        self.used.copy_(used)
        self.table.copy_(table)

    @property
    def num_indices(self) -> int:
        """How many values `to_used` can give."""
        return self.num_used + (self.unknown == "extra")

    def to_used(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes of the tokenizer (any shape) to 0 … `num_indices` - 1."""
        check_indices(indices, self.num_embeddings)
        mapped = self.table[indices.long()]
        missing = mapped < 0
        if self.unknown == "error" and torch.compiler.is_compiling():  # a graph has no branch on a value
            message = f"`indices` must hold the {self.num_used} used codes alone."
            torch._assert_async(~missing.any(), message)
        elif self.unknown == "error" and missing.any():
            codes = indices[missing].unique()[:5].tolist()
            raise ValueError(
                f"`indices` hold codes that are not among the {self.num_used} used ones, such as {codes}."
            )
        if self.unknown == "random":
            mapped = torch.where(missing, torch.randint_like(mapped, self.num_used), mapped)
        return mapped

    def to_full(self, indices: torch.Tensor) -> torch.Tensor:
        """Renumbered indices 0 … `num_indices` - 1 to codes of the tokenizer."""
        check_indices(indices, self.num_indices)
        indices = indices.long()
        return self.used[torch.where(indices == self.num_used, 0, indices)]


class RemappedQuantizer(Quantizer):
    """A quantizer whose indices are renumbered to the used ones, by the table `remap` that is saved with it.

    Args:
        quantizer: of one code a position, with all its codes.
        num_used: U, how many of them are used.
        unknown: what becomes of the others, see `IndexRemap`.
    """

    def __init__(self, quantizer: Quantizer, num_used: int, unknown: str | int = "random"):
        remap = IndexRemap(num_used, quantizer.num_embeddings, unknown)
        super().__init__(remap.num_indices, quantizer.embed_dim)
        self.quantizer, self.remap = quantizer, remap

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors of the renumbered indices, `(num_indices, D)`."""
        full = self.remap.to_full(torch.arange(self.num_embeddings, device=self.remap.used.device))
        return self.quantizer.codebook[full]

    def forward(self, latents: torch.Tensor, **kwargs: Any) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`; `kwargs` go to the quantizer."""
        output = self.quantizer(latents, **kwargs)
        output.indices = self.remap.to_used(output.indices)
        return output

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, D, h, w)` of renumbered `indices` `(B, h, w)`."""
        return self.quantizer.indices_to_latents(self.remap.to_full(indices))


__all__ = ["IndexRemap", "RemappedQuantizer"]
