"""The base of the diffusion pipelines: what their denoiser takes for a class or a text, and for none of them."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin

from ..argument_checks import check_real
from .conditioning import TextCondition, class_ids, repeat_to
from .text_condition import encode_prompt, text_states
from .vq_pipeline import VQPipeline


class DenoisingPipeline(VQPipeline):
    """
    Base of the pipelines with `vqvae`, a denoiser, `scheduler`, and perhaps `text_encoder` and its `tokenizer`, whose
    config has the `text_…` options of [`encode_text`].
    """

    _optional_components = ["text_encoder", "tokenizer"]

    encode_prompt = encode_prompt
    text_states = text_states

    # whether the denoiser's attention has no meaning where a mask leaves it nothing
    needs_tokens: bool = False

    # What each pipeline says of its denoiser

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is called at each step."""
        raise NotImplementedError

    @property
    def condition_kind(self) -> str | None:
        """How the denoiser is conditioned: "class", "class_token", "text" or None."""
        raise NotImplementedError

    @property
    def class_rows(self) -> int:
        """Rows of the denoiser's class embedding, the null class included if there is one."""
        raise NotImplementedError

    @property
    def null_class_id(self) -> int | None:
        """The class that stands for none, if there is one."""
        raise NotImplementedError

    def class_inputs(self, ids: torch.LongTensor) -> dict[str, torch.Tensor]:
        """The denoiser's keyword arguments for classes `(B,)`."""
        return {"class_labels": ids.to(self._execution_device)}

    def null_text(self, name: str) -> TextCondition:
        """The states of no text, that stand for the argument `name`: those of the empty one."""
        return self.encode_prompt("", name)

    @property
    def encoder_passes_over_padding(self) -> bool:
        """Whether the text encoder is given the mask of padding."""
        return True

    # What they share

    @property
    def num_classes(self) -> int:
        """Classes of the denoiser, the null class not counted."""
        return self.class_rows - (self.null_class_id is not None)

    @property
    def example_call(self) -> str:
        """The arguments of a simple call, for a model card."""
        kind = self.condition_kind
        return {"class": "class_labels=0", "class_token": "class_labels=0", "text": 'prompt="…"'}.get(kind, "")

    def own_scheduler(self) -> SchedulerMixin:
        """A scheduler for one call, since its timesteps and its state must not be another call's."""
        return copy.deepcopy(self.scheduler)

    def class_ids(self, class_labels: Any) -> torch.LongTensor:
        """Ids `(B,)` of classes, which may be names of `id2label`.

        Raises:
            ValueError: ids out of range, which the null class is too, unknown names, or a denoiser without classes.
        """
        if self.condition_kind not in ("class", "class_token"):
            raise ValueError(f"`class_labels` needs a denoiser with classes, got {class_labels!r}.")
        return class_ids(class_labels, self.class_rows, self.id2label, self.null_class_id)

    def prepare_condition(
        self,
        batch_size: int,
        prompt: str | list[str] | None = None,
        class_labels: Any = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        guided: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """
        The denoiser's keyword arguments for `batch_size` conditions and, if `guided`, those of the null condition.

        The null condition is the negative prompt, or else `null_text`; of classes it is the null class. It is also
        what an image without condition has.

        Raises:
            ValueError: a condition that the denoiser does not take, or guidance without a null condition.
        """
        kind = self.condition_kind
        texts = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        for name, text in texts.items():
            if text is not None and kind != "text":
                raise ValueError(f"`{name}` needs a denoiser that is conditioned on text.")
        class_labels = None if class_labels is None else self.class_ids(class_labels)
        if kind == "text":
            given = self.text_states("prompt", prompt, prompt_embeds, prompt_attention_mask)
            negative = self.text_states(  # without guidance too, so that it is checked
                "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
            )
            conditional, null = self._text_conditions(given, negative, guided)
        elif kind is not None:
            conditional, null = self._class_conditions(class_labels, guided)
        elif guided:
            raise ValueError("`guidance_scale` other than 1 needs a conditional denoiser.")
        else:
            conditional, null = {}, None
        label = "class_labels" if kind != "text" else "prompt" if prompt_embeds is None else "prompt_embeds"
        null_label = "negative_prompt" if negative_prompt_embeds is None else "negative_prompt_embeds"
        conditional = {name: repeat_to(rows, batch_size, label) for name, rows in conditional.items()}
        if null is not None:
            null = {name: repeat_to(rows, batch_size, null_label) for name, rows in null.items()}
        return conditional, null

    def _class_conditions(self, class_labels, guided: bool) -> tuple[dict, dict | None]:
        null = self.null_class_id
        if class_labels is None and null is None:
            raise ValueError("`class_labels` must be given: the denoiser has classes and no null class.")
        if guided and (class_labels is None or null is None):
            raise ValueError("`guidance_scale` other than 1 needs `class_labels`, and a denoiser with a null class.")
        null = None if null is None else self.class_inputs(torch.tensor([null]))
        return null if class_labels is None else self.class_inputs(class_labels), null if guided else None

    def _text_conditions(self, given, negative, guided: bool) -> tuple[dict, dict | None]:
        if guided and given is None:
            raise ValueError("`guidance_scale` other than 1 needs a `prompt`, or `prompt_embeds`.")
        if not guided:
            return self._text_inputs(self.null_text("prompt") if given is None else given, "prompt"), None
        null = self.null_text("negative_prompt") if negative is None else negative
        if given.embeddings.shape[1:] != null.embeddings.shape[1:]:
            raise ValueError(
                "`negative_prompt_embeds`, or what stands in for them, must have as many tokens of the same width as "
                f"the prompt, got {tuple(null.embeddings.shape[1:])} and {tuple(given.embeddings.shape[1:])}."
            )
        return self._text_inputs(given, "prompt"), self._text_inputs(null, "negative_prompt")

    def _text_inputs(self, condition: TextCondition, name: str) -> dict[str, torch.Tensor]:
        config, found = self.denoiser.config, condition.embeddings.shape[2]
        width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
        if isinstance(width, int) and found != width:
            raise ValueError(
                f"`{name}_embeds`, or what the text encoder gives, must have the {width} channels of the denoiser's "
                f"cross-attention, got {found}."
            )
        inputs = {"encoder_hidden_states": condition.embeddings.to(self._execution_device, self.denoiser.dtype)}
        if self.config.text_mask:
            has_tokens = condition.mask.any(dim=1)
            if self.needs_tokens and not has_tokens.all():
                raise ValueError(
                    f"`{name}`, or `{name}_attention_mask`, must have a token that is not padding in "
                    f"each row, but has "
                    f"none in row {int(has_tokens.int().argmin())}; for an empty text the tokenizer must add one."
                )
            inputs["encoder_attention_mask"] = condition.mask.to(self._execution_device)
        return inputs


@dataclass
class GuidanceInterval:
    """
    The share of a schedule's steps that is guided: those from `floor(start · n)` up to `floor(end · n)` of n steps, as
    the guiders of diffusers count them (a limited interval of noise levels, Kynkäänniemi et al. 2024,
    https://arxiv.org/abs/2404.07724).

    Args:
        start, end: shares in [0, 1].

    Raises:
        ValueError: other numbers, or an end that is not after the start.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        self.start = check_real("guidance_start", self.start, 0, 1)
        self.end = check_real("guidance_end", self.end, 0, 1)
        if self.end <= self.start:
            raise ValueError(f"`guidance_end` must be above `guidance_start`, got {self.end} and {self.start}.")

    def guided(self, evaluations: int, order: int = 1) -> list[bool]:
        """
        Which evaluations of the denoiser are guided in a schedule of so many.

        Args:
            order: evaluations of a step, of which the last step has a single one.

        Raises:
            ValueError: an interval that holds no step.
        """
        count = -(-evaluations // order)
        first, after = (math.floor(share * count + 1e-4) for share in (self.start, self.end))  # shares in float32 too
        if first == after:
            raise ValueError(
                f"`guidance_start` and `guidance_end` must hold at least one of the {count} steps, got {self.start} "
                f"and {self.end}."
            )
        return [first <= evaluation // order < after for evaluation in range(evaluations)]


def last_steps(count: int, strength: float) -> int:
    """How many of `count` steps the share `strength` in (0, 1] is, rounded down; a ValueError if that is none."""
    taken = int(count * strength + 1e-6)  # 0.29 of 100 would be 28: the product is 28.999999999999996
    if taken < 1:
        raise ValueError(f"`strength` must leave at least one of {count} steps, got {strength}.")
    return taken


__all__ = ["DenoisingPipeline", "GuidanceInterval", "last_steps"]
