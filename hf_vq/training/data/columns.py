"""The columns of a data set that samples are made of: images, classes, captions and others, checked when it is
opened.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import datasets

    from .image_datasets import DataArguments

logger = logging.getLogger(__name__)

CONDITION = "conditioning_image"
NO_LABEL = -1  # the class of a row without one, where rows may lack it: `datasets` writes it so, too


def prepare_columns(
    rows: "datasets.Dataset | datasets.IterableDataset",
    arguments: "DataArguments",
    class_names: list[str] | None = None,
    keep_gaps: bool = True,
):
    """Keeps the image columns, undecoded, as `image` and `conditioning_image`, integer labels as `label`, and the
    extra ones.

    Args:
        class_names: number the classes in this order.
        keep_gaps: whether rows without a label or caption stay where `missing_condition="null"` allows them.

    Returns:
        The rows, and the names of the classes, if they have names.

    Raises:
        ValueError: a column is not there or holds something else; a value to exclude does not exist; a row has no
            label or caption and `missing_condition` does not allow it (of a stream, when the row is read).
    """
    import datasets

    if rows.features is None:  # a stream of a format without a schema: the first rows tell
        rows = rows._resolve_features()
    features = rows.features
    wanted = {_image_column(arguments.image_column, features): "image"}
    if arguments.label_column is not None:
        wanted[arguments.label_column] = "label"
    if arguments.conditioning_image_column is not None:
        wanted[_image_column(arguments.conditioning_image_column, features)] = CONDITION
    wanted.update({column: column for column in arguments.carried_columns})
    for column in wanted:
        if column not in features:
            images = sorted(name for name, feature in features.items() if isinstance(feature, datasets.Image))
            hint = f" (images: {images})" if images else ""
            raise ValueError(f"the data set has no column {column!r}; it has {sorted(features)}{hint}.")
    if len(set(wanted.values())) < len(wanted):
        raise ValueError(
            f"extra_columns={arguments.carried_columns} may not contain 'image', 'label' or {CONDITION!r}."
        )

    if arguments.caption_column is not None:
        _check_captions(features[arguments.caption_column], arguments.caption_column)
    for column, name in wanted.items():
        if name in ("image", CONDITION) and not _holds_arrays(features[column]):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    rows = _exclude(rows, arguments.exclude).select_columns(list(wanted))
    if isinstance(rows, datasets.Dataset):
        rows = without_gaps(rows, arguments, arguments.label_column, keep_gaps)
    if arguments.label_column is None:
        class_names = None
    else:
        column = arguments.label_column
        rows, class_names = _integer_labels(rows, column, features[column], class_names or arguments.class_names)
    for column, name in wanted.items():
        if column != name:
            rows = rows.rename_column(column, name)
    return rows, class_names


def class_names_of(rows: "datasets.Dataset", arguments: "DataArguments") -> list[str] | None:
    """The names of the classes, in the order of the numbers that `prepare_columns` gives them."""
    column = arguments.label_column
    if column not in rows.features:
        return None  # as `prepare_columns` says, where one was wanted
    labels = _exclude(rows, arguments.exclude).select_columns([column])
    return _integer_labels(labels, column, rows.features[column], arguments.class_names)[1]


def _image_column(column: str, features: Any) -> str:
    """The column, or the one that names the files of its images, as the metadata of a folder of images does."""
    import datasets

    if any(isinstance(feature, datasets.Image) for feature in features.values()):
        return column  # these are meant, under another name
    names = "file_name" if column == "image" else f"{column}_file_name"
    return names if column not in features and names in features else column


def _check_captions(feature: Any, column: str) -> None:
    import datasets

    inner = feature
    while isinstance(inner, (datasets.List, datasets.LargeList, list)):
        inner = inner[0] if isinstance(inner, list) else inner.feature
    if getattr(inner, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(f"caption_column={column!r} must hold texts, or lists of texts, got {feature}.")


def _holds_arrays(feature) -> bool:
    import datasets

    return isinstance(feature, (datasets.Array2D, datasets.Array3D, datasets.List, list))


def is_missing(value: Any) -> bool:
    """Whether a label or a caption, or a list of captions, says nothing."""
    if isinstance(value, (list, tuple)):
        return all(item is None for item in value)
    return value is None


def missing_error(column: str, row: str, more: int = 0) -> ValueError:
    """The error of a row without a label or caption."""
    others = f" and in {more} more rows" if more else ""
    return ValueError(
        f"the column {column!r} has no value in {row}{others}: leave such rows out, or set "
        f"missing_condition=null, which "
        "takes them as the null condition."
    )


def draw_caption(value: str | Sequence[str] | None, seed: int, epoch: int, index: int) -> str | None:
    """A caption, of several one that is drawn from `(seed, epoch, index)`; None where there is none."""
    if not isinstance(value, (list, tuple)):
        return value
    captions = [caption for caption in value if caption is not None]
    if not captions:
        return None
    # not the numbers that the crop is drawn from
    return captions[int(np.random.default_rng((seed, epoch, index, 1)).integers(len(captions)))]


def without_gaps(
    rows: "datasets.Dataset | datasets.IterableDataset",
    arguments: "DataArguments",
    label_column: str | None,
    keep: bool,
):
    """Refuses rows that lack a label or caption; with `missing_condition="null"` leaves them out, or keeps them."""
    import datasets

    columns = (label_column if arguments.label_column is not None else None, arguments.caption_column)
    for column in filter(None, columns):
        no_label = NO_LABEL if isinstance(rows.features[column], datasets.ClassLabel) else None
        values = rows[column][:]
        gaps = {row for row, value in enumerate(values) if is_missing(value) or value == no_label}
        if gaps and arguments.missing_condition == "error":
            raise missing_error(column, f"row {min(gaps)}", len(gaps) - 1)
        if gaps and not keep:
            logger.warning("Left out %d rows without a value in the column %r.", len(gaps), column)
            rows = rows.select([row for row in range(len(rows)) if row not in gaps])
    return rows


def _exclude(rows, conditions: list[str]):
    """Without the rows that meet a condition "column=value"; a class is given by its name."""
    import datasets

    excluded: dict[str, set[str]] = {}
    for condition in conditions:
        column, separator, value = condition.partition("=")
        if not separator:
            raise ValueError(f"exclude={condition!r}: it must be written column=value.")
        excluded.setdefault(column, set()).add(value)
    for column, values in excluded.items():
        if column not in rows.features:
            raise ValueError(f"exclude: the data set has no column {column!r}; it has {sorted(rows.features)}.")
        names = getattr(rows.features[column], "names", None)
        if names is not None and not values <= set(names):
            raise ValueError(
                f"exclude: {sorted(values - set(names))} are not among the classes {names} of {column!r}."
            )
        is_kept = partial(_differs, excluded=values, names=names)
        if isinstance(rows, datasets.IterableDataset):
            rows = rows.filter(is_kept, input_columns=column)
        else:
            rows = rows.select([i for i, value in enumerate(rows[column][:]) if is_kept(value)])
    return rows


def _differs(value, excluded: set[str], names: list[str] | None) -> bool:
    return str(value if names is None else names[value]) not in excluded


def _integer_labels(rows, column: str, feature, class_names: list[str] | None):
    import datasets

    if isinstance(feature, datasets.ClassLabel) and class_names in (None, feature.names):
        return rows, list(feature.names)
    if isinstance(feature, datasets.ClassLabel):
        return _renumbered(rows, column, feature.names, class_names), class_names
    dtype = str(getattr(feature, "dtype", None))
    if dtype == "bool" or dtype.startswith(("int", "uint")):
        return rows, class_names
    if dtype not in ("string", "large_string"):
        raise ValueError(
            f"label_column={column!r} holds {feature}: it must hold ClassLabel, bool, integers or strings."
        )
    is_stream = isinstance(rows, datasets.IterableDataset)
    if class_names is None or not is_stream:
        known = _distinct(rows, column) if is_stream else set(rows.unique(column)) - {None}
        class_names = class_names or sorted(known)
        unknown = sorted(known - set(class_names))
        if unknown:
            raise ValueError(f"label_column={column!r} holds {unknown}: the classes are {class_names}.")
    labels = datasets.ClassLabel(names=class_names)
    if not is_stream:
        return rows.cast_column(column, labels), class_names
    encode = partial(_encode_label, column=column, numbers={name: i for i, name in enumerate(class_names)})
    return rows.map(encode, features=datasets.Features({**rows.features, column: labels})), class_names


def _renumbered(rows, column: str, names: list[str], class_names: list[str]):
    """The classes of `rows`, numbered among `names`, with the numbers that they have among `class_names`."""
    import datasets

    labels = datasets.ClassLabel(names=class_names)
    numbers = {None: None, NO_LABEL: NO_LABEL}
    numbers |= {i: class_names.index(name) for i, name in enumerate(names) if name in class_names}
    if isinstance(rows, datasets.IterableDataset):
        renumber = partial(_renumber, column=column, numbers=numbers, names=names, class_names=class_names)
        return rows.map(renumber, features=datasets.Features({**rows.features, column: labels}))
    unknown = sorted(names[number] for number in set(rows.unique(column)) - set(numbers))
    if unknown:
        raise ValueError(f"label_column={column!r} holds {unknown}: the classes are {class_names}.")
    renumbered = [numbers[number] for number in rows[column]]
    return rows.remove_columns(column).add_column(column, renumbered, feature=labels)  # images are not copied


def _renumber(row: dict, column: str, numbers: dict, names: list[str], class_names: list[str]) -> dict:
    value = row[column]
    if value not in numbers:
        raise ValueError(f"label_column={column!r} holds {names[value]!r}: the classes are {class_names}.")
    return {column: numbers[value]}


def _distinct(rows, column: str) -> set[str]:
    logger.warning("Reading the column %r of the whole stream once; class_names=… spares it.", column)
    return {row[column] for row in rows.select_columns([column])} - {None}


def _encode_label(row: dict, column: str, numbers: dict[str, int]) -> dict:
    value = row[column]
    if value is not None and value not in numbers:
        raise ValueError(f"label_column={column!r} holds {value!r}: the classes are {list(numbers)}.")
    return {column: None if value is None else numbers[value]}
