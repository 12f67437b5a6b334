import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest


ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name}
    package = {
        path.relative_to(source).as_posix()
        for path in (source / "hf_vq").rglob("*")
        if path.is_file() and (path.suffix in (".py", ".md") or path.name == "py.typed")
    }
    assert packed == package
    assert "hf_vq/model_card_template.md" in packed and "hf_vq/models/autoencoders/modeling_vqgan.py" in packed
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= metadata
    assert wheel.stat().st_size < 1_000_000
