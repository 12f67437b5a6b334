"""Latent diffusion on real images: train a small denoiser of the shipped tokenizer's latents, and look at its samples.

    python examples/demo/demo_latent_diffusion.py [--output_dir outputs/demo-latent-diffusion] [--quick]

Runs the training script of ../vq_latent_diffusion and writes to the output folder: samples.png (a row for each class),
schedulers.png (the same noise with several schedulers and numbers of steps), pipeline/ and metrics.json. A second run
continues where the first stopped, or says what it skips.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from demo import DATA, QUICK, SAMPLES_PER_CLASS, TOKENIZER, print_table, train
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch.utils.data import DataLoader

from hf_vq import VQLatentDiffusionPipeline
from hf_vq.evaluation.features import PooledLayer
from hf_vq.evaluation.generation import compare_images
from hf_vq.evaluation.pictures import labelled_rows, samples_by_class
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


GUIDANCE_SCALE = 2.0
STEPS = 50
FEATURE_LAYER = 13  # of MobileNetV2, 96 features: few pictures suffice
SCHEDULERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler, "Euler": EulerDiscreteScheduler}


def sample(
    pipe: VQLatentDiffusionPipeline,
    classes: list[int],
    per_class: int,
    steps: int = STEPS,
    seed: int = 0,
    eta: float = 1.0,
):
    """Images in [-1, 1], `per_class` of each class, adjacent; with new noise in every step, unless `eta` is 0."""
    output = pipe(
        class_labels=classes,
        num_images_per_prompt=per_class,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=steps,
        eta=eta,
        generator=torch.Generator(pipe.device).manual_seed(seed),
        output_type="pt",
    )
    return output.images * 2 - 1


def sample_sheet(pipe: VQLatentDiffusionPipeline, path: Path) -> float:
    """Write a row of samples for each class to `path`; images per second."""
    classes = sorted(pipe.id2label)
    start = time.perf_counter()
    images = sample(pipe, classes, SAMPLES_PER_CLASS)
    seconds = time.perf_counter() - start
    labels = [label for label in classes for _ in range(SAMPLES_PER_CLASS)]
    samples_by_class(images, labels, [pipe.id2label[label] for label in classes], scale=2).save(path)
    print(f"{path}: {len(images)} samples of {STEPS} steps in {seconds:.1f} s")
    return len(images) / seconds


def scheduler_sheet(pipe: VQLatentDiffusionPipeline, path: Path) -> None:
    """Write the images that each scheduler makes of the same noise, in 5, 10 and 50 steps."""
    own, rows = pipe.scheduler, []
    classes = sorted(pipe.id2label)
    for name, kind in SCHEDULERS.items():
        pipe.scheduler = kind.from_config(own.config)
        for steps in (5, 10, 50):
            rows.append((f"{name}, {steps} steps", sample(pipe, classes, 1, steps, seed=1, eta=0.0)))
    pipe.scheduler = own
    labelled_rows(rows, scale=2).save(path)


def compare(pipe: VQLatentDiffusionPipeline, quick: bool) -> dict:
    """Distances to validation images, classes as frequent as there, beside what training images score."""
    arguments = DataArguments(
        str(DATA), label_column="category", resolution=pipe.vqvae.config.resolution, max_samples=64 if quick else None
    )
    train_images, validation = (load_image_dataset(arguments, split) for split in ("train", "validation"))
    extractor = PooledLayer(build_perceptual("mobilenet_v2"), FEATURE_LAYER)
    batches = list(DataLoader(validation, batch_size=64, collate_fn=collate))
    real = torch.cat([batch["pixel_values"] for batch in batches])
    generated = [sample(pipe, batch["label"].tolist(), 1, seed=100 + i) for i, batch in enumerate(batches)]
    rows = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[: len(validation)]
    seen = torch.stack([train_images[i]["pixel_values"] for i in rows.tolist()])
    metrics = {}
    for name, images in (("", torch.cat(generated).cpu()), ("training_images_", seen)):
        for figure in compare_images(real, images, extractor, metrics=("frechet_distance", "kernel_distance")):
            metrics[f"{name}{figure.label}"] = figure.value
            metrics[f"floor_{figure.label}"] = figure.real_split
    return {**metrics, "num_images": len(real)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-latent-diffusion"))
    parser.add_argument("--quick", action="store_true", help="a minute-long form, for tests")
    args = parser.parse_args(argv)
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = f"vq_latent_diffusion_{'gpu' if device == 'cuda' else 'cpu'}.yaml"
    start = time.perf_counter()

    folder = output_dir / "training"
    quick = QUICK if args.quick else []
    train(
        "vq_latent_diffusion/train_vq_latent_diffusion.py",
        config,
        folder,
        "--tokenizer",
        str(TOKENIZER),
        *quick,
    )
    pipe = VQLatentDiffusionPipeline.from_pretrained(str(folder / "pipeline")).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(output_dir / "pipeline")
    scheduler_sheet(pipe, output_dir / "schedulers.png")
    validation = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = {
        "validation_loss": next(row["validation/loss"] for row in reversed(validation) if "validation/loss" in row),
        "scaling_factor": pipe.vqvae.config.scaling_factor,
        "parameters": pipe.unet.num_parameters(),
        **compare(pipe, args.quick),
        "images_per_second": sample_sheet(pipe, output_dir / "samples.png"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_file_atomically(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)
    print(f"\nPictures, metrics and the pipeline are in {output_dir}.")


if __name__ == "__main__":
    main()
