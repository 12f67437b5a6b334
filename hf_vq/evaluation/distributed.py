"""Sums over the processes of a distributed run."""

import torch
import torch.distributed as dist


def all_reduced(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, as a new tensor on the device of `values`.

    `values` itself stays as it is, so that asking twice gives the same answer twice. Without a process group this
    is a copy.
    """
    total = values.clone()
    if not (dist.is_available() and dist.is_initialized()):
        return total
    if dist.get_backend() == "nccl":  # takes CUDA tensors only
        on_gpu = total.cuda()
        dist.all_reduce(on_gpu)
        return on_gpu.to(values.device)
    dist.all_reduce(total)
    return total


def is_main_process() -> bool:
    """Whether this is process 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


__all__ = ["all_reduced", "is_main_process"]
