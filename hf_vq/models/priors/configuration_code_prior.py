"""What the configurations of the autoregressive priors over code indices share."""

from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .code_orders import code_order


class CodeSequenceConfigMixin:
    """
    The ids of a sequence `(condition_length + image_seq_length)` of condition ids and codes; comes before the
    configuration of transformers among the bases.

    Ids below `codebook_size` are codes. Above them lie the condition ids and, last, the null condition, which is also
    the start token of an unconditional prior. All of them are inputs (`input_vocab_size`); the logits are `vocab_size`
    wide.
    """

    order = "raster"
    permutation = None

    def validate_token_ids(self) -> None:
        """Called by transformers: the start token is an input, above the codes. The configurations here check it."""

    def _take_aliases(self, kwargs: dict) -> None:
        """The other spellings of `attribute_map` arrive in `kwargs`, and the checks need them in place."""
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))

    def _check_condition_counts(self, kinds: tuple[str, ...]) -> None:
        if self.codebook_size < 1:
            raise ValueError(f"`codebook_size` must be at least 1, got {self.codebook_size}.")
        if self.condition_type not in kinds:
            raise ValueError(f"`condition_type` must be one of {kinds}, got {self.condition_type!r}.")
        if (self.condition_vocab_size > 0) != (self.condition_type != "unconditional"):
            raise ValueError(
                "`condition_vocab_size` (`num_classes`) must be 0 when unconditional and positive otherwise, got "
                f"{self.condition_vocab_size} with condition_type={self.condition_type!r}."
            )
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"`condition_dropout` must be a probability, got {self.condition_dropout}.")
        if self.condition_dropout > 0 and self.condition_type == "unconditional":
            raise ValueError("`condition_dropout` needs a condition, got condition_type='unconditional'.")

    def _check_names(self) -> None:
        if self.condition_type == "class" and sorted(self.id2label) != list(range(self.condition_vocab_size)):
            raise ValueError(
                f"`id2label` must name the classes 0 to {self.condition_vocab_size - 1}, got {len(self.id2label)} "
                f"names for the ids {sorted(self.id2label)[:5]}…"
            )

    @property
    def image_seq_length(self) -> int:
        """Number of codes of an image."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def condition_token_offset(self) -> int:
        """The id of condition 0."""
        return self.codebook_size

    @property
    def null_class_token_id(self) -> int | None:
        """The id of the null condition, the last one; the start token when unconditional."""
        return self.codebook_size + self.condition_vocab_size

    @property
    def code_order(self) -> list[int]:
        """The raster positions of the grid in the order in which their codes are read."""
        return code_order(self.order, *self.grid_size, self.permutation)


@strict
class CodePriorConfig(CodeSequenceConfigMixin, PreTrainedConfig):
    """
    The codes and the condition of a convolutional autoregressive prior.

    A sequence is one prefix id and the `grid_size[0] * grid_size[1]` codes of a grid, row by row. Ids below
    `codebook_size` are codes; above them lie the classes and, last, the null class, which is also the start token of
    an unconditional prior. `input_vocab_size` counts them all; the logits are of codes only, so that `vocab_size` is
    another spelling of `codebook_size`.

    Args:
        codebook_size (`int`, defaults to 512): number of codes, and the width of the head.
        grid_size (`int` or pair of `int`, defaults to (32, 32)): height and width of the grid of codes.
        condition_type (`str`, defaults to `"unconditional"`): or `"class"`.
        condition_vocab_size (`int`, defaults to 0): number of classes (also spelled `num_classes`), the null class not
            counted; 0 exactly when unconditional.
        condition_dropout (`float`, defaults to 0.0): in training, probability with which an example's class becomes
            the null class, as classifier-free guidance needs (Ho & Salimans, 2022).

    Raises:
        ValueError: if the arguments contradict each other.
    """

    attribute_map = {"num_classes": "condition_vocab_size", "vocab_size": "codebook_size"}

    codebook_size: int = 512
    grid_size: int | list[int] | tuple[int, ...] = (32, 32)
    condition_type: str = "unconditional"
    condition_vocab_size: int = 0
    condition_dropout: float | int = 0.0

    def __post_init__(self, **kwargs):
        names_given = self.id2label is not None
        self._take_aliases(kwargs)
        super().__post_init__(**kwargs)
        self.grid_size = pair_of_sides("grid_size", self.grid_size)
        self._check_condition_counts(("unconditional", "class"))
        if names_given:
            self._check_names()
        if self.condition_type == "unconditional":
            self.bos_token_id = self.null_class_token_id

    @property
    def n_positions(self) -> int:
        """The longest input: a prefix id and all codes but the last, which is never an input."""
        return self.image_seq_length

    @property
    def condition_length(self) -> int:
        """Number of ids in the prefix."""
        return 1

    @property
    def input_vocab_size(self) -> int:
        """Number of input ids: codes, classes and the null class."""
        return self.codebook_size + self.condition_vocab_size + 1


def pair_of_sides(name: str, value: int | Sequence[int]) -> list[int]:
    """The height and width that `value` gives, one number or two, or a ValueError that names the argument."""
    sides = [value] * 2 if isinstance(value, int) else list(value)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"`{name}` must be one or two positive numbers, got {value}.")
    return sides


__all__ = ["CodePriorConfig", "CodeSequenceConfigMixin", "pair_of_sides"]
