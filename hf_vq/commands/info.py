"""``hf-vq info``: what a folder or a repository holds."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..loading import load
from .sources import is_indices


def info(options: argparse.Namespace) -> None:
    """Prints what a model, a pipeline, a part of one, a run or a data set of indices is."""
    folder = Path(options.model)
    if not folder.is_dir():
        folder = downloaded_indices(options.model) or folder
    if (folder / "metrics.jsonl").is_file():
        found = run_facts(folder)
    elif folder.is_dir() and is_indices(folder):
        found = {split: indices_facts(place) for split, place in indices_splits(folder).items()}
    else:
        found = model_facts(load(options.model, stock=True))
    if list(found) == [""]:
        found = found[""]
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, part in value.items():
                print(f"  {key:14} {part}")
        else:
            print(f"  {name:14} {value}")


def model_facts(model: Any) -> dict[str, dict]:
    """What each part of a pipeline is, by its name; of anything else by the name ""."""
    from ..hub_cards import facts

    parts = getattr(model, "components", {"": model})
    return {
        name: {**dict(facts(part)), **codebook_health(part)}
        for name, part in parts.items()
        if part is not None and not isinstance(part, (bool, int, float, str, list, dict))
    }


def codebook_health(model: Any) -> dict[str, str]:
    """How evenly training last used the codes, by the running counts of an EMA codebook; empty where none are kept."""
    from ..models.quantizers.codebook_statistics import codebook_statistics

    quantizers = [module for _, module in getattr(model, "named_modules", list)() if hasattr(module, "cluster_size")]
    found = {}
    for number, quantizer in enumerate(quantizers):
        counts = quantizer.cluster_size.detach().cpu().double()
        dead = int((counts < 0.01 * counts.mean()).sum())
        name = "codes in use" if len(quantizers) == 1 else f"codes in use, {number}"
        found[name] = (
            f"{len(counts) - dead} of {len(counts)}, perplexity {float(codebook_statistics(counts).perplexity):.1f} "
            "(running counts of training)"
        )
    return found


def run_facts(folder: Path) -> dict[str, object]:
    """The steps of a training run, its last figures, its checkpoints, and what it has trained."""
    from ..evaluation.inspection import metric_rows

    losses, validation, step = {}, {}, 0
    for row in metric_rows(folder / "metrics.jsonl"):
        step = max(step, row["step"])
        figures = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        if any(name.startswith("validation/") for name in figures):
            validation = figures
        elif figures:
            losses = figures
    found: dict[str, object] = {"steps": step}
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    found["checkpoints"] = ", ".join(path.name for path in checkpoints) or "none"
    found["metrics"] = losses
    found["validation"] = {name.removeprefix("validation/"): value for name, value in validation.items()}
    for name in ("tokenizer", "prior", "pipeline"):
        if (folder / name).is_dir():
            for part, facts in model_facts(load(str(folder / name))).items():
                found[f"{name}.{part}" if part else name] = facts
    return found


def downloaded_indices(repo: str) -> Path | None:
    """The indices in a data set of the Hub, in its cache; None where no data set has this name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns="*indices-*.parquet"))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError):  # `load` says what is wrong
        return None
    return folder if is_indices(folder) else None


def indices_splits(folder: Path) -> dict[str, Path]:
    """The folders of indices by their splits; of a folder that holds indices itself by the name ""."""
    if any(folder.glob("indices-*.parquet")):
        return {"": folder}
    return {path.name: path for path in sorted(folder.iterdir()) if any(path.glob("indices-*.parquet"))}


def indices_facts(folder: Path) -> dict[str, object]:
    """The images and columns of a data set of indices, and how evenly its codes are used."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from ..models.quantizers.codebook_statistics import codebook_statistics

    tables = [pq.read_table(path) for path in sorted(folder.glob("indices-*.parquet"))]
    found: dict[str, object] = {"images": sum(map(len, tables)), "columns": ", ".join(tables[0].column_names)}
    for name in tables[0].column_names:
        if not name.startswith("indices"):
            continue
        columns = [table[name].combine_chunks() for table in tables]
        codes = np.concatenate([np.asarray(column.flatten()) for column in columns]).astype(np.int64)
        counts = torch.from_numpy(np.bincount(codes))
        found[name] = (
            f"{len(codes) // found['images']} codes an image, {int((counts > 0).sum())} different codes up to "
            f"{len(counts) - 1}, perplexity {float(codebook_statistics(counts).perplexity):.1f}"
        )
    return found
