"""A file of reference log-probabilities: found again bit for bit, refused by name, and never overwritten."""

import errno
import os
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from entangle.errors import NonFiniteError, UserError
from entangle.training import check_reference, reference_fingerprint, reference_log_probs
from entangle.training.reference_cache import ReferenceFingerprint
from entangle.types import PairBatch

FINGERPRINT = ReferenceFingerprint("aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb", "cccccccccccccccc", 8)
COUNTS = {"train": 500, "held_out": 3}


def arrays(seed=0):
    """Finite float32 numbers of every size: drawn as bits, so that subnormal and negative zeros are among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, 4 * 503, dtype=np.uint32).view(np.float32)
    values = bits[np.isfinite(bits)][: 2 * 503].reshape(503, 2)
    values[0], values[1] = (-0.0, 0.0), (1e-45, -1e-45)
    return {"train": values[:500], "held_out": values[500:]}


def refuse_to_compute():
    raise AssertionError("computed again")


BOTH = (check_reference, lambda *a: reference_log_probs(*a, refuse_to_compute))


def same_bits(one, other):
    assert one.keys() == other.keys()
    for split in one:
        assert one[split].dtype == other[split].dtype == np.float32
        assert np.array_equal(one[split].view(np.uint32), other[split].view(np.uint32))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cache" / "reference.safetensors"
    same_bits(reference_log_probs(path, FINGERPRINT, COUNTS, arrays), arrays())
    return path


def refused(path, message, fingerprint=FINGERPRINT, counts=COUNTS):
    """Both functions refuse the file in the same line, compute nothing and leave the folder as it is; return the line."""
    before = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    lines = []
    for use in BOTH:
        with pytest.raises(UserError, match=message) as error:
            use(path, fingerprint, counts)
        lines.append(str(error.value))
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{path}: ") and "\n" not in lines[0]
    assert before == {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    return lines[0]


def test_a_second_run_reads_the_same_bits_and_computes_nothing(file):
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    before = file.read_bytes()
    same_bits(reference_log_probs(str(file), FINGERPRINT, COUNTS, refuse_to_compute), arrays())
    assert file.read_bytes() == before
    check_reference(file, FINGERPRINT, COUNTS)


def test_the_file_can_be_read_by_others_as_the_umask_says(file):
    (file.parent / "other").write_text("")
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


@pytest.mark.parametrize("part", ReferenceFingerprint._fields)
def test_each_part_changed_alone_is_refused_by_name(file, part):
    there, here = getattr(FINGERPRINT, part), 9 if part == "length" else "dddddddddddddddd"
    line = refused(file, "stale", FINGERPRINT._replace(**{part: here}))
    what = f"stale reference log-probabilities: {part} is {there} there and {here} here"
    assert line == f"{file}: {what}; name another path, or delete the file to have it computed anew"


def test_all_that_differs_is_named(file):
    line = refused(file, "stale", ReferenceFingerprint("x", "y", "z", 9))
    assert re.findall(r"(\w+) is \w+ there", line) == ["model", "tokenizer", "data", "length"]


def test_a_model_that_is_not_known_yet_is_not_compared(file):
    unknown = FINGERPRINT._replace(model=None)
    check_reference(file, unknown, COUNTS)
    with pytest.raises(UserError, match="stale reference log-probabilities: data is"):
        check_reference(file, unknown._replace(data="z"), COUNTS)
    with pytest.raises(ValueError, match="the fingerprint has none"):
        reference_log_probs(file, unknown, COUNTS, arrays)


CONFIG = {"width": 4, "layers": 2}
PARAMS = {"a": jnp.arange(4.0), "b": {"c": jnp.ones((2, 3))}}
TOKENS = np.arange(2 * 2 * 6, dtype=np.int32).reshape(2, 2, 6)
MASK = np.broadcast_to((np.arange(6) == 2) | (np.arange(6) == 3), TOKENS.shape)


def pairs(tokens=TOKENS, mask=MASK):
    return PairBatch(tokens, mask)


def changed(array, index, value):
    array = np.array(array)
    assert array[index] != value
    array[index] = value
    return array


def fingerprint(config=CONFIG, params=PARAMS, tokenizer="bpe", train=None, **others):
    return reference_fingerprint(config, params, tokenizer, {"train": pairs() if train is None else train, **others})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", {"config": {**CONFIG, "layers": 3}}),
        ("model", {"params": {**PARAMS, "a": PARAMS["a"].at[2].add(1e-6)}}),
        ("model", {"params": {**PARAMS, "a": PARAMS["a"].reshape(2, 2)}}),
        ("model", {"params": {**PARAMS, "a": PARAMS["a"].view(jnp.int32)}}),
        ("model", {"params": {"a": PARAMS["a"], "b": {"d": PARAMS["b"]["c"]}}}),
        ("tokenizer", {"tokenizer": "bpe2"}),
        ("data", {"train": pairs(changed(TOKENS, (1, 0, 0), 99))}),
        ("data", {"train": pairs(changed(TOKENS, (0, 1, 3), 99))}),
        ("data", {"train": pairs(mask=changed(MASK, (0, 0, 2), False))}),
        ("data", {"train": pairs(mask=changed(MASK, (0, 0, 4), True))}),
        ("data", {"train": pairs(TOKENS[::-1])}),
        ("data", {"train": pairs(TOKENS[:, ::-1])}),
        ("data", {"train": pairs(TOKENS[:1], MASK[:1])}),
        ("data", {"held_out": pairs()}),
    ],
)
def test_the_fingerprint_changes_in_the_part_that_changed(part, change):
    usual, other = fingerprint(), fingerprint(**change)
    assert [name for name in usual._fields if getattr(usual, name) != getattr(other, name)] == [part]


def test_splits_are_told_apart_by_name_not_by_order():
    small = pairs(TOKENS[:1], MASK[:1])
    one = reference_fingerprint(CONFIG, PARAMS, "bpe", {"train": pairs(), "held_out": small})
    assert one == reference_fingerprint(CONFIG, PARAMS, "bpe", {"held_out": small, "train": pairs()})
    assert one.data != reference_fingerprint(CONFIG, PARAMS, "bpe", {"held_out": pairs(), "train": small}).data


def test_more_padding_is_another_length_and_the_same_data():
    wider = [(0, 0), (0, 0), (0, 2)]
    usual = fingerprint()
    padded = fingerprint(train=pairs(np.pad(TOKENS, wider, constant_values=7), np.pad(MASK, wider)))
    assert (usual.length, padded.length) == (6, 8)
    assert padded == usual._replace(length=8)


def test_an_unknown_model_and_unequal_lengths():
    assert fingerprint(params=None) == fingerprint()._replace(model=None)
    with pytest.raises(ValueError, match=r"one row length for all splits is needed, got \[5, 6\]"):
        fingerprint(held_out=pairs(TOKENS[..., :5], MASK[..., :5]))


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(file, kept):
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert refused(file, "cannot be read as safetensors").endswith("or delete the file to have it computed anew")


def test_a_changed_number_is_noticed(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refused(file, "broken: its numbers are not those that were written")


def forge(file, tensors, **metadata):
    """Replace the file by one with its metadata and other contents."""
    with safe_open(file, "numpy") as old:
        metadata = {**old.metadata(), **metadata}
    file.unlink()
    save_file(tensors, file, {name: text for name, text in metadata.items() if text is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": None}, "broken: its splits are train, expected held_out, train"),
        ({"third": np.zeros(1, np.float32)}, "broken: its splits are held_out, third, train"),
        ({"train": np.zeros((499, 2), np.float32)}, r"train is F32 \(499, 2\), expected F32 \(500, 2\)"),
        ({"train": np.zeros((500, 2))}, r"train is F64 \(500, 2\), expected F32"),
        ({"train": np.full((500, 2), np.nan, np.float32)}, "its numbers are not those that were written"),
    ],
)
def test_other_contents_under_the_same_fingerprint_are_refused(file, change, message):
    forge(file, {split: values for split, values in {**arrays(), **change}.items() if values is not None})
    refused(file, message)


@pytest.mark.parametrize("metadata", [{"kind": "something else"}, {"kind": None}, {"data": None}, {"values": None}])
def test_other_formats_are_refused(file, metadata):
    forge(file, arrays(), **metadata)
    refused(file, "holds no reference log-probabilities of this version; name another path")


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n" * 99)
    refused(tmp_path / "notes.txt", "cannot be read as safetensors")
    save_file(arrays(), tmp_path / "plain.safetensors")
    refused(tmp_path / "plain.safetensors", "holds no reference log-probabilities of this version")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "is a folder; name another path")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "is no file; name another path")


@pytest.mark.parametrize("use", BOTH)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch, use):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "reference", tmp_path / "file" / "deeper" / "reference"):
        with pytest.raises(UserError) as error:
            use(path, FINGERPRINT, COUNTS)
        assert str(error.value) == f"{path}: cannot be written: {tmp_path / 'file'} is a file"
    long = tmp_path / ("n" * 300) / "reference"
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        use(long, FINGERPRINT, COUNTS)
    path = tmp_path / "new" / "deeper" / "reference"
    monkeypatch.setattr(os, "access", lambda folder, mode: str(folder) != str(tmp_path))  # root may write everywhere
    with pytest.raises(UserError) as error:
        use(path, FINGERPRINT, COUNTS)
    assert str(error.value) == f"{path}: cannot be written: no permission to write in {tmp_path}"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_looking_makes_nothing(tmp_path):
    check_reference(tmp_path / "new" / "reference", FINGERPRINT._replace(model=None), COUNTS)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "reference"
    with pytest.raises(UserError) as error:
        reference_log_probs(path, FINGERPRINT, COUNTS, arrays)
    assert str(error.value) == f"{path}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["fsync", "link"])
def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, moment):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        reference_log_probs(tmp_path / "reference", FINGERPRINT, COUNTS, arrays)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import numpy as np
from entangle.training.reference_cache import ReferenceFingerprint, reference_log_probs

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

os.{moment} = die
fingerprint, zeros = ReferenceFingerprint("m", "t", "d", 8), np.zeros((4, 2), np.float32)
reference_log_probs(sys.argv[1], fingerprint, {{"train": 4}}, lambda: {{"train": zeros}})
"""


