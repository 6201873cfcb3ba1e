"""optax's Adam and schedules mix counters and floats, so strict promotion cannot hold where they run."""

import functools

import jax
import pytest

from entangle import command_line, distributed, models
from experiments import sentiment
from experiments.sweep import trial_data
from experiments.sweep.trial_config import data_fingerprint


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def tfds_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


@pytest.fixture(autouse=True, scope="module")
def one_process():
    """No others are looked for: JAX is in use by the time that a test calls a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(distributed.COUNT, "1")
        yield


@pytest.fixture(scope="module")
def small_model():
    """Where it does not matter what a model is made of: one layer is compiled in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(models.DecoderConfig, max_positions=128, width=32, layers=1, heads=2)
        patch.setitem(models.PRESETS, "tiny", small)
        yield


@pytest.fixture(scope="module")
def gathered_once(small_model):
    """What trials are made from is read once for all tests of a module."""
    gather, found = trial_data.gather, {}

    def once(config):
        key = data_fingerprint(config), repr(config.sft), repr(config.preference)
        if key not in found:
            found[key] = gather(config)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_data, "gather", once)
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
