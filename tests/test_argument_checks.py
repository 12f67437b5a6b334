import math

import numpy as np
import pytest
import torch

from hf_vq.argument_checks import check_integer, check_real


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).int()])
def test_whole_numbers_of_every_library(value):
    number = check_integer("steps", value, 1, 3)
    assert number == 3 and type(number) is int


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).half()])
def test_real_numbers_of_every_library(value):
    number = check_real("scale", value, 0)
    assert number == 0.5 and type(number) is float


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), 3.0, "3", None, [3], torch.tensor([3]), 0, 4]
)
def test_what_is_no_such_whole_number(value):
    with pytest.raises(ValueError, match="`steps` must be an int in 1…3, got"):
        check_integer("steps", value, 1, 3)


@pytest.mark.parametrize("value", [True, math.nan, math.inf, np.float32("inf"), torch.tensor(math.nan), "1", None, 1j])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match="`scale` must be a finite number, got"):
        check_real("scale", value)


@pytest.mark.parametrize(
    "limits, wrong, wanted",
    [
        ({"minimum": 0}, -1, "a finite number of at least 0"),
        ({"above": 0}, 0, "a finite number above 0"),
        ({"maximum": 1}, 2, "a finite number of at most 1"),
        ({"minimum": 0, "below": 1}, 1, "a number in [0, 1)"),
        ({"above": 0, "maximum": 1}, 0, "a number in (0, 1]"),
    ],
)
def test_limits(limits, wrong, wanted):
    with pytest.raises(ValueError) as caught:
        check_real("rate", wrong, **limits)
    assert str(caught.value) == f"`rate` must be {wanted}, got {wrong}."
    assert check_real("rate", 0.5, **limits) == 0.5
