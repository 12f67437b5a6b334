import numpy as np
import pytest
import torch

from hf_vq.training.objectives.segmentation_loss import segmentation_loss


LOGITS = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 2, 2)), dtype=torch.float32)
LABELS = torch.tensor([[[0, 2], [-1, 1]], [[1, 1], [2, -1]]])


def test_the_mean_over_labelled_pixels_by_hand():
    entropies, binary, correct = [], [], []
    for sample, row, column in np.argwhere(LABELS.numpy() >= 0):
        values = LOGITS[sample, :, row, column].double().numpy()
        label = int(LABELS[sample, row, column])
        entropies.append(-np.log(np.exp(values[label]) / np.exp(values).sum()))
        share = 1 / (1 + np.exp(-values))
        binary.append(-np.mean([np.log(p if i == label else 1 - p) for i, p in enumerate(share)]))
        correct.append(values.argmax() == label)
    loss, metrics = segmentation_loss(LOGITS, LABELS)
    assert float(loss) == pytest.approx(np.mean(entropies), rel=1e-6)
    assert float(metrics["pixel_accuracy"]) == pytest.approx(np.mean(correct))
    assert float(segmentation_loss(LOGITS, LABELS, "bce")[0]) == pytest.approx(np.mean(binary), rel=1e-6)


def test_without_a_labelled_pixel_there_is_no_loss_and_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    loss, _ = segmentation_loss(logits, torch.full_like(LABELS, -1))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_what_is_refused():
    with pytest.raises(ValueError, match="`labels` must have the shape"):
        segmentation_loss(LOGITS, LABELS[:, :1])
    with pytest.raises(ValueError, match="`kind` must be one of"):
        segmentation_loss(LOGITS, LABELS, "l1")
