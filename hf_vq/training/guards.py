"""What ends a run before its time."""

import math


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
