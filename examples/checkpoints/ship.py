"""Makes a checkpoint of this folder from a trained pipeline: half precision, figures, sheets of samples and a card.

    python examples/checkpoints/ship.py outputs/pixelcnn-emoji-32/pipeline --name emoji-32-pixelcnn \
        --about about.md --command "python examples/…" --sampling guidance_scale=2.0

The weights are stored in half precision, and the program ends with an error where that changes a figure. Everything
is measured on the packaged validation images, which no run trains on; `--all-styles` names the folder of the images
that it trained on, if they are those of all styles and skin tones. `samples.webp` has eight samples of each class,
the first that were drawn, and `row.png` the first of each; `nearest.webp` the first two of each class above the
training images that are closest to them in the features of MobileNetV2; `reconstructions.webp` unseen images above
their reconstructions. Those of a tokenizer that another checkpoint has are in its folder (`--tokenizer-of emoji-64`).
A pipeline with a condition tokenizer is measured with `--condition-column`; its `samples.webp` shows conditions, three
samples of each, and the originals. With `--classifier` (examples/demo/image_classifier.py) `rejection.webp` has four
samples of each class that it chose from four times as many.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader, Subset

import hf_vq
from hf_vq.evaluation.evaluate_pipeline import DISTANCES, applicable_metrics, draw_images, evaluate_model
from hf_vq.evaluation.features import FeatureSet, PooledLayer, extract_features
from hf_vq.evaluation.generation import compare_features
from hf_vq.evaluation.inspection import copied_share
from hf_vq.evaluation.pictures import labelled_rows, reconstruction_grid, samples_by_class
from hf_vq.hub import halve_weights
from hf_vq.hub_cards import model_card
from hf_vq.training.data.conditions import condition_values
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = ROOT / "examples/data/emoji-64"
sys.path.insert(0, str(ROOT / "examples/demo"))  # whose measures are imported where they are asked for
DATASET = "emoji-64, {count} training pictures at {size}×{size} pixels with their nine categories, {origin}"
CREDIT = "Noto Emoji © Google (Apache-2.0), Twemoji © Twitter, Inc. and contributors (CC BY 4.0)"
PACKAGED = f"those in `examples/data`. {CREDIT}."
ALL = f"of all styles and skin tones (`examples/data/make_emoji.py`). {CREDIT}, Fluent Emoji © Microsoft (MIT)."
FEATURE_LAYER = 13  # of MobileNetV2, 96 features: few pictures suffice
PER_CLASS = 8
COLUMNS = 12
TIMESTEPS = 10  # drawn for each image in the bound of VQ-Diffusion
SHEET = {"quality": 92, "method": 6}  # of WebP, a third of PNG's bytes
CHOSEN = 4  # samples of each class that a classifier chooses
ACCEPTED = 0.25  # of those it chooses from
SHOWN = (
    "psnr", "ssim", "perceptual", "codebook_perplexity", "codebook_usage", "bits_per_index", "uniform_bits_per_index",
    "bits_per_pixel_dim",
)  # fmt: skip
# what half precision may change: dB and bits, below what the cards show
TOLERANCES = {"psnr": 0.02, "bits_per_index": 0.005}


def has_map(pipeline: DiffusionPipeline) -> bool:
    """Whether a label map or the like is its condition."""
    return getattr(pipeline, "condition_tokenizer", None) is not None


def load(folder: Path) -> DiffusionPipeline:
    """The pipeline of a folder, of the class that its model_index.json names."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(hf_vq, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def likelihood_and_reconstruction(pipeline: DiffusionPipeline, dataset, perceptual=None) -> dict:
    metrics = [name for name in applicable_metrics(pipeline) if name not in ("generation", "agreement")]
    options = {"label_key": "label", "batch_size": 62, "num_timesteps": TIMESTEPS, "progress": False}
    return evaluate_model(pipeline, dataset, metrics, perceptual, **options)


def check_tokenizer(folder: Path, name: str) -> None:
    """Raises unless the tokenizer has the weights of that of the checkpoint `name`, and its reconstructions.

    Its configuration is its own: a latent diffusion's has the factor that its latents are scaled by.
    """
    own, other = (place / "vqvae/model.safetensors" for place in (folder, HERE / name))
    if own.read_bytes() != other.read_bytes():
        raise ValueError(f"--tokenizer-of {name}: {own} must have the weights of {other}.")


def check_half(full: dict, half: dict) -> None:
    """Raises where half precision changes a figure."""
    for name, tolerance in TOLERANCES.items():
        if name in full and abs(full[name] - half[name]) > tolerance:
            raise ValueError(f"half precision changes `{name}` from {full[name]:.4f} to {half[name]:.4f}")


def features(images, extractor) -> torch.Tensor:
    return extract_features(images, extractor, progress=False).features


