"""optax's Adam and schedules mix counters and floats, so strict promotion cannot hold where they run."""

import jax
import pytest

from experiments import command_line, sentiment


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def tfds_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


@pytest.fixture
def fail(capsys):
    """Run a command line that has to fail; return its one line of error."""

    def run(words, main=sentiment.main):
        with pytest.raises(SystemExit) as stop:
            command_line.run(lambda: main(words))
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error
        return error

    return run
