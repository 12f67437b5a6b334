"""Pages that are made of what the project holds: the examples' READMEs, the classes, the command line, the figures.

Run by mkdocs-gen-files, so that nothing is said twice.
"""

import argparse
import re
from pathlib import Path

import mkdocs_gen_files
import yaml

import hf_vq
from docs.rooms import rooms
from hf_vq.cli import build_parser


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("vqvae", "vqvae2", "vqgan", "vq_gpt", "pixelcnn", "vq_diffusion", "vq_latent_diffusion")
READMES = {
    "conditional.md": "examples/conditional/README.md",
    "convert.md": "conversion/README.md",
    "web_page.md": "examples/space/README.md",
    "data.md": "examples/data/README.md",
    **{f"scripts/{name}.md": f"examples/{name}/README.md" for name in SCRIPTS},
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def picture(source: str) -> str:
    """Copies a picture of the project into the site, and returns its address from the root of the pages."""
    target = "pictures/" + source.replace("examples/", "").replace("checkpoints/", "").replace("/", "-")
    with mkdocs_gen_files.open(target, "wb") as file:
        file.write((ROOT / source).read_bytes())
    return target


def readme(page: str, source: str) -> str:
    """A README as a page: its pictures copied, links to other READMEs to their pages, and those to files as code."""
    text = (ROOT / source).read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    up = "../" * page.count("/")
    pages = {str(Path(other).parent): name for name, other in READMES.items()}

    def link(match: re.Match) -> str:
        mark, label, address = match.groups()
        if "://" in address or address.startswith("#"):
            return match[0]
        path = (ROOT / source).parent.joinpath(address).resolve().relative_to(ROOT)
        if mark:
            return f"![{label}]({up}{picture(str(path))})"
        folder = str(path.parent if path.suffix else path)
        return f"[{label}]({up}{pages[folder]})" if folder in pages else f"{label} (`{path}`)"

    return LINK.sub(link, text)


def classes() -> None:
    """A page for each public name, and one that lists them."""
    parts = ["# Classes\n\nEvery public name: `from hf_vq import …`.\n"]
    for title, names in rooms().items():
        parts.append(f"## {title}\n\n" + "\n".join(f"- [`{name}`]({name}.md)" for name in names) + "\n")
        for name in names:
            write(f"classes/{name}.md", f"# {name}\n\n::: {hf_vq._MODULES[name]}.{name}\n")
    write("classes/index.md", "\n".join(parts))


def command_line() -> None:
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# The command line\n\nWhat `hf-vq COMMAND --help` prints.\n"]
    for name, command in commands.choices.items():
        command.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=110)
        parts.append(f"## hf-vq {name}\n\n```text\n{command.format_help().rstrip()}\n```\n")
    write("command_line.md", "\n".join(parts))


def figures() -> None:
    """The page of measured figures: of the packaged checkpoints from their cards, and of the comparison of priors."""
    parts = [(ROOT / "docs/figures_introduction.md").read_text(encoding="utf-8"), "## The packaged checkpoints\n"]
    for card in sorted((ROOT / "examples/checkpoints").glob("*/README.md")):
        text = card.read_text(encoding="utf-8")
        data = yaml.safe_load(text.split("---")[1])
        result = data["model-index"][0]["results"][0]
        table = ["| metric | value |", "|---|---|"]
        table += [f"| {metric['type']} | {metric['value']:.4g} |" for metric in result["metrics"]]
        parts.append(f"### {card.parent.name}\n\nOn the {result['dataset']['split']} split.\n")
        parts.append("\n".join(table) + "\n")
        sheet = card.parent / "samples.webp"
        if sheet.is_file():
            parts.append(f"![Samples]({picture(str(sheet.relative_to(ROOT)))})\n")
    comparison = readme("figures.md", "examples/comparison/README.md")
    parts.append(re.sub(r"^(#+) ", r"#\1 ", comparison, flags=re.MULTILINE))
    text = re.sub(r"(```.*?```)", lambda m: m[0].replace("\n## ", "\n# "), "\n".join(parts), flags=re.DOTALL)
    write("figures.md", text)


for page, source in READMES.items():
    write(page, readme(page, source))
examples = (ROOT / "examples/README.md").read_text(encoding="utf-8")
scale = examples.partition("## Several processes and machines\n")[2]
if not scale:
    raise ValueError("examples/README.md has lost its section on several machines.")
write("scale.md", "# Scale out\n" + scale)
for name in ("examples/vq_diffusion/prompts.png", "examples/comparison/samples.png"):
    picture(name)
for sheet in sorted((ROOT / "examples/checkpoints").glob("*/*.*")):
    if sheet.suffix in (".png", ".webp"):
        picture(str(sheet.relative_to(ROOT)))
classes()
command_line()
figures()
