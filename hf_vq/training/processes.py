"""The processes of a run: what they share, and what they agree on."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .run_arguments import RunArguments
from .sharding import take_launchers_wish


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def build_accelerator(arguments: RunArguments, find_unused_parameters: bool):
    """The `Accelerator` of a run, on one process or with data parallelism."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    if take_launchers_wish():
        arguments.fsdp = "full_shard"
    if arguments.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", arguments.mixed_precision):
        logger.warning(
            "Training with mixed_precision=%s, the run's own argument; the launcher's %s has no effect.",
            arguments.mixed_precision,
            launched,
        )
    _check_tracker(arguments.report_to)
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        cpu=arguments.cpu,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=str(Path(arguments.output_dir) / "logs"),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
    )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"distributed_type={accelerator.distributed_type.value}: runs work on one process, with data parallelism "
            "(accelerate launch --multi_gpu, also with the argument --cpu), or sharded by FSDP2 (--fsdp full_shard)."
        )
    # Accelerate's launcher for the CPU sets the address of a main process, but starts one process only (without MPI).
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "This is a single process. If you asked for more with `accelerate launch --cpu "
            "--num_processes N`: it starts "
            "one unless there is an MPI. Use `accelerate launch --multi_gpu --num_processes N SCRIPT ... --cpu`, or "
            "`torchrun --nproc_per_node N SCRIPT ... --cpu`."
        )
    return accelerator


def _check_tracker(name: str) -> None:
    """Accelerate passes over a tracker whose package is missing; a run that would leave no curves ends here."""
    from accelerate.tracking import get_available_trackers

    if name != "none" and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise ValueError(
            f'report_to={name!r} needs a package that is not installed: `pip install {name}`, or use "none".'
        )


def prepare_model(accelerator: "Accelerator", model: nn.Module) -> nn.Module:
    """Moves a model to the device of this process and prepares it for precision and several processes."""
    prepared = accelerator.prepare_model(model)
    if isinstance(prepared, nn.parallel.DistributedDataParallel):
        # Quantizers synchronise their own buffers, and a broadcast in the middle of a step would change tensors that
        # the backward pass still needs.
        prepared.broadcast_buffers = False
    return prepared


def end_processes(accelerator: "Accelerator", prepared: list[nn.Module]) -> None:
    """Closes the trackers and the group of processes; the prepared models can no more be called, those in them can.

    Whatever `DistributedDataParallel` holds of the group is let go before: its reducer, as the last owner, would wait
    for a thread of gloo while it holds Python's lock, for which that thread may wait to free what it exchanged last.
    """
    for model in prepared:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.reducer = model.logger = model.process_group = None
    accelerator.end_training()


def seed_process(accelerator: "Accelerator", seed: int) -> None:
    """Seeds the generators of Python, numpy and torch, differently in every process."""
    from accelerate.utils import set_seed

    set_seed(seed + accelerator.process_index)
