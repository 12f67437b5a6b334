"""Whether drawn images follow their spatial condition: overlap of labels, error of depth, and edges found again."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..argument_checks import check_integer, check_real
from ..distributed import all_reduced
from ..images import to_pil
from ..pipelines.annotators import annotated


class ConditionAgreement:
    """How well drawn images follow their spatial conditions, collected over a data set and over processes.

    An annotator makes of each drawn image what its condition was made of: of label maps `LabelAgreement` is told, of
    depth maps the mean `depth_error`, of edges the mean `edge_f1`.

    Args:
        processor ([`VQConditionProcessor`]): of the conditions.
        annotator: from a list of Pillow images to their conditions, such as [`SegmentationAnnotator`].

    Raises:
        ValueError: a kind of condition that no such figure is known of.
    """

    def __init__(self, processor: Any, annotator: Callable):
        if processor.condition not in ("segmentation", "depth", "edges"):
            raise ValueError(
                "`processor` must be of segmentation, depth or edges to measure agreement, got "
                f"{processor.condition!r}."
            )
        self.processor, self.annotator = processor, annotator
        self.labels = LabelAgreement(processor.num_labels) if processor.condition == "segmentation" else None
        self.total = torch.zeros(2, dtype=torch.float64)

    def update(self, images: torch.FloatTensor, condition: torch.Tensor) -> None:
        """Count images `(B, 3, H, W)` in [-1, 1] and what they were drawn for, `condition` of a data set's samples."""
        made = annotated(self.annotator, to_pil(images))
        size = {"height": condition.shape[-2], "width": condition.shape[-1]}
        if self.labels is not None:
            self.labels.update(self.processor.labels(made, size), condition)
            return
        found = self.processor.preprocess(made, size).pixel_values[:, 0]
        if self.processor.condition == "edges":
            scores = edge_f1(found > 0, condition[:, 0].cpu() > 0).double()
        else:
            scores = depth_error(found, condition[:, 0].cpu())
            scores = scores[scores.isfinite()]  # a condition of one depth says nothing
        self.total += torch.tensor([scores.sum(), len(scores)], dtype=torch.float64)

    def compute(self) -> dict[str, float | list]:
        """`condition_mean_iou`, …, `condition_depth_error` or `condition_edge_f1`; without depths, nothing."""
        if self.labels is not None:
            return {f"condition_{name}": value for name, value in self.labels.compute().items()}
        total, count = all_reduced(self.total).tolist()
        name = {"edges": "condition_edge_f1", "depth": "condition_depth_error"}[self.processor.condition]
        return {name: total / count} if count else {}


class LabelAgreement:
    """Intersection over union of two label maps, collected over a data set and over processes.

    For each label, `IoU = |A ∩ B| / |A ∪ B|` over all pixels of all images (Everingham et al. 2010, section 4.1.2),
    and their mean over the labels that occur in either.

    Args:
        num_labels: N; other values of the reference, such as 255 or -1, are left out of the count.
    """

    def __init__(self, num_labels: int):
        self.num_labels = check_integer("num_labels", num_labels, 1)
        self.confusion = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)

    def update(self, labels: torch.Tensor, references: torch.Tensor) -> None:
        """Count a batch of label maps of the drawn images and of their conditions, integers `(B, H, W)` both.

        Raises:
            ValueError: other shapes, or a label of the drawn images outside 0…N-1.
        """
        _check_maps(labels, references)
        labels, references = labels.detach().cpu().long().flatten(), references.detach().cpu().long().flatten()
        known = (references >= 0) & (references < self.num_labels)
        labels, references = labels[known], references[known]
        if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < self.num_labels):
            raise ValueError(
                f"`labels` must lie in 0…{self.num_labels - 1}, got {int(labels.min())} to {int(labels.max())}."
            )
        pairs = references * self.num_labels + labels
        self.confusion += torch.bincount(pairs, minlength=self.num_labels**2).view_as(self.confusion)

    def compute(self) -> dict[str, float | list]:
        """`mean_iou`, `pixel_accuracy`, and `iou`, a list with None for the labels that occur in neither."""
        confusion = all_reduced(self.confusion).double()
        if confusion.sum() == 0:
            raise ValueError("no labelled pixel has been counted: call `update(...)` before `compute()`")
        correct = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - correct
        occurs = union > 0
        iou = (correct / union.clamp_min(1)).tolist()
        return {
            "mean_iou": float((correct[occurs] / union[occurs]).mean()),
            "pixel_accuracy": float(correct.sum() / confusion.sum()),
            "iou": [value if is_there else None for value, is_there in zip(iou, occurs.tolist(), strict=True)],
        }


def depth_error(depth: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """The root mean squared difference of each pair of depth maps after the best scale and shift, in units of the
    reference.

    Monocular depth is known up to a scale `a` and a shift `b`, so these are fitted by least squares:
    `min over a, b of |a d + b - r|²` (Ranftl et al. 2020, equation 4), and the residue is divided by the standard
    deviation of the reference: 0 is a perfect map, 1 is as good as a constant.

    Args:
        depth, references: `(B, H, W)`.

    Returns:
        `(B,)`; NaN where the reference is constant.
    """
    _check_maps(depth, references)
    x, y = depth.double().flatten(1), references.double().flatten(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    variance, covariance = x.square().mean(1), (x * y).mean(1)
    explained = torch.where(variance > 0, covariance.square() / variance.clamp_min(1e-300), 0)
    total = y.square().mean(1)
    return ((total - explained).clamp_min(0) / total).sqrt()


def edge_f1(edges: torch.Tensor, references: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """The F1 score of each pair of edge maps: `2 P R / (P + R)`.

    Precision is the share of edge pixels that have one of the reference within `tolerance` pixels, recall the share of
    the reference's that have one (Martin et al. 2004, section 3, without the one-to-one matching).

    Args:
        edges, references: bool `(B, H, W)`.
        tolerance: in pixels, along either axis.

    Returns:
        `(B,)`; 1 where neither map has an edge, 0 where only one has.
    """
    _check_maps(edges, references)
    reach = check_integer("tolerance", tolerance, 0)
    a, b = edges.bool(), references.bool()
    precision = (a & _widened(b, reach)).flatten(1).sum(1) / a.flatten(1).sum(1).clamp_min(1)
    recall = (b & _widened(a, reach)).flatten(1).sum(1) / b.flatten(1).sum(1).clamp_min(1)
    score = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    neither = ~a.flatten(1).any(1) & ~b.flatten(1).any(1)
    return torch.where(neither, 1.0, score)


def object_mask(images: torch.Tensor, threshold: float = 0.1) -> torch.BoolTensor:
    """Where pictures on a white background show something: `(B, C, H, W)` in [-1, 1] to `(B, H, W)`.

    Args:
        threshold: how far from white, in units of the range [-1, 1] of any channel, a pixel must be.
    """
    threshold = check_real("threshold", threshold, 0, 2)
    return (1 - images).amax(dim=1) > threshold


def _widened(mask: torch.Tensor, reach: int) -> torch.Tensor:
    return F.max_pool2d(mask.float()[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0


def _check_maps(maps: torch.Tensor, references: torch.Tensor) -> None:
    if maps.ndim != 3 or maps.shape != references.shape:
        raise ValueError(
            f"maps and `references` must have one shape (B, H, W), got {tuple(maps.shape)} and "
            f"{tuple(references.shape)}."
        )


__all__ = ["ConditionAgreement", "LabelAgreement", "depth_error", "edge_f1", "object_mask"]
