"""Classes as a condition: from ids or names to ids."""

import numpy as np
import torch


def class_ids(class_labels, num_classes: int, id2label: dict[int, str] | None = None) -> torch.LongTensor:
    """
    Ids of classes.

    Args:
        class_labels: an id or a name, a list of them, or an array or tensor of ids.
        num_classes: ids lie below it.
        id2label (*optional*): the names of the classes.

    Returns:
        int64 `(B,)`.

    Raises:
        ValueError: no label, an id out of range, or a name that is not one of `id2label`.
    """
    if isinstance(class_labels, (torch.Tensor, np.ndarray, np.integer)):
        class_labels = class_labels.reshape(-1).tolist()
    labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
    names = {name: number for number, name in (id2label or {}).items()}
    ids = [names.get(label, label) if isinstance(label, str) else label for label in labels]
    wrong = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < num_classes]
    if wrong or not ids:
        known = f", or one of {sorted(names)}" if names else ""
        raise ValueError(f"`class_labels` must be ids from 0 to {num_classes - 1}{known}, got {class_labels!r}.")
    return torch.tensor(ids)


def class_names(id2label: dict[int | str, str] | None) -> dict[int, str] | None:
    """`id2label` with ints as ids, which are strings where it comes from JSON."""
    if id2label is None:
        return None
    wrong = [i for i in id2label if not str(i).isdecimal()]
    if wrong:
        raise ValueError(f"`id2label` must map ids, ints from 0, to names of classes, got the ids {wrong}.")
    return {int(i): name for i, name in id2label.items()}


__all__ = ["class_ids", "class_names"]
