"""What the denoiser of VQ-Diffusion takes beside codes: classes or text, and what stands for none of them."""

import torch

from .class_conditioning import class_ids
from .latent_conditions import repeat_to
from .text_conditioning import TextCondition, TextConditionMixin


class CodeConditionMixin(TextConditionMixin):
    """For a pipeline with `transformer`, perhaps `text_encoder` and `tokenizer`, and the config of `VQDiffusionImagePipeline`."""

    def encode_prompt(self, prompt: str | list[str], name: str = "prompt") -> TextCondition:
        """The states `(B, S, D)` of prompts, as the options of this pipeline say."""
        config = self.config
        return super().encode_prompt(
            prompt, name, mask_padding=config.text_mask, pad_token_id=config.text_pad_token_id
        )

    def class_ids(self, class_labels) -> torch.LongTensor:
        """Ids `(B,)` of classes, which may be names of `id2label`."""
        config = self.transformer.config
        if config.condition_type != "class":
            raise ValueError(
                f"`class_labels` needs a transformer whose condition_type is 'class', got {config.condition_type!r}."
            )
        return class_ids(class_labels, config.num_classes + config.null_class, self.id2label)

    def prepare_condition(
        self,
        count: int,
        class_labels: torch.LongTensor | None = None,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        prompt_attention_mask=None,
        negative_prompt_attention_mask=None,
        guided: bool = False,
    ) -> dict[str, torch.Tensor]:
        """
        The transformer's keyword arguments for `count` conditions; if `guided`, those of the null condition come first, as
        many of them.

        The null condition is the negative prompt, or else the null embedding that the transformer has learned, or else the
        empty prompt; of classes it is the transformer's null class. It is also what an image without condition has.

        Args:
            class_labels: int64 `(B,)`; the others are those of the call.

        Raises:
            ValueError: a condition that the transformer does not take, or guidance without a null condition.
        """
        kind = self.transformer.config.condition_type
        texts = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        for name, text in texts.items():
            if text is not None and kind != "text":
                raise ValueError(f"`{name}` needs a transformer whose condition_type is 'text', got {kind!r}.")
        if kind == "unconditional":
            if guided:
                raise ValueError("`guidance_scale` other than 1 needs a conditional transformer.")
            return {}
        if kind == "class":
            conditional, null = self._class_conditions(class_labels, guided)
        else:
            given = self.text_states("prompt", prompt, prompt_embeds, prompt_attention_mask)
            negative = self.text_states(  # without guidance too, so that it is checked
                "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
            )
            conditional, null = self._text_conditions(given, negative, guided)
        inputs = {}
        label = "class_labels" if kind == "class" else "prompt" if prompt_embeds is None else "prompt_embeds"
        null_label = "negative_prompt" if negative_prompt_embeds is None else "negative_prompt_embeds"
        for name, values in conditional.items():
            values = repeat_to(values, count, label)
            if guided:
                values = torch.cat([repeat_to(null[name], count, null_label), values])
            inputs[name] = values.to(self._execution_device)
        return inputs

    def _class_conditions(self, class_labels, guided: bool) -> tuple[dict, dict | None]:
        null = self.transformer.null_class_id
        if class_labels is None and null is None:
            raise ValueError("`class_labels` must be given: the transformer has classes and no null class.")
        if guided and (class_labels is None or null is None):
            raise ValueError(
                "`guidance_scale` other than 1 needs `class_labels`, and a transformer with a null class."
            )
        null = None if null is None else torch.tensor([null])
        return {"class_labels": null if class_labels is None else class_labels}, {"class_labels": null}

    def _text_conditions(self, given, negative, guided: bool) -> tuple[dict, dict | None]:
        if guided and given is None:
            raise ValueError("`guidance_scale` other than 1 needs a `prompt`, or `prompt_embeds`.")
        if not guided:
            return self._text_inputs(self._null_text("prompt") if given is None else given, "prompt"), None
        null = self._null_text("negative_prompt") if negative is None else negative
        if given.embeddings.shape[1:] != null.embeddings.shape[1:]:
            raise ValueError(
                "`negative_prompt_embeds`, or what stands in for them, must have as many tokens of the same width as the "
                f"prompt, got {tuple(null.embeddings.shape[1:])} and {tuple(given.embeddings.shape[1:])}."
            )
        return self._text_inputs(given, "prompt"), self._text_inputs(null, "negative_prompt")

    def _text_inputs(self, condition: TextCondition, name: str) -> dict[str, torch.Tensor]:
        inputs = {"encoder_hidden_states": condition.embeddings.to(self.transformer.dtype)}
        if self.config.text_mask:
            has_tokens = condition.mask.any(dim=1)
            if not has_tokens.all():
                raise ValueError(
                    f"`{name}`, or `{name}_attention_mask`, must have a token that is not padding in each row, but has none "
                    f"in row {int(has_tokens.int().argmin())}; for an empty text the tokenizer must add one."
                )
            inputs["encoder_attention_mask"] = condition.mask
        return inputs

    def _null_text(self, name: str) -> TextCondition:
        learned = self.transformer.null_embedding
        if learned is not None:
            embeddings = learned[None].to(self._execution_device)
            return TextCondition(embeddings, torch.ones_like(embeddings[..., 0], dtype=torch.bool))
        return self.encode_prompt("", name)


__all__ = ["CodeConditionMixin"]
