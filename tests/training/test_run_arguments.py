from dataclasses import dataclass, field

import pytest

from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run_arguments import parse_arguments, parse_mapping


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


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_changes_nothing(tmp_path, text):
    (tmp_path / "empty.yaml").write_text(text)
    (numbers,) = parse_arguments((Numbers,), [str(tmp_path / "empty.yaml"), "--steps", "4"])
    assert numbers == Numbers(steps=4)


def test_a_file_without_names_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="list.yaml holds a list"):
        parse_arguments((Numbers,), [str(tmp_path / "list.yaml")])


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
