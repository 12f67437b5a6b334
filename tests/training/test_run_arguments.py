import dataclasses
from dataclasses import dataclass, field

import pytest

from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run_arguments import RunArguments, learning_rate_factor, parse_arguments, parse_mapping


@dataclass
class Numbers:
    steps: int = 3
    rate: float = field(default=0.5)


@dataclass
class Share:
    share: str = field(default="5%", metadata={"help": 'Such as "train[5%:]", 100 %(all) or %s.'})
    on: bool = field(default=True, metadata={"help": "At 100%."})


def test_help_shows_percent_signs_as_they_are_written(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments((Share,), ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert 'Such as "train[5%:]", 100 %(all) or %s. (default: 5%)' in text and text.count("At 100%.") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus", "3"], "unrecognized arguments: --bogus 3; --help lists those there are"),
        (["--stepps=3"], "unrecognized arguments: --stepps=3; did you mean --steps?"),
        (["nowhere.yaml"], "the file of arguments `nowhere.yaml` does not exist"),
    ],
)
def test_wrong_usage_is_one_line_and_the_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        parse_arguments((Numbers,), arguments)
    error = capsys.readouterr().err
    assert error.endswith(f": error: {message}\n") and error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_changes_nothing(tmp_path, text):
    (tmp_path / "empty.yaml").write_text(text)
    (numbers,) = parse_arguments((Numbers,), [str(tmp_path / "empty.yaml"), "--steps", "4"])
    assert numbers == Numbers(steps=4)


def test_a_file_without_names_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="list.yaml holds a list"):
        parse_arguments((Numbers,), [str(tmp_path / "list.yaml")])


@dataclass
class Kinds:
    flag: bool = True
    count: int = 1
    rate: float | None = None
    name: str = "a"
    numbers: list[int] = field(default_factory=lambda: [1])
    names: list[str] = field(default_factory=list)
    options: str = "{}"
    loss: str = field(default="l1", metadata={"choices": ["l1", "l2"]})


@pytest.mark.parametrize(
    "line",
    [
        *(
            "flag: maybe",
            "flag: 1",
            "flag: ''",
            "count: true",
            "count: 1.5",
            "count: [1]",
            "count: null",
            "rate: true",
        ),
        *("rate: [1]", "name: 5", "name: {a: 1}", "name: ''", "name: null", "numbers: [a]", "numbers: [1.5]"),
        *("numbers: {a: 1}", "names: [[a]]", "names: [1]", "options: [1]", "loss: l3"),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path, line):
    (tmp_path / "run.yaml").write_text(line)
    with pytest.raises(ValueError, match=f"run.yaml: `{line.split(':')[0]}` must be"):
        parse_arguments((Kinds,), [str(tmp_path / "run.yaml")])


def test_values_of_the_right_kind(tmp_path):
    text = "flag: 'False'\ncount: '3'\nrate: 1e-4\nnumbers: 2\nnames: a\noptions: {a: 1}\nloss: l2\n"
    (tmp_path / "run.yaml").write_text(text)
    wanted = Kinds(flag=False, count=3, rate=1e-4, numbers=[2], names=["a"], options={"a": 1}, loss="l2")
    assert parse_arguments((Kinds,), [str(tmp_path / "run.yaml")])[0] == wanted


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"a: [1", b"a:\n\t- b", b"!!python/object:os.system {}", b"{" * 10000]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name}` must be a (YAML|JSON) file"):
        parse_arguments((Kinds,), [str(tmp_path / name)])


def test_keys_that_are_no_text(tmp_path):
    (tmp_path / "run.yaml").write_text("1: 2\nfoo: 3\n")
    with pytest.raises(ValueError, match=r"unknown keys \['1', 'foo'\]"):
        parse_arguments((Kinds,), [str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("none", ["none", "None"])
def test_the_command_line_unsets_the_label_column_of_a_file(tmp_path, none):
    (tmp_path / "data.yaml").write_text("dataset_name_or_path: images\nlabel_column: category\n")
    file = str(tmp_path / "data.yaml")
    assert parse_arguments((DataArguments,), [file])[0].label_column == "category"
    assert parse_arguments((DataArguments,), [file, "--label_column", none])[0].label_column is None


def test_mappings():
    assert (
        parse_mapping("kwargs", '{"levels": [8, 5]}')
        == parse_mapping("kwargs", {"levels": [8, 5]})
        == {"levels": [8, 5]}
    )
    for value in ("levels=8", "[8, 5]", 3):
        with pytest.raises(ValueError, match="kwargs=.*must be a JSON object"):
            parse_mapping("kwargs", value)


def test_schedules():
    def factors(name, **options):
        arguments = RunArguments("x", lr_scheduler=name, max_train_steps=10, **options)
        return [learning_rate_factor(arguments, step) for step in range(11)]

    assert factors("constant") == [1.0] * 11
    assert factors("constant_with_warmup", lr_warmup_steps=3)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors("linear", lr_warmup_steps=0) == pytest.approx([1 - step / 10 for step in range(11)])
    cosine = factors("cosine", lr_warmup_steps=2)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and cosine[6] == pytest.approx(0.5) and cosine[10] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "step"}, "`lr_scheduler` must be one of constant, .*, got 'step'"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of no"),
        ({"lr_warmup_steps": 5}, "lr_warmup_steps=5 has no effect"),
        ({"push_to_hub": True}, "needs hub_model_id"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RunArguments("x", **options)


NAN, INF = float("nan"), float("inf")
BAD_NUMBERS = {
    "seed": (-1, 0.5, 2**32),
    "max_train_steps": (0, -3, 2.5, NAN),
    "max_train_minutes": (0.0, -1.0, NAN),
    "train_batch_size": (0, -8, 1.5),
    "gradient_accumulation_steps": (0, -1),
    "learning_rate": (0.0, -1e-4, NAN, INF),
    "lr_warmup_steps": (-5, 0.5),
    "max_grad_norm": (-1.0, NAN, INF),
    "ema_decay": (-0.1, 1.0, NAN),
    "checkpointing_steps": (0, -1),
    "checkpointing_minutes": (0.0, -1.0, NAN),
    "checkpoints_total_limit": (0, -1),
    "logging_steps": (0, -1),
    "validation_steps": (-1, NAN),
    "min_codebook_perplexity": (-1.0, NAN, INF),
    "codebook_patience": (0, -1),
    "dataloader_num_workers": (-1, 0.5),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_NUMBERS.items() for value in values]
)
def test_bad_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        RunArguments("x", lr_scheduler="cosine", **{name: value})


def test_every_number_among_the_arguments_is_checked():
    kinds = {field.name: field.type for field in dataclasses.fields(RunArguments)}
    numbers = {name for name, kind in kinds.items() if "int" in str(kind) or "float" in str(kind)}
    assert numbers == set(BAD_NUMBERS)
