"""VQ-Diffusion with fewer steps than it was trained on: how far its samples are from real images, and the time."""

import time
from pathlib import Path

import torch


TITLE = "Steps of VQ-Diffusion"
NOTES = """
The packaged checkpoint, guidance 2, images of the classes of the validation images; distances to those images on
features of MobileNetV2, with the standard error of the kernel distance. The last column is the Fréchet distance to
other samples of 100 steps: what the steps change, beside what a seed does (the row of 100 steps).
"""
CHECKPOINTS = Path(__file__).resolve().parent.parent / "examples"


@torch.no_grad()
def run(quick: bool, threads: int) -> list[dict]:
    """A row for each number of steps."""
    from hf_vq import VQDiffusionImagePipeline
    from hf_vq.evaluation.features import PooledLayer
    from hf_vq.evaluation.generation import compare_images
    from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
    from hf_vq.training.objectives.perceptual import build_perceptual

    torch.set_num_threads(threads)
    data = DataArguments(str(CHECKPOINTS / "data/emoji-64"), label_column="category", resolution=32)
    rows = load_image_dataset(data, "validation")
    count = 32 if quick else len(rows)
    real = torch.stack([rows[i]["pixel_values"] for i in range(count)])
    labels = [int(rows[i]["label"]) for i in range(count)]
    pipe = VQDiffusionImagePipeline.from_pretrained(str(CHECKPOINTS / "checkpoints/emoji-32-vq-diffusion"))
    pipe.set_progress_bar_config(disable=True)
    extractor = PooledLayer(build_perceptual("mobilenet_v2"), 13)

    def draw(steps: int, seed: int) -> tuple[torch.Tensor, float]:
        images, start = [], time.process_time()
        for first in range(0, count, 62):
            output = pipe(
                class_labels=labels[first : first + 62],
                guidance_scale=2.0,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(1000 * seed + first),
                output_type="pt",
            )
            images.append(output.images * 2 - 1)
        return torch.cat(images), (time.process_time() - start) / count

    def distances(reference: torch.Tensor, images: torch.Tensor) -> tuple[float, str]:
        metrics = ("frechet_distance", "kernel_distance")
        frechet, kernel = compare_images(reference, images, extractor, metrics=metrics)
        return frechet.value, f"{kernel.value:.3f} ± {kernel.standard_error:.3f}"

    longest, _ = draw(2 if quick else 100, seed=1)
    table = []
    for steps in (1, 2) if quick else (10, 25, 50, 100):
        images, seconds = draw(steps, seed=0)
        frechet, kernel = distances(real, images)
        to_longest, _ = distances(longest, images)
        row = {"steps": steps, "s/image": seconds, "Fréchet": frechet, "kernel": kernel}
        table.append({**row, "to other 100": to_longest})
    return table
