"""Draws two data sets whose conditions are known: spheres and boxes with their depth, and stick figures with their
pose.

python examples/data/make_scenes.py --output scenes --size 64 --train 2000 --validation 200

Writes OUTPUT/depth/{train,validation}.parquet with `image` and `depth` (16-bit PNG: 65535 is nearest, as a camera's
disparity, the reciprocal of the distance), and OUTPUT/pose/… with `image`, `pose` (the drawn skeleton) and
`keypoints`, x and y in pixels of COCO's 17 points.
"""

import argparse
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hf_vq.pipelines.annotators import COCO_LIMBS, draw_pose


CAMERA_HEIGHT = 1.0  # over the plane, in the units of all lengths; the camera is the origin and looks along +z
FOCAL_LENGTH = 1.2  # in half sides of the picture
LIGHT = np.array([-0.5, 0.8, -0.6]) / np.linalg.norm([-0.5, 0.8, -0.6])
FAR = 12.0  # where the floor ends and the sky begins


def rays(size: int) -> np.ndarray:
    """Directions `(size, size, 3)` through the pixels, with z = 1, y upwards: a hit at `t` is at depth z = t."""
    steps = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(steps, -steps)
    return np.stack([x / FOCAL_LENGTH, y / FOCAL_LENGTH, np.ones_like(x)], axis=-1)


def hit_plane(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth `(H, W)` of the floor y = -CAMERA_HEIGHT, infinite where there is none, and its normals `(H, W, 3)`."""
    down = np.minimum(directions[..., 1], -1e-9)
    depth = np.where(directions[..., 1] < 0, -CAMERA_HEIGHT / down, np.inf)
    return np.where(depth < FAR, depth, np.inf), np.broadcast_to([0.0, 1.0, 0.0], directions.shape)


def hit_sphere(directions: np.ndarray, center: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """The nearer root of |t d - c|² = r², and the outward normals there."""
    a = (directions**2).sum(-1)
    b = directions @ center
    square = b**2 - a * (center @ center - radius**2)
    depth = np.where(square >= 0, (b - np.sqrt(np.maximum(square, 0))) / a, np.inf)
    points = np.where(np.isfinite(depth), depth, 0)[..., None] * directions
    return depth, (points - center) / radius


def hit_box(directions: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entry into an axis-parallel box by the slab method, and the normals of the faces."""
    safe = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
    first, second = low / safe, high / safe
    near, far = np.minimum(first, second), np.maximum(first, second)
    axis = near.argmax(-1)
    depth = near.max(-1)
    depth = np.where((depth <= far.min(-1)) & (depth > 0), depth, np.inf)
    return depth, -np.eye(3)[axis] * np.sign(safe)


def colour_of(generator: np.random.Generator) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(generator.random(), generator.uniform(0.5, 0.9), generator.uniform(0.6, 1)))


