"""Builds the emoji data set from npm packages.

npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 unicode-emoji-json@0.9.0
python examples/data/make_emoji.py --packages . --output examples/data --size 64

All that the packages hold, 10,934 pictures, of which the packaged ones are a part with the same split:

npm pack @lobehub/fluent-emoji-3d@1.1.0
python examples/data/make_emoji.py --packages . --output data --styles google twitter fluent3d --skin-tones
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
STYLES = ["google", "twitter", "fluent3d"]
PACKAGED_STYLES = STYLES[:2]
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def read_package(folder: Path, name: str, wanted) -> dict[str, bytes]:
    """The files of a packed npm package whose path `wanted` accepts."""
    archives = sorted(folder.glob(f"{name}-[0-9]*.tgz"))
    if not archives:
        package = name.replace("lobehub-", "@lobehub/")  # as npm writes the scope into the name of the file
        raise ValueError(f"`--packages`: no {name}-*.tgz in {folder}; get it with `npm pack {package}`.")
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


def read_pictures(folder: Path, style: str) -> dict[str, bytes]:
    """The picture files of a style, by their emoji's key."""
    if style == "fluent3d":
        files = read_package(folder, "lobehub-fluent-emoji-3d", lambda path: path.endswith(".webp"))
    else:
        files = read_package(folder, f"emoji-datasource-{style}", lambda path: path.startswith(f"img/{style}/64/"))
    return {key(Path(path).stem): picture for path, picture in files.items()}


def variants(emoji: dict, caption: str, skin_tones: bool) -> list[tuple[str, str]]:
    """Code points and captions of an emoji, and of it in each skin tone."""
    found = [(emoji["unified"], caption)]
    for tones, variant in sorted(emoji.get("skin_variations", {}).items()) if skin_tones else []:
        names = " and ".join(TONES[tone] for tone in tones.split("-"))
        found.append((variant["unified"], f"{caption}, {names} skin tone"))
    return found


def make_rows(folder: Path, size: int, styles: list[str], skin_tones: bool) -> tuple[list[dict], list[str]]:
    names = json.loads(read_package(folder, "unicode-emoji-json", lambda p: p == "data-by-emoji.json").popitem()[1])
    captions = {key("-".join(f"{ord(c):x}" for c in emoji)): about["name"] for emoji, about in names.items()}
    pictures = {style: read_pictures(folder, style) for style in styles}
    # both packages describe all emoji alike
    emoji = json.loads(read_package(folder, "emoji-datasource-google", lambda p: p == "emoji.json").popitem()[1])
    emoji = [e for e in sorted(emoji, key=lambda e: e["sort_order"]) if e["category"] in CATEGORIES]
    subcategories = sorted({e["subcategory"] for e in emoji})
    rows = []
    for e in emoji:
        caption = captions.get(key(e["unified"])) or re.sub(r"\s+", " ", e["name"]).strip()
        for code_points, of_variant in variants(e, caption, skin_tones):
            for style in styles:
                is_toned = code_points != e["unified"]
                if key(code_points) not in pictures[style] or not (is_toned or e.get(f"has_img_{style}", True)):
                    continue
                image, opacity = square_picture(pictures[style][key(code_points)], size)
                category = CATEGORIES.index(e["category"])
                mask = opacity.point([0] * 128 + [category + 1] * 128)
                rows.append(
                    {
                        "image": {"bytes": png_bytes(image), "path": f"{style}-{code_points.lower()}.png"},
                        "mask": {"bytes": png_bytes(mask), "path": None},
                        "caption": of_variant.lower(),
                        "category": category,
                        "subcategory": subcategories.index(e["subcategory"]),
                        "style": STYLES.index(style),
                        "skin_tone": is_toned,
                        "unified": code_points,
                        "split": split_of(e["unified"]),
                    }
                )
    return rows, subcategories


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packed npm packages")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--size", type=int, default=64, help="side of the pictures; the sources have 64, those of fluent3d 256"
    )
    parser.add_argument("--styles", nargs="+", default=PACKAGED_STYLES, choices=STYLES)
    parser.add_argument("--skin-tones", action="store_true", help="people in each tone too, which doubles the set")
    arguments = parser.parse_args()
    styles = [style for style in STYLES if style in arguments.styles]  # each once
    rows, subcategories = make_rows(arguments.packages, arguments.size, styles, arguments.skin_tones)
    features = Features(
        {
            "image": Image(),
            "mask": Image(),
            "caption": Value("string"),
            "category": ClassLabel(names=CATEGORIES),
            "subcategory": ClassLabel(names=subcategories),
            "style": ClassLabel(names=STYLES),
            "skin_tone": Value("bool"),
            "unified": Value("string"),
        }
    )
    folder = arguments.output / f"emoji-{arguments.size}"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        chosen = [{name: row[name] for name in features} for row in rows if row["split"] == split]
        Dataset.from_list(chosen, features=features).to_parquet(folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {len(chosen)} pictures")


if __name__ == "__main__":
    main()
