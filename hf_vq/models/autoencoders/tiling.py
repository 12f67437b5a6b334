"""Large images piece by piece: overlapping tiles, blended where they overlap."""

from collections.abc import Callable

import torch


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First positions of tiles of `tile` positions that cover `length`, neighbours sharing at least `overlap`."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _ramp(length: int, overlap: int, first: bool, last: bool) -> torch.Tensor:
    """Weight of each position of a tile: rises over the overlap with the tile before it, falls over the next."""
    weights = torch.ones(length)
    slope = (torch.arange(overlap) + 0.5) / max(overlap, 1)
    if not first:
        weights[:overlap] = slope
    if not last:
        weights[length - overlap :] = slope.flip(0)
    return weights


def map_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, tile: int, overlap: int, scale: float
) -> torch.Tensor:
    """`function(inputs)`, computed on overlapping square tiles and blended linearly.

    A network whose view reaches beyond the overlap, or that normalises over the whole image, gives slightly other
    values on a tile than on the whole; the blend keeps the change smooth.

    Args:
        function: `(B, C, H, W) -> (B, C', H·scale, W·scale)`.
        inputs: `(B, C, H, W)`.
        tile: side of a tile.
        overlap: positions that neighbours share, less than half of `tile`.
        scale: output positions over input positions; `tile`, `overlap`, H and W times `scale` must be whole numbers.
    """
    height, width = inputs.shape[2:]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    total = weight_sum = None
    for top in rows:
        for left in columns:
            piece = function(inputs[:, :, top : top + tile, left : left + tile])
            if total is None:
                shape = (piece.shape[0], piece.shape[1], round(height * scale), round(width * scale))
                total = torch.zeros(shape, dtype=piece.dtype, device=piece.device)
                weight_sum = torch.zeros(shape[2:], dtype=torch.float32, device=piece.device)
            shared = round(overlap * scale)
            vertical = _ramp(piece.shape[2], shared, top == rows[0], top == rows[-1])
            horizontal = _ramp(piece.shape[3], shared, left == columns[0], left == columns[-1])
            weights = (vertical[:, None] * horizontal).to(piece.device)
            y, x = round(top * scale), round(left * scale)
            window = (..., slice(y, y + piece.shape[2]), slice(x, x + piece.shape[3]))
            total[window] += piece * weights.to(piece.dtype)
            weight_sum[window] += weights
    return total / weight_sum.to(total.dtype)


__all__ = ["map_tiles", "tile_starts"]