@pytest.mark.parametrize("moment", ["fsync", "link"])
def test_killed_in_the_middle_leaves_no_file(tmp_path, moment):
    path = tmp_path / "reference"
    done = subprocess.run([sys.executable, "-c", KILLED.format(moment=moment), path], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]  # killed while it wrote, and the file is not there
    same_bits(reference_log_probs(path, FINGERPRINT, COUNTS, arrays), arrays())


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_compute_at_once_the_first_writes_and_both_return_it(tmp_path, monkeypatch, links):
    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "reference"

    def slower():
        same_bits(reference_log_probs(path, FINGERPRINT, COUNTS, arrays), arrays())
        return arrays(seed=1)

    same_bits(reference_log_probs(path, FINGERPRINT, COUNTS, slower), arrays())
    same_bits(reference_log_probs(path, FINGERPRINT, COUNTS, refuse_to_compute), arrays())
    assert [p.name for p in tmp_path.iterdir()] == ["reference"]


def test_another_process_that_wrote_something_else_meanwhile_is_refused_too(tmp_path):
    path = tmp_path / "reference"

    def slower():
        reference_log_probs(path, FINGERPRINT._replace(model="z"), COUNTS, arrays)
        return arrays()

    with pytest.raises(
        UserError, match="stale reference log-probabilities: model is z there and aaaaaaaaaaaaaaaa here"
    ):
        reference_log_probs(path, FINGERPRINT, COUNTS, slower)
    same_bits(reference_log_probs(path, FINGERPRINT._replace(model="z"), COUNTS, refuse_to_compute), arrays())


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_numbers_that_are_not_finite_are_named_and_not_written(tmp_path, value):
    found = arrays()
    found["train"][10:17, 1] = found["held_out"][2, 0] = value
    message = "the reference's log-probabilities are not finite: train 10, 11, 12, 13, 14 and 2 more; held_out 2; "
    with pytest.raises(NonFiniteError) as error:
        reference_log_probs(tmp_path / "reference", FINGERPRINT, COUNTS, lambda: found)
    assert str(error.value) == f"{message}{tmp_path / 'reference'} was not written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"train": np.zeros((500, 2))}, {"train": np.zeros(500, np.float32)}, {"third": np.zeros((1, 2), "f")}]
)
def test_a_function_that_computes_something_else_is_an_error_of_the_program(tmp_path, change):
    with pytest.raises(ValueError, match=r"expected \{'train': "):
        reference_log_probs(tmp_path / "reference", FINGERPRINT, COUNTS, lambda: {**arrays(), **change})
    assert list(tmp_path.iterdir()) == []
