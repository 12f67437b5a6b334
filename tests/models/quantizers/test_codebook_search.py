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


def first_two(num_rows, seeds, weights):
    """How often each pair of rows is drawn first and second: `(N, N)`."""
    vectors = torch.arange(float(num_rows)).unsqueeze(1)
    counts = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    for seed in range(seeds):
        first, second = draw_vectors(vectors, 2, seed, weights).long().flatten().tolist()
        counts[first, second] += 1
    return counts


def chi_square(counts, chances):
    expected = counts.sum() * chances
    return float(((counts - expected).square() / expected)[chances > 0].sum())


def test_draws_are_uniform():
    """Over 5 · 4 pairs: its mean is 19 and its standard deviation about 6."""
    chances = (1 - torch.eye(5, dtype=torch.float64)) / 20
    for weights in (None, torch.full((5,), 0.3)):
        assert 4 < chi_square(first_two(5, 1500, weights), chances) < 45


def test_the_next_row_is_drawn_in_proportion_to_the_weights():
    """P(i, then j) = w_i / Σw · w_j / (Σw - w_i); over 6 pairs, the mean is 5 and the standard deviation about 3."""
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    chances = weights[:, None] / 8 * weights / (8 - weights[:, None])
    chances.fill_diagonal_(0)
    counts = first_two(4, 2000, weights.float())
    assert 0.3 < chi_square(counts, chances) < 20
    assert counts[1].sum() == counts[:, 1].sum() == 0  # as long as others are left


def test_rows_repeat_only_where_there_are_too_few():
    vectors = torch.arange(20.0).unsqueeze(1)
    for weights in (None, torch.arange(20.0)):
        assert len(draw_vectors(vectors, 20, 0, weights).unique()) == 20
        twelve = draw_vectors(vectors, 12, 5, weights)
        assert len(twelve.unique()) == 12
        assert torch.equal(draw_vectors(vectors, 4, 5, weights), twelve[:4])
        repeated = draw_vectors(vectors, 50, 0, weights).long().flatten()
        assert torch.bincount(repeated).tolist() == [3 if i in repeated[:10].tolist() else 2 for i in range(20)]


def test_only_finite_rows_are_drawn():
    vectors = torch.tensor([[1.0], [float("nan")], [2.0], [float("inf")]])
    for weights in (None, torch.tensor([1.0, float("nan"), 0.0, float("inf")])):
        assert draw_vectors(vectors, 4, 1, weights).flatten().sort().values.tolist() == [1, 1, 2, 2]
        assert torch.equal(draw_vectors(vectors[1:2], 3, 1), torch.zeros(3, 1))
        assert torch.equal(draw_vectors(vectors[:0], 3, 1), torch.zeros(3, 1))


def test_rows_without_weight_are_drawn_before_those_that_are_not_finite():
    vectors = torch.arange(400.0).unsqueeze(1)
    vectors[::2] = float("nan")
    drawn = draw_vectors(vectors, 200, 0, torch.zeros(400)).flatten()
    assert torch.equal(drawn.sort().values, torch.arange(1.0, 400.0, 2))
