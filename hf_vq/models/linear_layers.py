"""GPT-2's `Conv1D` layers as the `nn.Linear` layers that they compute, for libraries that look for these alone."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def as_linear(model: nn.Module) -> nn.Module:
    """Replaces every `Conv1D` of a model, in place, by an `nn.Linear` of the same weights; returns the model.

    transformers' GPT-2, and with it `VQGPTForCausalLM`, multiplies by `Conv1D`, whose weight `(in, out)` is that of an
    `nn.Linear` transposed. torchao's `quantize_` passes over such layers without a word, so that a quantized VQGPT
    would keep all of its weights but the head's. The model computes what it did; its weights have other shapes, so
    that it is for inference, and not to be saved for `from_pretrained`.

    ```python
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(as_linear(prior), Int8WeightOnlyConfig())
    ```

    Args:
        model: any module; one without a `Conv1D` stays as it is.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, Conv1D):
            inputs, outputs = child.weight.shape
            linear = nn.Linear(inputs, outputs, device="meta", dtype=child.weight.dtype)
            linear.weight = nn.Parameter(child.weight.detach().t().contiguous(), child.weight.requires_grad)
            linear.bias = child.bias
            linear.train(child.training)
            setattr(model, name, linear)
        else:
            as_linear(child)
    return model


__all__ = ["as_linear"]
