import gzip
import json
import os
from pathlib import Path

import pytest

from entangle.data import PreferenceRecord, divide_by_prompt, read_preferences
from entangle.data.dialogues import NotAPairError, parse_pair
from entangle.errors import UserError

PAIR = ("\n\nHuman: hi\n\nAssistant:", " hello", " no")
USER, HELLO, NO = (
    {"role": role, "content": text} for role, text in [("user", "hi"), ("assistant", "hello"), ("assistant", "no")]
)


def write(path: Path, lines: list[object]) -> Path:
    raw = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": PAIR[0], "chosen": PAIR[1], "rejected": PAIR[2]},
        {"chosen": PAIR[0] + PAIR[1], "rejected": PAIR[0] + PAIR[2]},
        {"prompt": [USER], "chosen": [HELLO], "rejected": [NO]},
        {"chosen": [USER, HELLO], "rejected": [USER, NO]},
        {"prompt": "hi", "chosen": [USER, HELLO], "rejected": [USER, NO]},
        {"prompt": "hi", "chosen": [HELLO], "rejected": [NO], "score": 3},
        {"prompt": [USER], "chosen": [USER, HELLO], "rejected": [USER, NO]},
    ],
)
def test_every_published_form_gives_the_same_pair(fields):
    assert parse_pair(fields) == PAIR


def test_dialogues_are_split_at_the_last_turn_that_both_begin():
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert parse_pair({"chosen": shared + " same x", "rejected": shared + " same y"}) == (shared, " same x", " same y")
    longer = shared + " x\n\nHuman: d\n\nAssistant: e"  # a further turn on one side belongs to its completion
    assert parse_pair({"chosen": longer, "rejected": shared + " y"})[1] == longer.removeprefix(shared)


def test_messages_of_several_turns_and_a_system_message():
    system, more = {"role": "system", "content": "be kind"}, {"role": "user", "content": "and?"}
    shared = [system, USER, HELLO, more]
    prompt, chosen, rejected = parse_pair({"chosen": [*shared, NO], "rejected": [*shared, HELLO]})
    assert prompt == "\n\nSystem: be kind\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    assert (chosen, rejected) == (" no", " hello")


def test_equal_and_empty_responses_are_left_to_the_encoding_report():
    assert parse_pair({"chosen": [USER, HELLO], "rejected": [USER, HELLO]})[1:] == (" hello", " hello")
    assert parse_pair({"prompt": "p", "chosen": "", "rejected": "x"}) == ("p", "", "x")
    empty = {"role": "assistant", "content": ""}
    assert parse_pair({"chosen": [USER, empty], "rejected": [USER, NO]})[1:] == ("", " no")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "p", "rejected": "a"}, "no field 'chosen'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "field 'prompt' is not text"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "field 'chosen' is neither"),
        ({"prompt": "p", "chosen": "a", "rejected": [NO]}, "field 'chosen' is neither text nor a list"),
        ({"prompt": "p", "chosen": [HELLO], "rejected": []}, "field 'rejected' is neither"),
        ({"chosen": "a", "rejected": "b"}, "share none"),
        ({"chosen": "x\n\nAssistant: a", "rejected": "y\n\nAssistant: b"}, "share none"),
        ({"chosen": [HELLO], "rejected": [NO]}, "share no message"),
        ({"chosen": [USER, USER], "rejected": [USER, NO]}, "chosen does not go on with the assistant"),
        ({"prompt": "p", "chosen": ["a"], "rejected": [NO]}, "message without a text 'content'"),
        ({"prompt": "p", "chosen": [{"role": "tool", "content": ""}], "rejected": [NO]}, "role 'tool': not one of"),
        ({"prompt": "p", "chosen": "\ud83d", "rejected": "b"}, "half a character"),
    ],
)
def test_what_is_not_a_pair_says_why(fields, reason):
    with pytest.raises(NotAPairError, match=reason):
        parse_pair(fields)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_bad_lines_are_counted_and_named_and_the_rest_is_read(tmp_path, name):
    good = {"prompt": "p", "chosen": " a", "rejected": " b"}
    lines = [good, b"{not json", b"", {"prompt": "p"}, [1], b'{"prompt": "caf\xe9"}', good]
    records, report = read_preferences(write(tmp_path / name, lines))
    assert [record.source for record in records] == [f"{name}:1", f"{name}:7"]
    assert [bad.source for bad in report.bad_lines] == [f"{name}:{number}" for number in (2, 4, 5, 6)]
    reasons = ["not JSON", "no field 'chosen'", "not a JSON object", "not UTF-8"]
    assert all(bad.reason.startswith(reason) for bad, reason in zip(report.bad_lines, reasons, strict=True))
    assert report.lines()[0] == f"{name}: 2 of 6 lines read, 4 bad"


def test_a_long_list_of_bad_lines_is_cut_short(tmp_path):
    good = {"prompt": "p", "chosen": " a", "rejected": " b"}
    report = read_preferences(write(tmp_path / "a.jsonl", [good, *[b"?"] * 9]))[1]
    assert len(report.lines()) == 1 + 5 + 1 and report.lines()[-1] == "  and 4 more"


def test_files_without_a_pair(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read \(No such file"):
        read_preferences(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl: no preference pair in 0 lines$"):
        read_preferences(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match=r"no preference pair in 2 lines; the first bad one is bad\.jsonl:1: not JSON"):
        read_preferences(write(tmp_path / "bad.jsonl", [b"?", b"!"]))


def test_a_damaged_archive(tmp_path):
    path = write(tmp_path / "cut.jsonl.gz", [{"prompt": str(n), "chosen": " a", "rejected": " b"} for n in range(99)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        read_preferences(path)
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match="Not a gzipped file"):
        read_preferences(path)


@pytest.mark.skipif("ENTANGLE_DATA" not in os.environ, reason="ENTANGLE_DATA names no folder with real data")
def test_real_dialogues():
    path = Path(os.environ["ENTANGLE_DATA"]) / "hh_rlhf" / "harmless-base.jsonl.gz"
    records, report = read_preferences(path)
    assert (len(records), len(report.bad_lines)) == (1800, 0)
    raw = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for record, dialogue in zip(records, raw, strict=True):
        assert record.prompt + record.chosen == dialogue["chosen"]
        assert record.prompt + record.rejected == dialogue["rejected"]
        assert record.prompt.endswith("\n\nAssistant:")


def test_divided_pairs_share_no_prompt_and_none_is_lost_without_reason():
    records = [PreferenceRecord(f"p{i % 16}", " a", " b", f"x:{i}") for i in range(40)]
    train, held_out = divide_by_prompt(records)
    assert {r.prompt for r in held_out} == {"p7", "p15"}
    assert sorted(train + held_out) == sorted(records)
    others = [PreferenceRecord("p3", " c", " d", "y:1"), PreferenceRecord("new", " c", " d", "y:2")]
    train, held_out = divide_by_prompt(records, others)
    assert held_out == others
    assert train == [r for r in records if r.prompt != "p3"]
