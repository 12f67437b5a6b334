"""How much of a large codebook stays in use: plain VQ beside SimVQ and BSQ, on synthetic patches."""

import argparse
import time

import torch
from torch import nn

from hf_vq.models.quantizers.build import build_quantizer
from hf_vq.models.quantizers.codebook_statistics import code_counts, codebook_statistics


TITLE = "Codebook usage at K = 65536"
NOTES = """
A linear autoencoder of 8×8 patches of blurred noise (64 values, 8 channels between; BSQ has one for each of its bits),
trained from scratch on fresh patches at each step. "used" is the share of the K codes that 16·K latents of patches
never seen reach.
"""
EVALUATED = 16  # latents a code
# the entropy of all 16 bits together: groups of 9 leave bits of different groups free to repeat one another
OPTIONS = {"bsq": {"bits_per_group": 16}}
DIM = 8  # channels of a latent, but for BSQ, which has one a bit
SMOOTH = 1  # images are noise, blurred so often


def patches(count: int, generator: torch.Generator) -> torch.Tensor:
    """`(1, 64, count / 64, 64)`: patches of blurred noise, a falling spectrum, of unit variance."""
    images = torch.randn(count, 1, 8 + 2 * SMOOTH, 8 + 2 * SMOOTH, generator=generator, device=generator.device)
    for _ in range(SMOOTH):
        images = nn.functional.avg_pool2d(images, 3, stride=1)
    images = images / images.std()
    return images.flatten(1).t().reshape(1, 64, -1, 64)


def train(
    name: str, num_codes: int, steps: int, batch: int, seed: int = 0, device: str = "cpu", **options: float
) -> dict[str, str | float]:
    """Usage, perplexity and error of one quantizer after `steps` steps; `options` go to the quantizer."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    dim = num_codes.bit_length() - 1 if name == "bsq" else DIM
    quantizer = build_quantizer(name, num_codes, dim, **options).train().to(device)
    encoder, decoder = nn.Conv2d(64, dim, 1).to(device), nn.Conv2d(dim, 64, 1).to(device)
    parameters = [p for module in (encoder, quantizer, decoder) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    began = time.perf_counter()
    for _ in range(steps):
        images = patches(batch, generator)
        output = quantizer(encoder(images))
        loss = (decoder(output.quantized) - images).square().mean() + output.loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    quantizer.eval()
    counts, error = torch.zeros(num_codes, device=device), 0.0
    with torch.no_grad():
        rounds = EVALUATED * num_codes // 8192
        for _ in range(rounds):
            images = patches(8192, generator)
            output = quantizer(encoder(images))
            counts += code_counts(output.indices, num_codes)
            error += (decoder(output.quantized) - images).square().mean().item() / rounds
    statistics = codebook_statistics(counts)
    return {
        "quantizer": name,
        "used": f"{100 * statistics.usage.item():.1f} %",
        "perplexity": round(statistics.perplexity.item()),
        "squared error": error,
        "seconds": seconds,
    }


def run(quick: bool, threads: int) -> list[dict]:
    """One row for each quantizer."""
    torch.set_num_threads(threads)
    codes, steps, batch = (512, 20, 256) if quick else (2**16, 1000, 1024)
    return [train(name, codes, steps, batch, **OPTIONS.get(name, {})) for name in ("vq", "simvq", "bsq")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=int, default=2**16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantizers", nargs="+", default=["vq", "simvq", "bsq"])
    arguments = parser.parse_args()
    for name in arguments.quantizers:
        print(
            train(
                name,
                arguments.codes,
                arguments.steps,
                arguments.batch,
                device=arguments.device,
                **OPTIONS.get(name, {}),
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
