"""From a photo to a spatial condition: segmentation, depth, edges and pose, by transformers' task models."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw


# The models that are used where none is named; any other of the same task does as well.
DEFAULT_MODELS = {
    "segmentation": "nvidia/segformer-b0-finetuned-ade-512-512",
    "depth": "Intel/dpt-large",
    "pose": "usyd-community/vitpose-base-simple",
}
DEFAULT_DETECTOR = "PekingU/rtdetr_r50vd_coco_o365"
PERSON = "person"

# COCO's 17 keypoints, in their order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles
COCO_LIMBS = (
    (0, 1), (0, 2), (1, 3), (2, 4),
    (5, 6), (5, 7), (7, 9), (6, 8), (8, 10),
    (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
)  # fmt: skip


class SegmentationAnnotator:
    """Label maps by a semantic or universal segmentation model.

    Args:
        model: of `AutoModelForSemanticSegmentation` or `AutoModelForUniversalSegmentation`.
        processor: its image processor, with `post_process_semantic_segmentation`.
    """

    def __init__(self, model: torch.nn.Module, processor: Any):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> "SegmentationAnnotator":
        """The model `model_id` of the Hub or a folder; its configuration says which Auto class it needs."""
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForSemanticSegmentation,
            AutoModelForUniversalSegmentation,
        )

        config = AutoConfig.from_pretrained(model_id, **kwargs)
        is_semantic = type(config) in AutoModelForSemanticSegmentation._model_mapping
        auto_class = AutoModelForSemanticSegmentation if is_semantic else AutoModelForUniversalSegmentation
        return cls(
            auto_class.from_pretrained(model_id, **kwargs), AutoImageProcessor.from_pretrained(model_id, **kwargs)
        )

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """int64 label maps `(H, W)`, of each image's own size."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        sizes = [(image.height, image.width) for image in images]
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [labels.cpu().numpy().astype(np.int64) for labels in maps]


class DepthAnnotator:
    """Depth maps by a monocular depth model, in its own unit: inverse depth for DPT, metres for GLPN.

    Args:
        model: of `AutoModelForDepthEstimation`.
        processor: its image processor.
    """

    def __init__(self, model: torch.nn.Module, processor: Any):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> "DepthAnnotator":
        """The model `model_id` of the Hub or a folder."""
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        model = AutoModelForDepthEstimation.from_pretrained(model_id, **kwargs)
        return cls(model, AutoImageProcessor.from_pretrained(model_id, **kwargs))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """float32 depth maps `(H, W)`, of each image's own size."""
        maps = []
        for image in images:  # one by one: processors that keep the proportions give each its own size
            inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
            depth = self.model(**inputs).predicted_depth.float()
            depth = torch.nn.functional.interpolate(
                depth.view(1, 1, *depth.shape[-2:]), (image.height, image.width), mode="bicubic", align_corners=False
            )
            maps.append(depth[0, 0].cpu().numpy())
        return maps


class EdgeAnnotator:
    """Canny edges of the greyscale image, by scikit-image.

    Args:
        sigma: standard deviation of the Gaussian, in pixels; 2 is the original VQGAN's, for its edge condition.
    """

    def __init__(self, sigma: float = 2.0):
        self.sigma = sigma

    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """bool edge maps `(H, W)`, of each image's own size."""
        try:
            from skimage.color import rgb2gray
            from skimage.feature import canny
        except ImportError as error:
            raise ImportError('`annotator="edges"` needs scikit-image: pip install "hf_vq[conditions]".') from error
        return [canny(rgb2gray(np.asarray(image.convert("RGB"))), sigma=self.sigma) for image in images]


