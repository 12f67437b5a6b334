"""Draws from many categorical distributions that read only the rows they need."""

import torch


CHUNK_ELEMENTS = 2**20  # logits worked on at a time: they and what is made of them stay in a CPU's cache


def uniform(counts: torch.LongTensor, columns: int, generator, device) -> torch.FloatTensor:
    """
    Uniform numbers in [0, 1).

    Args:
        counts (int64 `(B,)`, CPU): how many rows each sample needs.
        columns: numbers in a row.
        generator: `None` for torch's global randomness, a `torch.Generator`, or a list with one for each sample, whose
            rows then do not depend on the other samples.

    Returns:
        float32 `(counts.sum(), columns)`, the rows of a sample adjacent.
    """

    def draw(rows, source):
        return torch.rand(rows, columns, generator=source, device=device if source is None else source.device)

    if isinstance(generator, list):
        parts = [draw(rows, source).to(device) for rows, source in zip(counts.tolist(), generator, strict=True)]
        return torch.cat(parts)
    return draw(int(counts.sum()), generator).to(device)


def counts_of(mask: torch.BoolTensor) -> torch.LongTensor:
    """How many entries of each sample's row of `mask` `(B, L)` are set, on the CPU."""
    return mask.sum(dim=1).cpu()


def invert_cdf(weights: torch.FloatTensor, u: torch.FloatTensor) -> torch.LongTensor:
    """The code of each row at which the cumulative sum of `weights` `(N, K)` passes `u` `(N,)` times their total."""
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1]
    # below the total even after rounding, so that a code without weight cannot be drawn
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)


def nucleus(probs: torch.FloatTensor, rate: float) -> torch.BoolTensor:
    """
    Which codes belong to each row's smallest set of most probable codes with mass `rate` or more.

    A code is in it if the codes before it, the more probable ones and those as probable with a lower index, have less
    than `rate` together: the code that passes `rate` is kept, and the most probable one always.

    Args:
        probs (`(..., K)`): normalised.
        rate: in (0, 1]; 1 keeps every code.
    """
    if rate == 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before < rate)


def draw_rows(
    logits: torch.FloatTensor,
    rows: torch.LongTensor,
    counts: torch.LongTensor,
    truncation_rate: float = 1.0,
    temperature: float = 1.0,
    power: torch.FloatTensor | None = None,
    generator=None,
) -> torch.LongTensor:
    """
    One code of each of the rows' distributions softmax(logits / temperature), within their nuclei.

    A nucleus needs no sorting to be drawn from: a code is drawn from all, and if the codes before it have the mass
    `truncation_rate` already, it and all that come after it are dropped and another one is drawn.

    Args:
        logits (`(M, K)`): in any floating dtype.
        rows (int64 `(N,)`): rows of `logits`, those of a sample adjacent and in the order of the samples.
        counts (int64 `(B,)`, CPU): how many of the rows belong to each sample.
        truncation_rate: see `nucleus`; of the distribution before `power`.
        power (float32 `(N,)`, *optional*): draws are from the probabilities to this power, normalised.
        generator: see `uniform`.

    Returns:
        int64 `(N,)`.
    """
    codes = torch.empty_like(rows)
    bound = torch.full_like(rows, -1)  # the code that was rejected, if any
    pending = torch.arange(len(rows), device=rows.device)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
    while len(pending):
        u = uniform(owner[pending.cpu()].bincount(minlength=len(counts)), 1, generator, rows.device).squeeze(1)
        rejected = []
        for part, u_part in zip(pending.split(chunk), u.split(chunk), strict=True):
            scaled = logits[rows[part]].float() / temperature
            probs = scaled.softmax(dim=-1)
            weights = probs if power is None else (scaled * power[part, None]).softmax(dim=-1)
            drop = bound[part]
            if (drop >= 0).any():
                weights = torch.where(_precedes(probs, drop), weights, 0.0)
            drawn = invert_cdf(weights, u_part)
            codes[part] = drawn
            if truncation_rate < 1:
                outside = torch.where(_precedes(probs, drawn), probs, 0.0).sum(dim=-1) >= truncation_rate
                rejected.append(part[outside])
        pending = torch.cat(rejected) if rejected else pending[:0]
        bound[pending] = codes[pending]
    return codes


def _precedes(probs: torch.FloatTensor, codes: torch.LongTensor) -> torch.BoolTensor:
    """Which codes of each row come before `codes` `(N,)`: more probable, or as probable with a lower index."""
    chosen = probs.gather(-1, codes[:, None])
    index = torch.arange(probs.shape[-1], device=probs.device)
    return (probs > chosen) | ((probs == chosen) & (index < codes[:, None]))


__all__ = ["CHUNK_ELEMENTS", "counts_of", "draw_rows", "invert_cdf", "nucleus", "uniform"]
