import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import VQConditionProcessor
from hf_vq.training.data.conditions import ConditionReader
from hf_vq.training.data.image_decoding import BrokenImageError, choose_window


IDS = np.array([[0, 1, 1, 255], [2, 2, 1, 0]], np.uint8)


def expand(ids, factor):
    return ids.repeat(factor, axis=0).repeat(factor, axis=1)


def segmentation(**options):
    return VQConditionProcessor("segmentation", num_labels=3, size={"height": 2, "width": 4}, **options)


@pytest.mark.parametrize(
    "label_map", [IDS, IDS.astype(np.int64), torch.from_numpy(IDS), Image.fromarray(IDS), expand(IDS, 5)]
)
def test_label_maps_become_one_channel_a_label(label_map):
    values = segmentation()(label_map).pixel_values
    assert values.shape == (1, 3, 2, 4) and values.dtype == torch.float32
    for label in range(3):
        np.testing.assert_array_equal(values[0, label], IDS == label)


def test_unlabelled_pixels_get_the_label_that_is_named():
    values = segmentation(ignore_label=2)(IDS).pixel_values
    assert values[0, :, 0, 3].tolist() == [0, 0, 1]
    assert segmentation().labels(IDS)[0].tolist() == [[0, 1, 1, -1], [2, 2, 1, 0]]


@pytest.mark.parametrize("label_map", [[2, 0, 1], {0: 2, 1: 0, 2: 1}])
def test_ids_of_the_data_are_mapped(label_map, tmp_path):
    processor = segmentation(label_map=label_map)
    expected = [[2, 0, 0, -1], [1, 1, 0, 2]]
    assert processor.labels(IDS)[0].tolist() == expected
    processor.save_pretrained(tmp_path)
    assert VQConditionProcessor.from_pretrained(tmp_path).labels(IDS)[0].tolist() == expected
    with pytest.raises(ValueError, match=r"ids that `label_map` has, got \[7\]"):
        processor(np.full((2, 4), 7))


def test_coloured_maps_are_read_and_drawn_by_the_palette():
    palette = [[9, 8, 7], [200, 0, 0], [0, 200, 0]]
    ids = np.where(IDS == 255, 0, IDS)
    coloured = Image.fromarray(np.array(palette, np.uint8)[ids])
    processor = segmentation(palette=palette)
    values = processor(coloured).pixel_values
    np.testing.assert_array_equal(values[0].argmax(0), ids)
    np.testing.assert_array_equal(np.asarray(processor.postprocess(values)[0]), np.asarray(coloured))
    assert torch.equal(processor.postprocess(values, "pt")[0], torch.from_numpy(ids).long())
    with pytest.raises(ValueError, match=r"colours of `palette`, got \[1, 2, 3\]"):
        processor(Image.new("RGB", (4, 2), (1, 2, 3)))


def test_the_centre_is_cut_out_as_of_the_image():
    wide = np.concatenate([np.full((4, 3), 255), expand(np.array([[0, 1], [2, 0]]), 2), np.full((4, 3), 255)], axis=1)
    values = VQConditionProcessor("segmentation", num_labels=3, size=2).labels(wide.astype(np.uint8))
    assert values[0].tolist() == [[0, 1], [2, 0]]


def test_depth_is_scaled_by_its_own_extremes():
    depth = np.linspace(3, 11, 12).reshape(3, 4).astype(np.float32)
    values = VQConditionProcessor("depth", size={"height": 3, "width": 4})(depth).pixel_values
    assert values.shape == (1, 1, 3, 4)
    np.testing.assert_allclose(values[0, 0], (depth - 3) / 4 - 1, atol=1e-6)
    sixteen_bits = Image.fromarray((depth * 1000).astype(np.uint16))
    scaled = VQConditionProcessor("depth", size={"height": 3, "width": 4})(sixteen_bits).pixel_values
    np.testing.assert_allclose(scaled[0, 0], values[0, 0], atol=1e-3)
    assert not VQConditionProcessor("depth", size=3)(np.full((3, 3), 5.0)).pixel_values.any()


