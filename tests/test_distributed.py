import jax
import pytest

from entangle import command_line, distributed
from entangle.errors import PreemptedError, UserError


@pytest.fixture
def asked(monkeypatch):
    """What jax.distributed.initialize is called with; nothing is started."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **named: calls.append((words, named)))
    monkeypatch.setattr(distributed, "_alone", False)
    for name in (distributed.ADDRESS, distributed.COUNT, distributed.INDEX):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_environment_says_which_process_this_is(asked, monkeypatch):
    for name, value in zip((distributed.ADDRESS, distributed.COUNT, distributed.INDEX), ("h:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    distributed.initialize()
    distributed.initialize("other:2", 2, 0)
    assert [words for words, _ in asked] == [("h:1", 4, 3), ("other:2", 2, 0)]
    assert {named["cluster_detection_method"] for _, named in asked} == {"deactivate"}


def test_a_cluster_is_looked_for_where_the_environment_says_nothing(asked):
    distributed.initialize()
    ((words, named),) = asked
    assert words == (None, None, None)
    assert named["cluster_detection_method"] is None


def test_one_process_starts_nothing(asked, monkeypatch):
    monkeypatch.setenv(distributed.COUNT, "1")
    distributed.initialize("h:1", process_id=0)
    assert asked == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is no number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "process 2 of 2: processes are counted from 0"),
        ({"JAX_NUM_PROCESSES": "0"}, "process None of 0: processes are counted from 0"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost"},
            "JAX_COORDINATOR_ADDRESS=localhost: write host:port, such as 10.0.0.1:1234",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(environment, message, asked, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        distributed.initialize()
    assert str(error.value) == message
    assert asked == []


def test_what_is_missing_is_named(monkeypatch):
    asked = []

    def nothing_found(*words, **named):
        asked.append(words)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing_found)
    monkeypatch.setattr(distributed, "_alone", False)
    distributed.initialize()  # nothing is asked for, nothing is found: one process
    distributed.initialize()  # JAX would refuse to look again once it is in use
    assert asked == [(None, None, None)]
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS=None, JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=1"):
        distributed.initialize(processes=2, process_id=1)


def test_sigterm_is_status_143(capsys):
    def preempted():
        raise PreemptedError("SIGTERM: saved at step 3 of 9; the same command goes on from there")

    with pytest.raises(SystemExit) as stop:
        command_line.run(preempted)
    assert stop.value.code == 143
    assert capsys.readouterr().err == "stopped: SIGTERM: saved at step 3 of 9; the same command goes on from there\n"
