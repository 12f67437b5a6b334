"""Encoding a large data set: images a second, and how the memory of each process grows.

`python -m benchmarks.extraction` writes 64 parquet files of 32×32 PNGs, and two processes encode them, as a stream, to
indices or to latents.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from .table import markdown


TITLE = "Encoding a data set on several processes"
NOTES = """
Images a second of all processes together, reading and decoding included. The columns `MB at ...` hold the largest
resident memory of a process when so much of the time has passed. The hours are an extrapolation.
"""
FILES = 64
DISTINCT = 4096  # images; the files repeat them, each with a label of its own


def write_images(folder: Path, count: int) -> None:
    """`count` small pictures of rectangles in 64 parquet files."""
    import io

    import datasets
    import numpy as np
    from PIL import Image

    pictures = []
    for number in range(min(DISTINCT, count)):
        generator = np.random.default_rng(number)
        pixels = np.full((32, 32, 3), generator.integers(0, 255, 3), np.uint8)
        for _ in range(3):
            top, left = generator.integers(0, 24, 2)
            pixels[top : top + 8, left : left + 8] = generator.integers(0, 255, 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    per_file = -(-count // FILES)
    for file in range(FILES):
        numbers = range(file * per_file, min((file + 1) * per_file, count))
        rows = {"image": [pictures[n % len(pictures)] for n in numbers], "label": [n % 1000 for n in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{file:05d}-of-{FILES}.parquet")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def encode(rank: int, world: int, folder: Path, kind: str) -> None:
    """One process: encodes its part, and writes how much memory it held at each moment."""
    from hf_vq import VQVAEConfig, VQVAEModel
    from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
    from hf_vq.training.data.indices_cache import write_indices
    from hf_vq.training.data.latents_cache import write_latents

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    config = VQVAEConfig(resolution=32, hidden_size=16, residual_hidden_size=8, embed_dim=8, num_embeddings=512)
    tokenizer = VQVAEModel(config).eval()
    images = load_image_dataset(DataArguments(str(folder / "images"), resolution=[32], streaming=True))
    samples, ended = [], threading.Event()

    def watch():
        while not ended.wait(1.0):
            samples.append(resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    (write_indices if kind == "indices" else write_latents)(tokenizer, images, folder / kind, progress=False)
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    torch.save({"seconds": seconds, "resident": samples or [resident_bytes()]}, folder / f"{kind}-{rank}.pt")
    dist.destroy_process_group()


def measure(count: int, processes: int, kind: str, folder: Path) -> dict:
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(encode, (processes, folder, kind), nprocs=processes)
    found = [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(processes)]
    seconds = max(result["seconds"] for result in found)
    row = {"what": kind, "images": count, "processes": processes, "images/s": count / seconds}
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        at = max(
            series["resident"][min(int(share * len(series["resident"])), len(series["resident"]) - 1)] / 2**20
            for series in found
        )
        row[f"MB at {share:.0%}"] = at
    size = sum(file.stat().st_size for file in (folder / kind).iterdir())
    return {**row, "MB written": size / 2**20, "hours for 10⁶": seconds / count * 1e6 / 3600}


def run(quick: bool, threads: int, count: int = 1_000_000, processes: int = 2) -> list[dict]:
    count = 512 if quick else count
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        write_images(folder / "images", count)
        return [measure(count, processes, kind, folder) for kind in ("indices", "latents")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    print(markdown(run(given.quick, 1, given.count, given.processes)), NOTES, sep="\n")
