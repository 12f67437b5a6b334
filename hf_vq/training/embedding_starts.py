"""The embeddings of a new prior begun with what is known before: the tokenizers' codebooks, and where a code lies."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel


_SCALE = 0.05  # of an element; the drawn weights, a fifth of which stay, have 0.02


@torch.no_grad()
def begin_with_codebooks(
    prior: PreTrainedModel, tokenizer: nn.Module, condition_tokenizer: nn.Module | None = None
) -> None:
    """Begins the embeddings of codes and of condition codes, and the rows of the head, with the tokenizers' vectors.

    Codes that look alike then begin alike, and what is learnt of one holds for the other. Each codebook is
    standardised and mapped to the prior's width by a random (semi-)orthogonal matrix, which leaves the angles between
    its vectors.

    Args:
        prior: a causal LM over codes with an embedding of ids and a linear head.
        tokenizer: of the images; has `quantize.indices_to_latents`.
        condition_tokenizer: of the conditions, for a prior whose `condition_type` is "codes".
    """
    embedding, head = prior.get_input_embeddings().weight, prior.get_output_embeddings().weight
    vectors = _as_embeddings(tokenizer, embedding.shape[1]).to(embedding)
    for weight in (embedding, head):
        weight[: len(vectors)] = vectors + weight[: len(vectors)] / 5
    if condition_tokenizer is not None:
        vectors = _as_embeddings(condition_tokenizer, embedding.shape[1]).to(embedding)
        rows = embedding[prior.config.condition_token_offset :][: len(vectors)]
        rows.copy_(vectors + rows / 5)


def _as_embeddings(tokenizer: nn.Module, width: int) -> torch.Tensor:
    """The codebook as `(num_embeddings, width)`, of standard deviation `_SCALE`."""
    count = tokenizer.config.num_embeddings
    device = next(tokenizer.parameters()).device
    indices = torch.arange(count, device=device).reshape(1, 1, count)
    codebook = tokenizer.quantize.indices_to_latents(indices).flatten(2)[0].T.float().cpu()
    codebook = (codebook - codebook.mean(dim=0)) / codebook.std(dim=0).clamp_min(1e-6)
    turned = codebook @ nn.init.orthogonal_(torch.empty(width, codebook.shape[1])).T
    return turned * (_SCALE / turned.std())


@torch.no_grad()
def begin_with_grid_positions(prior: PreTrainedModel, condition_grid: tuple[int, int] | None = None) -> None:
    """Begins the embeddings of positions with waves over the picture, the same for a condition code and for the code
    that is to be predicted at the same place.

    A code's row and column give the sines and cosines of its distances from the borders, in wavelengths from 3 codes
    to 4 times the larger side (Vaswani et al. 2017, section 3.5, in two dimensions). Attention then begins with what
    lies near, and a prior need not learn from a few thousand pictures which condition belongs to which code.

    Args:
        prior: a `VQGPTForCausalLM`; its `order` may be any.
        condition_grid: height and width of the condition's codes, which lie over the whole picture; None for a
            condition that is no map.

    Raises:
        ValueError: the prior's width is no multiple of 4.
    """
    positions, (height, width) = prior.transformer.wpe.weight, prior.config.grid_size
    if positions.shape[1] % 4:
        raise ValueError(f"`prior` must have a width that 4 divides, got {positions.shape[1]}.")
    codes = prior.to_reading_order(_waves((height, width), (height, width), positions.shape[1])[None])[0].to(positions)
    first = prior.config.condition_length  # where the first code is read, and the second predicted
    rows = positions[first : first + len(codes) - 1]
    rows.copy_(codes[1:] + rows / 5)
    if condition_grid is not None:
        waves = _waves(condition_grid, (height, width), positions.shape[1]).flatten(0, 1).to(positions)
        positions[:first] = waves + positions[:first] / 5


def _waves(grid: tuple[int, int], picture: tuple[int, int], width: int) -> torch.Tensor:
    """`(h, w, width)` of a grid over a picture of `picture` codes, of standard deviation `_SCALE`."""
    wavelengths = torch.logspace(math.log10(3), math.log10(4 * max(picture)), width // 4)
    angles = [
        (torch.arange(side) + 0.5)[:, None] * (codes / side) * 2 * math.pi / wavelengths
        for side, codes in zip(grid, picture, strict=True)
    ]
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=-1) for angle in angles)
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], dim=-1) * _SCALE * 2**0.5


__all__ = ["begin_with_codebooks", "begin_with_grid_positions"]
