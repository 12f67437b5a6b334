"""What a run writes down: means over a window of steps, and `metrics.jsonl`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .checkpointing import write_file_atomically


class MetricWindow:
    """Sums of scalars since the last report, kept on the device so that adding one waits for nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            if value.numel() != 1:
                raise ValueError(f"the metric {name!r} has shape {tuple(value.shape)}: log one number.")
            value = value.reshape(()).to(self.device, self.dtype)
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self, reduce_sum) -> dict[str, float]:
        """The means over window and processes, and an empty window.

        Args:
            reduce_sum: sums a tensor over all processes. Every process must have added the same names.
        """
        names = sorted(self.sums)
        if not names:
            return {}
        totals = torch.stack([self.sums[name] for name in names])
        counts = torch.tensor([self.counts[name] for name in names], dtype=totals.dtype, device=self.device)
        totals, counts = reduce_sum(torch.stack([totals, counts]))
        self.sums, self.counts = {}, {}
        return dict(zip(names, (totals / counts).tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])


class MetricsFile:
    """One JSON object per line, each with its `step`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps, and a last line that was cut off, so that no step stands there twice."""
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            write_file_atomically(self.path, "".join(kept))

    def append(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except json.JSONDecodeError:
        return float("inf")


class Stopwatch:
    """The time of a run, all its starts together, and its speed without the pauses."""

    def __init__(self):
        self.seconds_before = 0.0
        self.samples = 0
        self.start()

    def start(self) -> None:
        self._start = self._window = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the first start, pauses included."""
        return self.seconds_before + time.perf_counter() - self._start

    def take_speed(self) -> float:
        """Samples per second since the last call, without the pauses."""
        now = time.perf_counter()
        speed = self.samples / max(now - self._window, 1e-9)
        self._window, self.samples = now, 0
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count for the speed."""
        start = time.perf_counter()
        yield
        self._window += time.perf_counter() - start
