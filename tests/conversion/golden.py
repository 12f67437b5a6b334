"""What the original programs computed (tests/fixtures/golden), and how closely it must be met."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def published(name: str) -> tuple[dict, dict]:
    """A published checkpoint's `model` section of the YAML, and empty tensors under its keys and with its shapes."""
    entry = json.loads(gzip.decompress((GOLDEN / "published_keys" / f"{name}.json.gz").read_bytes()))
    state_dict = {}
    for key, (shape, dtype) in entry["keys"].items():
        # attention masks are read, so they exist; the stride of 0 makes them small
        is_mask = key.endswith(".attn.mask")
        tensor = (
            torch.zeros(1).expand(shape) if is_mask else torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        )
        state_dict[key] = tensor
    return {"target": entry.get("target"), "params": entry.get("params")}, state_dict


@dataclass
class Golden:
    """One case; `compare` remembers what was compared, so that a test can tell that nothing was left out."""

    name: str

    def __post_init__(self):
        self.folder = GOLDEN / self.name
        self.tensors = load_file(self.folder / "io.safetensors")
        self.manifest = json.loads((self.folder / "manifest.json").read_text())["tensors"]
        self.compared = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def compare(self, name: str, actual: torch.Tensor):
        """Indices must be equal; the rest within the case's own tolerance, at least 1e-5 (gradients: 3 times their
        own).
        """
        expected, entry = self.tensors[name], self.manifest[name]
        self.compared.add(name)
        if not expected.is_floating_point():
            assert torch.equal(actual.reshape(expected.shape), expected), name
            return
        is_gradient = entry["role"] == "gradient" or "grad" in name
        atol = 3 * entry["suggested_atol"] if is_gradient else max(entry["suggested_atol"], 1e-5)
        torch.testing.assert_close(
            actual.detach(), expected, atol=atol, rtol=0, msg=lambda text: f"{self.name}, {name}: {text}"
        )

    def assert_all_compared(self, besides: set[str] = frozenset()):
        outputs = {name for name, entry in self.manifest.items() if entry["role"] != "input"}
        assert outputs - self.compared == besides
