"""ValueErrors for arguments that are numbers: Python's, numpy's and tensors of one element alike."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch


_LARGEST_INTEGER = 2**63 - 1  # that torch and numpy hold


def _plain(value: Any) -> Any:
    """A tensor without dimensions, or an array without any, as the number in it."""
    if isinstance(value, torch.Tensor) or (hasattr(value, "dtype") and hasattr(value, "item")):
        return value.item() if value.ndim == 0 else value
    return value


def check_integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """`value` as an `int`.

    Raises:
        ValueError: it is no whole number (a `bool` is none), or lies outside `minimum`…`maximum`, by default what 64
            bits hold.
    """
    number = _plain(value)
    is_integer = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if maximum is None and is_integer and number > _LARGEST_INTEGER:
        maximum = _LARGEST_INTEGER
    if is_integer and (minimum is None or number >= minimum) and (maximum is None or number <= maximum):
        return int(number)
    wanted = "an int" if minimum is None else f"an int of at least {minimum}"
    if maximum is not None:
        wanted = f"an int in {minimum}…{maximum}" if minimum is not None else f"an int of at most {maximum}"
    raise ValueError(f"`{name}` must be {wanted}, got {_described(value)}.")


def check_real(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """`value` as a `float`: finite, in [`minimum`, `maximum`], and strictly between `above` and `below`.

    Raises:
        ValueError: it is no such number.
    """
    number = _plain(value)
    is_real = isinstance(number, numbers.Real) and not isinstance(number, bool) and _fits_a_float(number)
    if is_real and minimum <= number <= maximum and above < number < below:
        return float(number)
    low = f"[{minimum:g}" if minimum > above else f"({above:g}" if above > -math.inf else None
    high = f"{maximum:g}]" if maximum < below else f"{below:g})" if below < math.inf else None
    if low and high:
        wanted = f"a number in {low}, {high}"
    elif low:
        wanted = f"a finite number {'of at least' if low[0] == '[' else 'above'} {low[1:]}"
    elif high:
        wanted = f"a finite number {'of at most' if high[-1] == ']' else 'below'} {high[:-1]}"
    else:
        wanted = "a finite number"
    raise ValueError(f"`{name}` must be {wanted}, got {_described(value)}.")


def check_sequence(name: str, value: Any) -> list:
    """The entries of a list, tuple, range, array or tensor `(N,)`.

    Raises:
        ValueError: it is none of these, or empty.
    """
    if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    is_sequence = isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict, set))
    entries = list(value) if is_sequence else []
    if not entries:
        raise ValueError(f"`{name}` must be a list that is not empty, got {_described(value)}.")
    return entries


def check_tensor(name: str, value: Any) -> None:
    """A ValueError that names `value` unless it is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got a {type(value).__name__}.")


def _fits_a_float(number: numbers.Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int or a fraction beyond what a float holds
        return False


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(_plain(value))
    return text if len(text) <= 100 else f"{text[:100]}…"


__all__ = ["check_integer", "check_real", "check_sequence", "check_tensor"]
