"""Tokenizers as ONNX graphs: images to indices, and indices to images, where no torch is."""

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .evaluation.evaluate import evaluation_mode


class _Encoder(nn.Module):
    def __init__(self, tokenizer: PreTrainedModel):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixel_values: torch.Tensor):
        return self.tokenizer.encode(pixel_values).indices


class _Decoder(nn.Module):
    def __init__(self, tokenizer: PreTrainedModel):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, *indices: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode_indices(indices[0] if len(indices) == 1 else indices).sample


@torch.no_grad()
def export_onnx(tokenizer: PreTrainedModel, folder: str | Path, size: int | Sequence[int] | None = None) -> list[Path]:
    """Writes `encoder.onnx` (`pixel_values` `(B, C, H, W)` in [-1, 1] to `indices`) and `decoder.onnx` (back to
    `sample`).

    Any number of images; of one size each. The levels of a hierarchy are `indices_0`, `indices_1`, … from top to
    bottom.

    Args:
        tokenizer: of any kind, on the CPU, in float32.
        folder: where to.
        size: side of the images, or `(height, width)`; by default the one the tokenizer was trained at.

    Returns:
        The two files.

    Raises:
        ValueError: the exporter has fixed the number of images.
        ModuleNotFoundError: `onnx` or `onnxscript` is missing (the extra `export`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = example_images(tokenizer, size)
    with evaluation_mode(tokenizer):
        indices = tokenizer.encode(images).indices
        levels = indices if isinstance(indices, tuple) else (indices,)
        names = ["indices"] if len(levels) == 1 else [f"indices_{level}" for level in range(len(levels))]
        graphs = (
            ("encoder.onnx", _Encoder(tokenizer), (images,), ["pixel_values"], names),
            ("decoder.onnx", _Decoder(tokenizer), levels, names, ["sample"]),
        )
        files = []
        for file, module, inputs, input_names, output_names in graphs:
            batch = {0: torch.export.Dim("batch", min=1)}
            # a module of several arguments gets them as one tuple
            shapes = (batch,) if file == "encoder.onnx" else (tuple(batch for _ in inputs),)
            with _quiet():
                program = torch.onnx.export(
                    module.eval(),  # the wrapper: its tokenizer is already
                    inputs,
                    dynamo=True,
                    dynamic_shapes=shapes,
                    input_names=input_names,
                    output_names=output_names,
                )
            if any(isinstance(one.shape[0], int) for one in program.model.graph.inputs):
                raise ValueError(f"`tokenizer` must take any number of images, but {file} would take {len(images)}.")
            program.save(folder / file)
            files.append(folder / file)
    return files


@torch.no_grad()
def largest_difference(
    tokenizer: PreTrainedModel, folder: str | Path, size: int | Sequence[int] | None = None
) -> float:
    """The largest difference of the images that the graphs of `export_onnx` and the tokenizer make of noise.

    Raises:
        ValueError: the graphs give other indices.
        ModuleNotFoundError: `onnxruntime` is missing (the extra `export`).
    """
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    images = example_images(tokenizer, size, 5)  # not as many as the graphs were made with
    with evaluation_mode(tokenizer):
        indices = tokenizer.encode(images).indices
        levels = indices if isinstance(indices, tuple) else (indices,)
        found = encoder.run(None, {"pixel_values": images.numpy()})
        pairs = zip(map(torch.from_numpy, found), levels, strict=True)
        different = sum(int((codes != level).sum()) for codes, level in pairs)
        if different:
            total = sum(level.numel() for level in levels)
            raise ValueError(
                f"`{folder}/encoder.onnx` must give the tokenizer's indices, got {different} of {total} others."
            )
        names = [one.name for one in decoder.get_inputs()]
        (sample,) = decoder.run(None, dict(zip(names, found, strict=True)))
        return float((torch.from_numpy(sample) - tokenizer.decode_indices(indices).sample).abs().max())


def example_images(tokenizer: PreTrainedModel, size: int | Sequence[int] | None, count: int = 3) -> torch.Tensor:
    """Images of noise in [-1, 1]."""
    size = tokenizer.config.resolution if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, tokenizer.config.in_channels, height, width, generator=generator) * 2 - 1


@contextlib.contextmanager
def _quiet():
    """Without the exporter's account of its progress, and of a torchvision that is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


__all__ = ["export_onnx", "largest_difference"]
