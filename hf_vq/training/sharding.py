"""Fully sharded training (FSDP2): each process holds its part of the parameters, gradients, optimizer and averages.

The engine is torch's `fully_shard` (Zhao et al. 2023, "PyTorch FSDP", https://arxiv.org/abs/2304.11277), on GPUs and,
by gloo, on CPUs. A run asks for it with `--fsdp full_shard` or by an FSDP configuration (version 2) of `accelerate
launch`.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..distributed import is_distributed


PRECISIONS = {"no": None, "bf16": torch.bfloat16}


# What an FSDP configuration may say here, by the variable that `accelerate launch` puts it in; unset is allowed too.
_ALLOWED = {
    "FSDP_VERSION": ("2",),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "full_shard"),
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap",),
    "FSDP_IGNORED_MODULES": (),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (),
    "FSDP_STATE_DICT_TYPE": ("sharded_state_dict",),
}
_WHY = {
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "a model's blocks are those that it names itself",
    "FSDP_STATE_DICT_TYPE": "checkpoints are sharded, and the trained model is gathered",
}


def take_launchers_wish() -> bool:
    """Whether `accelerate launch` asks for FSDP; Accelerate is told that it does not, since torch is asked here.

    Raises:
        ValueError: for another engine, and for an FSDP configuration that is not of version 2 or has what is not
            offered here.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: use FSDP2, which shards as its stage 3 does, by --fsdp full_shard or by "
            "`accelerate launch --use_fsdp --fsdp_version 2`."
        )
    for name, engine in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "A `parallelism_config`"),
    ):
        if _is_set(name):
            raise ValueError(f"{engine} is not supported: use data parallelism, or FSDP2 by --fsdp full_shard.")
    if not _is_set("ACCELERATE_USE_FSDP"):
        return False
    os.environ.setdefault("FSDP_VERSION", "1")
    for name, allowed in _ALLOWED.items():
        value = os.environ.get(name)
        if value is None or value.lower() in allowed:
            continue
        option = name.lower().replace("transformer_cls", "transformer_layer_cls")
        asked = f"`{option}: {allowed[0]}`" if allowed else f"no `{option}`"
        why = f": {_WHY[name]}" if name in _WHY else ""
        raise ValueError(f"an FSDP configuration must have {asked}, got {value!r}{why}.")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def shard_model(model: nn.Module, device: torch.device, mixed_precision: str) -> None:
    """Cuts the parameters of a model, on its device, over all processes: a group for each block, one for the rest.

    The blocks are the modules whose class is named in the model's `_no_split_modules`, as everywhere in transformers.
    With one process there is nothing to cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mixed_precision not in PRECISIONS:
        raise ValueError(
            f"`mixed_precision` must be one of {', '.join(PRECISIONS)} with fsdp, got {mixed_precision!r}."
        )
    if not is_distributed():
        return
    precision = PRECISIONS[mixed_precision]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    reduced = None if precision is None else torch.float32
    inner = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=reduced)
    outer = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=reduced, output_dtype=reduced)
    for parameter in model.parameters():  # in channels_last they are refused
        parameter.data = parameter.data.contiguous()
    names = set(model._no_split_modules)
    blocks = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    for block in reversed(blocks):  # a block inside another comes first
        fully_shard(block, mesh=mesh, mp_policy=inner, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=outer, reshard_after_forward=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, on every process, which all call this; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _groups(model: nn.Module) -> list:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_gradient_exchange(model: nn.Module, exchanged: bool) -> None:
    """Whether the next backward pass exchanges gradients, or adds them up on each process."""
    for group in _groups(model):
        group.set_requires_gradient_sync(exchanged, recurse=False)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Inside it every process has all parameters, so that it may call the model alone, as often as it wants.

    For inference: what happens to the parameters inside is lost.
    """
    groups = _groups(model)
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield model
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of a model that is not sharded yet, with its buffers and without memory for its parameters."""
    memo = {id(value): nn.Parameter(value.to("meta"), value.requires_grad) for value in model.parameters()}
    memo.update({id(value): value for value in model.buffers()})
    return copy.deepcopy(model, memo)


def gather_model(model: nn.Module, skeleton: nn.Module) -> nn.Module | None:
    """The whole of a sharded model as an ordinary one on the CPU, on process 0; `None` on the others. Called by
    all.
    """
    if not is_distributed():
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    found = skeleton_of(skeleton)
    live = dict(model.named_buffers())
    for name, _ in list(found.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(found.get_submodule(owner), leaf, live[name].detach().clone())
    found.load_state_dict(state, assign=True)
    return found.cpu()


# Checkpoints: one folder of torch.distributed.checkpoint, to which every process writes its part


def save_sharded(folder: Path, models: dict[str, nn.Module], optimizers: dict, emas: dict) -> None:
    """Writes sharded models, their optimizers and averages; `optimizers` holds `(model, optimizer)`. Called by all."""
    import torch.distributed.checkpoint as dcp

    dcp.save(_states(models, optimizers, emas), checkpoint_id=str(folder))


def load_sharded(folder: Path, models: dict[str, nn.Module], optimizers: dict, emas: dict) -> None:
    """Reads what `save_sharded` has written, by any number of processes. Called by all.

    An optimizer keeps the hyper-parameters that it was made with.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    own = {
        name: [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for name, (_, optimizer) in optimizers.items()
    }
    states = _states(models, optimizers, emas)
    dcp.load(states, checkpoint_id=str(folder))
    for name, model in models.items():
        set_model_state_dict(model, states[name])
    for name, (model, optimizer) in optimizers.items():
        set_optimizer_state_dict(model, optimizer, states[name])
        for group, options in zip(optimizer.param_groups, own[name], strict=True):
            group.update(options)
    for name, ema in emas.items():
        ema.load_state_dict(states[name])


def _states(models: dict, optimizers: dict, emas: dict) -> dict:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    states = {name: get_model_state_dict(model) for name, model in models.items()}
    states.update({name: get_optimizer_state_dict(model, optim) for name, (model, optim) in optimizers.items()})
    states.update({name: ema.state_dict() for name, ema in emas.items()})
    return states


__all__ = [
    "gather_model",
    "load_sharded",
    "local",
    "save_sharded",
    "set_gradient_exchange",
    "shard_model",
    "skeleton_of",
    "take_launchers_wish",
    "unsharded",
    "whole",
]
