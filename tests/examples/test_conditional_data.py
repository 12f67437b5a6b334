"""Scenes whose depth and pose are known, and data sets that get their conditions by an annotator."""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vq import VQConditionProcessor
from hf_vq.training.data.conditions import check_mirrored
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scenes = example("data/make_scenes.py")


def test_depth_of_a_sphere_by_marching():
    """Along each ray, the first of many small steps that is inside."""
    directions, center, radius = scenes.rays(16), np.array([0.3, -0.2, 3.0]), 0.8
    depth, normals = scenes.hit_sphere(directions, center, radius)
    steps = np.arange(1.5, 4, 1e-3)
    inside = np.linalg.norm(directions[None] * steps[:, None, None, None] - center, axis=-1) < radius
    marched = np.where(inside.any(0), steps[inside.argmax(0)], np.inf)
    both = np.isfinite(depth) & np.isfinite(marched)
    assert both.sum() > 20 and (np.isfinite(depth) != np.isfinite(marched)).sum() <= 1
    assert np.abs(depth[both] - marched[both]).max() < 2e-3
    assert np.allclose(np.linalg.norm(normals[both], axis=-1), 1)


def test_depth_of_a_box_by_marching():
    directions, low, high = scenes.rays(16), np.array([-0.9, -0.7, 2.0]), np.array([0.2, 0.4, 3.0])
    depth, normals = scenes.hit_box(directions, low, high)
    steps = np.arange(1.5, 4, 1e-3)
    points = directions[None] * steps[:, None, None, None]
    inside = ((points > low) & (points < high)).all(-1)
    marched = np.where(inside.any(0), steps[inside.argmax(0)], np.inf)
    both = np.isfinite(depth) & np.isfinite(marched)
    assert both.sum() > 20 and (np.isfinite(depth) != np.isfinite(marched)).sum() <= 2
    assert np.abs(depth[both] - marched[both]).max() < 2e-3
    assert (np.einsum("hwc,hwc->hw", normals, directions)[both] < 0).all()  # towards the camera


def test_scenes_are_read_as_pairs(tmp_path):
    scenes.main(["--output", str(tmp_path), "--size", "32", "--train", "3", "--validation", "2"])
    for kind, channels in (("depth", 1), ("pose", 3)):
        arguments = DataArguments(str(tmp_path / kind), resolution=32, conditioning_image_column=kind)
        dataset = load_image_dataset(arguments, "train", condition_processor=VQConditionProcessor(kind))
        sample = dataset[1]
        assert sample["condition"].shape == (channels, 32, 32) and sample["condition"].std() > 0.05
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "pose/train.parquet"), split="train")
    points = np.array(rows[0]["keypoints"])
    drawn = np.asarray(rows[0]["pose"]).max(-1)
    seen = [drawn[int(y), int(x)] for x, y in points if 0 <= x < 32 and 0 <= y < 32]
    assert len(seen) >= 12 and min(seen) > 0


def test_figures_have_the_bones_they_were_made_with():
    _, points = scenes.draw_figure(np.random.default_rng(0), 64)
    for upper, lower, end in ((5, 7, 9), (6, 8, 10), (11, 13, 15), (12, 14, 16)):
        first, second = np.linalg.norm(points[upper] - points[lower]), np.linalg.norm(points[lower] - points[end])
        assert first == pytest.approx(second, rel=1e-4)
    assert points[5, 0] > points[6, 0] and points[0, 1] < points[5, 1] < points[11, 1] < points[15, 1]


def test_a_column_of_edges(tmp_path, monkeypatch):
    from skimage.feature import canny

    pixels = np.random.default_rng(0).integers(0, 2, (3, 4, 4), np.uint8).repeat(8, 1).repeat(8, 2) * 200
    rows = datasets.Dataset.from_dict({"image": [Image.fromarray(one) for one in pixels], "number": [0, 1, 2]})
    rows.to_parquet(tmp_path / "photos/train.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    places = ["--dataset_name_or_path", str(tmp_path / "photos"), "--output", str(tmp_path / "pairs")]
    module = example("conditional/annotate.py")
    module.main([*places, "--annotator", "edges"])
    pairs = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs/train.parquet"), split="train")
    assert pairs["number"][:] == [0, 1, 2]
    places[-1] = str(tmp_path / "none")
    with pytest.raises(ValueError, match="has no split 'validation'"):
        module.main([*places, "--annotator", "edges", "--splits", "train", "validation"])
    assert not (tmp_path / "none").exists()
    for pixel, pair in zip(pixels, pairs, strict=True):
        np.testing.assert_array_equal(np.asarray(pair["conditioning_image"]) > 0, canny(pixel / 255.0, sigma=2))
        np.testing.assert_array_equal(np.asarray(pair["image"]), pixel)
    deep = module.as_picture(np.array([[1.0, 3.0], [2.0, 1.5]]), "depth")
    assert np.asarray(deep).tolist() == [[0, 65535], [32768, 16384]]
    assert np.asarray(module.as_picture(np.array([[0, 300]]), "segmentation")).tolist() == [[0, 300]]
    with pytest.raises(ValueError, match="ids in 0…65535"):
        module.as_picture(np.array([[-1]]), "segmentation")


@pytest.mark.parametrize("name", ["random_flip", "random_flip_codes"])
def test_a_drawn_pose_is_not_mirrored(name):
    """Left and right have colours of their own, which a mirrored drawing would exchange."""
    with pytest.raises(ValueError, match=f"{name}=True mirrors a drawn pose"):
        check_mirrored(VQConditionProcessor("pose"), name)
    check_mirrored(VQConditionProcessor("depth"), name)
    if name == "random_flip":
        arguments = DataArguments("nowhere", random_flip=True, conditioning_image_column="pose")
        with pytest.raises(ValueError, match="random_flip=True mirrors a drawn pose"):
            load_image_dataset(arguments, "train", augment=True, condition_processor=VQConditionProcessor("pose"))