def measure_samples(pipeline, dataset, training, folder: Path, sampling: dict) -> dict[str, float]:
    """Draws as many images of each class as the data set has; their distances, and the sheets in `folder`."""
    network = build_perceptual("mobilenet_v2")
    extractor = PooledLayer(network, FEATURE_LAYER)
    drawn = torch.cat(list(draw_images(pipeline, dataset, len(dataset), 62, 0, "label", progress=False, **sampling)))
    labels = torch.tensor(dataset.labels)
    classes = range(len(dataset.class_names))
    chosen = torch.cat([(labels == label).nonzero().flatten()[:PER_CLASS] for label in classes])
    scale = 2 if drawn.shape[-1] <= 32 else 1
    row = [("", drawn[chosen[::PER_CLASS]])]
    if has_map(pipeline):
        sheet = labelled_rows(follow_maps(pipeline, dataset, sampling), scale=scale)
        row = [("", maps_of(pipeline, [dataset[i] for i in chosen[::PER_CLASS].tolist()])), *row]
    else:
        sheet = samples_by_class(drawn[chosen], labels[chosen].tolist(), dataset.class_names, scale=scale)
    sheet.save(folder / "samples.webp", **SHEET)
    labelled_rows(row, scale=scale).save(folder / "row.png")

    own = features(drawn.split(62), extractor)
    held_out = features(DataLoader(dataset, batch_size=62, collate_fn=collate), extractor)
    seen = features(DataLoader(training, batch_size=62, collate_fn=collate), extractor)
    shown = chosen.view(-1, PER_CLASS)[:, :2].flatten()
    numbers = torch.cdist(own[shown].double(), seen.double()).topk(2, largest=False).indices
    rows = [("sample", drawn[shown])]
    for place, name in enumerate(("nearest", "second")):
        rows.append((name, torch.stack([training[i]["pixel_values"] for i in numbers[:, place].tolist()])))
    labelled_rows(rows, scale=scale).save(folder / "nearest.webp", **SHEET)

    measured = compare_features(
        FeatureSet(held_out, "mobilenet_v2.layer13"), FeatureSet(own, "mobilenet_v2.layer13"), DISTANCES
    )
    figures = {f"{m.label} ({m.num_generated} against {m.num_real} images)": m.value for m in measured}
    figures["frechet_distance of one half of the validation images to the other"] = measured[0].real_split
    figures["copied_share"] = copied_share(own, seen, held_out)
    return figures


def maps_of(pipeline, samples: list[dict]) -> torch.Tensor:
    """Pictures of the samples' conditions."""
    processor = pipeline.condition_processor
    return processor.postprocess(condition_values(collate(samples)["condition"], processor))


def follow_maps(pipeline, dataset, sampling: dict) -> list[tuple[str, torch.Tensor]]:
    """Rows of a sheet: conditions of the whole data set, three samples of each, and the originals."""
    places = torch.linspace(0, len(dataset) - 1, COLUMNS).long().tolist()
    samples = [dataset[i] for i in places]
    rows = [("condition", maps_of(pipeline, samples))]
    for seed in range(3):
        (drawn,) = draw_images(pipeline, Subset(dataset, places), COLUMNS, COLUMNS, seed, progress=False, **sampling)
        rows.append((f"sample {seed + 1}", drawn))
    return [*rows, ("original", collate(samples)["pixel_values"])]


def agreement_with_masks(pipeline) -> dict[str, float]:
    """How well samples keep the silhouettes of their label maps, and of others', as `make demo-conditional` says."""
    from demo_conditional import MEASURED, agreement, load_pairs

    return agreement(pipeline, load_pairs(pipeline, MEASURED, pipeline.vqvae.config.resolution))


def reject(pipeline, path: Path, folder: Path, names: list[str], sampling: dict) -> dict[str, float]:
    """Stores a classifier with its checkpoint, and what it chooses; the probability that it gives to the classes."""
    from image_classifier import LinearClassifier

    (folder / "classifier").mkdir()
    shutil.copyfile(path, folder / "classifier/model.safetensors")
    results = pipeline.rejection_sample(
        list(range(len(names))),
        LinearClassifier.load(folder / "classifier/model.safetensors", build_perceptual("mobilenet_v2")),
        CHOSEN,
        acceptance_rates=[1.0, ACCEPTED],
        batch_size=round(CHOSEN / ACCEPTED),
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **sampling,
    )
    chosen = results[ACCEPTED]
    scale = 2 if chosen.images.shape[-1] <= 32 else 1
    samples_by_class(chosen.images * 2 - 1, chosen.class_ids, names, scale=scale).save(
        folder / "rejection.webp", **SHEET
    )
    return {
        f"class probability of samples accepted at {rate:g}": float(output.scores.mean())
        for rate, output in results.items()
    }


def reconstruct(pipeline, dataset, path: Path) -> None:
    places = torch.linspace(0, len(dataset) - 1, 2 * COLUMNS).long().tolist()
    images = torch.stack([dataset[i]["pixel_values"] for i in places])
    sample = pipeline.vqvae.decode_indices(pipeline.vqvae.encode(images).indices).sample.clamp(-1, 1)
    reconstruction_grid(images, sample, columns=COLUMNS, scale=2 if images.shape[-1] <= 32 else 1).save(path, **SHEET)


