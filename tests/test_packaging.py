import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image


ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The files of the repository, and the wheel made of them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    source, wheel = built
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


@pytest.mark.slow
def test_the_wheel_trains_without_a_clone(built, tmp_path):
    """`hf-vq train` of an installed wheel, in a folder that has nothing of the repository."""
    _, wheel = built
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel]
    subprocess.run(install, check=True, timeout=300)
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    model = "--hidden_size 8 --residual_hidden_size 4 --num_residual_layers 1 --embed_dim 4 --num_embeddings 8"
    data = f"--dataset_name_or_path {tmp_path / 'photos'} --train_split train[2:] --validation_split train[:2]"
    length = "--max_train_steps 2 --train_batch_size 2 --resolution 16 --cpu true --validation_perceptual none"
    command = f"{site / 'bin' / 'hf-vq'} train vqvae {model} {data} {length} --output_dir run".split()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    work = tmp_path / "elsewhere"
    work.mkdir()
    done = subprocess.run([sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = (work / "run" / "tokenizer" / "README.md").read_text()
    assert "hf-vq train vqvae --hidden_size 8" in card and str(tmp_path) not in card
    imported = "import hf_vq; print(hf_vq.__file__)"
    done = subprocess.run([sys.executable, "-c", imported], cwd=work, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(site))
