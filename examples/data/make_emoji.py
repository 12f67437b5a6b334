"""Builds the emoji data set from npm packages.

npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 unicode-emoji-json@0.9.0
python examples/data/make_emoji.py --packages . --output examples/data --size 64
"""

import argparse
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage


CATEGORIES = [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
]
STYLES = ["google", "twitter"]
STYLE_NAMES = [*STYLES, "fluent3d"]  # the third one is reserved: no picture here has it


def read_package(folder: Path, name: str, wanted) -> dict[str, bytes]:
    """The files of a packed npm package whose path `wanted` accepts."""
    archives = sorted(folder.glob(f"{name}-[0-9]*.tgz"))
    if not archives:
        raise ValueError(f"`--packages`: no {name}-*.tgz in {folder}; get it with `npm pack {name}`.")
    with tarfile.open(archives[-1], "r:gz") as archive:
        files = ((member.name.split("/", 1)[-1], member) for member in archive if member.isfile())
        return {path: archive.extractfile(member).read() for path, member in files if wanted(path)}


def key(code_points: str) -> str:
    """One spelling of an emoji's code points: lower case, without variation selectors."""
    return re.sub(r"-?fe0f", "", code_points.lower()).strip("-")


def split_of(code_points: str) -> str:
    """One emoji in ten is for validation, whatever its style."""
    return "validation" if int(hashlib.md5(key(code_points).encode()).hexdigest(), 16) % 10 == 0 else "train"


def square_picture(png: bytes, size: int) -> tuple[PILImage.Image, PILImage.Image]:
    """The picture on white, and its opacity."""
    image = PILImage.open(io.BytesIO(png)).convert("RGBA")
    side = max(image.size)
    canvas = PILImage.new("RGBA", (side, side), (0, 0, 0, 0))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if side != size:  # premultiplied, or the colour of transparent pixels would bleed in
        filter = PILImage.Resampling.BOX if side == 2 * size else PILImage.Resampling.LANCZOS
        canvas = canvas.convert("RGBa").resize((size, size), filter).convert("RGBA")
    opacity = canvas.getchannel("A")
    white = PILImage.new("RGB", canvas.size, "white")
    white.paste(canvas, mask=opacity)
    return white, opacity


def png_bytes(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def make_rows(folder: Path, size: int) -> tuple[list[dict], list[str]]:
    names = json.loads(read_package(folder, "unicode-emoji-json", lambda p: p == "data-by-emoji.json").popitem()[1])
    captions = {key("-".join(f"{ord(c):x}" for c in emoji)): about["name"] for emoji, about in names.items()}
    pictures = {}
    for style in STYLES:
        files = read_package(
            folder, f"emoji-datasource-{style}", lambda p, s=style: p == "emoji.json" or p.startswith(f"img/{s}/64/")
        )
        emoji = json.loads(files.pop("emoji.json"))
        pictures[style] = {key(Path(path).stem): png for path, png in files.items()}
    emoji = [e for e in sorted(emoji, key=lambda e: e["sort_order"]) if e["category"] in CATEGORIES]
    subcategories = sorted({e["subcategory"] for e in emoji})
    rows = []
    for e in emoji:
        caption = captions.get(key(e["unified"])) or re.sub(r"\s+", " ", e["name"]).strip()
        for style in STYLES:
            if not e[f"has_img_{style}"] or key(e["unified"]) not in pictures[style]:
                continue
            image, opacity = square_picture(pictures[style][key(e["unified"])], size)
            category = CATEGORIES.index(e["category"])
            mask = opacity.point([0] * 128 + [category + 1] * 128)
            rows.append(
                {
                    "image": {"bytes": png_bytes(image), "path": f"{style}-{e['unified'].lower()}.png"},
                    "mask": {"bytes": png_bytes(mask), "path": None},
                    "caption": caption.lower(),
                    "category": category,
                    "subcategory": subcategories.index(e["subcategory"]),
                    "style": STYLE_NAMES.index(style),
                    "skin_tone": False,
                    "unified": e["unified"],
                }
            )
    return rows, subcategories


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packed npm packages")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures; the sources have 64")
    arguments = parser.parse_args()
    rows, subcategories = make_rows(arguments.packages, arguments.size)
    features = Features(
        {
            "image": Image(),
            "mask": Image(),
            "caption": Value("string"),
            "category": ClassLabel(names=CATEGORIES),
            "subcategory": ClassLabel(names=subcategories),
            "style": ClassLabel(names=STYLE_NAMES),
            "skin_tone": Value("bool"),
            "unified": Value("string"),
        }
    )
    folder = arguments.output / f"emoji-{arguments.size}"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        chosen = [row for row in rows if split_of(row["unified"]) == split]
        Dataset.from_list(chosen, features=features).to_parquet(folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {len(chosen)} pictures")


if __name__ == "__main__":
    main()
