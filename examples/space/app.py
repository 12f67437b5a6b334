"""The web page: hf_vq's models in a browser, on loopback or as a Space. ``make space`` starts it."""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: nothing is to be told to anybody

import actions
import gradio as gr
import torch
from actions import ModelShelf, Wishes


HERE = Path(__file__).resolve().parent
QUEUE_LENGTH = 20
INTRODUCTION = """# hf_vq
Pictures as codes: a tokenizer turns a picture into a grid of codes and back, and a prior draws new grids."""


def main() -> None:
    """Starts the page on the models that the command line, or the variable HF_VQ_MODELS, names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or Hub ids (default: the packaged ones)")
    parser.add_argument("--host", help="address to listen at (default: loopback)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    options = parser.parse_args()
    named = options.models or os.environ.get("HF_VQ_MODELS", "").split()
    found = {Path(name).name if Path(name).is_dir() else name: name for name in named}
    found = found or actions.find_checkpoints([HERE / "checkpoints", HERE.parent / "checkpoints"])
    if not found:
        parser.error("`MODEL` must name at least one model: there is no folder of checkpoints beside this file.")
    is_public = "SPACE_ID" in os.environ  # strangers must not make the machine load what they like
    shelf = ModelShelf(found, any_source=not is_public, device="cuda" if torch.cuda.is_available() else "cpu")
    page = build_page(shelf)
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
    page.launch(
        server_name=options.host,
        server_port=options.port,
        max_file_size=actions.MAX_UPLOAD_BYTES,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        ssr_mode=False,
        share=False,
    )


def build_page(shelf: ModelShelf) -> gr.Blocks:
    """The page: a model for all tabs, and a tab for each thing to do with it."""
    names = list(shelf.sources)
    with gr.Blocks(title="hf_vq", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            model = gr.Dropdown(
                names,
                value=names[0],
                label="Model",
                info="or type a folder or Hub id" if shelf.any_source else None,
                allow_custom_value=shelf.any_source,
                elem_id="model",
            )
            summary = gr.Markdown(elem_id="summary")
        with gr.Tab("Codes"):
            on_model_change = [_codes_tab(shelf, model)]
        with gr.Tab("Generate"):
            on_model_change.append(_generate_tab(shelf, model))
        with gr.Tab("Complete"):
            on_model_change.append(_complete_tab(shelf, model))
        with gr.Tab("Compare"):
            _compare_tab(shelf)

        def change(name: str) -> list:  # one event for all, so that none of them comes after what a visitor does next
            return [shelf.get(name).summary, *(value for update, _ in on_model_change for value in update(name))]

        fields = [field for _, outputs in on_model_change for field in outputs]
        gr.on([page.load, model.change], said(change), model, [summary, *fields])
    return page


def said(function: Callable) -> Callable:
    """`function`, with what is wrong with its arguments shown on the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="This does not work", print_exception=False) from error

    return wrapped


def upload(label: str, elem_id: str) -> gr.Image:
    """A field for a picture, of which functions get the file: what is wrong with it is for `read_upload` to say."""
    field = gr.Image(
        label=label, sources=["upload", "clipboard"], type="filepath", image_mode=None, elem_id=elem_id, height=260
    )
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def _clickable(heading: str, elem_id: str) -> gr.Image:
    """A picture without labels and buttons, which would lie over what is to be clicked."""
    with gr.Column(min_width=240):
        gr.Markdown(heading)
        return gr.Image(show_label=False, interactive=False, format="png", buttons=[], elem_id=elem_id)


# Codes


