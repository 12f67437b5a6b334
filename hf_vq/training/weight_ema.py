"""An exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .sharding import local


class WeightEMA:
    """Keeps a float32 average of a model's trained parameters; everything else is copied.

    At update `n` (from 1) the average becomes `d·a + (1 - d)·w` with `d = min(decay, (1 + n) / (10 + n))`: early
    averages follow the weights closely, so that the random initial weights are forgotten. Buffers (BatchNorm's
    statistics, the codebook of an EMA quantizer) and parameters that are frozen when the object is made are copied
    as they are: they are averages already, or constant. Of a sharded model each process averages its own part.

    Args:
        model (`nn.Module`): the model that is trained; the object keeps a reference to it.
        decay (`float`): between 0 and 1, excluded.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay={decay}: it must lie between 0 and 1, for example 0.9999.")
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self.averages = {
            name: parameter.detach().float().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        self.copies = {
            name: value.detach().clone() for name, value in self._live().items() if name not in self.averages
        }

    def _live(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights that the model has after an optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = self._live()
        torch._foreach_lerp_(
            [local(average) for average in self.averages.values()],
            [local(live[name]).float() for name in self.averages],
            weight=1.0 - decay,
        )
        for name, copy in self.copies.items():
            local(copy).copy_(local(live[name]))

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Inside the context the model has the averaged weights; afterwards its own again, bit for bit."""
        live = self._live()
        own = {name: value.detach().clone() for name, value in live.items()}
        self._write(live, {**self.averages, **self.copies})
        try:
            yield self.model
        finally:
            self._write(live, own)

    @staticmethod
    @torch.no_grad()
    def _write(live: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
        for name, value in live.items():
            local(value).copy_(local(values[name]))

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates, "averages": self.averages, "copies": self.copies}

    def load_state_dict(self, state: dict) -> None:
        for kind in ("averages", "copies"):
            ours, theirs = getattr(self, kind), state[kind]
            if ours.keys() != theirs.keys():
                raise ValueError(
                    f"the saved average has other {kind} than the model: {sorted(ours.keys() ^ theirs.keys())}"
                )
            for name, value in ours.items():
                local(value).copy_(local(theirs[name]))
        self.num_updates = state["num_updates"]
