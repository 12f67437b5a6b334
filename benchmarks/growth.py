"""How time grows with each size: the exponent of the power of the size that fits the measured times."""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .extraction import measure as measure_extraction
from .extraction import write_images
from .measure import in_subprocess


TITLE = "Growth"
NOTES = """
The fastest of three runs at each size, seconds of the processor; "exponent" is the slope of their logarithms, 1 where
the time is proportional to the size. Sampling is linear in the number of codes until attention over all of them shows.
Extraction is timed by the clock, once: -1 in the number of processes if there are as many free cores.
"""


def quantizer(vectors: int, codes: int) -> Callable[[], object]:
    from hf_vq import VectorQuantizer

    module, latents = VectorQuantizer(codes, 64).eval(), torch.randn(1, 64, 32, vectors // 32)
    return lambda: module(latents)


def gpt(side: int, batch: int) -> Callable[[], object]:
    from hf_vq import VQGPTConfig, VQGPTForCausalLM

    size = {"n_embd": 256, "n_layer": 4, "n_head": 4}
    model = VQGPTForCausalLM(VQGPTConfig(codebook_size=1024, grid_size=(side, side), **size)).eval()
    prompt = model.prepare_condition(batch_size=batch)
    return lambda: model.generate(prompt, do_sample=True)


def pixelsnail(side: int) -> Callable[[], object]:
    from hf_vq import PixelSNAILConfig, PixelSNAILForCausalLM

    size = {"hidden_size": 64, "res_channels": 64, "num_blocks": 2, "num_res_blocks": 2, "codebook_size": 256}
    model = PixelSNAILForCausalLM(PixelSNAILConfig(grid_size=side, **size)).eval()
    prompt = model.prepare_condition(batch_size=1)
    return lambda: model.generate(prompt, do_sample=True)


def tokenizer(side: int) -> Callable[[], object]:
    from hf_vq import VQGANConfig, VQGANModel

    size = {"base_channels": 32, "channel_multiplier": (1, 2, 4), "attn_resolutions": (), "resolution": 64}
    model = VQGANModel(VQGANConfig(latent_channels=32, embed_dim=32, num_embeddings=256, **size)).eval()
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    return lambda: model(pixels)


# what grows: how to build a run of a size, the sizes, and how many things that size stands for
SERIES = {
    "quantizer, latents N (K = 1024)": (lambda n: quantizer(n, 1024), (4096, 16384, 65536), lambda n: n),
    "quantizer, codes K (N = 4096)": (lambda k: quantizer(4096, k), (1024, 4096, 16384), lambda k: k),
    "GPT, codes of a map": (lambda side: gpt(side, 1), (8, 16, 32), lambda side: side**2),
    "GPT, batch (8×8 codes)": (lambda batch: gpt(8, batch), (1, 8, 64), lambda batch: batch),
    "PixelSNAIL, codes of a map": (pixelsnail, (8, 16, 32), lambda side: side**2),
    "VQGAN, pixels of an image": (tokenizer, (64, 128, 256), lambda side: side**2),
}


def run(quick: bool, threads: int) -> list[dict]:
    """A row for each series."""
    rows = []
    for name in SERIES:
        measured = in_subprocess("benchmarks.growth", series=name, threads=threads, quick=int(quick))
        rows.append(
            {
                "time against": name,
                "sizes": ", ".join(map(str, measured["sizes"])),
                "seconds": ", ".join(f"{seconds:.3g}" for seconds in measured["seconds"]),
                "exponent": exponent(measured["sizes"], measured["seconds"]),
            }
        )
    counts, processes = ((512, 1024), (1, 2)) if quick else ((8192, 16384, 32768), (1, 2))
    for name, sizes, each in (
        ("extraction, images (1 process)", counts, [(count, 1) for count in counts]),
        ("extraction, processes", processes, [(counts[-1], number) for number in processes]),
    ):
        seconds = extraction(each)
        shown = {"sizes": ", ".join(map(str, sizes)), "seconds": ", ".join(f"{value:.3g}" for value in seconds)}
        rows.append({"time against": name, **shown, "exponent": exponent(sizes, seconds)})
    return rows


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """The slope of the straight line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


@torch.no_grad()
def measure(name: str, threads: int, quick: bool) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    build, sizes, count = SERIES[name]
    fastest = []
    for size in sizes[:2] if quick else sizes:
        function = build(size)
        times = []
        for _ in range(1 if quick else 4):  # the first one warms up
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        fastest.append(min(times))
    return {"sizes": [count(size) for size in sizes[: len(fastest)]], "seconds": fastest}


def extraction(sizes: list[tuple[int, int]]) -> list[float]:
    """Seconds of encoding a stream to indices, for numbers of images and of processes."""
    seconds = []
    for images, processes in sizes:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "images").mkdir()
            write_images(Path(place) / "images", images)
            seconds.append(images / measure_extraction(images, processes, "indices", Path(place))["images/s"])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures one series and prints JSON.")
    parser.add_argument("--series", choices=list(SERIES), required=True)
    for name in ("threads", "quick"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.series, arguments.threads, bool(arguments.quick))))


if __name__ == "__main__":
    main()
