"""ValueErrors for what a scheduler of codes is called with."""

import torch

from ..argument_checks import check_real


def check_indices(name: str, indices: torch.Tensor, highest: int, shape: torch.Size | None = None):
    """`indices` must be int64 `(B, *)`, of `shape` where it is given, and lie in 0…`highest`."""
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64 or indices.ndim < 2:
        got = (
            f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, torch.Tensor) else type(indices).__name__
        )
        raise ValueError(f"`{name}` must be an int64 tensor of shape (B, *), got {got}.")
    if shape is not None and indices.shape != shape:
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(indices.shape)}.")
    if indices.numel() == 0:
        raise ValueError(f"`{name}` must hold at least one index, got shape {tuple(indices.shape)}.")
    lowest_found, highest_found = torch.stack(indices.aminmax()).tolist()  # one wait for an accelerator, not two
    if lowest_found < 0 or highest_found > highest:
        raise ValueError(f"`{name}` must hold indices in 0…{highest}, got {lowest_found} to {highest_found}.")


def check_predictions(name: str, predictions: torch.Tensor, sample: torch.Tensor, num_embeddings: int):
    """`predictions` must be floating and have a value for each code at each position of `sample`."""
    expected = (*sample.shape, num_embeddings)
    if not isinstance(predictions, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor of shape {expected}, got {type(predictions).__name__}.")
    if not predictions.is_floating_point() or tuple(predictions.shape) != expected:
        raise ValueError(
            f"`{name}` must be floating and of shape {expected}, the codes last, got {predictions.dtype} of shape "
            f"{tuple(predictions.shape)}."
        )


def check_distributions(name: str, values: torch.Tensor, in_training: bool = False):
    """`values` `(..., K)`, a softmax or its logarithm, must come from logits that make a distribution of each row.

    One NaN or infinity among the logits of a row, or nothing but -inf, makes NaN of all its probabilities, so that one
    of them tells. `in_training`, an accelerator is not waited for: the loss is NaN then, which a training run looks
    at, and with float16 some steps overflow that its loss scale is there for.
    """
    if in_training and values.device.type != "cpu":
        return
    if values[..., 0].isnan().any():
        raise ValueError(f"`{name}` must hold logits of which at least one is finite and none is NaN.")


def check_timesteps(
    name: str, timesteps: int | torch.LongTensor, batch_size: int, lowest: int, highest: int
) -> torch.LongTensor:
    """An int, or ints `(B,)`, in `lowest`…`highest`, as int64 `(B,)` on the CPU."""
    timesteps = torch.as_tensor(timesteps).cpu()
    if timesteps.dtype not in (torch.int64, torch.int32) or timesteps.shape not in ((), (1,), (batch_size,)):
        raise ValueError(
            f"`{name}` must be an int or {batch_size} of them, one for each sample, got {timesteps.dtype} of shape "
            f"{tuple(timesteps.shape)}."
        )
    if (timesteps < lowest).any() or (timesteps > highest).any():
        raise ValueError(f"`{name}` must lie in {lowest}…{highest}, got {timesteps.tolist()}.")
    return timesteps.long().expand(batch_size)


def check_rate(truncation_rate: float) -> float:
    """`truncation_rate` as a float, which must be the mass of a nucleus, and one that float32 can tell from 0."""
    return check_real("truncation_rate", truncation_rate, minimum=1e-6, maximum=1)


def check_generators(generator: torch.Generator | list[torch.Generator] | None, batch_size: int):
    """`generator` must be None, a `torch.Generator`, or a list with one for each of `batch_size` samples."""
    generators = generator if isinstance(generator, list) else [generator]
    if any(not isinstance(g, torch.Generator) for g in generators if generator is not None):
        raise ValueError("`generator` must be a torch.Generator or a list of them.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must hold one torch.Generator for each of {batch_size} samples, got {len(generator)}."
        )


__all__ = [
    "check_distributions",
    "check_generators",
    "check_indices",
    "check_predictions",
    "check_rate",
    "check_timesteps",
]
