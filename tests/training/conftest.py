"""What the tests of training share."""

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests.training.toy_run import rows, train, weights


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state in singletons: another precision or accumulation needs a new one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = train(folder)
    return rows(folder, validation=True), weights(run), folder
