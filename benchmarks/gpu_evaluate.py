"""The figures and the sheets of what `benchmarks.gpu` has trained."""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.gpu import DATA
from hf_vq import VQAutoregressivePipeline
from hf_vq.evaluation.evaluate_pipeline import evaluate_model
from hf_vq.evaluation.features import PooledLayer
from hf_vq.evaluation.pictures import reconstruction_grid, samples_by_class
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.quick or not torch.cuda.is_available() else "cuda"
    pipeline = VQAutoregressivePipeline.from_pretrained(args.work / "vq_gpt/pipeline").to(device)
    pipeline.set_progress_bar_config(disable=True)
    data = DataArguments(str(DATA), label_column="category", resolution=64, max_samples=16 if args.quick else None)
    dataset = load_image_dataset(data, "validation")
    rows = [dataset[number]["pixel_values"] for number in range(0, len(dataset), max(1, len(dataset) // 24))]
    images = torch.stack(rows[:24]).to(device)
    with torch.no_grad():
        samples = pipeline.vqvae.decode(pipeline.vqvae.encode(images).latents).sample.clamp(-1, 1)
    reconstruction_grid(images, samples, columns=12).save(args.work / "reconstructions.png")
    names = dataset.class_names
    drawn = pipeline(
        class_labels=list(range(len(names))),
        num_images_per_prompt=2 if args.quick else 8,
        guidance_scale=2.0,
        generator=torch.Generator(device).manual_seed(0),
    ).images
    labels = [label for label in range(len(names)) for _ in range(len(drawn) // len(names))]
    samples_by_class(drawn, labels, names).save(args.work / "samples.png")
    network = build_perceptual("mobilenet_v2").to(device)
    figures = evaluate_model(
        pipeline,
        dataset,
        perceptual=network,
        extractor=PooledLayer(network, 13),
        label_key="label",
        batch_size=16 if args.quick else 128,
        progress=False,
        guidance_scale=2.0,
    )
    (args.work / "evaluate.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
