import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from hf_vq import VQConditionProcessor
from hf_vq.evaluation.agreement import ConditionAgreement, LabelAgreement, depth_error, edge_f1, object_mask
from hf_vq.images import to_pil


def test_iou_by_counting_pixels():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (3, 5, 6), generator=generator)
    references = torch.randint(0, 3, (3, 5, 6), generator=generator)
    references[0, 0] = 255
    agreement = LabelAgreement(5)
    agreement.update(labels[:1], references[:1])
    agreement.update(labels[1:], references[1:])
    found = agreement.compute()
    a, b = labels[references < 255].tolist(), references[references < 255].tolist()
    expected = []
    for label in range(4):
        both = sum(x == label and y == label for x, y in zip(a, b, strict=True))
        either = sum(x == label or y == label for x, y in zip(a, b, strict=True))
        expected.append(both / either)
    assert found["iou"] == pytest.approx([*expected, None]) and found["mean_iou"] == pytest.approx(np.mean(expected))
    assert found["pixel_accuracy"] == pytest.approx(np.mean(np.array(a) == np.array(b)))
    with pytest.raises(ValueError, match=r"`labels` must lie in 0…4, got 7 to 7"):
        agreement.update(torch.full((1, 2, 2), 7), torch.zeros(1, 2, 2))


def test_depth_error_is_that_of_the_least_squares_fit():
    generator = np.random.default_rng(0)
    depth, reference = generator.normal(size=(2, 3, 7, 8))
    reference[1] = -3 * depth[1] + 5
    expected = []
    for x, y in zip(depth, reference, strict=True):
        design = np.stack([x.ravel(), np.ones(x.size)], axis=1)
        fit = design @ np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
        expected.append(np.sqrt(np.mean((fit - y.ravel()) ** 2)) / y.std())
    found = depth_error(torch.tensor(depth), torch.tensor(reference))
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert depth_error(torch.ones(1, 4, 4), torch.tensor(reference[:1, :4, :4])) == pytest.approx(1.0)


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_edge_f1_by_dilation(tolerance):
    generator = np.random.default_rng(tolerance)
    a, b = generator.random((2, 12, 13)) < 0.1
    square = np.ones((2 * tolerance + 1,) * 2)
    near_a, near_b = (binary_dilation(one, square) for one in (a, b))
    precision, recall = (a & near_b).sum() / a.sum(), (b & near_a).sum() / b.sum()
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    found = edge_f1(torch.tensor(a)[None], torch.tensor(b)[None], tolerance)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_edges_that_are_not_there():
    none, some = torch.zeros(1, 4, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool)[None]
    assert edge_f1(none, none).item() == 1 and edge_f1(none, some).item() == 0 and edge_f1(some, some).item() == 1


def test_objects_are_what_is_not_white():
    image = torch.ones(1, 3, 2, 2)
    image[0, 1, 0, 0] = 0.5
    image[0, 2, 1, 1] = 0.95
    assert object_mask(image).tolist() == [[[True, False], [False, False]]]


def test_maps_of_different_shapes_are_refused():
    for function in (depth_error, edge_f1, LabelAgreement(2).update):
        with pytest.raises(ValueError, match="one shape"):
            function(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("kind", ["segmentation", "depth", "edges"])
def test_conditions_found_again_in_drawn_images(kind):
    """The annotator reads the red channel; what it must give is known."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(5, 3, 8, 8, generator=generator) * 2 - 1
    red = torch.from_numpy(np.stack([np.asarray(image)[..., 0] for image in to_pil(images)]))
    processor = VQConditionProcessor(kind, size=8, **({"num_labels": 3} if kind == "segmentation" else {}))

    def annotator(pictures):
        maps = [np.asarray(picture)[..., 0] for picture in pictures]
        return [one.astype(np.int64) // 86 if kind == "segmentation" else one for one in maps]

    agreement = ConditionAgreement(processor, annotator)
    if kind == "segmentation":
        condition = torch.randint(-1, 3, (5, 8, 8), generator=generator)
        reference = LabelAgreement(3)
        reference.update(red.long() // 86, condition)
        expected = {"condition_mean_iou": reference.compute()["mean_iou"]}
    else:
        condition = torch.rand(5, 1, 8, 8, generator=generator) * 2 - 1
        if kind == "depth":
            expected = {"condition_depth_error": depth_error(red.float(), condition[:, 0]).mean().item()}
        else:
            expected = {"condition_edge_f1": edge_f1(red > 127, condition[:, 0] > 0).mean().item()}
    agreement.update(images[:2], condition[:2])
    agreement.update(images[2:], condition[2:])
    found = agreement.compute()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5)
    with pytest.raises(ValueError, match="`processor` must be of segmentation, depth or edges .* got 'pose'"):
        ConditionAgreement(VQConditionProcessor("pose"), annotator)