class PoseAnnotator:
    """Drawn skeletons of the persons in an image, by a top-down pose model and a detector.

    Args:
        model: of `AutoModelForPoseEstimation`, such as ViTPose, with COCO's 17 keypoints.
        processor: its image processor.
        detector, detector_processor: of `AutoModelForObjectDetection`, with a class "person"; without them the whole
            image is taken for one person's box.
        box_threshold: detections below this score are left out.
        threshold: keypoints below this score are not drawn.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        detector: torch.nn.Module | None = None,
        detector_processor: Any = None,
        box_threshold: float = 0.3,
        threshold: float = 0.3,
    ):
        self.model, self.processor = model.eval(), processor
        self.detector, self.detector_processor = detector, detector_processor
        self.box_threshold, self.threshold = box_threshold, threshold

    @classmethod
    def from_pretrained(
        cls, model_id: str, detector_id: str | None = DEFAULT_DETECTOR, **kwargs: Any
    ) -> "PoseAnnotator":
        """The models of the Hub or of folders; `detector_id=None` takes the whole image for one person's box."""
        from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForPoseEstimation

        parts = [
            AutoModelForPoseEstimation.from_pretrained(model_id, **kwargs),
            AutoImageProcessor.from_pretrained(model_id, **kwargs),
        ]
        if detector_id is not None:
            parts += [
                AutoModelForObjectDetection.from_pretrained(detector_id, **kwargs).eval(),
                AutoImageProcessor.from_pretrained(detector_id, **kwargs),
            ]
        return cls(*parts)

    def __call__(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """RGB pictures of the skeletons on black, of each image's own size; black alone where nobody was found."""
        return [draw_pose(self.keypoints(image), image.size, self.threshold) for image in images]

    @torch.no_grad()
    def keypoints(self, image: Image.Image) -> np.ndarray:
        """float32 `(persons, 17, 3)`: x and y in pixels, and the score, of each keypoint."""
        boxes = self._boxes(image)
        if not len(boxes):
            return np.zeros((0, 17, 3), np.float32)
        inputs = self.processor(image, boxes=[boxes], return_tensors="pt").to(self.model.device)
        if getattr(self.model.config, "backbone_config", None) is not None and hasattr(
            self.model.config.backbone_config, "num_experts"
        ):
            inputs["dataset_index"] = torch.zeros(len(boxes), dtype=torch.int64, device=self.model.device)
        outputs = self.model(**inputs)
        (persons,) = self.processor.post_process_pose_estimation(outputs, boxes=[boxes])
        rows = [np.concatenate([p["keypoints"].cpu(), p["scores"].cpu().reshape(-1, 1)], axis=1) for p in persons]
        return np.stack(rows).astype(np.float32)

    @torch.no_grad()
    def _boxes(self, image: Image.Image) -> np.ndarray:
        """float32 `(persons, 4)`: left, top, width and height in pixels."""
        if self.detector is None:
            return np.array([[0, 0, image.width, image.height]], np.float32)
        inputs = self.detector_processor(images=image, return_tensors="pt").to(self.detector.device)
        outputs = self.detector(**inputs)
        (found,) = self.detector_processor.post_process_object_detection(
            outputs, threshold=self.box_threshold, target_sizes=[(image.height, image.width)]
        )
        names = self.detector.config.id2label
        persons = [number for number, label in enumerate(found["labels"].tolist()) if names[label] == PERSON]
        boxes = found["boxes"].cpu().numpy()[persons]
        boxes[:, 2:] -= boxes[:, :2]
        return boxes.astype(np.float32)


ANNOTATORS = {
    "segmentation": SegmentationAnnotator,
    "depth": DepthAnnotator,
    "edges": EdgeAnnotator,
    "pose": PoseAnnotator,
}


def load_annotator(
    annotator: str | Callable, model_id: str | None = None, device: torch.device | str | None = None
) -> Callable:
    """The annotator that an argument means.

    Args:
        annotator: "segmentation", "depth", "edges" or "pose"; any callable is given back as it is.
        model_id: a model of that task in place of the one in `DEFAULT_MODELS`.
        device: where its models go.

    Raises:
        ValueError: another name, or the model cannot be had.
    """
    if callable(annotator):
        return annotator
    if annotator not in ANNOTATORS:
        raise ValueError(
            f"`annotator` must be a callable or one of {', '.join(map(repr, ANNOTATORS))}, got {annotator!r}."
        )
    if annotator == "edges":
        return EdgeAnnotator()
    model = model_id or DEFAULT_MODELS[annotator]
    try:
        loaded = ANNOTATORS[annotator].from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the annotator {annotator!r} needs the model {model!r}, which cannot be loaded from a folder, the Hub or "
            f"its cache; `model_id` names another. {error}"
        ) from error
    for part in (loaded.model, getattr(loaded, "detector", None)):
        if part is not None and device is not None:
            part.to(device)
    return loaded


def annotated(annotator: Callable, images: Sequence[Image.Image]) -> list:
    """The condition of each image, by an annotator that gives them in a list or in one array.

    Raises:
        ValueError: it gives none, or another number of them.
    """
    made = annotator(images)
    try:
        conditions = list(made)
    except TypeError:
        conditions = None
    if conditions is None or len(conditions) != len(images):
        got = type(made).__name__ if conditions is None else f"{len(conditions)} for {len(images)}"
        raise ValueError(f"`annotator` must give a condition for each image, got {got}.")
    return conditions


def draw_pose(
    keypoints: np.ndarray,
    size: tuple[int, int],
    threshold: float = 0.3,
    limbs: Sequence[tuple[int, int]] = COCO_LIMBS,
) -> Image.Image:
    """Skeletons on a black canvas, each limb and each joint in a colour of its own.

    Args:
        keypoints: `(persons, points, 2)`, x and y in pixels, or with the score as a third value.
        size: width and height of the canvas.
        threshold: points below this score, and limbs that end in one, are left out.
        limbs: pairs of points that are joined.

    Raises:
        ValueError: keypoints of another shape.
    """
    keypoints = np.asarray(keypoints, np.float32)
    if keypoints.ndim != 3 or keypoints.shape[2] not in (2, 3):
        raise ValueError(f"`keypoints` must have shape (persons, points, 2 or 3), got {keypoints.shape}.")
    canvas = Image.new("RGB", size)
    draw = ImageDraw.Draw(canvas)
    width = max(1, round(min(size) / 64))
    for person in keypoints:
        visible = np.isfinite(person).all(axis=1)
        if person.shape[1] == 3:
            visible &= person[:, 2] >= threshold
        for number, (start, end) in enumerate(limbs):
            if max(start, end) < len(person) and visible[start] and visible[end]:
                line = [tuple(person[start, :2]), tuple(person[end, :2])]
                draw.line(line, fill=_colour(number, len(limbs)), width=width)
        for number in np.flatnonzero(visible):
            x, y = person[number, :2]
            draw.ellipse([x - width, y - width, x + width, y + width], fill=_colour(number, len(person)))
    return canvas


def _colour(number: int, count: int) -> tuple[int, int, int]:
    """Colours evenly around the hue circle."""
    import colorsys

    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(number / count, 1.0, 1.0))


__all__ = [
    "DepthAnnotator",
    "EdgeAnnotator",
    "PoseAnnotator",
    "SegmentationAnnotator",
    "annotated",
    "draw_pose",
    "load_annotator",
]
