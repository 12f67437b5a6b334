"""What a run writes down: means over a window of steps, and `metrics.jsonl`."""

import json
from pathlib import Path

import torch

from .checkpointing import write_file_atomically


class MetricWindow:
    """Sums of scalars since the last report, kept on the device so that adding one waits for nothing."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double().cpu() if not torch.is_tensor(value) else value.detach()
            if value.numel() != 1:
                raise ValueError(f"the metric {name!r} has shape {tuple(value.shape)}: log one number.")
            value = value.reshape(()).to(torch.float32 if value.device.type == "mps" else torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self, reduce_sum) -> dict[str, float]:
        """The means over window and processes, and an empty window.

        Args:
            reduce_sum: sums a tensor over all processes. Every process must have added the same names.
        """
        names = sorted(self.sums)
        if not names:
            return {}
        device = next((value.device for value in self.sums.values() if value.device.type != "cpu"), "cpu")
        totals = torch.stack([self.sums[name].to(device) for name in names])
        counts = torch.tensor([self.counts[name] for name in names], dtype=totals.dtype, device=device)
        totals, counts = reduce_sum(torch.stack([totals, counts]))
        self.sums, self.counts = {}, {}
        return dict(zip(names, (totals / counts).tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
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
