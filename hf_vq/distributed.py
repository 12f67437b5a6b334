"""Sums and concatenations over the processes of a distributed run."""

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there are several processes; a process group of one changes nothing."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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


def all_gathered(rows: torch.Tensor | None) -> torch.Tensor:
    """The rows of all processes, `(n, ...)` each with its own n, concatenated by rank; `None` has no rows.

    Raises:
        ValueError: no process has any row.
    """
    parts = [rows]
    if is_distributed():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
    parts = [part for part in parts if part is not None]
    if not parts:
        raise ValueError("no process has collected anything")
    return torch.cat(parts)


__all__ = ["all_gathered", "all_reduced", "is_distributed", "is_main_process"]
