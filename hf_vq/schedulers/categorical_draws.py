"""Draws from many categorical distributions, of which only the rows that are asked for are read."""

import torch


# Logits worked on at a time. On a CPU they and what is made of them stay in the cache; elsewhere each launch has a
# price.
CHUNK_ELEMENTS = {"cpu": 2**20, "other": 2**26}


def rows_at_a_time(logits: torch.Tensor) -> int:
    """How many rows of `logits` `(N, K)` to work on at a time."""
    return max(1, CHUNK_ELEMENTS["cpu" if logits.device.type == "cpu" else "other"] // logits.shape[1])


def uniform(
    counts: torch.LongTensor,
    columns: int,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device | str | None,
) -> torch.FloatTensor:
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
        return torch.cat(
            [draw(rows, source).to(device) for rows, source in zip(counts.tolist(), generator, strict=True)]
        )
    return draw(int(counts.sum()), generator).to(device)


def uniform_positions(
    sample: torch.LongTensor, generator: torch.Generator | list[torch.Generator] | None
) -> torch.FloatTensor:
    """Uniform numbers in [0, 1), one for each position of `sample` `(B, L)`."""
    counts = torch.full((sample.shape[0],), sample.shape[1])
    return uniform(counts, 1, generator, sample.device).reshape(sample.shape)


def nucleus(probs: torch.FloatTensor, rate: float) -> torch.BoolTensor:
    """
    Which codes belong to each row's smallest set of most probable codes with mass `rate` or more.

    A code is in it if the codes before it, the more probable ones and those as probable with a lower index, have less
    than `rate` together: the code that reaches `rate` is kept, and the most probable one always.

    Args:
        probs (`(..., K)`): normalised.
        rate: in (0, 1].
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before < rate)


def draw_rows(
    logits: torch.FloatTensor,
    rows: torch.LongTensor,
    counts: torch.LongTensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    truncation_rate: float = 1.0,
    temperature: float = 1.0,
    power: torch.FloatTensor | None = None,
) -> torch.LongTensor:
    """
    One code of each row's distribution softmax(logits / temperature), within its nucleus.

    A nucleus need not be known to be drawn from. A code is drawn from all, and if it turns out that the codes before
    it have the mass `truncation_rate` already, it is dropped together with those after it, and another one is drawn.

    Args:
        logits (`(M, K)`): in any floating dtype.
        rows (int64 `(N,)`): indices of rows of `logits`, those of a sample adjacent, in the order of the samples.
        counts (int64 `(B,)`, CPU): how many of `rows` belong to each sample.
        generator: see `uniform`.
        truncation_rate: see `nucleus`; 1 keeps all codes.
        power (float32 `(N,)`, *optional*): what is drawn from is the probabilities of the nucleus to this power,
            normalised.

    Returns:
        int64 `(N,)`.

    Raises:
        ValueError: a row that is not a distribution, such as one with NaN.
    """
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    chunk = rows_at_a_time(logits)
    codes, pending, dropped = torch.empty_like(rows), torch.arange(len(rows), device=rows.device), None
    while len(pending):
        u = uniform(owner[pending.cpu()].bincount(minlength=len(counts)), 1, generator, rows.device).squeeze(1)
        rejected = []
        for part, u_part in zip(pending.split(chunk), u.split(chunk), strict=True):
            scaled = logits[rows[part]].float() / temperature
            probs = scaled.softmax(dim=-1)
            weights = probs if power is None else (scaled * power[part, None]).softmax(dim=-1)
            if dropped is not None:
                weights = torch.where(_precedes(probs, dropped[part]), weights, 0.0)
            codes[part] = drawn = invert_cdf(weights, u_part)
            wrong = weights.gather(-1, drawn[:, None]).squeeze(-1) == 0
            if truncation_rate < 1:
                wrong |= torch.where(_precedes(probs, drawn), probs, 0.0).sum(dim=-1) >= truncation_rate
            rejected.append(part[wrong])
        pending, dropped = torch.cat(rejected), codes.clone()
    return codes


def invert_cdf(weights: torch.FloatTensor, u: torch.FloatTensor) -> torch.LongTensor:
    """
    The code of each row at which the sum of the `weights` `(N, K)` until it passes `u` `(N,)` times the sum of all.

    It has a weight above 0 if the cumulative sum is computed in order, which not every device does.
    """
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1]
    if not (total > 0).all():
        raise ValueError("`model_output` must hold logits of which at least one is finite and none is NaN.")
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))  # below it after rounding, too
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)


def _precedes(probs: torch.FloatTensor, codes: torch.LongTensor) -> torch.BoolTensor:
    """Which codes of each row come before `codes` `(N,)`: more probable, or as probable with a lower index."""
    chosen = probs.gather(-1, codes[:, None])
    index = torch.arange(probs.shape[-1], device=probs.device)
    return (probs > chosen) | ((probs == chosen) & (index < codes[:, None]))


__all__ = ["draw_rows", "invert_cdf", "nucleus", "rows_at_a_time", "uniform", "uniform_positions"]
