"""How close generated pictures are to real ones, by the features that a network gives them.

Fréchet distance, kernel distance, precision and recall, and a classifier score; all in float64. Each function takes
features `(N, D)` or logits `(N, classes)`; `compare_features` runs them together, beside what real pictures score
against real ones.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..argument_checks import check_integer, check_tensor
from .features import FeatureExtractor, FeatureSet, extract_features


PUBLISHED = {"frechet_distance": "FID", "kernel_distance": "KID"}
LEAST_REAL = 8  # real pictures: precision and recall of one half against the other need four in each
BLOCK_ELEMENTS = 2**22  # of the pairwise matrices: 32 MB in float64


@dataclass
class Measurement:
    """One figure, with what is needed to read it.

    Args:
        metric: `frechet_distance`, `kernel_distance`, `precision` or `recall`.
        network: name of the feature network. Figures of different networks cannot be compared.
        value: of generated against real.
        standard_error: where the metric has one.
        num_real, num_generated: sample counts.
        real_split: the same metric of one random half of the real features against the other: the floor of a
            distance, what a perfect generator reaches in precision and recall; None where only the mean and the
            covariance of the real features are known.
        num_real_split: pictures in each half. The Fréchet distance of few pictures is biased upwards, and the floor
            says by how much.
    """

    metric: str
    network: str
    value: float
    standard_error: float | None
    num_real: int | None
    num_generated: int
    real_split: float | None
    num_real_split: int | None

    @property
    def label(self) -> str:
        """`metric[network]`; FID and KID with the original Inception weights, and with no others."""
        published = PUBLISHED.get(self.metric) if self.network == "inception" else None
        return published or f"{self.metric}[{self.network}]"

    def to_dict(self) -> dict:
        """All fields, and `label`."""
        return {"label": self.label, **asdict(self)}


def compare_features(
    real: FeatureSet,
    generated: FeatureSet,
    metrics: Sequence[str] = ("frechet_distance", "kernel_distance", "precision", "recall"),
    neighbours: int = 3,
    subset_size: int | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Measure generated against real pictures, and one half of the real ones against the other.

    Args:
        real, generated: features of one network; at least 8 real pictures.
        metrics: which of the four to measure.
        neighbours: k of precision and recall.
        subset_size: see `kernel_distance`; the halves of the floor are cut in the same way.
        seed: of the random halves and subsets.
    """
    if real.network != generated.network:
        raise ValueError(f"`generated` must come from {real.network!r} as `real` does, got {generated.network!r}")
    if len(real) < LEAST_REAL:
        raise ValueError(
            f"`real` must have at least {LEAST_REAL} pictures, to be halved for the floor, got {len(real)}"
        )
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(check_integer("seed", seed)))
    half = len(real) // 2
    halves = real.features[order[:half]], real.features[order[half : 2 * half]]
    functions = {
        "frechet_distance": lambda a, b: (frechet_distance(a, b), None),
        "kernel_distance": lambda a, b: kernel_distance(a, b, subset_size, seed),
        "precision": lambda a, b: (precision_recall(a, b, neighbours)[0], None),
        "recall": lambda a, b: (precision_recall(a, b, neighbours)[1], None),
    }
    results = []
    for metric in [metrics] if isinstance(metrics, str) else metrics:
        if metric not in functions:
            raise ValueError(f"`metrics` must be among {sorted(functions)}, got {metric!r}")
        value, standard_error = functions[metric](real.features, generated.features)
        floor, _ = functions[metric](*halves)
        results.append(
            Measurement(metric, real.network, value, standard_error, len(real), len(generated), floor, half)
        )
    return results


def compare_with_reference(mean: torch.Tensor, covariance: torch.Tensor, generated: FeatureSet) -> Measurement:
    """The Fréchet distance to real pictures of which only the features' mean and covariance are known.

    Args:
        mean `(D,)`, covariance `(D, D)`: float64.
        generated: features of the same network.
    """
    features = generated.features.double()
    distance = frechet_distance_of_gaussians(mean, covariance, features.mean(0), _covariance(features))
    return Measurement("frechet_distance", generated.network, distance, None, None, len(generated), None, None)


