import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_vq.pipelines.annotators import (
    COCO_LIMBS,
    DepthAnnotator,
    EdgeAnnotator,
    PoseAnnotator,
    SegmentationAnnotator,
    draw_pose,
    load_annotator,
)


def photo(width=40, height=24):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def segformer():
    config = transformers.SegformerConfig(
        num_labels=5,
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )
    return transformers.SegformerForSemanticSegmentation(config), transformers.SegformerImageProcessorPil(size=32)


def maskformer():
    backbone = transformers.SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=4,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=8,
        dim_feedforward=8,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    return model, transformers.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64})


@pytest.mark.parametrize("make, labels", [(segformer, 5), (maskformer, 4)])
def test_segmentation_by_either_auto_class(make, labels, tmp_path):
    torch.manual_seed(0)
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    annotator = SegmentationAnnotator.from_pretrained(str(tmp_path))
    assert type(annotator.model) is type(model)
    images = [photo(), photo(32, 32)]
    maps = annotator(images)
    assert [one.shape for one in maps] == [(24, 40), (32, 32)]
    assert all(one.dtype == np.int64 and 0 <= one.min() <= one.max() < labels for one in maps)
    with torch.no_grad():
        outputs = model.eval()(**processor(images=images[0], return_tensors="pt"))
    (alone,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(24, 40)])
    np.testing.assert_array_equal(annotator(images[:1])[0], alone)


def test_depth(tmp_path):
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    model = transformers.DPTForDepthEstimation(config).eval()
    processor = transformers.DPTImageProcessorPil(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    annotator = DepthAnnotator.from_pretrained(str(tmp_path))
    depth, other = annotator([photo(), photo(33, 50)])
    assert depth.shape == (24, 40) and other.shape == (50, 33) and depth.dtype == np.float32
    with torch.no_grad():
        outputs = model(**processor(images=photo(), return_tensors="pt"))
    (expected,) = processor.post_process_depth_estimation(outputs, target_sizes=[(24, 40)])
    np.testing.assert_allclose(depth, expected["predicted_depth"], atol=1e-5)


def test_edges_are_where_the_image_changes():
    image = Image.new("RGB", (40, 24), "white")
    image.paste((0, 0, 0), (20, 0, 40, 24))
    (edges,) = EdgeAnnotator()([image])
    assert edges.shape == (24, 40) and edges.dtype == bool
    columns = np.flatnonzero(edges[6:-6].any(axis=0))
    assert len(columns) and 18 <= columns.min() and columns.max() <= 21
    assert not EdgeAnnotator()([Image.new("RGB", (40, 24), "white")])[0].any()


def pose_parts():
    config = transformers.VitPoseConfig(
        backbone_config=transformers.VitPoseBackboneConfig(
            image_size=[64, 48],
            patch_size=[16, 16],
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            out_indices=[1],
        ),
        num_labels=17,
    )
    model = transformers.VitPoseForPoseEstimation(config)
    return model, transformers.VitPoseImageProcessorPil(size={"height": 64, "width": 48})


def detector_parts():
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        num_detection_tokens=6,
        id2label={0: "person", 1: "dog"},
        label2id={"person": 0, "dog": 1},
    )
    return transformers.YolosForObjectDetection(config), transformers.YolosImageProcessorPil(
        size={"height": 32, "width": 32}
    )


def test_pose_of_the_whole_image_and_of_detected_persons(tmp_path):
    torch.manual_seed(0)
    for name, parts in (("pose", pose_parts()), ("detector", detector_parts())):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    whole = PoseAnnotator.from_pretrained(str(tmp_path / "pose"), detector_id=None)
    keypoints = whole.keypoints(photo())
    assert keypoints.shape == (1, 17, 3)
    annotator = PoseAnnotator.from_pretrained(str(tmp_path / "pose"), detector_id=str(tmp_path / "detector"))
    annotator.box_threshold, annotator.threshold = 0.0, -1.0
    boxes = annotator._boxes(photo())
    assert boxes.shape[1] == 4 and len(annotator.keypoints(photo())) == len(boxes)
    (skeleton,) = annotator([photo()])
    assert skeleton.size == (40, 24) and skeleton.mode == "RGB"
    annotator.box_threshold = 1.0
    assert not np.asarray(annotator([photo()])[0]).any()


def test_skeletons_are_drawn_where_their_points_are():
    points = np.zeros((1, 17, 3), np.float32)
    points[0, 5], points[0, 7] = (10, 10, 1), (50, 40, 1)  # a shoulder, and the elbow that a limb joins it to
    points[0, 9] = (50, 60, 0.1)  # a wrist that was not seen
    pixels = np.asarray(draw_pose(points, (64, 64))).any(axis=2)
    assert pixels[10, 10] and pixels[40, 50] and pixels[25, 30] and not pixels[55, 50]
    assert (5, 7) in COCO_LIMBS and not pixels[:8].any()
    np.testing.assert_array_equal(np.asarray(draw_pose(points[..., :2] * 0 + 5, (9, 9))).shape, (9, 9, 3))
    with pytest.raises(ValueError, match="`keypoints` must have shape"):
        draw_pose(points[0], (8, 8))


def test_names_and_callables():
    def own(images):
        return images

    assert load_annotator(own) is own and isinstance(load_annotator("edges"), EdgeAnnotator)
    with pytest.raises(ValueError, match="`annotator` must be a callable or one of 'segmentation', 'depth'"):
        load_annotator("normals")


def test_a_model_that_cannot_be_had(tmp_path):
    with pytest.raises(
        ValueError, match="the annotator 'depth' needs the model '.*', which cannot be loaded from a folder"
    ):
        load_annotator("depth", str(tmp_path))
