import errno
import json
import os

import pytest

from entangle.errors import UserError
from entangle.training.run_folder import RunFolder, read_metrics, write_text

CONFIG = {"seed": 0, "stage": {"steps": 10, "optimizer": {"learning_rate": 1e-3}}, "labels": ("a", "b")}


def test_same_configuration_opens_again(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).append([{"step": 1}])
    assert RunFolder(tmp_path / "run", CONFIG).metrics() == [{"step": 1}]


def test_another_configuration_is_refused_and_nothing_changes(tmp_path):
    RunFolder(tmp_path / "run", CONFIG)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    other = {**CONFIG, "stage": {"steps": 10, "optimizer": {"learning_rate": 2e-3}}}
    with pytest.raises(
        UserError, match=r"run holds a run of another configuration: stage.optimizer.learning_rate is 0.001 there"
    ):
        RunFolder(tmp_path / "run", other)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_a_checkpoint_folder_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "seed": 0}')
    with pytest.raises(UserError, match="holds a checkpoint, not a run; name another folder"):
        RunFolder(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("3")  # nobody's
    with pytest.raises(UserError, match="holds a run of another configuration"):
        RunFolder(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_two_processes_may_write_one_file_at_once(tmp_path, monkeypatch):
    path, flush = tmp_path / "config.json", os.fsync

    def meanwhile(file):
        monkeypatch.setattr(os, "fsync", flush)
        write_text(path, "theirs")  # from its beginning to its end while the other one is at it
        assert path.read_text() == "theirs"

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_text(path, "mine")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_start_left_is_no_stranger(tmp_path):
    (tmp_path / "config.json.0a1b.partial").write_text("{")
    assert not RunFolder(tmp_path, CONFIG).done


def test_strange_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "notes.txt", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_broken_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read as JSON"):
        RunFolder(tmp_path, CONFIG)


def test_rewind_drops_later_records_and_a_torn_line(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG)
    run.append([{"step": step} for step in range(5)])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # what kill -9 leaves
    assert [r["step"] for r in run.metrics()] == [0, 1, 2, 3, 4]
    run.rewind(2)
    run.append([{"step": 3}])
    assert [r["step"] for r in run.metrics()] == [0, 1, 2, 3]


def test_a_bad_line_before_the_last_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not JSON"):
        read_metrics(tmp_path)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run, other = (RunFolder(tmp_path / "run", CONFIG) for _ in range(2))
    refused = pytest.raises(UserError, match=r"run: another process is training in this folder")
    with run.locked():
        with run.locked():  # its own: a launcher holds it, and the loop asks again
            pass
        with refused, other.locked():
            pass
    with other.locked():  # free again
        pass


def test_environment_has_versions_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t" * 7)
    RunFolder(tmp_path / "run", CONFIG)
    text = (tmp_path / "run" / "environment.json").read_text()
    assert "s3cr3t" not in text
    assert {"jax", "optax"} <= set(json.loads(text)[0]["packages"])


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run", CONFIG)
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError) as error:
        run.append([{"step": 1}])
    assert str(error.value) == f"{run.path / 'metrics.jsonl'}: cannot be written: No space left on device"
    before = {path.name: path.read_bytes() for path in run.path.glob("*.json")}

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"config\.json: cannot be written: No space left on device"):
        write_text(run.path / "config.json", "half")
    assert {path.name: path.read_bytes() for path in run.path.glob("*.json*") if path.name != "metrics.jsonl"} == before
