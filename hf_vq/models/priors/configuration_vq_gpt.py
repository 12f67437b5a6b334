"""Configuration of the autoregressive prior over code indices."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from .bounding_boxes import BoundingBoxTokenizer
from .configuration_code_prior import CodeSequenceConfigMixin, pair_of_sides


CONDITION_TYPES = ("unconditional", "class", "codes", "coordinates")


@strict
class VQGPTConfig(CodeSequenceConfigMixin, GPT2Config):
    """
    Configuration of [`VQGPTForCausalLM`], a GPT-2 over the code indices of an image tokenizer.

    A sequence is a condition prefix of `condition_length` ids followed by the `grid_size[0] * grid_size[1]` codes of
    an image in the order `order`. Ids below `codebook_size` are codes; above them lie the condition ids and, last, the
    null condition:

    | condition_type    | prefix                                | ids                                                 |
    |-------------------|---------------------------------------|-----------------------------------------------------|
    | `"unconditional"` | one start token                       | start `codebook_size`                               |
    | `"class"`         | one class id                          | class c: `codebook_size + c`, null: the last id     |
    | `"codes"`         | `condition_length` codes, e.g. of     | code c: `codebook_size + c`, null: the last id      |
    |                   | another tokenizer's segmentation map  |                                                     |
    | `"coordinates"`   | `condition_length` coordinates of a   | coordinate c: `codebook_size + c`, null: the last   |
    |                   | crop, see [`coordinate_ids`]          | id                                                  |

    With `share_condition_embedding=True`, the convention of the original VQGAN checkpoints, condition `c` uses the
    very embedding of code `c`, the start token is `bos_token_id`, and there is no null condition.

    The fields of `GPT2Config` that are not listed keep their meaning; `n_embd`, `n_layer`, `n_head` and `n_positions`
    may also be spelled `hidden_size`, `num_hidden_layers`, `num_attention_heads` and `max_position_embeddings`.

    Args:
        codebook_size (`int`, defaults to 1024): number of codes of the image tokenizer.
        grid_size (`int` or pair of `int`, defaults to (16, 16)): height and width of the grid of codes.
        order (`str`, defaults to `"raster"`): the order in which the grid is read: `"raster"`, `"alternate"`,
            `"subsample"`, `"z-curve"`, `"spiral-out"`, `"spiral-in"` or `"random"`, see [`code_order`].
        permutation (`list[int]`, *optional*): for `order="random"`, the raster positions in the order in which they
            are read; by default the original's, and always saved.
        condition_type (`str`, defaults to `"unconditional"`): one of the table above.
        condition_vocab_size (`int`, defaults to 0): number of classes (also spelled `num_classes`), of condition codes
            or of coordinates, the null condition not counted; 0 exactly when unconditional.
        condition_length (`int`, defaults to 1): number of ids in the prefix; more than 1 only for `"codes"` and
            `"coordinates"`. A condition map may have any size of its own, smaller than the image's grid too.
        coordinate_scale (`int`, *optional*): the id of coordinate 1, for `"coordinates"` alone; by default
            `condition_vocab_size - 1`. Coordinates that would be beyond the ids get the last one.
        bounding_boxes (`dict`, *optional*): the arguments of the [`BoundingBoxTokenizer`] whose ids are the condition,
            for `"codes"` alone; `id2label` may then name the classes of objects.
        share_condition_embedding (`bool`, defaults to `False`): condition ids reuse the codes' embeddings.
        n_unmasked (`int`, defaults to 0): the first `n_unmasked` positions attend to each other in both directions.
            Where they reach beyond the prefix, the training loss of the codes among them is no likelihood, since they
            see themselves; sampling and `log_likelihood` then read each of these codes in a pass of its own, without a
            cache.
        pkeep (`float`, defaults to 1.0): in training, each input code is replaced by a uniformly random one with
            probability `1 - pkeep` (Esser et al., "Taming Transformers", 2021, their code's `pkeep`).
        condition_dropout (`float`, defaults to 0.0): in training, probability with which an example's whole prefix
            becomes the null condition, as classifier-free guidance needs (Ho & Salimans, 2022).
        vocab_size (`int`, *optional*): width of the logits, `codebook_size` by default. A head may have more columns,
            as the original's do where its vocabulary exceeds the codebook: they count in the loss and in
            `log_likelihood`, and are never sampled.
        input_vocab_size (`int`, *optional*): rows of the embedding; derived, only needed by shared embeddings that
            have more.
        n_positions (`int`, *optional*): rows of the position table. The last code is never an input, so the default is
            `condition_length + image_seq_length - 1`.
        bos_token_id (`int`, *optional*): with shared embeddings and no condition, the start token (the original's
            `sos_token`), 0 by default; else it follows from the other fields.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    model_type = "hf_vq_gpt"
    attribute_map = {**GPT2Config.attribute_map, "num_classes": "condition_vocab_size"}

    codebook_size: int = 1024
    grid_size: int | list[int] | tuple[int, ...] = (16, 16)
    order: str = "raster"
    permutation: list[int] | tuple[int, ...] | None = None
    condition_type: str = "unconditional"
    condition_vocab_size: int = 0
    condition_length: int = 1
    coordinate_scale: int | None = None
    bounding_boxes: dict | None = None
    share_condition_embedding: bool = False
    n_unmasked: int = 0
    pkeep: float | int = 1.0
    condition_dropout: float | int = 0.0

    vocab_size: int | None = None
    input_vocab_size: int | None = None
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
        self._take_aliases(kwargs)
        super().__post_init__(**kwargs)
        self._check_condition()
        self._check_ids()
        self._check_sequence()
        if names_given:
            self._check_names()
        for name in ("tie_word_embeddings", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` must be False: the embedding is wider than the head, and it is decoder-only."
                )

    def _check_condition(self):
        self._check_condition_counts(CONDITION_TYPES)
        has_map = self.condition_type in ("codes", "coordinates")
        if self.condition_length < 1 or (self.condition_length > 1 and not has_map):
            raise ValueError(
                f"`condition_length` must be 1 for condition_type={self.condition_type!r} (at least 1 for 'codes' and "
                f"'coordinates'), got {self.condition_length}."
            )
        is_coordinates = self.condition_type == "coordinates"
        if is_coordinates and self.coordinate_scale is None:
            self.coordinate_scale = max(self.condition_vocab_size - 1, 1)
        if self.coordinate_scale is not None and (not is_coordinates or self.coordinate_scale < 1):
            raise ValueError(
                "`coordinate_scale` must be positive, and for condition_type='coordinates' alone, got "
                f"{self.coordinate_scale} with condition_type={self.condition_type!r}."
            )
        if self.bounding_boxes is not None:
            self._check_boxes()
        if not 0 <= self.pkeep <= 1:
            raise ValueError(f"`pkeep` must be a probability, got {self.pkeep}.")
        if self.condition_dropout > 0 and self.share_condition_embedding:
            raise ValueError("`condition_dropout` needs a null condition (share_condition_embedding=False).")

    def _check_boxes(self):
        try:
            boxes = BoundingBoxTokenizer(**self.bounding_boxes)
        except TypeError as error:
            raise ValueError(
                f"`bounding_boxes` must be arguments of BoundingBoxTokenizer, got {self.bounding_boxes}."
            ) from error
        wanted = (boxes.num_tokens, boxes.condition_length)
        if self.condition_type != "codes" or (self.condition_vocab_size, self.condition_length) != wanted:
            raise ValueError(
                f"`bounding_boxes` need condition_type='codes', {wanted[0]} condition ids and a condition_length of "
                f"{wanted[1]}, got {self.condition_type!r}, {self.condition_vocab_size} and {self.condition_length}."
            )

    def _check_ids(self):
        self.vocab_size = self.codebook_size if self.vocab_size is None else self.vocab_size
        if self.vocab_size < self.codebook_size:
            raise ValueError(
                f"`vocab_size` must be at least `codebook_size` ({self.codebook_size}), got {self.vocab_size}."
            )
        if self.condition_type == "unconditional":
            start = 0 if self.share_condition_embedding else self.null_class_token_id
            self.bos_token_id = start if self.bos_token_id is None else self.bos_token_id
            if self.bos_token_id < 0 or (not self.share_condition_embedding and self.bos_token_id != start):
                raise ValueError(
                    f"`bos_token_id` must be {'an id' if self.share_condition_embedding else start}, got "
                    f"{self.bos_token_id}."
                )
        elif self.bos_token_id is not None:
            raise ValueError(
                f"`bos_token_id` must be None: a sequence starts with the condition, got {self.bos_token_id}."
            )
        needed = self.codebook_size + self.condition_vocab_size + 1
        if self.share_condition_embedding:
            needed = max(self.codebook_size, self.condition_vocab_size, (self.bos_token_id or 0) + 1)
        given = needed if self.input_vocab_size is None else self.input_vocab_size
        if given < needed or (given > needed and not self.share_condition_embedding):
            wanted = f"at least {needed} for shared embeddings" if self.share_condition_embedding else f"{needed}"
            raise ValueError(f"`input_vocab_size` must be {wanted}, got {given}.")
        self.input_vocab_size = given

    def _check_sequence(self):
        self.grid_size = pair_of_sides("grid_size", self.grid_size)
        order = self.code_order
        if self.order == "random":
            self.permutation = order
        needed = self.condition_length + self.image_seq_length - 1
        self.n_positions = needed if self.n_positions is None else self.n_positions
        if self.n_positions < needed:
            raise ValueError(
                f"`n_positions` must be at least {needed} for {self.condition_length} condition ids and "
                f"{self.image_seq_length} codes, got {self.n_positions}."
            )
        if not 0 <= self.n_unmasked <= self.n_positions:
            raise ValueError(
                f"`n_unmasked` must be one of 0 … {self.n_positions} (`n_positions`), got {self.n_unmasked}."
            )

    @property
    def condition_token_offset(self) -> int:
        """The id of condition 0."""
        return 0 if self.share_condition_embedding else self.codebook_size

    @property
    def null_class_token_id(self) -> int | None:
        """The id of the null condition, the last one; the start token when unconditional; `None` when shared."""
        return None if self.share_condition_embedding else self.codebook_size + self.condition_vocab_size


__all__ = ["VQGPTConfig"]
