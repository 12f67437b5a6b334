"""Memory and time of a quantizer's training step, beside diffusers', lucidrains' and the bare search."""

import argparse
import importlib.util
import json
from collections.abc import Callable

import torch
from torch import nn

from .measure import in_subprocess, interleaved_seconds, peak_allocated_bytes, peak_resident_bytes


TITLE = "Vector quantization: forward and backward of a training step"
NOTES = """
N latents of D channels against K codes, float32. "peak" is what torch's allocator held above the latents and the
parameters; "RSS" is how far the process's resident memory rose, in a fresh process. "× bare" is the time over that of
`(z @ e.T).argmin(1)`, forward only, taken in turns in the same process; how far its own row is from 1 says how much
the machine's other work disturbs the ratios. All estimate gradients by straight-through; those marked EMA have
moving-average codebooks, the others a gradient.
"""
SIZES = ((1024, 64, 512), (4096, 256, 1024), (16384, 256, 16384))  # N, D, K
QUICK_SIZES = ((1024, 64, 512),)
GRID = 16  # the latents are pictures of 16 x 16 codes


def build_hf_vq(dim: int, num_codes: int) -> tuple[nn.Module, Callable]:
    from hf_vq.models.quantizers.vector_quantizers import VectorQuantizer

    module = VectorQuantizer(num_codes, dim)
    return module, lambda z: (lambda output: (output.quantized, output.loss))(module(z))


def build_hf_vq_ema(dim: int, num_codes: int) -> tuple[nn.Module, Callable]:
    from hf_vq.models.quantizers.vector_quantizers import EMAVectorQuantizer

    module = EMAVectorQuantizer(num_codes, dim)
    return module, lambda z: (lambda output: (output.quantized, output.loss))(module(z))


def build_diffusers(dim: int, num_codes: int) -> tuple[nn.Module, Callable]:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    module = VectorQuantizer(num_codes, dim, beta=0.25, legacy=False)
    return module, lambda z: module(z)[:2]


def build_lucidrains(dim: int, num_codes: int) -> tuple[nn.Module, Callable]:
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(
        dim=dim,
        codebook_size=num_codes,
        decay=0.99,
        rotation_trick=False,
        accept_image_fmap=True,
        commitment_weight=0.25,
    )
    return module, lambda z: (lambda output: (output[0], output[2].sum()))(module(z))


VARIANTS = {
    "hf_vq VectorQuantizer": build_hf_vq,
    "hf_vq EMAVectorQuantizer (EMA)": build_hf_vq_ema,
    "diffusers VectorQuantizer": build_diffusers,
    "lucidrains VectorQuantize (EMA)": build_lucidrains,
}
BARE = "bare matmul + argmin"


def run(quick: bool, threads: int) -> list[dict]:
    """One row for each size and variant; lucidrains' only where `vector-quantize-pytorch` is installed."""
    rows = []
    for vectors, dim, num_codes in QUICK_SIZES if quick else SIZES:
        size = {"vectors": vectors, "dim": dim, "codes": num_codes, "threads": threads}
        for name in (BARE, *VARIANTS):
            if name.startswith("lucidrains") and importlib.util.find_spec("vector_quantize_pytorch") is None:
                continue
            measured = in_subprocess("benchmarks.quantizer", variant=name, **size)
            rows.append(
                {
                    "N, D, K": f"{vectors}, {dim}, {num_codes}",
                    "quantizer": name,
                    "peak MB": measured["allocated"] / 1e6,
                    "RSS MB": None if measured["resident"] is None else measured["resident"] / 1e6,
                    "seconds": measured["seconds"],
                    "× bare": measured["seconds"] / measured["bare_seconds"],
                }
            )
    return rows


def measure(variant: str, vectors: int, dim: int, num_codes: int, threads: int) -> dict:
    """Peak bytes and seconds of one variant, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    latents = torch.randn(vectors // GRID**2, dim, GRID, GRID)
    flat, codebook = latents.permute(0, 2, 3, 1).reshape(-1, dim).contiguous(), torch.randn(num_codes, dim)

    def bare():
        with torch.no_grad():
            return (flat @ codebook.T).argmin(1)

    step = bare if variant == BARE else _training_step(variant, latents, num_codes)
    # threads and libraries start on a small problem, so that the resident size shows this one only
    small = torch.randn(256, 256)
    (small @ small.T).argmin(1)
    if variant != BARE:
        _training_step(variant, torch.randn(1, 8, GRID, GRID), num_codes=8)()
    resident = peak_resident_bytes(step)
    allocated = peak_allocated_bytes(step)
    repetitions = 3 if vectors * num_codes > 2**26 else 30
    seconds = interleaved_seconds({"bare": bare, "step": step}, repetitions)
    return {
        "allocated": allocated,
        "resident": resident,
        "seconds": seconds["step"],
        "bare_seconds": seconds["bare"],
    }


def _training_step(variant: str, latents: torch.Tensor, num_codes: int) -> Callable[[], None]:
    module, call = VARIANTS[variant](latents.shape[1], num_codes)
    module.train()
    latents = latents.requires_grad_()
    upstream = torch.randn_like(latents)

    def step():
        quantized, loss = call(latents)
        torch.autograd.backward([quantized, loss], [upstream, None])
        # last, so that every step begins without gradients and their memory counts
        latents.grad = None
        module.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures one variant and prints JSON.")
    parser.add_argument("--variant", choices=[BARE, *VARIANTS], required=True)
    for name in ("vectors", "dim", "codes", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.variant, arguments.vectors, arguments.dim, arguments.codes, arguments.threads)))


if __name__ == "__main__":
    main()