def draw_depth_scene(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 `(size, size, 3)` and its depth float64 `(size, size)`, infinite in the sky."""
    directions = rays(size)
    depth, normals = hit_plane(directions)
    colours = np.broadcast_to(colour_of(generator) * 0.5 + 0.4, directions.shape)
    for _ in range(generator.integers(1, 5)):
        middle = np.array([generator.uniform(-1.6, 1.6), 0, generator.uniform(2.5, 6)])
        radius = generator.uniform(0.3, 0.8)
        if generator.random() < 0.5:
            center = middle + [0, radius - CAMERA_HEIGHT, 0]
            found, normal = hit_sphere(directions, center, radius)
        else:
            extent = radius * np.array([generator.uniform(0.6, 1.2), 0, generator.uniform(0.6, 1.2)])
            low = middle - extent + [0, -CAMERA_HEIGHT, 0]
            high = middle + extent + [0, 2 * radius - CAMERA_HEIGHT, 0]
            found, normal = hit_box(directions, low, high)
        nearer = found < depth
        depth = np.where(nearer, found, depth)
        normals = np.where(nearer[..., None], normal, normals)
        colours = np.where(nearer[..., None], colour_of(generator), colours)
    light = 0.35 + 0.65 * np.clip(normals @ LIGHT, 0, 1)[..., None]
    sky = np.array([0.7, 0.85, 1.0])
    shown = np.where(np.isfinite(depth)[..., None], colours * light, sky)
    return np.rint(shown * 255).clip(0, 255).astype(np.uint8), depth


def disparity_picture(depth: np.ndarray) -> Image.Image:
    """16 bits: 1 / depth from 0 (infinitely far) to 65535 (the nearest point)."""
    disparity = 1 / depth
    return Image.fromarray(np.rint(disparity / disparity.max() * 65535).astype(np.uint16))


def draw_figure(generator: np.random.Generator, size: int) -> tuple[Image.Image, np.ndarray]:
    """A figure on a plain ground, and its keypoints float32 `(17, 2)` in pixels, in COCO's order."""
    unit = size / 8 * generator.uniform(0.8, 1.05)
    hips = np.array([size * generator.uniform(0.4, 0.6), size * generator.uniform(0.52, 0.6)])
    lean = generator.uniform(-0.3, 0.3)
    up, side = np.array([np.sin(lean), -np.cos(lean)]), np.array([np.cos(lean), np.sin(lean)])
    neck = hips + 2 * unit * up
    head = neck + 0.9 * unit * up
    points = np.zeros((17, 2))
    points[0] = head
    for left, sign in ((True, 1), (False, -1)):  # the figure's left is on the viewer's right
        eye, ear, shoulder, elbow, wrist, hip, knee, ankle = np.arange(1, 17, 2) + (0 if left else 1)
        points[eye] = head + unit * (0.15 * sign * side + 0.15 * up)
        points[ear] = head + unit * 0.35 * sign * side
        points[shoulder] = neck + unit * 0.6 * sign * side
        points[hip] = hips + unit * 0.4 * sign * side
        for start, middle, end, spread in ((shoulder, elbow, wrist, 1.2), (hip, knee, ankle, 0.5)):
            angle = sign * generator.uniform(-0.1, spread)
            bend = angle + generator.uniform(-0.6, 0.6) * spread
            length = unit * (0.95 if start == shoulder else 1.25)
            points[middle] = points[start] + length * np.array([np.sin(angle), np.cos(angle)])
            points[end] = points[middle] + length * np.array([np.sin(bend), np.cos(bend)])
    ground, skin, cloth = (
        tuple(int(255 * channel) for channel in colour)
        for colour in (colour_of(generator) * 0.25 + 0.75, np.array([0.9, 0.7, 0.55]), colour_of(generator) * 0.8)
    )
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)
    width = max(2, round(unit * 0.45))
    draw.polygon([tuple(points[i]) for i in (5, 6, 12, 11)], fill=cloth)
    for start, end in COCO_LIMBS:
        if min(start, end) >= 5:
            is_bare = max(start, end) in (9, 10)
            draw.line([tuple(points[start]), tuple(points[end])], fill=skin if is_bare else cloth, width=width)
    radius = 0.5 * unit
    draw.ellipse([*(head - radius), *(head + radius)], fill=skin)
    return image, points.astype(np.float32)


def make_rows(kind: str, count: int, size: int, seed: int) -> list[dict]:
    rows = []
    for number in range(count):
        generator = np.random.default_rng((seed, number))
        if kind == "depth":
            pixels, depth = draw_depth_scene(generator, size)
            rows.append({"image": Image.fromarray(pixels), "depth": disparity_picture(depth)})
        else:
            image, points = draw_figure(generator, size)
            pose = draw_pose(points[None], image.size)
            rows.append({"image": image, "pose": pose, "keypoints": points.tolist()})
    return rows


def main(argv: list[str] | None = None) -> None:
    import datasets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--train", type=int, default=2000, help="how many pictures")
    parser.add_argument("--validation", type=int, default=200)
    args = parser.parse_args(argv)
    pictures = {"image": datasets.Image()}
    features = {
        "depth": datasets.Features({**pictures, "depth": datasets.Image()}),
        "pose": datasets.Features(
            {**pictures, "pose": datasets.Image(), "keypoints": datasets.Array2D((17, 2), "float32")}
        ),
    }
    for kind in features:
        folder = args.output / kind
        folder.mkdir(parents=True, exist_ok=True)
        for seed, split in enumerate(("train", "validation")):
            rows = make_rows(kind, getattr(args, split), args.size, seed)
            datasets.Dataset.from_list(rows, features=features[kind]).to_parquet(folder / f"{split}.parquet")
            print(f"{folder / split}.parquet: {len(rows)} pictures")


if __name__ == "__main__":
    main()
