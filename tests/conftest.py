import logging
import os


# before anything reads them: no test may reach for the Hub, and two workers on two cores want one thread each
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.conversion.drawn_weights import rebuild_all  # noqa: E402
from tests.conversion.golden import GOLDEN  # noqa: E402
from tests.hub_stub import hub  # noqa: E402, F401


def pytest_configure(config: pytest.Config):
    torch.set_num_threads(1)
    if not hasattr(config, "workerinput"):  # before the workers start
        rebuild_all(GOLDEN)


class LoadReports(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if "LOAD REPORT" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.fixture
def load_reports():
    """The reports of missing, unexpected or mismatched keys so far. A test that expects some must clear the list."""
    return LoadReports()


@pytest.fixture(autouse=True)
def no_unexpected_keys(load_reports):
    """Fails a test in which `from_pretrained` left keys out, found unknown ones, or initialised weights anew."""
    logger = logging.getLogger("transformers")
    logger.addHandler(load_reports)
    yield
    logger.removeHandler(load_reports)
    assert not load_reports.messages, "\n".join(load_reports.messages)
