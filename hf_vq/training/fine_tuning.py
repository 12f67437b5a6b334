"""Training on a part of a tokenizer that was trained before."""

from torch import nn

from hf_vq.models.autoencoders.modeling_tokenizer import VQTokenizerModel


PARTS = ("all", "decoder")


def train_part(tokenizer: VQTokenizerModel, part: str) -> list[nn.Parameter]:
    """Sets a tokenizer up to train all of it, or its decoder on the codes that it has; returns what is trained.

    With "decoder", all modules but `tokenizer.modules_after_codes()` have no gradients and are in evaluation mode: the
    encoder and the codebook stay as they are, one of moving averages too, and priors on its codes stay valid.

    Args:
        tokenizer: any tokenizer of the package.
        part: "all" or "decoder".

    Raises:
        ValueError: another `part`.
    """
    if part not in PARTS:
        raise ValueError(f"`part` must be one of {PARTS}, got {part!r}.")
    tokenizer.train().requires_grad_(True)
    if part == "decoder":
        for module in tokenizer.children():
            module.eval().requires_grad_(False)
        for module in tokenizer.modules_after_codes():
            module.train().requires_grad_(True)
    return [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]


__all__ = ["PARTS", "train_part"]
