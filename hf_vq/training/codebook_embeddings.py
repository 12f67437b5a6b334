"""The embeddings of a new prior begun with the codebooks of its tokenizers."""

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


__all__ = ["begin_with_codebooks"]
