import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from hf_vq.evaluation.features import FeatureSet
from hf_vq.evaluation.generation import (
    classifier_score,
    compare_features,
    compare_images,
    frechet_distance,
    frechet_distance_of_gaussians,
    kernel_distance,
    precision_recall,
    symmetric_sqrt,
)


def features(n, dim=6, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mixing * scale + shift


# Fréchet distance


def test_symmetric_sqrt_squares_back_and_survives_a_singular_matrix():
    x = features(4, dim=6).double()
    matrix = x.T @ x  # rank 4 of 6
    root = symmetric_sqrt(matrix)
    torch.testing.assert_close(root @ root, matrix, atol=1e-10, rtol=0)
    torch.testing.assert_close(root, root.T, atol=1e-12, rtol=0)


def test_frechet_distance_agrees_with_scipy():
    x, y = features(200), features(150, seed=1, shift=0.3, scale=1.5)
    a, b = x.double().numpy(), y.double().numpy()
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2)))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features():
    """Through the pictures' own products, and through the covariances, which are singular."""
    x, y = features(9, dim=12).double(), features(7, dim=12, seed=1, shift=0.3).double()
    expected = frechet_distance_of_gaussians(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    s1, s2 = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(s1 @ s2).real, 0, None)).sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(s1) + np.trace(s2) - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians():
    # Points ±s_i on each axis have a mean of 0 and a diagonal covariance: sum_i (s_i - t_i)² is left.
    def cross(scales):
        axes = torch.diag(torch.tensor(scales, dtype=torch.float64))
        return torch.cat([axes, -axes])

    unit = 2 / 5  # the variance of ±1 on one of three axes, 6 points, N - 1 = 5
    expected = unit * ((1 - 4) ** 2 + (2 - 5) ** 2 + (3 - 3) ** 2)
    shift = torch.tensor([1.0, 0.0, -2.0])
    assert frechet_distance(cross([1.0, 2, 3]), cross([4.0, 5, 3])) == pytest.approx(expected)
    assert frechet_distance(cross([1.0, 2, 3]), cross([4.0, 5, 3]) + shift) == pytest.approx(expected + 5)


def test_frechet_distance_of_equal_sets_is_zero_even_when_singular():
    x = features(5, dim=20)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


# Kernel distance


def mmd2_by_loops(x, y):
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    x, y = x.double().tolist(), y.double().tolist()
    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(k(a, b) for a in x for b in y) / (m * n)
    return xx + yy - 2 * xy


def test_kernel_distance_agrees_with_loops(monkeypatch):
    x, y = features(13), features(9, seed=1, shift=0.5)
    expected = mmd2_by_loops(x, y)
    assert kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr("hf_vq.evaluation.generation.BLOCK_ELEMENTS", 30)  # several blocks, the last one smaller
    assert kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(y, x)[0] == pytest.approx(expected, rel=1e-10)


def test_standard_error_is_the_jackknife():
    x, y = features(7), features(5, seed=1, shift=0.5)

    def leave_out(values, estimate):
        estimates = [estimate(torch.cat([values[:i], values[i + 1 :]])) for i in range(len(values))]
        n, mean = len(values), sum(estimates) / len(values)
        return (n - 1) / n * sum((e - mean) ** 2 for e in estimates)

    variance = leave_out(x, lambda rest: mmd2_by_loops(rest, y)) + leave_out(y, lambda rest: mmd2_by_loops(x, rest))
    assert kernel_distance(x, y)[1] == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_standard_error_covers_the_spread_over_fresh_samples():
    draws = [
        kernel_distance(torch.randn(60, 4, generator=g), torch.randn(60, 4, generator=g) + 1)
        for g in (torch.Generator().manual_seed(seed) for seed in range(60))
    ]
    values, errors = torch.tensor(draws).T
    assert 0.7 < errors.mean() / values.std() < 1.4


def test_kernel_distance_over_subsets():
    x, y = features(33), features(22, seed=1, shift=0.5)
    value, error = kernel_distance(x, y, subset_size=10, seed=3)
    generator = torch.Generator().manual_seed(3)
    xs, ys = x[torch.randperm(33, generator=generator)], y[torch.randperm(22, generator=generator)]
    parts = np.array([mmd2_by_loops(xs[:10], ys[:10]), mmd2_by_loops(xs[10:20], ys[10:20])])
    assert value == pytest.approx(parts.mean(), rel=1e-9)
    assert error == pytest.approx(parts.std(ddof=1) / math.sqrt(2), rel=1e-9)
    for size in (2, 12):
        with pytest.raises(ValueError, match="fit twice"):
            kernel_distance(x, y, subset_size=size)


# Precision and recall


