"""The converter of `hf-vq convert llamagen` as a script of its own; see `conversion/README.md`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone, hf_vq need not be installed

from hf_vq.conversion.checkpoints import run_script  # noqa: E402
from hf_vq.conversion.convert_llamagen import main  # noqa: E402


if __name__ == "__main__":
    run_script(main)
