"""The one meaning of several processes: sums, concatenations and agreements over a distributed run."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there are several processes; a process group of one changes nothing."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def num_processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this is process 0, or the only one."""
    return not is_distributed() or dist.get_rank() == 0


def all_reduced(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, as a new tensor on the device of `values`.

    `values` itself stays as it is, so that asking twice gives the same answer twice. With one process this is a
    copy.
    """
    total = values.clone()
    if not is_distributed():
        return total
    if dist.get_backend() == "nccl":  # takes CUDA tensors only
        on_gpu = total.cuda()
        dist.all_reduce(on_gpu)
        return on_gpu.to(values.device)
    dist.all_reduce(total)
    return total


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(context, values: torch.Tensor) -> torch.Tensor:
        return all_reduced(values)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduced(gradient)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, whose gradient is the sum of theirs.

    A loss that it goes into is one of all processes' data; where their gradients are averaged afterwards, each
    parameter has the gradient that one process with all the data would give it.
    """
    return _SumOverProcesses.apply(values) if is_distributed() else values


def all_gathered(rows: torch.Tensor | None) -> torch.Tensor:
    """The rows of all processes, `(n, ...)` each with its own n, concatenated by rank; `None` has no rows.

    Raises:
        ValueError: no process has any row.
    """
    parts = [part for part in gathered(rows) if part is not None]
    if not parts:
        raise ValueError("no process has collected anything")
    return torch.cat(parts)


def from_main_process(value: Any) -> Any:
    """The value that process 0 has, on every process; picklable, and called by all of them."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def union_over_processes(names: set[str]) -> set[str]:
    """The names that any process has, on every process; called by all of them."""
    return set().union(*gathered(names))


def gathered(value: Any) -> list:
    """The values of all processes by rank, on every process; picklable, and called by all of them."""
    if not is_distributed():
        return [value]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def maxima_over_processes(values: Sequence[int]) -> list[int]:
    """The largest of each value over all processes, on every process; called by all of them."""
    if not is_distributed():
        return [int(value) for value in values]
    maxima = torch.tensor([int(value) for value in values])
    if dist.get_backend() == "nccl":
        maxima = maxima.cuda()
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return maxima.tolist()


def share_of_process(rows: Sequence) -> Sequence:
    """The run of rows that this process takes of `rows`, in order of the ranks.

    Together the processes take every row once, and what they find, concatenated by rank, is in the order of `rows`.
    The shares differ in length by at most one, the first is the longest, and some may be empty.
    """
    if not is_distributed():
        return rows
    rank, count = dist.get_rank(), dist.get_world_size()
    first, end = (-(-len(rows) * index // count) for index in (rank, rank + 1))
    return rows[first:end]


__all__ = [
    "all_gathered",
    "all_reduced",
    "from_main_process",
    "gathered",
    "is_distributed",
    "is_main_process",
    "maxima_over_processes",
    "num_processes",
    "share_of_process",
    "sum_over_processes",
    "union_over_processes",
]
