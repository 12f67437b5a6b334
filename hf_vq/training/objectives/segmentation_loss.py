"""Losses of a tokenizer of label maps."""

import torch
import torch.nn.functional as F


LOSSES = ("cross_entropy", "bce")


def segmentation_loss(
    logits: torch.Tensor, labels: torch.LongTensor, kind: str = "cross_entropy"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over the labelled pixels of the cross-entropy, or of the N binary ones, as the original VQGAN has.

    Args:
        logits: `(B, N, H, W)`.
        labels: int64 `(B, H, W)` in 0…N-1, or negative where a pixel has no label and is left out.
        kind: "cross_entropy", `-log softmax(logits)[label]` in nats; "bce", the mean over the labels of the binary
            cross-entropy of `sigmoid(logits)` and the one-hot labels.

    Returns:
        A scalar, 0 without a labelled pixel, and the detached scalars `reconstruction_loss` (the same) and
        `pixel_accuracy`.

    Raises:
        ValueError: other shapes, or another kind.
    """
    if kind not in LOSSES:
        raise ValueError(f"`kind` must be one of {', '.join(LOSSES)}, got {kind!r}.")
    if labels.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            f"`labels` must have the shape of `logits` without their channels, got {tuple(labels.shape)} and "
            f"{tuple(logits.shape)}."
        )
    logits, known = logits.float(), labels >= 0
    wanted = labels.clamp(min=0)
    if kind == "cross_entropy":
        losses = F.cross_entropy(logits, wanted, reduction="none")
    else:
        targets = F.one_hot(wanted, logits.shape[1]).movedim(-1, 1).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    count = known.sum().clamp(min=1)
    loss = (losses * known).sum() / count
    correct = (logits.argmax(1) == labels).sum() / count
    return loss, {"reconstruction_loss": loss.detach(), "pixel_accuracy": correct}


__all__ = ["LOSSES", "segmentation_loss"]
