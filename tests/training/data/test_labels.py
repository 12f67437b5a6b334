from types import SimpleNamespace

import numpy as np
import pytest

from hf_vq.training.data.labels import count_classes


def splits(train, validation):
    arrays = {"train": train, "validation": validation}
    return {name: SimpleNamespace(labels=v if v is None else np.array(v)) for name, v in arrays.items()}


def test_as_many_as_names_or_as_labels():
    assert count_classes(splits([0, 2, 2], [1]), None, "number") == 3
    assert count_classes(splits([0, 1], [1]), ["a", "b", "c", "d"], "name") == 4
    assert count_classes({"train": object(), "validation": object()}, ["a", "b"], "name") == 2  # a stream
    assert count_classes(splits(None, None), None, None) == 0


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (([0, 1], [2]), None, "the validation labels are 2 to 2, not within 0 to 1"),
        (([-1, 1], [0]), None, "the train labels are -1 to 1, not within 0 to 1"),
        (([0, 1], [1]), ["a"], "the train labels are 0 to 1, not within 0 to 0"),
        ((None, None), None, "label_column='number': the classes of a stream need names"),
    ],
)
def test_what_is_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        count_classes(splits(*labels), names, "number")
