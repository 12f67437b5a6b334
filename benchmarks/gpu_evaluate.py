"""The figures and the sheets of what `benchmarks.gpu` has trained."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import hf_vq
from benchmarks.gpu import DATA
from hf_vq.evaluation.evaluate_pipeline import evaluate_model
from hf_vq.evaluation.features import PooledLayer
from hf_vq.evaluation.pictures import samples_by_class
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


SAMPLING = {
    "vq_gpt": {"guidance_scale": 2.0},
    "vq_diffusion": {"guidance_scale": 2.0, "num_inference_steps": 50},
    "latent_diffusion": {"guidance_scale": 2.0, "num_inference_steps": 50, "eta": 1.0},
    "vqvae2": {"guidance_scale": (3.0, 1.0), "temperature": (0.9, 0.5), "top_p": (0.95, 0.9)},
}
FIGURES = ("psnr", "ssim", "perceptual", "codebook_usage", "bits_per_index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.quick or not torch.cuda.is_available() else "cuda"
    join_levels(args.work)
    data = DataArguments(str(DATA), label_column="category", resolution=64, max_samples=16 if args.quick else None)
    dataset = load_image_dataset(data, "validation")
    found = {}
    for name, sampling in SAMPLING.items():
        folder = args.work / name / "pipeline"
        if not folder.is_dir():
            continue
        if args.quick and "num_inference_steps" in sampling:
            sampling = {**sampling, "num_inference_steps": 2}
        pipeline = load(folder).to(device)
        sheet(pipeline, dataset.class_names, 1 if args.quick else 8, sampling).save(args.work / f"{name}.png")
        found[name] = figures(pipeline, dataset, args.quick, sampling)
        (args.work / "evaluate.json").write_text(json.dumps(found, indent=2))
    if not found:
        raise ValueError(f"`work` must hold at least one trained pipeline, got none in {args.work}")


def join_levels(work: Path) -> None:
    """Saves the pipeline of VQ-VAE-2, whose parts were trained one by one."""
    parts = {"vqvae": work / "vqvae2/tokenizer", "top": work / "top/prior", "bottom": work / "bottom/prior"}
    if all(path.is_dir() for path in parts.values()):
        hf_vq.VQVAE2Pipeline(
            vqvae=hf_vq.VQVAE2Model.from_pretrained(parts["vqvae"]),
            top_prior=hf_vq.PixelSNAILForCausalLM.from_pretrained(parts["top"]),
            bottom_prior=hf_vq.PixelSNAILForCausalLM.from_pretrained(parts["bottom"]),
        ).save_pretrained(work / "vqvae2/pipeline")


def load(folder: Path) -> DiffusionPipeline:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(hf_vq, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sheet(pipeline: DiffusionPipeline, names: list[str], per_class: int, sampling: dict):
    drawn = pipeline(
        class_labels=list(range(len(names))),
        num_images_per_prompt=per_class,
        generator=torch.Generator(pipeline.device).manual_seed(0),
        **sampling,
    ).images
    return samples_by_class(drawn, [label for label in range(len(names)) for _ in range(per_class)], names)


def figures(pipeline: DiffusionPipeline, dataset, quick: bool, sampling: dict) -> dict:
    network = build_perceptual("mobilenet_v2").to(pipeline.device)
    measured = evaluate_model(
        pipeline,
        dataset,
        perceptual=network,
        extractor=PooledLayer(network, 13),
        label_key="label",
        batch_size=16 if quick else 128,
        progress=False,
        **sampling,
    )
    found = {name: measured[name] for name in FIGURES if name in measured}
    for number, level in enumerate(measured.get("levels", [])):
        found[f"bits_per_index of level {number}"] = level["bits_per_index"]
    for one in measured["distances"]:
        found[one["label"]] = one["value"]
        found[f"{one['label']}, half of the real images against half"] = one["real_split"]
    return found


if __name__ == "__main__":
    main()
