"""The comparison of discriminators: its table, and a short form of the whole."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image


SCRIPT = Path(__file__).resolve().parents[2] / "examples/comparison/compare_discriminators.py"
spec = importlib.util.spec_from_file_location("compare_discriminators", SCRIPT)
comparison = importlib.util.module_from_spec(spec)
spec.loader.exec_module(comparison)


def test_the_table_has_the_largest_fall():
    curve = [
        {"step": i, "psnr": psnr, "ssim": 0.5, "perceptual": 0.25} for i, psnr in enumerate([20, 22, 19.5, 23, 21])
    ]
    lines = comparison.table({"one": {"curve": curve, "frechet_distance": {"value": 3.14159}}}).splitlines()
    assert lines[2] == "| one | 21.00 | 2.50 | 0.500 | 0.2500 | 3.14 |"


@pytest.mark.slow
def test_a_short_comparison(tmp_path):
    names = ["no discriminator", "from the start"]
    options = ["--quick", "--output_dir", str(tmp_path), "--settings", *names]
    comparison.main(options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == names
    for result in results.values():
        assert [row["step"] for row in result["curve"]] == [1, 2]
    # a discriminator of weight 0.5 changes the steps
    assert results[names[0]]["curve"] != results[names[1]]["curve"]
    for name in ("curves.png", "reconstructions.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 20
    comparison.main(options)  # a second run trains no further
    assert json.loads((tmp_path / "results.json").read_text()) == results
