"""The classes of a data set, counted."""


def count_classes(splits: dict, class_names: list[str] | None, label_column: str | None) -> int:
    """
    How many classes a conditional model needs: as many as there are names, or one more than the highest training label.

    Args:
        splits: data sets by name, "train" among them; their `labels` are arrays of all labels, or None (as those of a
            stream, which has none).
        class_names: names of the classes, where they have any.
        label_column: where the labels come from; None if there are none.

    Returns:
        0 without a label column.

    Raises:
        ValueError: labels of a split that are out of range, or a stream's that have no names.
    """
    if label_column is None:
        return 0
    labels = {split: getattr(dataset, "labels", None) for split, dataset in splits.items()}
    if class_names is None and labels["train"] is None:
        raise ValueError(
            f"label_column={label_column!r}: the classes of a stream need names, from which their number follows."
        )
    count = len(class_names) if class_names is not None else int(labels["train"].max()) + 1
    for split, values in labels.items():
        if values is not None and (values.min() < 0 or values.max() >= count):
            raise ValueError(
                f"label_column: the {split} labels are {values.min()} to {values.max()}, not within 0 to {count - 1}."
            )
    return count


__all__ = ["count_classes"]
