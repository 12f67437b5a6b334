"""`hf-vq push` against the stand-in for the Hub."""

import pytest
import torch

import hf_vq
from hf_vq.cli import main
from hf_vq.hub import push_folder
from tests.pipelines import vq_diffusion_parts


pytestmark = pytest.mark.hub

PUSH = """
from hf_vq.cli import main
folder = {folder!r}
assert main(["push", folder + "/pipeline", "tester/whole", "--private", "--license", "mit"]) == 0
assert main(["push", folder + "/pipeline", "tester/whole", "--revision", "trial", "--message", "A trial"]) == 0
assert main(["push", folder + "/pipeline/transformer", "tester/denoiser", "--no-code"]) == 0
assert main(["push", folder + "/pipeline/scheduler", "tester/scheduler"]) == 0
assert main(["push", folder + "/processor", "tester/whole", "--create-pr"]) == 0
"""

INFO = """
assert main(["info", "tester/whole"]) == 0
assert main(["info", "tester/nobody"]) == 1
"""


def test_each_kind_of_folder(hub, tmp_path):
    torch.manual_seed(0)
    pipeline = vq_diffusion_parts.make_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    hf_vq.VQImageProcessor(size=8).save_pretrained(tmp_path / "processor")
    printed = hub.run(PUSH.format(folder=str(tmp_path)) + INFO)
    assert "VQDiffusionTransformer2DModel" in printed and "MaskReplaceScheduler" in printed
    assert "/tester/whole/discussions/1" in printed
    whole = hub.store.repositories["model", "tester/whole"]
    assert whole.private and set(whole.heads) == {"main", "trial", "refs/pr/1"}
    card = hub.files("tester/whole")["README.md"].decode()
    assert "license: mit" in card and 'from_pretrained("tester/whole", trust_remote_code=True)' in card
    assert str(tmp_path) not in card
    denoiser = hub.files("tester/denoiser")
    assert {"config.json", "README.md", "diffusion_pytorch_model.safetensors"} == set(denoiser)
    assert "trust_remote_code" not in denoiser["README.md"].decode()
    assert {"scheduling_mask_replace.py", "scheduler_config.json", "README.md"} == set(hub.files("tester/scheduler"))
    assert {"preprocessor_config.json", "image_processing_vq.py"} <= set(whole.at("refs/pr/1").files)


BROKEN = """
from pathlib import Path
from hf_vq.hub import push_folder
folder = Path({folder!r})
try:
    push_folder(folder, "tester/large", "Upload")
except RuntimeError:
    print("broke off")
push_folder(folder, "tester/large", "Upload")
"""


@pytest.mark.slow
def test_an_upload_that_broke_off_sends_only_what_is_missing(hub, tmp_path):
    files = {f"model-{number}.safetensors": bytes([number]) * 1000 for number in range(6)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    hub.store.broken_uploads = 2
    assert "broke off" in hub.run(BROKEN.format(folder=str(tmp_path)))
    uploads = [request for request in hub.store.requests if request.startswith("PUT /lfs/")]
    assert len(set(uploads)) == 6 and len(uploads) == 6 + 2  # the two that failed once more, and no other
    assert {name: hub.files("tester/large")[name] for name in files} == files


def test_what_cannot_be_pushed(tmp_path, capsys):
    for arguments, message in (
        (["push", str(tmp_path / "none"), "me/a"], "`FOLDER` must be a folder"),
        (["push", str(tmp_path), "me/a"], "must hold one of model_index.json"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="`create_pr` must not be given with `revision`, got 'trial'"):
        push_folder(tmp_path, "me/a", "Upload", revision="trial", create_pr=True)
