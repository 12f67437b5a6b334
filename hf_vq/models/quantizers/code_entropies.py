"""How certain each choice of a code is, and how even all choices together are."""

import torch
from torch.utils.checkpoint import checkpoint

from ...argument_checks import check_real
from ...distributed import num_processes, sum_over_processes


def mean_probabilities(sums: torch.Tensor, count: int, of_all_processes: bool) -> torch.Tensor:
    """The mean probability `(K,)` of each code from its sum over `count` vectors.

    Args:
        of_all_processes: over the vectors of all, as many of each process, which all ask at once; so the loss of a
            training step does not depend on how many processes there are.
    """
    return sum_over_processes(sums) / (count * num_processes()) if of_all_processes else sums / count


def _entropy_sums(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probabilities = scores.log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    return -(probabilities * log_probabilities).sum(), probabilities.sum(dim=0)


def choice_entropies(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    rows: int | None = None,
    epsilon: float = 0.0,
    of_all_processes: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """E H[p(code | z)] and H[E p(code | z)] in nats, with p the softmax of (z·e + bias) / temperature, both
    differentiable.

    Scores are made for `rows` vectors at a time, and again in the backward pass, so that N×K is never held whole.

    Args:
        vectors: z, `(N, D)` in float32.
        codebook: e, `(K, D)` in float32.
        bias: `(K,)`, or None for 0.
        temperature: above 0.
        rows: of one chunk; None for one of about 16 MB.
        epsilon: added to the mean probability in the logarithm, as the original programs do.
        of_all_processes: the second expectation is over the vectors of all processes, see [`mean_probabilities`].

    Returns:
        Two scalars from 0 to log K.
    """
    temperature = check_real("temperature", temperature, above=0)
    offset = codebook.new_zeros(codebook.shape[0]) if bias is None else bias

    def of_chunk(chunk, table, shift):
        return _entropy_sums(torch.addmm(shift, chunk, table.t()) / temperature)

    count = vectors.shape[0]
    rows = max(1, 2**22 // codebook.shape[0]) if rows is None else rows
    sample_sum, probability_sum = 0, 0
    for chunk in vectors.split(rows):
        own_sum, own_probabilities = (
            of_chunk(chunk, codebook, offset)
            if count <= rows
            else checkpoint(of_chunk, chunk, codebook, offset, use_reentrant=False)
        )
        sample_sum, probability_sum = sample_sum + own_sum, probability_sum + own_probabilities
    mean = mean_probabilities(probability_sum, count, of_all_processes)
    # a code that no vector reaches has probability 0, where the logarithm and its gradient are not finite
    mean_entropy = -(mean * (mean + epsilon).clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return sample_sum / count, mean_entropy


__all__ = ["choice_entropies", "mean_probabilities"]
