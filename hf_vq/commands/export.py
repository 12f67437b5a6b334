"""``hf-vq export``: a tokenizer as ONNX graphs."""

import argparse

from .sources import announce, load_tokenizer


def export(options: argparse.Namespace) -> None:
    """Writes `encoder.onnx` and `decoder.onnx` of a tokenizer, and prints how they compare with it."""
    from ..onnx_export import export_onnx, largest_difference

    model = load_tokenizer(options)
    files = export_onnx(model, options.output, options.size)
    difference = largest_difference(model, options.output, options.size)
    found = {"files": [str(file) for file in files], "largest_difference": difference}
    lines = [*found["files"], f"equal indices; largest difference of images {difference:.2g}"]
    announce(options, found, lines)