def compare_images(
    real: torch.Tensor, generated: torch.Tensor, extractor: FeatureExtractor, batch_size: int = 64, **kwargs: Any
) -> list[Measurement]:
    """`compare_features` of pictures `(N, 3, H, W)` and `(M, 3, H, W)` in [-1, 1], where `extractor` is.

    Args:
        extractor: see `FeatureExtractor`.
        batch_size: pictures that it sees at a time.
        kwargs: those of `compare_features`.
    """
    batch_size = check_integer("batch_size", batch_size, 1)
    for name, images in (("real", real), ("generated", generated)):
        check_tensor(name, images)
    sets = (extract_features(images.split(batch_size), extractor, progress=False) for images in (real, generated))
    return compare_features(*sets, **kwargs)


def symmetric_sqrt(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semi-definite `(D, D)`; eigenvalues below zero count as rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (Heusel et al. 2017, equation 6).

    `|μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)`. The trace of `(Σ₁Σ₂)^½` is the sum of the
    singular values of `Σ₁^½ Σ₂^½`, so no complex root is needed and a singular covariance does no harm. With N below a
    few times D the distance is mostly bias.

    Args:
        real: `(N, D)`, N at least 2.
        generated: `(M, D)`, M at least 2.
    """
    real, generated = _check_pair(real, generated, minimum=2)
    if max(len(real), len(generated)) <= real.shape[1]:  # with Σ = AᵀA the same singular values are those of A₁A₂ᵀ
        roots = [(features - features.mean(0)) / math.sqrt(len(features) - 1) for features in (real, generated)]
        cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
        variances = sum(root.square().sum() for root in roots)
        return float((real.mean(0) - generated.mean(0)).square().sum() + variances - 2 * cross)
    return frechet_distance_of_gaussians(real.mean(0), _covariance(real), generated.mean(0), _covariance(generated))


def frechet_distance_of_gaussians(
    real_mean: torch.Tensor, real_covariance: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor
) -> float:
    """The same from two means `(D,)` and covariances `(D, D)`, float64."""
    if real_mean.shape != mean.shape:
        raise ValueError(f"`real_mean` must have {len(mean)} features as `mean` has, got {len(real_mean)}.")
    cross = torch.linalg.svdvals(symmetric_sqrt(real_covariance) @ symmetric_sqrt(covariance)).sum()
    mean_term = (real_mean - mean).square().sum()
    return float(mean_term + real_covariance.trace() + covariance.trace() - 2 * cross)


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy with the kernel `(x·y / D + 1)³` (Bińkowski et al. 2018, equation 4).

    Args:
        real: `(N, D)`, N at least 3.
        generated: `(M, D)`, M at least 3.
        subset_size: without it, all pairs are used and the standard error is the two-sample jackknife's. With it
            (for large sets), the mean over the disjoint random subsets of this size, at least two, and the standard
            error of that mean.
        seed: of the subsets.

    Returns:
        The distance, which is negative half of the time where the two distributions are equal, and its standard error.
    """
    real, generated = _check_pair(real, generated, minimum=3)
    if subset_size is None:
        return _mmd2_with_jackknife(real, generated)
    subset_size = check_integer("subset_size", subset_size)
    num_subsets = min(len(real), len(generated)) // subset_size if subset_size >= 3 else 0
    if num_subsets < 2:
        raise ValueError(
            f"`subset_size` must be at least 3 and fit twice into both sets ({len(real)} real, {len(generated)} "
            f"generated), got {subset_size}"
        )
    generator = torch.Generator().manual_seed(check_integer("seed", seed))
    subsets = []
    for features in (real, generated):
        order = torch.randperm(len(features), generator=generator)[: num_subsets * subset_size]
        subsets.append(features[order.to(features.device)].view(num_subsets, subset_size, -1))
    values = torch.tensor([_mmd2_with_jackknife(x, y)[0] for x, y in zip(*subsets, strict=True)], dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(num_subsets))


def precision_recall(real: torch.Tensor, generated: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 to 3).

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest other one. Precision
    is the share of generated features inside the manifold of the real ones, recall the share of real features inside
    that of the generated ones.

    Args:
        real: `(N, D)`, N above `neighbours`.
        generated: `(M, D)`, M above `neighbours`.
        neighbours: k.
    """
    neighbours = check_integer("neighbours", neighbours, 1)
    real, generated = _check_pair(real, generated, minimum=neighbours + 1)
    return _share_inside(generated, real, neighbours), _share_inside(real, generated, neighbours)


def classifier_score(logits: torch.Tensor, num_splits: int = 10) -> tuple[float, float]:
    """`exp(E KL(p(y|x) ‖ p(y)))` of a classifier (Salimans et al. 2016): mean and standard deviation over splits.

    It is the Inception Score only with the logits of the original Inception network.

    Args:
        logits: `(N, classes)`, in random order.
        num_splits: consecutive parts that are scored one by one; at most N.
    """
    check_tensor("logits", logits)
    num_splits = check_integer("num_splits", num_splits)
    if logits.ndim != 2 or not 1 <= num_splits <= len(logits) or not logits.isfinite().all():
        raise ValueError(
            f"`logits` must be finite and have shape (N, classes) with N at least `num_splits`={num_splits}, got "
            f"{tuple(logits.shape)}"
        )
    scores = []
    for part in logits.double().log_softmax(1).tensor_split(num_splits):
        marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def _mmd2_with_jackknife(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    m, n = len(x), len(y)
    within_x, within_y, across_x, across_y = (torch.zeros(k, dtype=x.dtype, device=x.device) for k in (m, n, m, n))
    for rows in _blocks(m, max(m, n)):
        within_x[rows] = _kernel(x[rows], x).sum(1) - _kernel_with_itself(x[rows])
        cross = _kernel(x[rows], y)
        across_x[rows] = cross.sum(1)
        across_y += cross.sum(0)
    for rows in _blocks(n, n):
        within_y[rows] = _kernel(y[rows], y).sum(1) - _kernel_with_itself(y[rows])
    a, b, c = within_x.sum(), within_y.sum(), across_x.sum()
    mean_x, mean_y, mean_xy = a / (m * (m - 1)), b / (n * (n - 1)), c / (m * n)
    # the estimate without one x, and without one y
    without_x = (a - 2 * within_x) / ((m - 1) * (m - 2)) + mean_y - 2 * (c - across_x) / ((m - 1) * n)
    without_y = mean_x + (b - 2 * within_y) / ((n - 1) * (n - 2)) - 2 * (c - across_y) / (m * (n - 1))
    variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
    return float(mean_x + mean_y - 2 * mean_xy), float(variance.sqrt())


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_with_itself(x: torch.Tensor) -> torch.Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def _share_inside(points: torch.Tensor, manifold: torch.Tensor, neighbours: int) -> float:
    radii = torch.empty(len(manifold), dtype=manifold.dtype, device=manifold.device)
    for rows in _blocks(len(manifold), len(manifold)):
        distances = torch.cdist(manifold[rows], manifold)
        local = torch.arange(len(distances), device=distances.device)
        distances[local, local + rows.start] = math.inf  # itself is no neighbour
        radii[rows] = distances.kthvalue(neighbours, dim=1).values
    inside = 0
    for rows in _blocks(len(points), len(manifold)):
        inside += int((torch.cdist(points[rows], manifold) <= radii).any(1).sum())
    return inside / len(points)


def _blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _covariance(features: torch.Tensor) -> torch.Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _check_pair(real: torch.Tensor, generated: torch.Tensor, minimum: int) -> tuple[torch.Tensor, torch.Tensor]:
    for name, features in (("real", real), ("generated", generated)):
        check_tensor(name, features)
        if features.is_complex():
            raise ValueError(f"`{name}` must be real numbers, got {features.dtype}.")
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            "`real` and `generated` must have shapes (N, D) and (M, D), "
            f"got {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    for name, features in (("real", real), ("generated", generated)):
        if len(features) < minimum:
            raise ValueError(f"`{name}` must have at least {minimum} rows, got {len(features)}")
        if not features.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got infinite or NaN features")
    return real.double(), generated.double()


__all__ = [
    "Measurement",
    "classifier_score",
    "compare_features",
    "compare_images",
    "compare_with_reference",
    "frechet_distance",
    "frechet_distance_of_gaussians",
    "kernel_distance",
    "precision_recall",
    "symmetric_sqrt",
]