def test_edges_are_minus_one_and_one():
    edges = np.array([[0, 1], [1, 0]])
    for given in (
        edges.astype(bool),
        edges * 255,
        Image.fromarray((edges * 255).astype(np.uint8)),
        edges.astype(float),
    ):
        values = VQConditionProcessor("edges", size=2)(given).pixel_values
        assert values[0, 0].tolist() == [[-1, 1], [1, -1]]
    picture = VQConditionProcessor("edges", size=2).postprocess(values)[0]
    assert np.asarray(picture)[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_skeletons_are_pictures():
    canvas = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for given in (canvas, Image.fromarray(canvas)):
        values = VQConditionProcessor("pose", size=6)(given).pixel_values
        np.testing.assert_allclose(values[0], canvas.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_batches_and_other_sizes():
    processor = segmentation()
    batch = processor([IDS, IDS[::-1]]).pixel_values
    assert torch.equal(batch[1], processor(IDS[::-1]).pixel_values[0])
    assert torch.equal(processor(np.stack([IDS, IDS[::-1]])).pixel_values, batch)
    assert processor(IDS, size={"height": 4, "width": 8}).pixel_values.shape == (1, 3, 4, 8)
    assert isinstance(processor(IDS, return_tensors="np").pixel_values, np.ndarray)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"condition": "normals"}, "`condition` must be one of 'segmentation'"),
        ({"condition": "segmentation"}, "`num_labels` must be given"),
        ({"condition": "depth", "num_labels": 3}, "`num_labels` must be given"),
        ({"num_labels": 3, "ignore_label": 3}, "`ignore_label` must be an int in 0…2, got 3"),
        ({"num_labels": 3, "palette": [[0, 0, 0]]}, "`palette` must have a colour for each of 3 labels, got 1"),
        ({"num_labels": 3, "size": {"shortest_edge": 3}}, "`size` must be"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VQConditionProcessor(**options)


@pytest.mark.parametrize(
    "condition, image, message",
    [
        ("segmentation", np.full((2, 4), 3), r"labels in 0…2 or 255 for unlabelled, got \[3\]"),
        ("segmentation", np.full((2, 4), -1), r"got \[-1\]"),
        ("segmentation", Image.new("RGB", (4, 2)), "label maps of one channel without a `palette`"),
        ("segmentation", np.zeros((2, 4)), "label maps of integers .* a photo needs an `annotator`"),
        ("depth", Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)), "a photo needs an `annotator`"),
        ("depth", np.full((2, 4), np.nan), "finite depths"),
        ("edges", np.full((2, 4), -3.0), "must lie in"),
        ("pose", np.zeros((2, 4), np.uint8), "PIL images or uint8 arrays"),
        ("depth", [], "at least one condition"),
    ],
)
def test_what_is_no_condition_is_refused(condition, image, message):
    processor = VQConditionProcessor(condition, num_labels=3 if condition == "segmentation" else None, size=4)
    with pytest.raises(ValueError, match=message):
        processor(image)


def test_saved_and_loaded(tmp_path):
    processor = segmentation(ignore_label=1, palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    processor.save_pretrained(tmp_path)
    loaded = VQConditionProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() and loaded.num_channels == 3
    assert torch.equal(loaded(IDS).pixel_values, processor(IDS).pixel_values)


def depth_pictures():
    """One depth map in each of the forms that people store, as PNG or TIFF, by name, and its values in [-1, 1]."""
    depth = np.random.default_rng(0).integers(100, 9000, (4, 6)).astype(np.float32)
    packed = np.frombuffer(b"".join(struct.pack("<f", value / 7) for value in depth.flat), np.uint8).reshape(4, 6, 4)
    grey = (depth // 40).astype(np.uint8)
    palette = Image.fromarray(255 - grey, "P")
    palette.putpalette([255 - value for value in range(256) for _ in range(3)])
    pictures = {
        "I;16": (Image.fromarray(depth.astype(np.uint16)), depth),
        "I": (Image.fromarray(depth.astype(np.int32)), depth),
        "F": (Image.fromarray(depth / 3), depth),
        "RGBA": (Image.fromarray(packed), depth),
        "L": (Image.fromarray(grey), grey),
        "RGB": (Image.fromarray(grey).convert("RGB"), grey),
        "P": (palette, grey),
    }
    return {
        mode: (picture, (values - values.min() * 1.0) / (values.max() * 1.0 - values.min()) * 2 - 1)
        for mode, (picture, values) in pictures.items()
    }


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "RGBA", "L", "RGB", "P"])
def test_depth_as_people_store_it(mode):
    """By the processor, and by the reader of training data out of an encoded file."""
    picture, expected = depth_pictures()[mode]
    assert picture.mode == mode
    processor = VQConditionProcessor("depth", size={"height": 4, "width": 6})
    np.testing.assert_allclose(processor(picture).pixel_values[0, 0], expected, atol=1e-5)
    file = io.BytesIO()
    picture.save(file, format="TIFF" if mode in ("I", "F") else "PNG")
    image, reader = Image.new("RGB", (6, 4)), ConditionReader(processor)
    values = reader.decode({"bytes": file.getvalue(), "path": None}, image)
    window = choose_window(image, (4, 6))
    read = reader.read(values, window.cut(image), window)
    np.testing.assert_allclose(read[0], expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [0, 20, 128, 255])
def test_a_photo_with_alpha_is_no_packed_depth(alpha):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8)
    pixels[..., 3] = alpha
    with pytest.raises(ValueError, match=r"got colours \(mode 'RGBA'\); a photo needs an `annotator`"):
        VQConditionProcessor("depth", size=4)(Image.fromarray(pixels))
    with pytest.raises(BrokenImageError, match="has one channel: .* a photo needs an `annotator`"):
        ConditionReader(VQConditionProcessor("depth")).decode(Image.fromarray(pixels), Image.new("L", (6, 4)))
