"""Configuration of the autoregressive prior over code indices."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config


CONDITION_TYPES = ("unconditional", "class", "codes")


@strict
class VQGPTConfig(GPT2Config):
    """
    Configuration of [`VQGPTForCausalLM`], a GPT-2 over the code indices of an image tokenizer, read row by row.

    A sequence is a condition prefix of `condition_length` ids followed by the `grid_size[0] * grid_size[1]` codes of an
    image. Ids below `codebook_size` are codes; above them lie the condition ids and, last, the null condition:

    | condition_type    | prefix                                | ids                                                     |
    |-------------------|---------------------------------------|---------------------------------------------------------|
    | `"unconditional"` | one start token                       | start `codebook_size`                                   |
    | `"class"`         | one class id                          | class c: `codebook_size + c`, null: the last id         |
    | `"codes"`         | `condition_length` codes, e.g. of     | code c: `codebook_size + c`, null: the last id          |
    |                   | another tokenizer's segmentation map  |                                                         |

    With `share_condition_embedding=True`, the convention of the original VQGAN checkpoints, condition `c` uses the very
    embedding of code `c`, the start token is id 0, and there is no null condition.

    The fields of `GPT2Config` that are not listed keep their meaning; `n_embd`, `n_layer`, `n_head` and `n_positions` may
    also be spelled `hidden_size`, `num_hidden_layers`, `num_attention_heads` and `max_position_embeddings`.

    Args:
        codebook_size (`int`, defaults to 1024): number of codes of the image tokenizer, and the width of the head.
        grid_size (`int` or pair of `int`, defaults to (16, 16)): height and width of the grid of codes.
        condition_type (`str`, defaults to `"unconditional"`): one of the table above.
        condition_vocab_size (`int`, defaults to 0): number of classes (also spelled `num_classes`) or of condition codes,
            the null condition not counted; 0 exactly when unconditional.
        condition_length (`int`, defaults to 1): number of ids in the prefix; more than 1 only for `"codes"`.
        share_condition_embedding (`bool`, defaults to `False`): condition ids reuse the codes' embeddings.
        n_unmasked (`int`, defaults to 0): the first `n_unmasked` positions, all within the prefix, attend to each other
            in both directions.
        pkeep (`float`, defaults to 1.0): in training, each input code is replaced by a uniformly random one with
            probability `1 - pkeep` (Esser et al., "Taming Transformers", 2021, their code's `pkeep`).
        condition_dropout (`float`, defaults to 0.0): in training, probability with which an example's whole prefix becomes
            the null condition, as classifier-free guidance needs (Ho & Salimans, 2022).
        vocab_size (`int`, *optional*): rows of the embedding; derived, only needed by shared embeddings that have more.
        n_positions (`int`, *optional*): rows of the position table. The last code is never an input, so the default is
            `condition_length + image_seq_length - 1`.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    model_type = "hf_vq_gpt"
    attribute_map = {**GPT2Config.attribute_map, "num_classes": "condition_vocab_size"}

    codebook_size: int = 1024
    grid_size: int | list[int] | tuple[int, ...] = (16, 16)
    condition_type: str = "unconditional"
    condition_vocab_size: int = 0
    condition_length: int = 1
    share_condition_embedding: bool = False
    n_unmasked: int = 0
    pkeep: float | int = 1.0
    condition_dropout: float | int = 0.0

    vocab_size: int | None = None
    n_positions: int | None = None
    n_embd: int = 512
    n_layer: int = 12
    n_head: int = 8
    activation_function: str = "gelu"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        names_given = self.id2label is not None
        # The other spellings of attribute_map arrive here, and the checks below need them in place.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        super().__post_init__(**kwargs)
        self._check_condition()
        self._check_sequence()
        if names_given and self.condition_type == "class":
            if sorted(self.id2label) != list(range(self.condition_vocab_size)):
                raise ValueError(
                    f"`id2label` must name the classes 0 to {self.condition_vocab_size - 1}, got {len(self.id2label)} "
                    f"names for the ids {sorted(self.id2label)[:5]}…"
                )
        for name in ("tie_word_embeddings", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` must be False: the embedding is wider than the head, and it is decoder-only."
                )
        if self.condition_type == "unconditional":
            self.bos_token_id = 0 if self.share_condition_embedding else self.null_class_token_id

    def _check_condition(self):
        if self.condition_type not in CONDITION_TYPES:
            raise ValueError(f"`condition_type` must be one of {CONDITION_TYPES}, got {self.condition_type!r}.")
        if self.codebook_size < 1:
            raise ValueError(f"`codebook_size` must be at least 1, got {self.codebook_size}.")
        if self.condition_length < 1 or (self.condition_length > 1 and self.condition_type != "codes"):
            raise ValueError(
                f"`condition_length` must be 1 for condition_type={self.condition_type!r} (at least 1 for 'codes'), "
                f"got {self.condition_length}."
            )
        if (self.condition_vocab_size > 0) != (self.condition_type != "unconditional"):
            raise ValueError(
                "`condition_vocab_size` (`num_classes`) must be 0 when unconditional and positive otherwise, got "
                f"{self.condition_vocab_size} with condition_type={self.condition_type!r}."
            )
        if not 0 <= self.condition_dropout <= 1 or not 0 <= self.pkeep <= 1:
            raise ValueError(
                f"`pkeep` and `condition_dropout` are probabilities, got {self.pkeep} and {self.condition_dropout}."
            )
        if self.condition_dropout > 0 and (self.share_condition_embedding or self.condition_type == "unconditional"):
            raise ValueError(
                "`condition_dropout` needs a condition, and a null one (share_condition_embedding=False)."
            )

        if self.share_condition_embedding:
            needed = max(self.codebook_size, self.condition_vocab_size)
            if self.vocab_size is not None and self.vocab_size < needed:
                raise ValueError(
                    f"`vocab_size` must be at least {needed} for shared embeddings, got {self.vocab_size}."
                )
            self.vocab_size = needed if self.vocab_size is None else self.vocab_size
        else:
            needed = self.codebook_size + self.condition_vocab_size + 1
            if self.vocab_size not in (None, needed):
                raise ValueError(
                    f"`vocab_size` must be codebook_size + condition_vocab_size + 1 = {needed}, got {self.vocab_size}."
                )
            self.vocab_size = needed

    def _check_sequence(self):
        grid = [self.grid_size] * 2 if isinstance(self.grid_size, int) else list(self.grid_size)
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"`grid_size` must be one or two positive numbers, got {self.grid_size}.")
        self.grid_size = grid
        needed = self.condition_length + self.image_seq_length - 1
        self.n_positions = needed if self.n_positions is None else self.n_positions
        if self.n_positions < needed:
            raise ValueError(
                f"`n_positions` must be at least {needed} for {self.condition_length} condition ids and "
                f"{self.image_seq_length} codes, got {self.n_positions}."
            )
        if not 0 <= self.n_unmasked <= self.condition_length:
            raise ValueError(
                f"`n_unmasked` must lie within the prefix of {self.condition_length} ids, got {self.n_unmasked}: a code that "
                "sees later codes cannot be predicted."
            )

    @property
    def image_seq_length(self) -> int:
        """Number of codes of an image."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def condition_token_offset(self) -> int:
        """The id of condition 0."""
        return 0 if self.share_condition_embedding else self.codebook_size

    @property
    def null_class_token_id(self) -> int | None:
        """The id of the null condition, the last one; the start token when unconditional; `None` when shared."""
        return None if self.share_condition_embedding else self.codebook_size + self.condition_vocab_size


__all__ = ["VQGPTConfig"]
