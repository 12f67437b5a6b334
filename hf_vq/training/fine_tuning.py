"""Going on with what was trained before: a part of a tokenizer, or a prior on other data."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedConfig

from hf_vq.loading import load
from hf_vq.models.autoencoders.modeling_tokenizer import VQTokenizerModel


PARTS = ("all", "decoder")
START_HELP = (
    "Go on with the prior of this pipeline, or with this prior; folder or Hub id. Its sizes are its own, and those "
    "given here are not read."
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
        ValueError: what is there is none of `kinds`.
    """

    # tables with a row for each class and one for the null class; those of ids begin with a row for each code
    CLASS_TABLES = ("class_embedding", "class_vertical", "class_horizontal", "norm3.emb")
    ID_TABLES = ("transformer.wte", "model.embed_tokens")

    def __init__(self, source: str, part: str, kinds: tuple[type[nn.Module], ...]):
        found = load(source, stock=True)
        self.source = source
        self.pipeline = found if isinstance(found, DiffusionPipeline) else None
        self.model = found if self.pipeline is None else getattr(found, part, None)
        if not isinstance(self.model, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            held = type(found).__name__ if self.pipeline is None else f"{type(found).__name__} without one"
            raise ValueError(
                f"model_name_or_path={source!r}: it must be a {names}, or a pipeline that has one as its `{part}`, "
                f"got a {held}."
            )
        self.model = self.model.float()

    def check(self, wanted: Mapping[str, Any]) -> None:
        """A ValueError where the prior's config differs from what data and tokenizer ask for."""
        for name, value in wanted.items():
            found = getattr(self.model.config, name)
            as_tuple = tuple(found) if isinstance(found, list) else found
            if as_tuple != (tuple(value) if isinstance(value, list) else value):
                raise ValueError(
                    f"model_name_or_path={self.source!r}: its `{name}` must be {value}, as the tokenizer and the "
                    f"data have it, got {found}."
                )

    def remake(
        self, fields: Mapping[str, Any], num_classes: int = 0, class_names: list[str] | None = None
    ) -> nn.Module:
        """The prior with other `fields` of its config, and the weights that it has, as `fill` says."""
        config = self.model.config
        if not isinstance(config, PreTrainedConfig):
            return self.fill(type(self.model).from_config({**config, **fields}), num_classes, class_names)
        own = config.to_dict()
        followed = []  # fields that follow from others, which change
        if num_classes != self.num_classes or "id2label" in fields:
            followed += ["id2label", "label2id"]
        if num_classes != self.num_classes and not own.get("share_condition_embedding"):
            followed += ["input_vocab_size", "bos_token_id"]
        if fields.get("condition_type", config.condition_type) != config.condition_type:
            followed += ["id2label", "label2id", "condition_length", "n_positions", "coordinate_scale"]
            followed += ["bounding_boxes", "n_unmasked"]
        own = {name: value for name, value in own.items() if name not in followed}
        return self.fill(type(self.model)(type(config)(**{**own, **fields})), num_classes, class_names)

    @torch.no_grad()
    def fill(self, model: nn.Module, num_classes: int = 0, class_names: list[str] | None = None) -> nn.Module:
        """Gives `model` the prior's weights.

        A class keeps what was learnt of the class of the same name or, where one side has no names, of the same
        number; other classes keep the weights that `model` has. So does a null class, where the prior has none, and
        what a condition of another kind needs: its ids and, of a GPT, its positions.

        Args:
            model: of the prior's config, but for the classes.
            num_classes: of `model`, the null class not counted.
            class_names: their names, if they have names.

        Returns:
            `model`.

        Raises:
            ValueError: a weight that is no table of classes has another shape.
        """
        weights = self.model.state_dict()
        rows = self._rows_of_classes(model, num_classes, class_names)
        for name, weight in model.state_dict().items():
            module = re.sub(r"\.(weight|parametrizations\..*)$", "", name)
            if module.endswith(self.CLASS_TABLES) and name in weights:
                self._fill_table(weight, weights[name], 0, rows, num_classes)
            elif module in self.ID_TABLES and not getattr(model.config, "share_condition_embedding", False):
                self._fill_table(weight, weights[name], model.config.codebook_size, rows, num_classes)
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
        return model

    @property
    def num_classes(self) -> int:
        """Of the prior, or its condition's ids, the null condition not counted."""
        config = self.model.config
        for name in ("condition_vocab_size", "num_classes"):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        return max((config.get("num_class_embeds") or 0) - 1, 0)

    @property
    def class_names(self) -> dict[int, str] | None:
        """By their ids; None without names."""
        holder = self.model.config if hasattr(self.model.config, "id2label") else self.pipeline
        names = getattr(holder, "id2label", None) or {}
        names = {int(number): name for number, name in names.items()}
        is_default = all(name == f"LABEL_{number}" for number, name in names.items())
        return None if is_default else names

    def _rows_of_classes(
        self, model: nn.Module, num_classes: int, class_names: list[str] | None
    ) -> list[tuple[int, int]]:
        """Pairs of a class of the new model and the one of the prior whose weights it begins with."""
        kinds = [getattr(one.config, "condition_type", None) for one in (model, self.model)]
        if kinds[0] != kinds[1]:
            return []
        own = self.class_names
        if own is None or class_names is None:
            return [(number, number) for number in range(min(num_classes, self.num_classes))]
        numbers = {name: number for number, name in own.items()}
        return [(number, numbers[name]) for number, name in enumerate(class_names) if name in numbers]

    def _fill_table(
        self, weight: torch.Tensor, own: torch.Tensor, first: int, rows: list[tuple[int, int]], num_classes: int
    ) -> None:
        """`first`: the number of the first class's row, before which the tables are alike."""
        weight[:first] = own[:first]
        for new, old in rows:
            weight[first + new] = own[first + old]
        null, own_null = first + num_classes, first + self.num_classes
        if null < len(weight) and own_null < len(own):
            weight[null] = own[own_null]

    def _fill_positions(self, config: PreTrainedConfig, weight: torch.Tensor, own: torch.Tensor) -> None:
        """The last position of a condition predicts the first code: from there on the tables are alike."""
        first, own_first = config.condition_length - 1, self.model.config.condition_length - 1
        if first == own_first:
            weight.copy_(own)
        else:
            weight[first : first + config.image_seq_length] = own[own_first : own_first + config.image_seq_length]


__all__ = ["PARTS", "StartingPoint", "train_part"]
