"""Boxes as condition ids, by hand."""

import pytest
import torch

from hf_vq import BoundingBoxTokenizer, ObjectBox, VQGPTConfig
from tests.pipelines.autoregressive_parts import make_pipeline, seeded


def test_ids_by_hand():
    """64 ids: a lattice of 8×8 points, 0 … 7 sevenths; "none" is 63."""
    boxes = BoundingBoxTokenizer(num_classes=5, max_objects=3, num_tokens=64)
    # left 2/7 of the width, top 1/7; right 5/7, bottom 7/7; the second to the nearest points
    ids = boxes.encode([(4, (2 / 7, 1 / 7, 3 / 7, 6 / 7)), ObjectBox(0, (0.0, 0.49, 0.3, 0.2))])
    assert ids.tolist() == [4, 8 + 2, 56 + 5, 0, 24 + 0, 40 + 2, 63, 63, 63] and boxes.condition_length == 9
    assert ids.dtype == torch.int64
    mirrored = boxes.encode([(4, (2 / 7, 1 / 7, 3 / 7, 6 / 7))], flip=True)
    assert mirrored.tolist()[:3] == [4, 8 + 2, 56 + 5]  # 1 - 5/7 and 1 - 2/7
    found, crop = boxes.decode(ids)
    assert crop is None and [one.label for one in found] == [4, 0] and not any(found[0][2:])
    assert found[0].box == pytest.approx((2 / 7, 1 / 7, 3 / 7, 6 / 7))
    assert found[1].box == pytest.approx((0, 3 / 7, 2 / 7, 2 / 7))


def test_a_crop_by_hand():
    left, right = (0, (0.0, 0.0, 0.25, 1.0)), (1, (0.5, 0.5, 0.5, 0.5))
    shown = (0.5, 0.0, 0.5, 1.0)
    relative = BoundingBoxTokenizer(2, 2, 25)  # a lattice of 5×5 points, quarters
    assert relative.encode([left, right], shown).tolist() == [1, 10, 24, 24, 24, 24]
    whole = BoundingBoxTokenizer(2, 2, 25, encode_crop=True)
    ids = whole.encode([left, right], shown)
    assert ids.tolist() == [1, 12, 24, 24, 24, 24, 2, 24]
    assert whole.decode(ids) == ([ObjectBox(1, (0.5, 0.5, 0.5, 0.5))], shown)
    assert whole.encode([left, right], shown, flip=True).tolist() == [1, 10, 22, 24, 24, 24, 0, 22]
    # cut at its left, a box of width 0.5 keeps its size, as in the original
    assert relative.encode([(0, (0.25, 0.0, 0.375, 1.0))], shown).tolist()[:3] == [0, 0, 20 + 3]


def test_flags_by_hand():
    boxes = BoundingBoxTokenizer(10, 1, 256, use_group=True, use_flags=True)
    one = ObjectBox(3, (0, 0, 1, 1), is_group=True, is_depiction=True)
    assert boxes.encode([one]).tolist() == [3 + 10 * (1 + 4), 0, 255]
    assert boxes.decode(boxes.encode([one]))[0] == [one]
    plain = BoundingBoxTokenizer(10, 1, 256)
    assert plain.encode([one]).tolist() == [3, 0, 255]


def test_a_pipeline_takes_them():
    boxes = BoundingBoxTokenizer(3, 2, 49, encode_crop=True)
    pipeline = make_pipeline("codes", condition_vocab_size=49, condition_length=boxes.condition_length, n_unmasked=0)
    both = torch.stack([boxes.encode([(number, (0.1, 0.2, 0.5, 0.5))]) for number in (0, 2)])
    indices = pipeline(condition=both, generator=[seeded(), seeded()], output_type="indices").indices
    assert indices.shape == (2, 4, 4) and not torch.equal(*indices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(0, (0, 0, 1, 1))] * 3,), "`objects` must be at most 2, got 3"),
        (([(5, (0, 0, 1, 1))],), "`label` must be an int in 0…2, got 5"),
        (
            ([(0, (0.5, 0, 0.6, 1))],),
            r"`box` must be \(left, top, width, height\) in shares of the picture, within it",
        ),
        (([(0, (10, 0, 20, 30))],), r"`box` must be a number in \[0, 1\], got 10"),
        (([(0, (0, 0, 1, 1))], (0, 0, 0, 1)), "`crop` must be"),
    ],
)
def test_what_is_no_box(arguments, message):
    boxes = BoundingBoxTokenizer(3, 2, 49)
    with pytest.raises(ValueError, match=message):
        boxes.encode(*arguments)


def test_what_cannot_be_ids():
    with pytest.raises(ValueError, match="`num_tokens` must be more than the 96 ids of classes with their flags"):
        BoundingBoxTokenizer(6, 1, 96, use_group=True, use_flags=True)
    with pytest.raises(ValueError, match=r"`ids` must have shape \(6,\), got \(1, 6\)"):
        BoundingBoxTokenizer(3, 2, 49).decode(torch.zeros(1, 6, dtype=torch.int64))


def test_a_part_of_the_picture():
    """Of a lattice of 5×5 points: the right half, of the ids of the whole picture and of the boxes themselves."""
    boxes = BoundingBoxTokenizer(2, 3, 25)
    objects = [(0, (0.5, 0.0, 0.5, 0.5)), (1, (0.0, 0.0, 0.25, 0.25))]
    part = boxes.of_crop(boxes.encode(objects), (0.5, 0.0, 0.5, 1.0))
    assert torch.equal(part, boxes.encode(objects, (0.5, 0.0, 0.5, 1.0))) and part.tolist()[:4] == [0, 0, 14, 24]
    point = boxes.encode([(0, (0.99, 0.99, 0.01, 0.01))])  # both corners are the last point
    assert boxes.of_crop(point, (0.5, 0.5, 0.5, 0.5)).tolist()[:3] == [0, 24, 24]


def test_objects_in_a_random_order():
    boxes = BoundingBoxTokenizer(4, 4, 36, encode_crop=True)
    ids = boxes.encode([(label, (label / 4, 0.0, 0.25, 0.5)) for label in range(3)]).expand(64, -1)
    shuffled = boxes.shuffled(ids)
    assert len({tuple(row[:9:3].tolist()) for row in shuffled}) == 6  # all orders of three
    for row in shuffled:
        assert sorted(boxes.decode(row)[0]) == sorted(boxes.decode(ids[0])[0])
    assert (shuffled[:, 9:] == ids[:, 9:]).all()  # "none" and the crop stay last


def test_boxes_of_a_config():
    boxes = {"num_classes": 3, "max_objects": 2, "num_tokens": 49}
    config = {"condition_type": "codes", "condition_vocab_size": 49, "condition_length": 6, "bounding_boxes": boxes}
    assert VQGPTConfig(**config).bounding_boxes == boxes
    for other, message in (
        ({"condition_length": 7}, "`bounding_boxes` need .* a condition_length of 6, got 'codes', 49 and 7"),
        ({"bounding_boxes": {"classes": 3}}, "`bounding_boxes` must be arguments of BoundingBoxTokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            VQGPTConfig(**{**config, **other})
    with pytest.raises(ValueError, match="`boxes` needs a prior whose config has `bounding_boxes`"):
        make_pipeline("class")(boxes=[(0, (0, 0, 1, 1))])