def _codes_tab(shelf: ModelShelf, model: gr.Dropdown) -> tuple[Callable, list]:
    codes = gr.State()
    with gr.Row():
        with gr.Column(scale=1):
            picture = upload("Picture", "codes-upload")
            encode = gr.Button("Encode", variant="primary", elem_id="encode")
            figures = gr.Markdown(elem_id="codes-figures")
            gr.Markdown("What the tokenizer sees:")
            original = gr.Image(show_label=False, interactive=False, format="png", buttons=[], height=200)
        with gr.Column(scale=2):
            with gr.Row():
                decoded = _clickable("**Decoded.** Click a place to paint it.", "decoded")
                colours = _clickable("**Index map.** A colour for each code.", "index-map")
            with gr.Row():
                level = gr.Radio([("0", 0)], value=0, label="Level, from the top", visible=False, elem_id="level")
                mode = gr.Radio(["paint", "pick up"], value="paint", label="A click on a place", elem_id="mode")
                code = gr.Number(0, label="Code", precision=0, minimum=0, elem_id="code", min_width=80)
                undo = gr.Button("Undo", elem_id="undo", min_width=80)
                reset = gr.Button("Start over", elem_id="reset", min_width=80)
            note = gr.Markdown("Encode a picture, then click a code below and a place above.", elem_id="note")
            swatches = _clickable("**Codebook.** Click a code to take it.", "palette")

    shown = [decoded, colours, original, note]

    def encode_picture(name, path, level):
        encoded, text = actions.encode(shelf.get(name), path)
        return encoded, text, *_show(shelf.get(name), encoded, level, "Click a code below, then a place above.")

    def click(name, encoded, level, mode, code, event: gr.SelectData):
        loaded = shelf.get(name)
        _check_encoded(encoded)
        grid = encoded.levels[level].shape
        size = actions.enlarge(encoded.shown).size
        row, column = actions.cell_of(event.index, size, grid)
        before = int(encoded.levels[level][row, column])
        if mode == "pick up":
            text = f"Took code {before} of row {row}, column {column}."
            return encoded, before, *_show(loaded, encoded, level, text, (row, column))
        encoded = actions.edit(encoded, level, row, column, code, loaded.tokenizer.config.num_embeddings)
        text = f"Row {row}, column {column}: code {before} became {int(code)}; edits: {len(encoded.history)}"
        return encoded, code, *_show(loaded, encoded, level, text, (row, column))

    def take_back(name, encoded, level, everything=False):
        _check_encoded(encoded)
        encoded = actions.undo(encoded, everything)
        return encoded, *_show(shelf.get(name), encoded, level, f"Edits: {len(encoded.history)}")

    def take(name, level, event: gr.SelectData):
        loaded = shelf.get(name)
        swatch, (rows, columns) = actions.palette(loaded, level)
        row, column = actions.cell_of(event.index, swatch.size, (rows, columns))
        return min(row * columns + column, loaded.tokenizer.config.num_embeddings - 1)

    gr.on([encode.click, picture.upload], said(encode_picture), [model, picture, level], [codes, figures, *shown])
    for target in (decoded, colours):
        target.select(said(click), [model, codes, level, mode, code], [codes, code, *shown], show_progress="hidden")
    undo.click(said(take_back), [model, codes, level], [codes, *shown])
    reset.click(said(lambda *given: take_back(*given, everything=True)), [model, codes, level], [codes, *shown])
    swatches.select(said(take), [model, level], code, show_progress="hidden")

    def change_level(name, encoded, level):
        loaded = shelf.get(name)
        swatch = actions.palette(loaded, level)[0]
        if encoded is None:
            return swatch, None, None
        return swatch, *_show(loaded, encoded, level, "")[:2]

    level.change(said(change_level), [model, codes, level], [swatches, decoded, colours])

    def update(name):
        loaded = shelf.get(name)
        count = len(loaded.grids)
        levels = gr.Radio(choices=[(str(i), i) for i in range(count)], value=0, visible=count > 1)
        is_small = loaded.tokenizer.config.num_embeddings <= actions.MAX_PALETTE_CODES
        swatch = actions.palette(loaded)[0] if is_small else None
        last = loaded.tokenizer.config.num_embeddings - 1
        empty = "Encode a picture, then click a code below and a place above."
        return None, "", None, None, None, empty, levels, gr.Number(0, maximum=last), swatch

    return update, [codes, figures, *shown, level, code, swatches]


def _check_encoded(codes: actions.Codes | None) -> None:
    if codes is None:
        raise ValueError("Encode a picture first.")


def _show(model: actions.PageModel, codes: actions.Codes, level: int, text: str, cell: tuple | None = None) -> tuple:
    """What the fields `shown` of the codes' tab hold."""
    decoded = actions.with_grid(actions.decode(model, codes.levels), codes.levels[level].shape, cell)
    return decoded, actions.code_colours(model, codes, level), actions.enlarge(codes.shown), text


# New pictures


