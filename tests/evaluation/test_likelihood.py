import math
import statistics

import pytest
import torch

from hf_vq.evaluation.likelihood import CodeLikelihood


def test_uniform_prior_costs_log2_of_the_codebook():
    likelihood = CodeLikelihood(pixel_dims=3 * 8 * 8)
    likelihood.update(torch.full((5,), 16 * math.log(1 / 512)), num_indices=16)
    result = likelihood.compute()
    assert result["bits_per_index"] == pytest.approx(9)
    assert result["bits_per_image"] == pytest.approx(144)
    assert result["bits_per_image_standard_error"] == pytest.approx(0, abs=1e-4)
    assert result["bits_per_pixel_dim"] == pytest.approx(144 / 192)
    assert result["num_images"] == 5


def test_agrees_with_the_statistics_of_the_standard_library():
    values = -torch.rand(7, generator=torch.Generator().manual_seed(0)) * 50
    likelihood = CodeLikelihood()
    likelihood.update(values[:3], num_indices=9)
    likelihood.update(values[3:], num_indices=9)
    bits = [-value / math.log(2) for value in values.tolist()]
    result = likelihood.compute()
    assert result["bits_per_image"] == pytest.approx(statistics.mean(bits))
    assert result["bits_per_image_standard_error"] == pytest.approx(statistics.stdev(bits) / math.sqrt(7))
    assert result["bits_per_index"] == pytest.approx(statistics.mean(bits) / 9)
    assert "bits_per_pixel_dim" not in result


def test_one_image_has_no_standard_error():
    likelihood = CodeLikelihood()
    likelihood.update(torch.tensor([-2.0]), num_indices=4)
    assert likelihood.compute() == {
        "bits_per_index": 0.5 / math.log(2),
        "bits_per_image": 2 / math.log(2),
        "num_images": 1,
    }


def test_wrong_input_is_refused():
    likelihood = CodeLikelihood()
    with pytest.raises(ValueError, match="shape"):
        likelihood.update(torch.zeros(2, 2), num_indices=4)
    with pytest.raises(ValueError, match="num_indices"):
        likelihood.update(torch.zeros(2), num_indices=0)
    with pytest.raises(ValueError, match="no likelihood"):
        likelihood.compute()
    with pytest.raises(ValueError, match="pixel_dims"):
        CodeLikelihood(pixel_dims=0)
