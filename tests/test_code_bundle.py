import pathlib

import pytest

import hf_vq
from hf_vq.code_bundle import bundle


KINDS = ("image_processing_", "modeling_", "pipeline_", "scheduling_", "transformer_")  # what `save_with_code` writes
MODULES = sorted({module for module in hf_vq._MODULES.values() if module.split(".")[-1].startswith(KINDS)})


def write(folder, **sources):
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return folder / "top.py"


def execute(source):
    names = {"__name__": "bundled"}
    exec(compile(source, "bundle", "exec"), names)
    return names


def test_imports_become_source_in_the_order_of_need(tmp_path):
    top = write(
        tmp_path,
        base="import math\n\nNUMBER = 7\n\n\ndef double(x):\n    return 2 * x\n\n\n__all__ = ['NUMBER', 'double']\n",
        middle="import math\nfrom .base import (\n    NUMBER,\n    double as twice,\n)\n\nRESULT = twice(NUMBER)\n",
        top='"""Top."""\nfrom .middle import RESULT\nfrom .base import NUMBER as SEVEN\n\nvalue = '
        "(RESULT, SEVEN, math.pi)\n",
    )
    names = execute(bundle(top))
    assert names["value"][:2] == (14, 7)
    assert bundle(top).count("def double") == 1


@pytest.mark.parametrize(
    "sources,message",
    [
        ({"top": "from .base import x\n\nhelper = 1\n", "base": "x = 1\nhelper = 2\n"}, "`helper` has two meanings"),
        (
            {"top": "from .base import x\nimport math as m\n", "base": "import cmath as m\nx = 1\n"},
            "`m` has two meanings",
        ),
        ({"top": "from .base import x\n\n\ndef x():\n    pass\n", "base": "x = 1\n"}, None),
        ({"top": "from . import base\n", "base": ""}, "top.py, line 1"),
        ({"top": "from ..base import x\n"}, "top.py, line 1"),
        ({"top": "from .base.x import y\n", "base": "x = 1\n"}, "top.py, line 1"),
        ({"top": "from .base import *\n", "base": ""}, "top.py, line 1"),
        ({"top": "import hf_vq.models\n"}, "top.py, line 1"),
        ({"top": "from hf_vq import VQGANModel\n"}, "top.py, line 1"),
        ({"top": "def f():\n    from .base import x\n", "base": "x = 1\n"}, "top.py, line 2"),
    ],
)
def test_what_cannot_share_a_file(tmp_path, sources, message):
    top = write(tmp_path, **sources)
    with pytest.raises(ValueError, match=message or "`x` has two meanings"):
        bundle(top)


def test_imports_of_other_folders_are_followed(tmp_path):
    for name in ("priors", "quantizers"):
        (tmp_path / name).mkdir()
    (tmp_path / "outputs.py").write_text("class Output:\n    pass\n")
    (tmp_path / "quantizers" / "search.py").write_text("from ..outputs import Output\n\nLIMIT = 3\n")
    write(
        tmp_path / "priors",
        base="BASE = 'priors'\n",
        top="from ..outputs import Output\nfrom ..quantizers.search import LIMIT\nfrom .base import BASE\n\n"
        "value = (Output().__class__, LIMIT, BASE)\n",
    )
    source = bundle(tmp_path / "priors" / "top.py")
    names = execute(source)
    assert names["value"] == (names["Output"], 3, "priors") and source.count("class Output") == 1


def test_a_name_of_two_folders_has_two_meanings(tmp_path):
    for name in ("priors", "quantizers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "check.py").write_text(f"def check():\n    return {name!r}\n")
    top = write(tmp_path / "priors", top="from .check import check\nfrom ..quantizers.check import check as other\n")
    with pytest.raises(ValueError, match="`check` has two meanings: priors/check.py and quantizers/check.py"):
        bundle(top)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_class_can_be_bundled(module):
    path = pathlib.Path(hf_vq.__file__).parent.parent / (module.replace(".", "/") + ".py")
    source = bundle(path)
    names = execute(source)
    for name, defined_in in hf_vq._MODULES.items():
        if defined_in == module:
            assert isinstance(names[name], type)
    assert "hf_vq" not in {
        line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("from ", "import "))
    }
