"""Training on a part of a tokenizer that was trained before."""

from torch import nn


PARTS = ("all", "decoder")


def train_part(tokenizer: nn.Module, part: str) -> list[nn.Parameter]:
    """Sets a tokenizer up to train all of it, or its decoder on the codes that it has; returns what is trained.

    With "decoder", all modules but `decoder` and `post_quant_conv` have no gradients and are in evaluation mode: the
    encoder and the codebook stay as they are, one of moving averages too, and priors on its codes stay valid.

    Args:
        tokenizer: a tokenizer of one level.
        part: "all" or "decoder".

    Raises:
        ValueError: another `part`, or a tokenizer without those modules.
    """
    if part not in PARTS:
        raise ValueError(f"`part` must be one of {PARTS}, got {part!r}.")
    tokenizer.train().requires_grad_(True)
    if part == "decoder":
        if not hasattr(tokenizer, "post_quant_conv"):
            raise ValueError(f'`part` must be "all" for {type(tokenizer).__name__}, whose decoder is not apart.')
        for name, module in tokenizer.named_children():
            if name not in ("decoder", "post_quant_conv"):
                module.eval().requires_grad_(False)
    return [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]


__all__ = ["PARTS", "train_part"]
