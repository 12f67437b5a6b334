"""The metrics of a run: means over a window of steps, `metrics.jsonl`, and the guard that ends a run by them."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..distributed import all_reduced
from ..evaluation.evaluate import codebook_levels
from ..models.quantizers.codebook_statistics import code_counts, codebook_statistics
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

    def take(self, reduce_sum: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
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


class CodeCounts:
    """Counts the codes of a step over its micro-batches and processes, so that the perplexity depends on neither."""

    def __init__(self):
        self.counts: list[torch.Tensor] = []

    def add(self, indices: torch.Tensor | tuple[torch.Tensor, ...], num_embeddings: int) -> None:
        """Takes the codes of one micro-batch, see `TrainingRun.log_codes`."""
        counts = [code_counts(level, num_embeddings) for level in codebook_levels(indices)]
        before = self.counts or [0.0] * len(counts)
        self.counts = [old + new for old, new in zip(before, counts, strict=True)]

    def take(self) -> dict[str, torch.Tensor]:
        """The perplexity of each codebook, and no counts; called by all processes, or by none."""
        if not self.counts:
            return {}
        totals = all_reduced(torch.stack(self.counts))
        self.counts = []
        names = [f"codebook_perplexity_{level}" for level in range(len(totals))]
        names = names if len(totals) > 1 else ["codebook_perplexity"]
        return {name: codebook_statistics(row).perplexity for name, row in zip(names, totals, strict=True)}


class MetricsFile:
    """One JSON object per line, each with its `step`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def truncate_after(self, step: int) -> None:
        """Drops the lines of later steps, and what is no line of metrics, such as a last one that was cut off."""
        if self.path.exists():
            kept = [line for line in self._lines() if _step_of(line) <= step]
            write_file_atomically(self.path, "".join(kept))

    def has_validation(self, step: int) -> bool:
        """Whether there is a line of the validation after `step`."""
        return any("validation/" in line and _step_of(line) == step for line in self._lines())

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)

    def append(self, row: dict) -> None:
        """Adds a line, or, where that fails, none."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            os.truncate(self.path, size)
            raise


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


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


class TrainingStoppedError(RuntimeError):
    """The run cannot go on: a loss or a gradient is not finite, or the codebook has collapsed."""


class MetricGuard:
    """Looks at every row of metrics.

    Args:
        min_perplexity (`float`): the metric `codebook_perplexity`, or the lowest one whose name begins so where a
            tokenizer has several codebooks, must not stay below this; 0 accepts all.
        patience (`int`): so many consecutive rows below it are a collapse.
    """

    def __init__(self, min_perplexity: float, patience: int):
        self.min_perplexity = min_perplexity
        self.patience = patience
        self.low_rows = 0

    def check(self, row: dict) -> str | None:
        """The reason to stop, or `None`."""
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            return f"not finite in the row of metrics of step {row['step']}: {', '.join(bad)}"
        perplexities = [value for name, value in row.items() if name.startswith("codebook_perplexity")]
        if not perplexities:
            return None
        perplexity = min(perplexities)
        self.low_rows = self.low_rows + 1 if perplexity < self.min_perplexity else 0
        if self.low_rows < self.patience:
            return None
        return (
            f"a codebook has collapsed: at step {row['step']} its perplexity is {perplexity:.3f}, and was below "
            f"min_codebook_perplexity={self.min_perplexity} in the last {self.low_rows} rows of metrics"
        )
