"""Quantizers in one autoencoder, trained for the same number of steps on the same images: a table.

    python examples/comparison/compare_quantizers.py [--steps 400] [--data DATA] [--seed 0]

The convolutional VQ-VAE of ../vqvae at 32×32 pixels with 8×8 codes; every row has the same batches in the same order,
the same rate and the same initial encoder and decoder, but for the layers that touch a latent of other channels. The
peers' quantizers are those of `vector-quantize-pytorch` (the extra `bench`) and of diffusers, in the same autoencoder;
a row whose package is not installed is left out, which is printed. Writes quantizers.json and quantizers.md after each
row; a second run measures the rows that are missing.
"""

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_vq import VQVAEConfig, VQVAEModel
from hf_vq.evaluation.evaluate import evaluate_tokenizer
from hf_vq.models.modeling_outputs import QuantizerOutput
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


DATA = Path(__file__).resolve().parents[1] / "data/emoji-64"
SIZE = 32
BATCH = 32
CHANNELS = 16  # of a latent, but for FSQ, which has one a level, and BSQ, which has one a bit
RATE = 2e-3
FSQ_LEVELS = {1024: (8, 5, 5, 5), 16384: (8, 8, 8, 6, 5)}  # the FSQ paper's, table 1: 1000 and 15360 codes


class Peer(nn.Module):
    """Another package's quantizer with the interface of ours.

    Args:
        module: the quantizer.
        call: from the module and latents `(B, D, h, w)` to quantized latents, indices `(B, h, w)` and the loss.
    """

    def __init__(self, module: nn.Module, call: Callable):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        quantized, indices, loss = self.call(self.module, latents)
        loss = loss.sum()
        nothing = torch.zeros((), device=latents.device)
        return QuantizerOutput(quantized, indices.long(), loss, codebook_loss=nothing, commitment_loss=loss)


def diffusers_quantizer(num_codes: int) -> Peer:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    def call(module, latents):
        quantized, loss, (_, _, indices) = module(latents)
        return quantized, indices.reshape(latents.shape[0], *latents.shape[2:]), loss

    return Peer(VectorQuantizer(num_codes, CHANNELS, beta=0.25, legacy=False), call)


def lucidrains_ema(num_codes: int) -> Peer:
    """With what its documentation advises against dead codes: k-means, and codes below two uses replaced."""
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(
        dim=CHANNELS,
        codebook_size=num_codes,
        decay=0.99,
        kmeans_init=True,
        threshold_ema_dead_code=2,
        rotation_trick=False,
        commitment_weight=0.25,
        accept_image_fmap=True,
    )
    return Peer(module, lambda module, latents: module(latents))


def lucidrains_simvq(num_codes: int) -> Peer:
    from vector_quantize_pytorch import SimVQ

    module = SimVQ(dim=CHANNELS, codebook_size=num_codes, channel_first=True)
    return Peer(module, lambda module, latents: module(latents))


@dataclass(frozen=True)
class Row:
    """
    Args:
        quantizer, options: ours, by name.
        channels: of a latent, for a number of codes.
        peer: another package's, in place of ours.
        package: what the peer needs.
    """

    quantizer: str = "vq"
    options: Callable[[int], dict] = field(default=lambda num_codes: {})
    channels: Callable[[int], int] = field(default=lambda num_codes: CHANNELS)
    peer: Callable[[int], Peer] | None = None
    package: str | None = None


def codes_of(name: str, num_codes: int) -> int:
    """The codes that a row has in place of `num_codes`."""
    return math.prod(FSQ_LEVELS[num_codes]) if name == "FSQ" else num_codes


ROWS = {
    "EMA (the default)": Row("ema"),
    "EMA, rotation": Row("ema", lambda num_codes: {"gradient_estimator": "rotation"}),
    "EMA, codes from a random start": Row("ema", lambda num_codes: {"kmeans_init": False}),
    "EMA, restarts below half of the mean use": Row("ema", lambda num_codes: {"restart_threshold": 0.5}),
    "EMA, restarts below 2 % of the mean use": Row("ema", lambda num_codes: {"restart_threshold": 0.02}),
    "EMA, neither": Row("ema", lambda num_codes: {"kmeans_init": False, "restart_threshold": 0.02}),
    "gradient": Row("vq"),
    "SimVQ": Row("simvq"),
    "FSQ": Row(
        "fsq", lambda num_codes: {"levels": FSQ_LEVELS[num_codes]}, lambda num_codes: len(FSQ_LEVELS[num_codes])
    ),
    "BSQ": Row("bsq", channels=lambda num_codes: num_codes.bit_length() - 1),
    "IBQ": Row("ibq"),
    "diffusers, gradient": Row(peer=diffusers_quantizer, package="diffusers"),
    "vector-quantize-pytorch, EMA": Row(peer=lucidrains_ema, package="vector_quantize_pytorch"),
    "vector-quantize-pytorch, SimVQ": Row(peer=lucidrains_simvq, package="vector_quantize_pytorch"),
}


