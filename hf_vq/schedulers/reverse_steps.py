"""One step back in mask-and-replace diffusion: by the exact posterior, or by the purity prior."""

import torch

from .categorical_draws import draw_rows, rows_at_a_time, uniform, uniform_positions
from .transition_tables import Transition


def posterior_step(
    logits: torch.FloatTensor,
    sample: torch.LongTensor,
    free: torch.BoolTensor,
    transition: Transition,
    generator: torch.Generator | list[torch.Generator] | None = None,
    truncation_rate: float = 1.0,
    temperature: float = 1.0,
) -> torch.LongTensor:
    """
    Draws x_s from p(x_s | x_t) = Σ_i p(x_0 = i) q(x_s | x_t, x_0 = i): x_0 from the prediction, then x_s given both.

    Most positions stay as they are whatever x_0 is, which is decided first; only the others read their prediction.

    Args:
        logits (`(B L, K)`): of p(x_0 | x_t).
        sample (int64 `(B, L)`): x_t.
        free (bool `(B, L)`): which positions may change.
        transition: between s and t.
        generator, truncation_rate, temperature: see `draw_rows`.

    Returns:
        int64 `(B, L)`.
    """
    mask_index, device = logits.shape[-1], sample.device
    chain = Transition(*(value.expand(sample.shape) for value in transition.for_positions(device)))
    stays_if_right, stays_if_wrong = chain.right_code_stays, chain.wrong_code_stays
    stays = torch.where(sample == mask_index, chain.mask_stays, torch.minimum(stays_if_right, stays_if_wrong))
    u = uniform_positions(sample, generator)
    undecided = (u >= stays) & free

    counts = undecided.sum(dim=1).cpu()
    original = draw_rows(logits, _rows(undecided), counts, generator, truncation_rate, temperature)
    now = sample[undecided]
    is_code, same = now != mask_index, now == original
    stays = is_code & (u[undecided] < torch.where(same, stays_if_right[undecided], stays_if_wrong[undecided]))
    # a position that changes becomes x_0 with weight ᾱ_s + β̄_s, and any code but x_0 and x_t with β̄_s each
    others = mask_index - 1 - (is_code & ~same).long()
    weight = chain.alpha_s[undecided] + chain.beta_s[undecided]
    v, w = uniform(counts, 2, generator, device).unbind(dim=1)
    becomes_original = ~same & (v * (weight + others * chain.beta_s[undecided]) < weight)
    other = (w * others).long().minimum(others - 1)
    other = other + (other >= torch.minimum(original, now))
    other = other + ((other >= torch.maximum(original, now)) & ~same)
    changed = torch.where(becomes_original, original, other)
    return sample.masked_scatter(undecided, torch.where(stays, now, changed))


def purity_step(
    logits: torch.FloatTensor,
    sample: torch.LongTensor,
    free: torch.BoolTensor,
    counts: torch.LongTensor,
    weight: float | None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    truncation_rate: float = 1.0,
    temperature: float = 1.0,
) -> torch.LongTensor:
    """
    Gives codes to some masked positions and leaves all others as they are (Tang et al. 2022, with equation 11).

    Args:
        logits, sample, free, generator, truncation_rate, temperature: see `posterior_step`.
        counts (int64 `(B, 1)`): positions to pick in each sample, fewer where fewer are masked.
        weight: None picks positions with equal probability and draws from p(x_0). A number picks them in proportion to
            a score, their `purity` over the largest of the sample's, and draws from p(x_0)^(1 + weight * score),
            normalised.

    Returns:
        int64 `(B, L)`.
    """
    candidates = (sample == logits.shape[-1]) & free
    score = None if weight is None else purity(logits, temperature).reshape(sample.shape)
    if score is not None:
        score = score / score.amax(dim=1, keepdim=True)
        if not (score > 0).all():  # also where they are not picked they change the order
            raise ValueError("`model_output` must hold logits of which at least one is finite and none is NaN.")
    # times until events of rates `score`: the first ones are a draw without replacement in proportion to the score
    times = -torch.log1p(-uniform_positions(sample, generator))
    times = times if score is None else times / score
    rank = times.masked_fill(~candidates, torch.inf).argsort(dim=1).argsort(dim=1)
    picked = candidates & (rank < counts)
    power = 1 + weight * score[picked] if weight else None
    rows, per_sample = _rows(picked), picked.sum(dim=1).cpu()
    codes = draw_rows(logits, rows, per_sample, generator, truncation_rate, temperature, power)
    return sample.masked_scatter(picked, codes)


def purity(logits: torch.FloatTensor, temperature: float = 1.0) -> torch.FloatTensor:
    """The largest probability of a code in each row of `logits` `(N, K)`, float32 `(N,)`; before any truncation."""
    parts = logits.split(rows_at_a_time(logits))
    return torch.cat([(part.float() / temperature).softmax(dim=-1).amax(dim=-1) for part in parts])


def _rows(mask: torch.BoolTensor) -> torch.LongTensor:
    return mask.flatten().nonzero().squeeze(1)


__all__ = ["posterior_step", "purity", "purity_step"]
