"""Checkpoints of random weights, stored without the weights that can be drawn again.

The original programs began from `torch.manual_seed(seed)`, and most layers are initialised by `uniform_(-b, b)`, so
their weights are a run of that seed's random numbers between -b and b. Such runs are cut out of a checkpoint:
`drawn.json` says where they stood, and `rest.bin` is what is left. `rebuild` gives the file back byte by byte, which
the checksum proves.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch


LEAST_COUNT = 64  # to describe a shorter run costs more than it saves


def draw(seed: int, drawn_before: int, count: int, bound: float) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    torch.rand(drawn_before, generator=generator)
    return torch.empty(count).uniform_(-bound, bound, generator=generator).numpy().tobytes()


def rebuild_all(golden: Path):
    """Every checkpoint below `golden` that is not there yet, or not as it was."""
    for path in golden.glob("*/drawn.json"):
        description = json.loads(path.read_text())
        file = path.with_name(description["file"])
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != description["sha256"]:
            draft = file.with_name(f"draft-{os.getpid()}")
            draft.write_bytes(rebuild(path.parent))
            draft.replace(file)


def rebuild(folder: Path) -> bytes:
    """The content of the folder's checkpoint."""
    description = json.loads((folder / "drawn.json").read_text())
    rest, parts, position = (folder / "rest.bin").read_bytes(), [], 0
    for start, count, seed, drawn_before, bound in description["drawn"]:
        kept = start - position
        parts += [rest[:kept], draw(seed, drawn_before, count, bound)]
        rest, position = rest[kept:], start + 4 * count
    content = b"".join([*parts, rest])
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise RuntimeError(
            f"{folder / description['file']}: the weights drawn again differ: torch's random numbers changed."
        )
    return content


def store(file: Path, folder: Path, seeds: list[int], numbers: int = 2_000_000):
    """Writes `drawn.json` and `rest.bin` into `folder`: a tensor that stands among the first `numbers` random numbers
    of one of the `seeds` is left out. Writes nothing where few are.
    """
    content, drawn = file.read_bytes(), []
    streams = {seed: _Stream(seed, numbers) for seed in seeds}
    for start, count in _tensors(content):
        weights = np.frombuffer(content, np.float32, count, start)
        for seed, stream in streams.items():
            if found := stream.find(weights):
                drawn.append([start, count, seed, *found])
                break
    position, rest = 0, []
    for start, count, *_ in drawn:
        rest.append(content[position:start])
        position = start + 4 * count
    if 4 * sum(count for _, count, *_ in drawn) < len(content) / 10:
        return
    description = {"file": file.name, "sha256": hashlib.sha256(content).hexdigest(), "drawn": drawn}
    (folder / "rest.bin").write_bytes(b"".join([*rest, content[position:]]))
    (folder / "drawn.json").write_text(json.dumps(description))


def _tensors(content: bytes) -> list[tuple[int, int]]:
    """Position and count of the float32 tensors in a file that `torch.save` wrote."""
    found = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.file_size % 4 == 0 and entry.file_size >= 4 * LEAST_COUNT:
                header = content[entry.header_offset : entry.header_offset + 30]
                name_and_extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                found.append((entry.header_offset + 30 + name_and_extra, entry.file_size // 4))
    return sorted(found)


class _Stream:
    """The random numbers of a seed, 24 bits each, searched by pairs."""

    def __init__(self, seed: int, numbers: int):
        self.seed = seed
        drawn = torch.rand(numbers, generator=torch.Generator().manual_seed(seed)).double().mul(2**24).long().numpy()
        pairs = drawn[:-1] << 24 | drawn[1:]
        self.order = np.argsort(pairs, kind="stable")
        self.pairs = pairs[self.order]

    def find(self, weights: np.ndarray) -> tuple[int, float] | None:
        """How many numbers were drawn before these weights, and their bound."""
        largest, count = float(np.abs(weights).max()), len(weights)
        if not 0.01 < largest <= 1:
            return None
        # the largest of `count` uniform numbers lies this close to the bound, but for one case in e^20
        for fan_in in range(max(1, math.floor((1 - 20 / count) ** 2 / largest**2)), math.floor(1 / largest**2) + 1):
            # as torch computes the bound of weights, and of biases
            for bound in (math.sqrt(3.0) * (math.sqrt(2.0 / 6) / math.sqrt(fan_in)), 1 / math.sqrt(fan_in)):
                first = np.round((weights[:2].astype(np.float64) + bound) / (2 * bound) * 2**24).astype(np.int64)
                for shift in np.ndindex(3, 3):
                    pair = (first[0] + shift[0] - 1) << 24 | (first[1] + shift[1] - 1)
                    place = np.searchsorted(self.pairs, pair)
                    while place < len(self.pairs) and self.pairs[place] == pair:
                        before = int(self.order[place])
                        if draw(self.seed, before, count, bound) == weights.tobytes():
                            return before, bound
                        place += 1
        return None
