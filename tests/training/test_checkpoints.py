import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle.errors import UserError
from entangle.training.checkpoints import Checkpoints


def state(scale=1.0):
    return {"w": scale * jnp.arange(6.0).reshape(2, 3), "half": jnp.full((2,), scale, jnp.bfloat16), "n": jnp.int32(7)}


def test_restores_bitwise_with_dtypes_and_position(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, state(0.1), {"next_index": 9, "nested": {"a": [1, 2]}})
    restored, position = checkpoints.restore(jax.eval_shape(state))
    assert position == {"next_index": 9, "nested": {"a": [1, 2]}}
    for before, after in zip(jax.tree.leaves(state(0.1)), jax.tree.leaves(restored), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    checkpoints.close()


def test_keeps_the_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {})
    assert checkpoints.latest == 3
    assert float(checkpoints.restore(state(), step=2)[0]["w"][0, 1]) == 2.0
    assert not (tmp_path / "1").exists()
    checkpoints.close()


def test_an_earlier_step_is_not_saved_after_a_later_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state(5.0), {})
    checkpoints.save(5, state(1.0), {})  # there already
    assert float(checkpoints.restore(state())[0]["w"][0, 1]) == 5.0
    with pytest.raises(ValueError, match="step 3 cannot be saved after step 5"):
        checkpoints.save(3, state(3.0), {})
    checkpoints.save(6, {"count": 3, "w": np.ones(2)}, {})  # numbers of Python's
    checkpoints.close()


def test_a_half_written_checkpoint_is_not_the_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp-123").mkdir()  # what a kill during a save leaves
    assert Checkpoints(tmp_path).latest == 1


def test_nothing_there_and_another_shape_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match=r"run holds no checkpoint"):
        checkpoints.restore(state())
    checkpoints.save(1, state(), {})
    with pytest.raises(UserError, match=r"run, step 1: does not fit this run"):
        checkpoints.restore({**state(), "extra": jnp.zeros(1)})
    checkpoints.close()


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"next_index": step})
    yield checkpoints
    checkpoints.close()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({**state(), "w": jnp.zeros((2, 4))}, "w is float32[2, 3] there and float32[2, 4] here"),
        ({**state(), "half": jnp.zeros(2)}, "half is bfloat16[2] there and float32[2] here"),
        ({"w": state()["w"], "n": state()["n"]}, "half is bfloat16[2] there and missing here"),
        ({**state(), "extra": jnp.zeros(1)}, "extra is missing there and float32[1] here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(like, message, saved):
    with pytest.raises(UserError) as error:
        saved.restore(like)
    assert str(error.value) == f"{saved.folder}, step 2: does not fit this run: {message}"


def test_a_checkpoint_that_lost_bytes_is_refused_and_the_one_before_named(saved):
    files = [path for path in (saved.folder / "2" / "state").rglob("*") if path.is_file() and path.stat().st_size]
    refused = 0
    for file in [saved.folder / "2" / "position" / "metadata", *files]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        fresh = Checkpoints(saved.folder)  # nothing is remembered of what was read before
        try:
            restored = fresh.restore(state())[0]
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(error).startswith(f"{saved.folder}, step 2: cannot be read: ")
            assert str(error).endswith(f"{saved.folder / '1'}: remove the folder of step 2 to go on from there")
        else:  # not every file is needed; what is restored is right
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), restored, state(2))
        fresh.close()
        file.write_bytes(whole)
    assert refused >= 4  # the position, the manifest, the arrays' names and the arrays
    shutil.rmtree(saved.folder / "2")
    assert Checkpoints(saved.folder).restore(state())[1] == {"next_index": 1}


def test_a_full_disk_is_told_before_anything_is_written(saved, monkeypatch):
    usage = shutil.disk_usage(saved.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    before = sorted(saved.folder.rglob("*"))
    with pytest.raises(UserError) as error:
        saved.save(3, state(), {})
    assert str(error.value) == (
        f"{saved.folder}: the checkpoint of step 3 cannot be written: it needs 1,048,608 bytes, 1,000,000 are free; "
        f"the latest before it is {saved.folder / '2'}"
    )
    assert sorted(saved.folder.rglob("*")) == before


@pytest.mark.parametrize("told", ["by Python", "by TensorStore"])
def test_a_disk_that_fills_up_during_a_save_leaves_no_part_of_it(told, saved, monkeypatch):
    def fails(step, args):
        (saved.folder / f"{step}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        if told == "by Python":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": No space left on device [os_error_code='28']")

    monkeypatch.setattr(saved._manager, "save", fails)
    with pytest.raises(UserError, match="step 3 cannot be written: No space left on device; the latest before it is"):
        saved.save(3, state(), {})
    assert sorted(path.name for path in saved.folder.iterdir()) == ["1", "2"]


def test_what_killed_saves_left_is_removed(saved):
    (saved.folder / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    saved.tidy()
    assert sorted(path.name for path in saved.folder.iterdir()) == ["1", "2"]
