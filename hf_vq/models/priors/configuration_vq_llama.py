"""Configuration of the Llama prior over code indices."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .configuration_code_prior import CodeSequenceConfigMixin, pair_of_sides


@strict
class VQLlamaConfig(CodeSequenceConfigMixin, LlamaConfig):
    """
    Configuration of [`VQLlamaForCausalLM`], a Llama over the code indices of an image tokenizer with rotary positions
    on the grid (Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", 2024).

    A sequence is a condition prefix of `condition_length` ids followed by the `grid_size[0] * grid_size[1]` codes of
    an image. Ids below `codebook_size` are codes; above them lie the condition ids and, last, the null condition:

    | condition_type    | prefix                     | ids                                                          |
    |-------------------|----------------------------|--------------------------------------------------------------|
    | `"unconditional"` | one start token            | start `codebook_size`                                        |
    | `"class"`         | one class id               | class c: `codebook_size + c`, null: the last id              |
    | `"text"`          | `condition_length` places  | `codebook_size`: a text's features, given to `forward` as    |
    |                   |                            | `condition_states`; null: `codebook_size + 1`                |

    The fields of `LlamaConfig` that are not listed keep their meaning.

    Args:
        codebook_size (`int`, defaults to 16384): number of codes, and the width of the head (`vocab_size`).
        grid_size (`int` or pair of `int`, defaults to (16, 16)): height and width of the grid of codes.
        order, permutation: the order in which the grid is read, as in [`VQGPTConfig`].
        condition_type (`str`, defaults to `"class"`): one of the table above.
        condition_vocab_size (`int`, *optional*): number of classes (also spelled `num_classes`), the null class not
            counted.
        condition_length (`int`, *optional*): number of ids in the prefix; by default 1, and 120 for `"text"`.
        text_embed_dim (`int`, defaults to 2048): channels of a text's features.
        embd_pdrop (`float`, defaults to 0.1): dropout of the embeddings.
        pkeep (`float`, defaults to 1.0): in training, each input code is replaced by a uniformly random one with
            probability `1 - pkeep`.
        condition_dropout (`float`, defaults to 0.0): in training, probability with which an example's condition
            becomes the null condition, as classifier-free guidance needs (Ho & Salimans, 2022).
        rope_base (`float`, defaults to 10000.0): of the rotary positions.
        intermediate_size (`int`, *optional*): by default 8 / 3 of `hidden_size`, rounded up to a multiple of 256.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    model_type = "hf_vq_llama"
    attribute_map = {**LlamaConfig.attribute_map, "num_classes": "condition_vocab_size"}

    codebook_size: int = 16384
    grid_size: int | list[int] | tuple[int, ...] = (16, 16)
    order: str = "raster"
    permutation: list[int] | tuple[int, ...] | None = None
    condition_type: str = "unconditional"
    condition_vocab_size: int | None = None
    condition_length: int | None = None
    text_embed_dim: int = 2048
    embd_pdrop: float | int = 0.1
    pkeep: float | int = 1.0
    condition_dropout: float | int = 0.0
    rope_base: float | int = 10000.0

    vocab_size: int | None = None
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        names_given = self.id2label is not None
        self._take_aliases(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(8 * self.hidden_size / 3) // 256) * 256
        if self.condition_length is None:
            self.condition_length = 120 if self.condition_type == "text" else 1
        if self.condition_vocab_size is None:
            self.condition_vocab_size = 1 if self.condition_type == "text" else 0
        self.grid_size = pair_of_sides("grid_size", self.grid_size)
        self.vocab_size = self.codebook_size if self.vocab_size is None else self.vocab_size
        needed = self.condition_length + self.image_seq_length - 1
        if self.max_position_embeddings is None:
            self.max_position_embeddings = needed
        super().__post_init__(**kwargs)
        self._check_condition_counts(("unconditional", "class", "text"))
        if names_given:
            self._check_names()
        self._check_network(needed)
        if self.order == "random":
            self.permutation = self.code_order
        start = self.null_class_token_id if self.condition_type == "unconditional" else None
        if self.bos_token_id not in (None, start):
            raise ValueError(f"`bos_token_id` must be {start}, got {self.bos_token_id}.")
        self.bos_token_id = start

    def _check_network(self, needed: int):
        for name, value, wanted in (
            ("vocab_size", self.codebook_size, "`codebook_size`"),
            ("max_position_embeddings", needed, "condition_length + image_seq_length - 1"),
            ("tie_word_embeddings", False, "False: the embedding is wider than the head"),
        ):
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)}.")
        if self.condition_length < 1 or (self.condition_length > 1 and self.condition_type != "text"):
            raise ValueError(
                f"`condition_length` must be 1 for condition_type={self.condition_type!r} (at least 1 "
                f"for 'text'), got "
                f"{self.condition_length}."
            )
        if self.condition_type == "text" and self.condition_vocab_size != 1:
            raise ValueError(
                f"`condition_vocab_size` must be 1 for condition_type='text', got {self.condition_vocab_size}."
            )
        if self.head_dim % 4:
            raise ValueError(
                f"`head_dim` must be a multiple of 4, for pairs of rows and of columns, got {self.head_dim}."
            )
        for name in ("pkeep", "embd_pdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a probability, got {getattr(self, name)}.")
        _ = self.code_order  # raises for an order that is none

    @property
    def n_positions(self) -> int:
        """The longest input; the last code is never one."""
        return self.max_position_embeddings

    @property
    def input_vocab_size(self) -> int:
        """Number of input ids: codes, conditions and the null condition."""
        return self.codebook_size + self.condition_vocab_size + 1


__all__ = ["VQLlamaConfig"]
