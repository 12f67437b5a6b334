import random

import numpy as np
import pytest
import torch

from hf_vq.training.checkpointing import (
    atomic_folder,
    find_checkpoints,
    get_random_state,
    load_parts,
    preserved_random_state,
    remove_unfinished,
    rotate_checkpoints,
    save_parts,
    set_aside_after,
    set_random_state,
    write_file_atomically,
)


def draw():
    return random.random(), float(np.random.normal()), float(torch.randn(())), float(np.random.rand())


def test_random_state_survives_a_file(tmp_path):
    np.random.normal()  # numpy keeps a second normal value in hand: it belongs to the state
    random.gauss(0, 1)
    torch.save(get_random_state(), tmp_path / "state.pt")
    expected = [draw(), random.gauss(0, 1)]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(), random.gauss(0, 1)] == expected
    assert draw() != expected[0]


def test_preserved_random_state():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with preserved_random_state():
        draw()
    assert torch.equal(torch.rand(2), expected)


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not target.exists()
    assert (target / "sub" / "b").read_text() == "2"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as folder:
        (folder / "c").write_text("3")
    assert [path.name for path in target.iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_old_or_new(tmp_path):
    write_file_atomically(tmp_path / "x", "old")
    write_file_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_unfinished_writes_are_ignored_and_removed(tmp_path):
    for name in (
        ".unfinished-checkpoint-9",
        ".unfinished-removed-checkpoint-1",
        "checkpoint-5",
        "checkpoint-6-failed",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / ".unfinished-metrics.jsonl").write_text("")
    (tmp_path / "checkpoint-7").write_text("a file is no checkpoint")
    assert list(find_checkpoints(tmp_path)) == [5]
    assert len(remove_unfinished(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6-failed", "checkpoint-7"]


def test_rotation_goes_by_number(tmp_path):
    for step in (8, 9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate_checkpoints(tmp_path, None)
    assert list(find_checkpoints(tmp_path)) == [8, 9, 10, 100]
    rotate_checkpoints(tmp_path, 2)
    assert list(find_checkpoints(tmp_path)) == [10, 100]


def test_later_checkpoints_are_set_aside(tmp_path):
    for _ in range(2):
        for step in (1, 2, 3):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        set_aside_after(tmp_path, 1)
        assert list(find_checkpoints(tmp_path)) == [1]
    assert len(list(tmp_path.glob("*-superseded-*"))) == 4


def test_weights_of_another_model_are_one_line(tmp_path):
    save_parts(tmp_path, {"model": torch.nn.Linear(2, 3)})
    load_parts(tmp_path, {"model": torch.nn.Linear(2, 3)})
    for other, difference in (
        (torch.nn.Linear(2, 4), r"its `weight` is \(3, 2\), the run's \(4, 2\)"),
        (torch.nn.Linear(2, 3, bias=False), r"its `bias` is \(3,\), the run's not there"),
    ):
        with pytest.raises(
            ValueError, match=rf"model.safetensors holds the weights of another .*: {difference}\. "
        ) as caught:
            load_parts(tmp_path, {"model": other})
        assert "\n" not in str(caught.value)
