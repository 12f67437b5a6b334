"""What a run trains and saves: its models, optimizers, averages of weights, and whatever else it has registered."""

from pathlib import Path

import torch
from torch import nn

from .checkpointing import get_buffers, load_parts, save_parts, size_of_parts
from .sharding import load_sharded, save_sharded
from .weight_ema import WeightEMA


class RunParts:
    """The parts of a run, each with a name of its own.

    Attributes:
        models, optimizers, emas, states (`dict`): by name; `emas` by that of the model.
        skeletons (`dict[str, nn.Module]`): of the models that are sharded, see `hf_vq.training.sharding`.
        scaler (`torch.amp.GradScaler` or `None`): of fp16.
    """

    def __init__(self):
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.emas: dict[str, WeightEMA] = {}
        self.states: dict[str, object] = {}
        self.skeletons: dict[str, nn.Module] = {}
        self.scaler: torch.amp.GradScaler | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.models or name in self.optimizers or name in self.states

    def whole(self) -> dict[str, object]:
        """What one process writes for all."""
        parts = {**self.models, **self.optimizers, **self.states}
        parts.update({f"{name}-ema": ema for name, ema in self.emas.items()})
        if self.scaler is not None:
            parts["grad_scaler"] = self.scaler
        sharded = {name for kind in self.sharded() for name in kind}
        return {name: part for name, part in parts.items() if name not in sharded}

    def sharded(self) -> tuple[dict, dict, dict]:
        """What every process writes its share of: models, `(model, optimizer)`, and averages, by name."""
        models = {name: self.models[name] for name in self.skeletons}
        owners = {parameter: model for model in models.values() for parameter in model.parameters()}
        optimizers = {
            name: (owners[first], optimizer)
            for name, optimizer in self.optimizers.items()
            if (first := optimizer.param_groups[0]["params"][0]) in owners
        }
        return models, optimizers, {f"{name}-ema": self.emas[name] for name in models if name in self.emas}

    def own_buffers(self) -> dict[str, dict]:
        """The buffers of the models that are not sharded: BatchNorm's statistics, for one, are each process's own."""
        return get_buffers({name: part for name, part in self.models.items() if name not in self.skeletons})

    def num_bytes(self) -> int:
        """About how many bytes `save` writes, over all processes."""
        models, optimizers, emas = self.sharded()
        sharded = {**models, **{name: optimizer for name, (_, optimizer) in optimizers.items()}, **emas}
        return size_of_parts({**self.whole(), **sharded})

    def save(self, folder: Path, is_main_process: bool) -> None:
        """Writes the parts; called by every process."""
        if self.skeletons:
            save_sharded(folder / "sharded", *self.sharded())
        if is_main_process:
            save_parts(folder, self.whole())

    def load(self, folder: Path) -> None:
        """Reads what `save` has written; called by every process.

        Raises:
            ValueError: the folder holds other parts, or they were sharded and these are not, or the reverse.
        """
        if (folder / "sharded").exists() != bool(self.skeletons):
            raise ValueError(
                f"the checkpoint {folder} was written {'without' if self.skeletons else 'with'} fsdp=full_shard: "
                "continue it in the same way."
            )
        load_parts(folder, self.whole())
        if self.skeletons:
            load_sharded(folder / "sharded", *self.sharded())


__all__ = ["RunParts"]