def flat(figures: dict) -> dict[str, float]:
    """The figures of `evaluate_model` that cards show; those of a hierarchy's levels with their number."""
    found = {name: figures[name] for name in SHOWN if name in figures}
    for kind in ("codebooks", "levels"):
        for number, level in enumerate(figures.get(kind, [])):
            for name in ("codebook_usage", "codebook_perplexity", "bits_per_index"):
                if name in level:
                    found[f"{name} of level {number}"] = level[name]
    return found


def data_arguments(
    folder: Path, size: int, max_samples: int | None, condition_column: str | None = None
) -> DataArguments:
    return DataArguments(
        str(folder),
        label_column="category",
        resolution=size,
        max_samples=max_samples,
        conditioning_image_column=condition_column,
    )


@torch.no_grad()
def ship(args: argparse.Namespace) -> None:
    folder = HERE / args.name
    full = load(args.pipeline)
    if has_map(full) != (args.condition_column is not None):
        needed = "must" if has_map(full) else "cannot"
        raise ValueError(f"--condition-column {needed} be given for {args.pipeline}, got {args.condition_column}.")
    shutil.rmtree(folder, ignore_errors=True)
    full.save_pretrained(folder)
    halve_weights(folder)
    shutil.copy(args.pipeline / "vqvae/preprocessor_config.json", folder / "vqvae")
    if args.tokenizer_of:
        check_tokenizer(folder, args.tokenizer_of)
    pipeline = load(folder)
    size = pipeline.vqvae.config.resolution
    arguments = data_arguments(DATA, size, args.max_samples, args.condition_column)
    processor = pipeline.condition_processor if has_map(pipeline) else None
    dataset = load_image_dataset(arguments, "validation", condition_processor=processor)
    training = load_image_dataset(data_arguments(args.all_styles or DATA, size, args.max_samples), "train")
    perceptual = build_perceptual("mobilenet_v2")
    figures = likelihood_and_reconstruction(pipeline, dataset, perceptual)
    check_half(likelihood_and_reconstruction(full, dataset), figures)
    figures = flat(figures) | measure_samples(pipeline, dataset, training, folder, args.sampling)
    if not args.tokenizer_of:
        reconstruct(pipeline, dataset, folder / "reconstructions.webp")
    if has_map(pipeline):
        figures |= agreement_with_masks(pipeline)
    if args.classifier is not None:
        figures |= reject(pipeline, args.classifier, folder, dataset.class_names, args.sampling)
    write_card(folder, pipeline, figures, args)
    print(json.dumps(figures, indent=2))


def write_card(folder: Path, pipeline, figures: dict, args: argparse.Namespace) -> None:
    """README.md in the checkpoint's folder, and the same among the model cards."""
    size = pipeline.vqvae.config.resolution
    count = len(load_image_dataset(data_arguments(args.all_styles or DATA, size, None), "train"))
    card = model_card(
        pipeline,
        f"examples/checkpoints/{folder.name}",
        "cc-by-4.0",
        DATASET.format(count=count, origin=ALL if args.all_styles else PACKAGED, size=size),
        metrics=figures,
        description=args.about.read_text().strip(),
        command=args.command,
        with_code=False,
    )
    card.save(folder / "README.md")
    text = (folder / "README.md").read_text().replace("](", f"](../examples/checkpoints/{folder.name}/")
    (ROOT / "model_cards" / f"{folder.name}.md").write_text(text)


def sampling_pair(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of the trained pipeline")
    parser.add_argument("--name", required=True, help="of the checkpoint")
    parser.add_argument("--about", type=Path, required=True, help="Markdown: what is particular, and the limits")
    parser.add_argument("--command", required=True, help="what trained it")
    parser.add_argument("--sampling", nargs="*", type=sampling_pair, default=[], help="name=JSON, of the call")
    parser.add_argument("--tokenizer-of", help="the checkpoint that shows what this tokenizer reconstructs")
    parser.add_argument("--classifier", type=Path, help="chooses among samples, and is stored with the checkpoint")
    parser.add_argument(
        "--all-styles",
        type=Path,
        help="the folder that make_emoji.py has built of all styles and skin tones, if it was trained on that",
    )
    parser.add_argument("--condition-column", help="the label maps of a pipeline that follows them")
    parser.add_argument("--max-samples", type=int, help="measure on fewer images, for tests")
    parser.add_argument("--card-only", action="store_true", help="write the card anew, with the figures it has")
    args = parser.parse_args(argv)
    args.sampling = dict(args.sampling)
    if args.card_only:
        folder = HERE / args.name
        results = ModelCard.load(folder / "README.md").data.eval_results
        write_card(folder, load(folder), {one.metric_type: one.metric_value for one in results}, args)
    else:
        ship(args)


if __name__ == "__main__":
    main()