def build(name: str, num_codes: int, seed: int = 0) -> VQVAEModel:
    """The autoencoder of a row; the same initial encoder and decoder for every row, but for layers of other shapes."""
    row = ROWS[name]
    config = {"resolution": SIZE, "hidden_size": 64, "residual_hidden_size": 32}
    torch.manual_seed(seed)
    common = VQVAEModel(VQVAEConfig(**config, num_embeddings=1, embed_dim=CHANNELS)).state_dict()
    torch.manual_seed(seed)
    config |= {"num_embeddings": codes_of(name, num_codes), "embed_dim": row.channels(num_codes)}
    model = VQVAEModel(VQVAEConfig(**config, quantizer=row.quantizer, quantizer_kwargs=row.options(num_codes)))
    own = {key: value.shape for key, value in model.state_dict().items() if not key.startswith("quantize.")}
    model.load_state_dict({key: common[key] for key in own if common[key].shape == own[key]}, strict=False)
    if row.peer is not None:
        torch.manual_seed(seed)
        model.quantize = row.peer(num_codes)
    return model


def train(model: VQVAEModel, images: torch.Tensor, steps: int, seed: int = 0) -> float:
    """Trains a model on `images` `(N, 3, H, W)` and their mirror images; the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    variance = images.var()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        model.set_training_step(step, steps)
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        output = model.quantize(model.quant_conv(model.encoder(batch)))
        sample = model.decoder(model.post_quant_conv(output.quantized))
        loss = (sample - batch).square().mean() / variance + output.loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def as_dict(batch: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([one for (one,) in batch])}


def read(data: str, split: str, max_samples: int | None) -> torch.Tensor:
    dataset = load_image_dataset(DataArguments(data, resolution=SIZE, max_samples=max_samples), split)
    return torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])


def table(rows: list[dict]) -> str:
    header = ["quantizer", "codes", "in use", "perplexity", "PSNR", "perceptual", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        cells = [row["quantizer"], str(row["codes"]), f"{100 * row['codebook_usage']:.1f} %"]
        cells += [f"{row['codebook_perplexity']:.0f}", f"{row['psnr']:.2f}", f"{row['perceptual']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def compare(
    names: list[str],
    codes: list[int],
    steps: int,
    output_dir: Path,
    data: str = str(DATA),
    seed: int = 0,
    max_samples: int | None = None,
) -> None:
    images, unseen = (read(data, split, max_samples) for split in ("train", "validation"))
    perceptual = build_perceptual("mobilenet_v2")
    file = output_dir / "quantizers.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    for num_codes in codes:
        for name in names:
            package = ROWS[name].package
            if package is not None and importlib.util.find_spec(package) is None:
                print(f"{name}: left out, {package} is not installed")
                continue
            key = {"quantizer": name, "codes": codes_of(name, num_codes), "steps": steps, "seed": seed, "data": data}
            if any(key.items() <= row.items() for row in rows):
                continue
            model = build(name, num_codes, seed)
            seconds = train(model, images, steps, seed)
            loader = DataLoader(TensorDataset(unseen), batch_size=62, collate_fn=as_dict)
            figures = evaluate_tokenizer(model.eval(), loader, perceptual, progress=False)
            kept = {key: figures[key] for key in ("psnr", "perceptual", "codebook_usage", "codebook_perplexity")}
            row = {**key, "seconds": seconds, **kept}
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            write_file_atomically(file, json.dumps(rows, indent=2) + "\n")
            write_file_atomically(output_dir / "quantizers.md", table(rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison-quantizers"))
    parser.add_argument("--data", default=str(DATA), help="images with a split for validation (default: the emoji)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the start and the batches (default: %(default)s)")
    parser.add_argument("--codes", type=int, nargs="+", default=list(FSQ_LEVELS), choices=list(FSQ_LEVELS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="two steps on few images, for tests")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be positive, got {args.steps}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    quick = {"steps": 2, "max_samples": 32} if args.quick else {"steps": args.steps}
    compare(args.rows, args.codes, output_dir=args.output_dir, data=args.data, seed=args.seed, **quick)


if __name__ == "__main__":
    main()
