"""Going on with what was trained before: a part of a tokenizer, or a prior on other data."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_vq.loading import load_part
from hf_vq.models.autoencoders.modeling_tokenizer import VQTokenizerModel
from hf_vq.models.priors.transformer_vq_diffusion import SinusoidalEmbedding, VQDiffusionTransformer2DModel


PARTS = ("all", "decoder")
START_HELP = (
    "Go on with the prior of this pipeline, or with this prior; folder or Hub id. It keeps its sizes, whatever is "
    "given here."
)


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


class StartingPoint:
    """A trained prior that a run begins with, `model_name_or_path` of the training scripts.

    Args:
        source: a pipeline that has the prior, or the prior alone; a folder or Hub repository.
        part: the prior's name in its pipeline.
        kinds: the classes that it may have.

    Attributes:
        source: as given.
        model: the prior, float32 on the CPU.
        pipeline (`DiffusionPipeline` or `None`): what it came in.

    Raises:
        ValueError: nothing can be loaded, or what is there is none of `kinds`.
    """

    # tables with a row for each class and one for the null class; those of ids begin with a row for each code
    CLASS_TABLES = ("class_embedding", "class_vertical", "class_horizontal", "norm3.emb")
    ID_TABLES = ("transformer.wte", "model.embed_tokens")
    # of a GPT or Llama; these follow from others, and with another kind of condition all of them do
    FOLLOWED = ("id2label", "label2id", "input_vocab_size", "bos_token_id", "share_condition_embedding")
    OF_CONDITION = (
        *("condition_vocab_size", "condition_length", "n_positions", "max_position_embeddings"),
        *("coordinate_scale", "bounding_boxes", "n_unmasked"),
    )
    TEXT_OPTIONS = ("text_lower_case", "text_normalize", "text_mask", "text_pad_token_id", "text_pooled")

    def __init__(self, source: str, part: str, kinds: tuple[type[nn.Module], ...]):
        self.source = source
        model, self.pipeline = load_part("model_name_or_path", source, part, kinds)
        self.model = model.float()

    def check(self, wanted: Mapping[str, Any]) -> None:
        """A ValueError where the prior's config differs from what this run asks for."""
        for name, value in wanted.items():
            found = getattr(self.model.config, name)
            as_tuple = tuple(found) if isinstance(found, list) else found
            if as_tuple != (tuple(value) if isinstance(value, list) else value):
                raise ValueError(
                    f"model_name_or_path={self.source!r}: its `{name}` must be {value}, as the tokenizer, the data "
                    f"and the arguments of this run have it, got {found}."
                )

    @property
    def kind(self) -> str | None:
        """Its condition's: "boxes", or else `condition_type`; None without such a field."""
        return _kind(self.model.config)

    def remake(
        self, fields: Mapping[str, Any], num_classes: int = 0, class_names: list[str] | None = None
    ) -> nn.Module:
        """The prior with other `fields` of its config, and the weights that it has.

        A class keeps what was learnt of the class of the same name or, where one side has no names, of the same
        number; other classes begin anew. So does a null class, where the prior has none, and what a condition of
        another kind needs: its ids and, of a GPT, its positions. Classes that have no vectors of their own, those of
        the original's checkpoints, get them here: the codes' that they shared, or the waves.

        Args:
            fields: of the config; those of the weights' shapes are its own, but for the classes.
            num_classes: of the result, the null class not counted.
            class_names: their names, or those of the objects in boxes, if they have names.

        Raises:
            ValueError: a weight that is no table of classes has another shape; a class of objects in boxes, whose ids
                are those of places too, has another number.
        """
        config, cls = self.model.config, type(self.model)
        if self._is_of_transformers:
            own = config.to_dict()
            is_other = _kind({**own, "bounding_boxes": None, **fields}) != self.kind
            followed = self.FOLLOWED + (self.OF_CONDITION if is_other else ())
            own = {name: value for name, value in own.items() if name not in followed}
            model = cls(type(config)(**{**own, **fields}))
        else:
            waves = {"class_embedding": "learned", "null_class_position": None} if "class_embedding" in config else {}
            model = cls.from_config({**config, **waves, **fields})
        self._fill(model, num_classes, class_names)
        return model

    @torch.no_grad()
    def _fill(self, model: nn.Module, num_classes: int, class_names: list[str] | None) -> None:
        """Gives `model` the prior's weights."""
        weights = self.model.state_dict() | self._class_waves()
        rows = self._rows_of_classes(model, num_classes, class_names)
        for name, weight in model.state_dict().items():
            module = re.sub(r"\.(weight|parametrizations\..*)$", "", name)
            if module.endswith(self.CLASS_TABLES) and name in weights:
                self._fill_table(weight, weights[name], (0, 0), rows, num_classes)
            elif module in self.ID_TABLES:
                codes = model.config.codebook_size
                weight[:codes] = weights[name][:codes]
                firsts = (codes, self.model.config.condition_token_offset)
                self._fill_table(weight, weights[name], firsts, rows, num_classes)
            elif module == "transformer.wpe":
                self._fill_positions(model.config, weight, weights[name])
            elif name in weights and weight.shape == weights[name].shape:
                weight.copy_(weights[name])
            else:
                found = tuple(weights[name].shape) if name in weights else "none"
                raise ValueError(
                    f"model_name_or_path={self.source!r}: its `{name}` must have the shape {tuple(weight.shape)}, "
                    f"got {found}."
                )

    @property
    def _is_of_transformers(self) -> bool:
        return isinstance(self.model.config, PreTrainedConfig)

    @property
    def null_class(self) -> int | None:
        """The number of the prior's null class, or of its start token; None without one."""
        config = self.model.config
        if self._is_of_transformers:
            is_free = config.condition_type == "unconditional"
            token = config.bos_token_id if is_free else config.null_class_token_id
            return None if token is None else token - config.condition_token_offset
        if isinstance(self.model, VQDiffusionTransformer2DModel):
            return self.model.null_class_id
        if self.pipeline is not None:
            return getattr(self.pipeline, "null_class_id", None)
        return config.num_class_embeds - 1 if config.get("num_class_embeds") else None

    @property
    def class_numbers(self) -> list[int]:
        """Of the prior's classes, or its condition's ids, without the null one."""
        config = self.model.config
        for name in ("condition_vocab_size", "num_classes"):
            if getattr(config, name, None) is not None:
                return list(range(getattr(config, name)))
        return [number for number in range(config.get("num_class_embeds") or 0) if number != self.null_class]

    @property
    def text_options(self) -> dict[str, Any]:
        """How its pipeline encodes captions; empty without one that does."""
        if getattr(self.pipeline, "text_encoder", None) is None:
            return {}
        return {name: self.pipeline.config[name] for name in self.TEXT_OPTIONS if name in self.pipeline.config}

    @property
    def class_names(self) -> dict[int, str] | None:
        """By their ids; None without names."""
        holder = self.model.config if hasattr(self.model.config, "id2label") else self.pipeline
        names = getattr(holder, "id2label", None) or {}
        names = {int(number): name for number, name in names.items()}
        is_default = all(name == f"LABEL_{number}" for number, name in names.items())
        return None if is_default else names

    def _class_waves(self) -> dict[str, torch.Tensor]:
        """The vectors of classes that are waves, by the names of the tables that stand for them."""
        return {
            f"{name}.weight": module(torch.arange(module.num_ids + (self.null_class is not None)))
            for name, module in self.model.named_modules()
            if isinstance(module, SinusoidalEmbedding) and name.endswith(self.CLASS_TABLES)
        }

    def _rows_of_classes(
        self, model: nn.Module, num_classes: int, class_names: list[str] | None
    ) -> list[tuple[int, int]]:
        """Pairs of a class of the new model and the one of the prior whose weights it begins with."""
        kind, own = self.kind, self.class_names
        if kind != _kind(model.config):
            return []
        same_numbers = [(number, number) for number in self.class_numbers if number < num_classes]
        if own is None or class_names is None:
            return same_numbers
        numbers = {name: number for number, name in own.items()}
        rows = [(number, numbers[name]) for number, name in enumerate(class_names) if name in numbers]
        if kind != "boxes":
            return rows
        for new, old in rows:
            if new != old:
                raise ValueError(
                    f"model_name_or_path={self.source!r}: the class {class_names[new]!r} of objects must be number "
                    f"{old}, as the prior has it, got {new}."
                )
        return same_numbers

    def _fill_table(
        self,
        weight: torch.Tensor,
        own: torch.Tensor,
        firsts: tuple[int, int],
        rows: list[tuple[int, int]],
        num_classes: int,
    ) -> None:
        """`firsts`: the number of the first class's row, in `weight` and in `own`."""
        first, own_first = firsts
        for new, old in rows:
            weight[first + new] = own[own_first + old]
        if self.null_class is not None and first + num_classes < len(weight):
            weight[first + num_classes] = own[own_first + self.null_class]

    def _fill_positions(self, config: PreTrainedConfig, weight: torch.Tensor, own: torch.Tensor) -> None:
        """The last position of a condition predicts the first code: from there on the tables are alike."""
        first, own_first = config.condition_length - 1, self.model.config.condition_length - 1
        if first == own_first and len(weight) == len(own):
            weight.copy_(own)
        else:
            weight[first : first + config.image_seq_length] = own[own_first : own_first + config.image_seq_length]


def _kind(config: PreTrainedConfig | Mapping[str, Any]) -> str | None:
    """Of the condition."""
    fields = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    return "boxes" if fields.get("bounding_boxes") else fields.get("condition_type")


__all__ = ["PARTS", "START_HELP", "StartingPoint", "train_part"]
