"""Conditions beside images: the same window, ids that stay ids, and what is refused."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import VQConditionProcessor, VQImageProcessor
from hf_vq.training.data.conditions import ConditionReader, condition_values, load_condition_processor
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
from hf_vq.training.data.image_decoding import BrokenImageError, choose_window


LABELS = VQConditionProcessor("segmentation", num_labels=4)
SIDE = 40


def label_map(number, ignored=False):
    """Patches of 10 pixels with labels 0 to 3; the image that belongs to it shows label k as grey 60 k."""
    patches = np.random.default_rng(number).integers(0, 4, (4, 6), np.uint8)
    labels = patches.repeat(10, 0).repeat(10, 1)
    image = Image.fromarray((labels * 60)[..., None].repeat(3, -1))
    if ignored:
        labels[:10] = 255
    return image, Image.fromarray(labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    pairs = [label_map(number) for number in range(6)]
    depth = np.random.default_rng(0).random((6, 20, 30), np.float32)
    columns = {"image": [a for a, _ in pairs], "annotation": [b for _, b in pairs], "depth": depth.tolist()}
    columns["wrong"] = [Image.new("L", (30, 30))] * 6
    features = {name: datasets.Image() for name in ("image", "annotation", "wrong")}
    features["depth"] = datasets.Array2D((20, 30), "float32")
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(folder / "train.parquet")
    return str(folder)


def load(data, processor=LABELS, column="annotation", **options):
    options = {"resolution": 20, "conditioning_image_column": column, **options}
    return load_image_dataset(
        DataArguments(data, **options), "train", augment=True, seed=3, condition_processor=processor
    )


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_the_map_is_cut_and_mirrored_as_the_image(data, crop, cached):
    dataset = load(data, crop=crop, random_flip=True, cache_images=cached)
    seen = set()
    for index in range(6):
        for epoch in range(4):
            sample = dataset.sample(index, epoch)
            grey = (sample["pixel_values"][0] + 1) * 127.5
            labels = sample["condition"]
            assert labels.dtype == torch.int64 and labels.shape == (20, 20)
            # bicubic pixels differ along the borders of the patches of 5 pixels only
            agree = ((grey / 60).round() == labels).float().mean()
            assert agree > 0.9
            seen.add(tuple(labels.flatten().tolist()))
    assert len(seen) > (12 if crop == "random" else 6)


def test_a_stream_gives_the_same_pairs(data):
    stream = load(data, streaming=True)
    mapped = load(data)
    for number, sample in enumerate(stream):
        assert torch.equal(sample["condition"], mapped.read(number)["condition"])
        assert "conditioning_image" not in sample
    batch, _ = next(stream.read_batches(None, batch_size=4))
    assert all(sample["condition"].shape == (20, 20) for sample in batch)


def test_depth_from_arrays_of_half_the_size(data):
    values = load(data, VQConditionProcessor("depth"), "depth")[0]["condition"]
    assert values.shape == (1, 20, 20) and (values.min(), values.max()) == (-1, 1)
    whole = np.random.default_rng(0).random((6, 20, 30), np.float32)[0][:, 5:25]
    expected = (whole - whole.min()) / (whole.max() - whole.min()) * 2 - 1
    np.testing.assert_allclose(values[0].numpy(), expected, atol=1e-6)


def test_edges_of_the_images(data):
    from skimage.feature import canny

    dataset = load(data, VQConditionProcessor("edges"), None, edge_sigma=1.0, random_flip=True)
    mirrored = set()
    for epoch in range(8):
        sample = dataset.sample(0, epoch)
        grey = ((sample["pixel_values"][0] + 1) / 2).numpy()
        assert ((sample["condition"][0] > 0).numpy() == canny(grey, sigma=1.0)).mean() > 0.98
        mirrored.add(sample["condition"].numpy().tobytes())
    assert len(mirrored) == 2 and 0 < (sample["condition"] > 0).float().mean() < 0.5


def test_one_hot_values_are_the_processors_own():
    image, labels = label_map(0, ignored=True)
    expected = LABELS([labels], size={"height": 40, "width": 60}).pixel_values
    reader = ConditionReader(LABELS)
    window = choose_window(image, (40, 60))
    read = reader.read(reader.decode(labels, image), np.asarray(image), window)
    assert torch.equal(condition_values(read[None], LABELS), expected)
    assert not expected[:, :, :10].any()


def test_colours_of_a_palette_stay_colours():
    processor = VQConditionProcessor("segmentation", num_labels=2, palette=[[0, 0, 0], [200, 100, 50]])
    colours = np.zeros((40, 60, 3), np.uint8)
    colours[:, 30:] = 200, 100, 50
    image = Image.fromarray(colours)
    reader = ConditionReader(processor)
    read = reader.read(reader.decode(image, image), colours[:20, :20], choose_window(image, (20, 20)))
    assert torch.equal(read, torch.tensor([0] * 10 + [1] * 10).expand(20, 20))


def test_what_is_refused(data, tmp_path, caplog):
    with pytest.raises(ValueError, match="conditioning_image_column='annotation' needs a condition tokenizer"):
        load(data, None)
    with pytest.raises(ValueError, match="must name a column for condition 'depth'"):
        load(data, VQConditionProcessor("depth"), None)
    with pytest.raises(ValueError, match="the data set has no column 'labels'"):
        load(data, column="labels")
    with pytest.raises(ValueError, match="must differ from image_column"):
        load(data, column="image")
    with pytest.raises(ValueError, match="none of the 6 images"):
        load(data, column="wrong")[0]
    assert "30x30 pixels, not the proportions of its image, 60x40" in caplog.text
    with pytest.raises(ValueError, match=r"labels in 0…1 or 255 for unlabelled, got \[2, 3\]"):
        load(data, VQConditionProcessor("segmentation", num_labels=2))[0]
    with pytest.raises(BrokenImageError, match="of depth has one channel: .* got colours"):
        ConditionReader(VQConditionProcessor("depth")).decode(
            Image.new("RGB", (60, 40), "red"), Image.new("L", (60, 40))
        )
    VQImageProcessor(size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have a VQConditionProcessor beside it.*got 'VQImageProcessor'"):
        load_condition_processor(tmp_path)


def test_processor_of_a_pipelines_condition_tokenizer(tmp_path):
    """A pipeline has it in a folder of its own."""
    (tmp_path / "condition_tokenizer").mkdir()
    with pytest.raises(ValueError, match="`condition_tokenizer`='.*' must have a VQConditionProcessor beside it"):
        load_condition_processor(tmp_path / "condition_tokenizer")
    VQConditionProcessor("segmentation", num_labels=7).save_pretrained(tmp_path / "condition_processor")
    assert load_condition_processor(tmp_path / "condition_tokenizer").num_labels == 7