def _wish_fields(tab: str, count: int = 4) -> list:
    """The fields that `_wishes` reads, in the order of its arguments."""
    with gr.Group():
        classes = gr.Dropdown([], multiselect=True, label="Classes: none for any", elem_id=f"{tab}-classes")
        prompts = gr.Textbox(lines=2, label="Prompts, one a line", elem_id=f"{tab}-prompts", visible=False)
        condition = upload("Condition: label map, depth, edges or drawing", f"{tab}-condition")
        condition.visible = False
    with gr.Row():
        number = gr.Slider(1, actions.MAX_IMAGES, count, step=1, label="Pictures for each", elem_id=f"{tab}-count")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{tab}-seed")
    with gr.Accordion("Sampling", open=False):
        options = [
            gr.Slider(0, 8, 2, step=0.1, label="Guidance scale; 1 is off"),
            gr.Slider(0.1, 2, 1, step=0.05, label="Temperature"),
            gr.Slider(0, 512, 100, step=1, label="Top k; 0 is off"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top p; 1 is off"),
            gr.Slider(0, 200, 25, step=1, label="Steps; 0 is the model's own"),
        ]
    return [classes, prompts, condition, number, seed, *options]


def _wishes(classes, prompts, condition, count, seed, *options) -> Wishes:
    return Wishes(
        classes=classes or [],
        prompts=(prompts or "").splitlines(),
        condition_image=condition,
        count=int(count),
        seed=int(seed or 0),
        options=dict(zip(actions.OPTIONS, options, strict=True)),
    )


def _fit_wish_fields(model: actions.PageModel) -> list:
    """Updates of `_wish_fields`: those are shown that the model takes."""
    kind = model.condition
    return [
        gr.Dropdown(choices=model.class_names, value=[], visible=kind == "class"),
        gr.Textbox(visible=kind == "text"),
        gr.Image(visible=kind == "image", value=None),
        gr.Slider(),
        gr.Number(),
        *(gr.Slider(visible=name in model.options) for name in actions.OPTIONS),
    ]


def _generate_tab(shelf: ModelShelf, model: gr.Dropdown) -> tuple[Callable, list]:
    with gr.Row():
        with gr.Column(scale=1):
            fields = _wish_fields("generate")
            button = gr.Button("Draw", variant="primary", elem_id="generate")
        with gr.Column(scale=2):
            gallery = gr.Gallery(label="New pictures", columns=4, format="png", elem_id="generated", height=520)
            figures = gr.Markdown(elem_id="generate-figures")

    def draw(name, *given, progress=gr.Progress()):  # noqa: B008 - gradio looks for this default
        drawn = actions.draw(shelf.get(name), _wishes(*given), _tell(progress))
        return drawn.captioned, _time(drawn)

    button.click(said(draw), [model, *fields], [gallery, figures])
    return lambda name: [[], "", *_fit_wish_fields(shelf.get(name))], [gallery, figures, *fields]


def _complete_tab(shelf: ModelShelf, model: gr.Dropdown) -> tuple[Callable, list]:
    pixel_values = gr.State()
    with gr.Row():
        with gr.Column(scale=1):
            picture = upload("Picture", "complete-upload")
            fields = _wish_fields("complete")
            button = gr.Button("Complete", variant="primary", elem_id="complete")
        with gr.Column(scale=2):
            editor = gr.ImageEditor(
                label="Paint over what is to be drawn anew",
                type="pil",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=48, colors=["#ff2d78"], color_mode="fixed"),
                canvas_size=(actions.SHOWN_SIDE, actions.SHOWN_SIDE),
                elem_id="mask-editor",
            )
            gallery = gr.Gallery(label="Completed", columns=5, format="png", elem_id="completed", height=320)
            figures = gr.Markdown(elem_id="complete-figures")

    def show(name, path):
        values, enlarged = actions.prepare_completion(shelf.get(name), path)
        return values, {"background": enlarged, "layers": [], "composite": enlarged}

    def complete(name, values, painted, *given, progress=gr.Progress()):  # noqa: B008
        layers = painted["layers"] if painted else []
        mask = actions.mask_of_layers(layers, layers[0].size) if layers else None
        drawn, kept = actions.complete(shelf.get(name), values, mask, _wishes(*given), _tell(progress))
        return [(actions.enlarge(kept, 256), "given"), *drawn.captioned], _time(drawn)

    picture.upload(said(show), [model, picture], [pixel_values, editor])
    button.click(said(complete), [model, pixel_values, editor, *fields], [gallery, figures])

    def update(name):
        return [None, None, None, [], "", *_fit_wish_fields(shelf.get(name))]

    return update, [pixel_values, picture, editor, gallery, figures, *fields]


def _compare_tab(shelf: ModelShelf) -> None:
    names = list(shelf.sources)
    with gr.Row():
        with gr.Column(scale=1):
            chosen = gr.CheckboxGroup(names, value=names[:2], label="Models", elem_id="compare-models")
            fields = _wish_fields("compare", count=6)
            button = gr.Button("Compare", variant="primary", elem_id="compare")
        with gr.Column(scale=2):
            gr.Markdown("The same wishes to each model:")
            sheet = gr.Image(show_label=False, interactive=False, format="png", buttons=["download"], elem_id="sheet")
            table = gr.Dataframe(
                headers=["model", "pipeline", "M parameters", "pictures", "seconds"],
                interactive=False,
                elem_id="speeds",
            )

    def compare(chosen, *given, progress=gr.Progress()):  # noqa: B008
        return actions.compare([shelf.get(name) for name in chosen], _wishes(*given), _tell(progress))

    def fit(chosen):
        models = [shelf.get(name) for name in chosen]
        classes = list(dict.fromkeys(name for model in models for name in model.class_names))
        options = {name for model in models for name in model.options}
        return [
            gr.Dropdown(choices=classes, value=[], visible=bool(classes)),
            gr.Textbox(visible=any(model.condition == "text" for model in models)),
            *(gr.Slider(visible=name in options) for name in actions.OPTIONS),
        ]

    chosen.change(said(fit), chosen, [*fields[:2], *fields[5:]])
    chosen.select(said(fit), chosen, [*fields[:2], *fields[5:]])
    button.click(said(compare), [chosen, *fields], [sheet, table])


def _tell(progress: gr.Progress) -> Callable[[float], None]:
    return lambda share: progress(share, desc="drawing")


def _time(drawn: actions.Drawn) -> str:
    count = sum(len(row) for _, row in drawn.rows)
    return f"{count} pictures in {drawn.seconds:.1f} s"


if __name__ == "__main__":
    main()
