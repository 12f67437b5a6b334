"""The orders in which an autoregressive prior reads a grid of codes."""

import numpy as np


CODE_ORDERS = ("raster", "alternate", "subsample", "z-curve", "spiral-out", "spiral-in", "random")


def code_order(name: str, height: int, width: int, permutation: list[int] | None = None) -> list[int]:
    """
    The raster positions `row * width + column` of a grid in the order in which their codes are read, those of the
    original VQGAN's permuters (Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021).

    Args:
        name: one of `CODE_ORDERS`:

            - `"raster"`: row by row;
            - `"alternate"`: row by row, every second row from right to left;
            - `"subsample"`: from coarse to fine, first one code of each largest square and last each code's
              neighbours;
            - `"z-curve"`: the Morton order, quadrant by quadrant;
            - `"spiral-out"`: from the middle outwards, `"spiral-in"` its reverse;
            - `"random"`: `permutation`, or the one that the original's fixed seed draws.
        height, width: of the grid.
        permutation: for `"random"` only.

    Raises:
        ValueError: an unknown name, or a `permutation` that is none, or belongs to another order.
    """
    length = height * width
    if name not in CODE_ORDERS:
        raise ValueError(f"`order` must be one of {CODE_ORDERS}, got {name!r}.")
    if permutation is not None and name != "random":
        raise ValueError(f"`permutation` must be None for order={name!r}: it belongs to order='random'.")
    if name == "random":
        if permutation is None:
            return np.random.RandomState(1).permutation(length).tolist()
        if sorted(permutation) != list(range(length)):
            raise ValueError(
                f"`permutation` must hold each of the {length} positions 0 … {length - 1} once, got "
                f"{len(permutation)} numbers."
            )
        return list(permutation)
    if name.startswith("spiral"):
        outwards = _spiral(height, width)
        return outwards if name == "spiral-out" else outwards[::-1]
    if name == "alternate":
        rows = [list(range(row * width, (row + 1) * width)) for row in range(height)]
        return [position for number, row in enumerate(rows) for position in (row[::-1] if number % 2 else row)]
    if name in ("subsample", "z-curve"):
        bits = range(max(height - 1, width - 1).bit_length())
        weights = [4**bit for bit in bits]  # of the lowest bit first
        weights = weights[::-1] if name == "subsample" else weights

        def rank(position: int) -> int:
            row, column = divmod(position, width)
            digits = (2 * (row >> bit & 1) + (column >> bit & 1) for bit in bits)
            return sum(weight * digit for weight, digit in zip(weights, digits, strict=True))

        return sorted(range(length), key=rank)
    return list(range(length))


def _spiral(height: int, width: int) -> list[int]:
    """Up, right, down, left, in runs of 1, 1, 2, 2, 3, 3, … steps from the middle; what lies outside is left out."""
    row, column = height // 2, max(width // 2 - 1, 0)
    order, run = [row * width + column], 0
    while len(order) < height * width:
        row_step, column_step = ((-1, 0), (0, 1), (1, 0), (0, -1))[run % 4]
        run += 1
        for _ in range((run + 1) // 2):
            row, column = row + row_step, column + column_step
            if 0 <= row < height and 0 <= column < width:
                order.append(row * width + column)
    return order


__all__ = ["CODE_ORDERS", "code_order"]
