"""The comparison of quantizers: every row trains, is measured once, and starts from the same encoder and decoder."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).resolve().parents[2] / "examples/comparison/compare_quantizers.py"
spec = importlib.util.spec_from_file_location("compare_quantizers", SCRIPT)
comparison = importlib.util.module_from_spec(spec)
spec.loader.exec_module(comparison)


@pytest.mark.parametrize("name", [name for name in comparison.ROWS if not name.startswith("vector-quantize-pytorch")])
def test_row_starts_from_the_same_weights_and_trains(name):
    first, model = comparison.build("gradient", 1024), comparison.build(name, 1024)
    assert torch.equal(model.encoder.down[0].weight, first.encoder.down[0].weight)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = model.decoder.up[-1].weight.clone()
    comparison.train(model, images, steps=3)
    assert not torch.equal(model.decoder.up[-1].weight, before)
    with torch.no_grad():
        output = model.eval().encode(images)
    assert output.indices.shape == (8, 8, 8) and output.indices.dtype == torch.int64
    assert 0 <= output.indices.min() and output.indices.max() < comparison.codes_of(name, 1024)


def test_a_second_run_measures_only_what_is_missing(tmp_path, capsys):
    options = ["--quick", "--codes", "1024", "--output_dir", str(tmp_path), "--rows"]
    comparison.main([*options, "gradient"])
    assert "| gradient | 1024 |" in capsys.readouterr().out
    comparison.main([*options, "gradient", "FSQ"])
    printed = capsys.readouterr().out
    assert "| FSQ | 1000 |" in printed and "gradient" not in printed
    rows = json.loads((tmp_path / "quantizers.json").read_text())
    assert [row["quantizer"] for row in rows] == ["gradient", "FSQ"]
    table = (tmp_path / "quantizers.md").read_text().splitlines()
    assert len(table) == 4 and table[0].startswith("| quantizer | codes | in use |")