def test_precision_and_recall_agree_with_brute_force(monkeypatch):
    x, y = features(40), features(30, seed=2, shift=1.0, scale=1.0)

    def share(points, manifold, k):
        distances = cdist(manifold, manifold)
        radii = [sorted(np.delete(row, i))[k - 1] for i, row in enumerate(distances)]
        return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points])

    a, b = x.double().numpy(), y.double().numpy()
    for k in (1, 3, 5):
        expected = (share(b, a, k), share(a, b, k))
        assert 0 < expected[1] < 1 and (k > 1 or 0 < expected[0] < 1)
        assert precision_recall(x, y, k) == pytest.approx(expected)
        with monkeypatch.context() as patch:
            patch.setattr("hf_vq.evaluation.generation.BLOCK_ELEMENTS", 100)
            assert precision_recall(x, y, k) == pytest.approx(expected)


def test_a_collapsed_generator_is_precise_without_recall():
    real = features(50)
    collapsed = real[:1] + 1e-3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.05
    assert precision_recall(real, real) == (1, 1)


# Classifier score


def test_classifier_score_agrees_with_the_definition():
    logits = features(23, dim=5).double()
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    parts = np.array_split(p, 4)
    scores = [np.exp(np.mean([np.sum(row * np.log(row / part.mean(0))) for row in part])) for part in parts]
    assert classifier_score(logits, num_splits=4) == pytest.approx((np.mean(scores), np.std(scores)))
    certain = torch.eye(5).repeat(4, 1) * 1000
    assert classifier_score(certain, num_splits=1)[0] == pytest.approx(5)
    assert classifier_score(torch.zeros(8, 5), num_splits=2)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="num_splits"):
        classifier_score(torch.zeros(3, 5), num_splits=4)


# The report


def test_compare_features_reports_counts_network_and_floor():
    real, generated = FeatureSet(features(81), "toy"), FeatureSet(features(50, shift=2.0), "toy")
    results = {m.label: m for m in compare_features(real, generated, neighbours=2, seed=5)}
    assert set(results) == {"frechet_distance[toy]", "kernel_distance[toy]", "precision[toy]", "recall[toy]"}
    order = torch.randperm(81, generator=torch.Generator().manual_seed(5))
    half, other = real.features[order[:40]], real.features[order[40:80]]
    kernel = results["kernel_distance[toy]"]
    assert (kernel.value, kernel.standard_error) == kernel_distance(real.features, generated.features)
    assert kernel.real_split == kernel_distance(half, other)[0]
    assert (kernel.num_real, kernel.num_generated, kernel.num_real_split) == (81, 50, 40)
    assert abs(kernel.real_split) < kernel.value / 10
    assert results["frechet_distance[toy]"].real_split == frechet_distance(half, other)
    assert results["precision[toy]"].value == precision_recall(real.features, generated.features, 2)[0]
    assert results["recall[toy]"].real_split == precision_recall(half, other, 2)[1]
    assert kernel.to_dict()["label"] == "kernel_distance[toy]"


def test_compare_images_takes_the_features_of_all_batches():
    class Means:
        name = "means"

        def pooled(self, images):
            assert len(images) <= 4
            return images.mean((2, 3))

    real, generated = torch.rand(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = compare_images(real, generated[:9], Means(), batch_size=4, metrics=("frechet_distance",))
    means = [FeatureSet(images.flatten(2).mean(-1), "means") for images in (real, generated[:9])]
    assert found == compare_features(*means, metrics=("frechet_distance",)) and found[0].num_generated == 9

    with pytest.warns(UserWarning, match=r"`images` is expected in \[-1, 1\]"):
        compare_images(real, generated / 2 + 0.5, Means(), batch_size=4)
    with pytest.raises(ValueError, match="`images` must be floating-point values"):
        compare_images(real, (generated * 127.5 + 127.5).to(torch.uint8), Means(), batch_size=4)


def test_features_that_cannot_be_compared_are_refused():
    x = features(20)
    with pytest.raises(ValueError, match="'a' as `real` does, got 'b'"):
        compare_features(FeatureSet(x, "a"), FeatureSet(x, "b"))
    with pytest.raises(ValueError, match="at least 8"):
        compare_features(FeatureSet(x[:7], "a"), FeatureSet(x, "a"))
    with pytest.raises(ValueError, match="among"):
        compare_features(FeatureSet(x, "a"), FeatureSet(x, "a"), metrics=["FID"])
    for function in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="shapes"):
            function(x, features(20, dim=5))
        with pytest.raises(ValueError, match="rows"):
            function(x, x[:1])
        with pytest.raises(ValueError, match="finite"):
            function(x, torch.full_like(x, math.nan))
    with pytest.raises(ValueError, match="neighbours"):
        precision_recall(x, x, 0)
