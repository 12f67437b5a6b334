import json

import pytest
import torch

from tests.conversion.drawn_weights import rebuild, rebuild_all, store


def test_a_checkpoint_is_rebuilt_byte_by_byte_without_the_weights_that_its_seed_gives(tmp_path):
    torch.manual_seed(3)
    file = tmp_path / "case" / "checkpoint.pt"
    file.parent.mkdir()
    network = torch.nn.Sequential(torch.nn.Linear(40, 90), torch.nn.Conv2d(8, 70, 3), torch.nn.BatchNorm2d(70))
    torch.nn.init.normal_(network[2].weight)
    torch.save(network.state_dict(), file)
    content = file.read_bytes()

    store(file, file.parent, seeds=[2, 3], numbers=20_000)
    assert len((file.parent / "rest.bin").read_bytes()) < len(content) - 4 * (40 * 90 + 90 + 70 * 8 * 9 + 70) + 1
    assert rebuild(file.parent) == content

    file.write_bytes(b"damaged")
    rebuild_all(tmp_path)
    assert file.read_bytes() == content
    assert {path.name for path in file.parent.iterdir()} == {"checkpoint.pt", "drawn.json", "rest.bin"}


def test_other_random_numbers_are_noticed(tmp_path):
    torch.manual_seed(3)
    torch.save(torch.nn.Linear(40, 90).state_dict(), tmp_path / "checkpoint.pt")
    store(tmp_path / "checkpoint.pt", tmp_path, seeds=[3], numbers=20_000)
    description = json.loads((tmp_path / "drawn.json").read_text())
    description["drawn"][0][2] = 4
    (tmp_path / "drawn.json").write_text(json.dumps(description))
    with pytest.raises(RuntimeError, match="random numbers changed"):
        rebuild(tmp_path)
