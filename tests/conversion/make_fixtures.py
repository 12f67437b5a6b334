"""Makes tests/fixtures/golden of what the original programs computed: `python tests/conversion/make_fixtures.py
FOLDER`.

FOLDER holds a folder for each case, with the checkpoint, its configuration, `io.safetensors` and `manifest.json`, and
the folder `published_keys`. No value changes: tensors of a checkpoint that are equal become one, weights that the seed
gives again are left out (`drawn_weights.py`), lists of keys are compressed, and files that no test reads are dropped.
Weights stay float32, since the outputs beside them are those of exactly these.
"""

import gzip
import json
import shutil
import sys
from pathlib import Path

import torch

from hf_vq.conversion.reading import load_checkpoint
from tests.conversion.drawn_weights import store


UNREAD = {"codec_checkpoint.pth", "README.md"}
WITH_EQUAL_TENSORS = {"ldm_vq_uncond/checkpoint.ckpt"}  # weights that their moving average had not left yet


def share_equal_tensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, of which `torch.save` writes those that are equal once."""
    kept = {}
    return {
        key: kept.setdefault((tensor.dtype, tensor.shape, tensor.numpy().tobytes()), tensor)
        for key, tensor in state_dict.items()
    }


def make(source: Path, target: Path):
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or path.name in UNREAD:
            continue
        if path.parent.name == "published_keys":
            place.with_suffix(".json.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        elif path.relative_to(source).as_posix() in WITH_EQUAL_TENSORS:
            checkpoint = load_checkpoint(path)
            torch.save({**checkpoint, "state_dict": share_equal_tensors(checkpoint["state_dict"])}, place)
        else:
            shutil.copyfile(path, place)
        if path.suffix in (".ckpt", ".pt"):
            seed = json.loads((path.parent / "manifest.json").read_text())["seed"]
            store(place, place.parent, [seed, seed + 100])  # VQ-Diffusion's codec has a seed of its own


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(__file__).parents[1] / "fixtures" / "golden")
