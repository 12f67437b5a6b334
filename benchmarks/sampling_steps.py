"""VQ-Diffusion with fewer steps than it was trained on: how far its samples are from real images, and the time."""

import math
import time
from pathlib import Path

import torch


TITLE = "Steps of VQ-Diffusion"
NOTES = """
The packaged checkpoint, guidance 2, images of the classes of the validation images; distances to those images on
features of MobileNetV2, with the standard error of the kernel distance. "to other 100" is the Fréchet distance to
other samples of 100 steps: what the steps change, beside what a seed does (the row of 100 steps). "bits" is the bound
of the chain of so many steps, without guidance, for each code of the validation images, with the standard error over
images.
"""
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@torch.no_grad()
def run(quick: bool, threads: int) -> list[dict]:
    """A row for each number of steps."""
    from hf_vq import VQDiffusionImagePipeline
    from hf_vq.evaluation.diffusion_likelihood import DiffusionLikelihood
    from hf_vq.evaluation.evaluate_pipeline import draw_images
    from hf_vq.evaluation.features import PooledLayer
    from hf_vq.evaluation.generation import compare_images
    from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
    from hf_vq.training.objectives.perceptual import build_perceptual

    torch.set_num_threads(threads)
    count = 32 if quick else None
    data = DataArguments(
        str(EXAMPLES / "data/emoji-64"), label_column="category", resolution=64, max_samples=count, cache_images=True
    )
    rows = load_image_dataset(data, "validation")
    real = torch.stack([row["pixel_values"] for row in rows])
    pipe = VQDiffusionImagePipeline.from_pretrained(str(EXAMPLES / "checkpoints/emoji-64-vq-diffusion"))
    extractor = PooledLayer(build_perceptual("mobilenet_v2"), 13)

    def draw(steps: int, seed: int) -> torch.Tensor:
        sampling = {"guidance_scale": 2.0, "num_inference_steps": steps}
        return torch.cat(list(draw_images(pipe, rows, len(rows), 62, seed, "label", progress=False, **sampling)))

    def distances(reference: torch.Tensor, images: torch.Tensor) -> tuple[float, str]:
        metrics = ("frechet_distance", "kernel_distance")
        frechet, kernel = compare_images(reference, images, extractor, metrics=metrics)
        return frechet.value, f"{kernel.value:.3f} ± {kernel.standard_error:.3f}"

    codes, labels = pipe.vqvae.encode(real).indices, torch.tensor(rows.labels)

    def bound(steps: int) -> str:
        generator = torch.Generator().manual_seed(0)
        likelihood = DiffusionLikelihood(
            pipe.transformer, pipe.scheduler, generator=generator, num_inference_steps=steps
        )
        bits = -likelihood.log_likelihood(codes, labels) / math.log(2) / codes[0].numel()
        return f"{float(bits.mean()):.3f} ± {float(bits.std()) / len(bits) ** 0.5:.3f}"

    longest = draw(2 if quick else 100, seed=1)
    table = []
    for steps in (1, 2) if quick else (10, 25, 50, 100):
        start = time.process_time()
        images = draw(steps, seed=0)
        seconds = (time.process_time() - start) / len(rows)
        frechet, kernel = distances(real, images)
        row = {"steps": steps, "s/image": seconds, "Fréchet": frechet, "kernel": kernel}
        table.append({**row, "to other 100": distances(longest, images)[0], "bits": bound(steps)})
    return table
