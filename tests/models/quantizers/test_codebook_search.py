"""Vectors that every process draws alike."""

import torch

from hf_vq.models.quantizers.codebook_search import draw_vectors


def test_draws_rows_by_the_seed_alone():
    vectors = torch.arange(1000.0).unsqueeze(1)
    torch.manual_seed(0)
    first = draw_vectors(vectors, 64, seed=3)
    torch.manual_seed(1)
    assert torch.equal(draw_vectors(vectors, 64, seed=torch.tensor(3)), first)
    assert not torch.equal(draw_vectors(vectors, 64, seed=4), first)


def test_draws_are_uniform():
    """Chi-square of 200 seeds × 64 draws over 50 rows: its mean is 49 and its standard deviation about 10."""
    vectors = torch.arange(50.0).unsqueeze(1)
    draws = torch.cat([draw_vectors(vectors, 64, seed).long().flatten() for seed in range(200)])
    counts = torch.bincount(draws, minlength=50).double()
    expected = draws.numel() / 50
    assert 15 < float((counts - expected).square().sum() / expected) < 100


def test_distinct_rows_repeat_only_where_there_are_too_few():
    vectors = torch.arange(20.0).unsqueeze(1)
    assert len(draw_vectors(vectors, 20, 0, distinct=True).unique()) == 20
    assert len(draw_vectors(vectors, 12, 5, distinct=True).unique()) == 12
    repeated = draw_vectors(vectors, 50, 0, distinct=True).long().flatten()
    assert torch.bincount(repeated).tolist() == [3 if i in repeated[:10].tolist() else 2 for i in range(20)]
