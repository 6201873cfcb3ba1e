"""One call draws again what any experiment drew at its end, from run folders written here; and what it cannot draw."""

import functools
import importlib
import json
import os
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from entangle import training
from experiments import figures, one_step, preferences, single_token, unlearning_config
from experiments.pairs import sentiment_config
from experiments.pairs.pair_config import identity
from experiments.reports import plotting

SIDES = ("chosen", "rejected")
CASES = ("ideal", "both_fall", "both_rise", "reversed", "inactive")
ENVIRONMENT = [{"git_commit": "abc", "git_changed": False, "packages": {}, "python": "3", "devices": ["cpu:cpu"]}]


def ended(folder, names):
    """A run of two evaluations whose metrics rise by one."""
    folder.mkdir(parents=True)
    lines = (json.dumps({"step": step, **dict.fromkeys(names, step - 1.25)}) for step in (1, 2))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    training.write_json(folder / "config.json", {"kind": "preference"})
    training.write_json(folder / "done.json", {})


def began(out, kind, settings):
    """What an experiment's folder has before any run."""
    out.mkdir(parents=True)
    config = {"kind": kind, **identity(settings), "seeds": 2}
    training.write_json(out / "config.json", json.loads(json.dumps(config, default=str)))
    training.write_json(out / "environment.json", ENVIRONMENT)


def pairs(kind, settings, out):
    began(out, kind, settings)
    training.write_json(out / "pairs.json", {"long_suffix": {"train": ["2 of 2 pairs encoded"]}})
    names = [
        f"{split}/{what}/{side}"
        for split in ("eval", "eval_train")
        for what in ("log_prob", "log_ratio")
        for side in SIDES
    ]
    names += ["eval/geometry/cosine", "eval/geometry/condition_ratio", "eval/accuracy"]
    names += [f"eval/case/{case}" for case in CASES]
    for seed in (0, 1):
        ended(out / "long_suffix" / f"seed{seed}" / "preference", names)


def unlearning(out):
    settings = unlearning_config.presets()["smoke"]
    began(out, "unlearning", settings)
    config = json.loads((out / "config.json").read_text())
    variants = ["sgd-plain", "sgd-project"]
    training.write_json(out / "config.json", config | {"variants": variants, "rates": dict.fromkeys(variants, 0.1)})
    training.write_json(out / "pairs.json", {"tweets": {"train": ["2 of 2 pairs encoded"]}})
    names = [f"{split}/per_token/{side}" for split in ("eval", "eval_train") for side in SIDES]
    names += [f"{kind}/{side}" for kind in ("first_order", "realised") for side in SIDES]
    for variant in variants:
        for seed in (0, 1):
            ended(out / variant / f"seed{seed}", [*names, "batch/cosine"])


def singles(out):
    began(out, "single_token", sentiment_config.presets()["default"])
    names = [f"{split}/log_prob/{side}" for split in ("eval", "eval_train") for side in SIDES]
    for variant in single_token.sweep():
        for seed in (0, 1):
            ended(
                out / variant.name / f"seed{seed}", [*names, "eval/accuracy", "eval/geometry/cosine", "eval/case/ideal"]
            )


def steps(out):
    began(out, "one_step", one_step.presets()["smoke"])
    shares = ("ideal", "ideal_both_move", "agreement", "step", *(f"pairs_{side}_kept" for side in (*SIDES, "margin")))
    sums = [f"sum_{side}_{what}" for side in (*SIDES, "margin") for what in ("over_margins_gain", "kept")]
    settings = ("pair_sgd", "batch_sgd", "adam_first", "adam_warm", "adam_own")
    remedies = ("margin", "pairwise_band", "protect_chosen")
    rows = [
        {"setting": setting, "remedy": remedy, **dict.fromkeys((*shares, *sums), 0.5)}
        for setting in settings
        for remedy in remedies
    ]
    for seed in (0, 1):
        for start in ("sft", "dpo"):
            folder = out / "single_token" / f"seed{seed}" / f"one_step_after_{start}"
            folder.mkdir(parents=True)
            training.write_json(folder / "done.json", {"rows": rows})


WRITERS = {
    "sentiment": functools.partial(pairs, "sentiment", sentiment_config.presets()["smoke"]),
    "preferences": functools.partial(pairs, "preferences", preferences.presets()["smoke"]),
    "unlearning": unlearning,
    "single_token": singles,
    "one_step": steps,
}
FILES = {
    "sentiment": ["figures/figure_3.png", "figures/figure_4a.png", "report.md", "report.html"],
    "preferences": ["figures/log_ratios.png", "figures/cosine.png", "report.md", "report.html"],
    "unlearning": [
        *(f"figures/{n}.png" for n in ("log_probs", "trade_off", "first_order")),
        "report.md",
        "report.html",
    ],
    "single_token": ["single_token.csv", "single_token.md", "report.html"],
    "one_step": ["one_step.csv", "one_step.md", "one_step.png", "report.html"],
}


# signature, and a header of one pixel
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("entry", sorted(set(figures.REDRAW.values())))
def test_every_entry_names_a_function(entry):
    module, function = entry.split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_is_drawn_and_its_files_are_named(kind, tmp_path, capsys, monkeypatch):
    # the gate draws the others' figures where it runs these experiments
    monkeypatch.setitem(plotting.STYLE, "savefig.dpi", 20)
    if kind != "one_step":
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(PNG))
    out = tmp_path / "runs" / "deep" / kind
    WRITERS[kind](out)
    before = contents(out)
    figures.main([str(tmp_path / "runs"), str(out)])  # twice the same experiment: it is drawn once
    wrote = capsys.readouterr().out.split("wrote:\n")
    assert len(wrote) == 2
    assert wrote[1].split() == [str(out / name) for name in FILES[kind]]
    after = contents(out)
    assert all(after[name] for name in FILES[kind])
    beside = {
        str((out / name).with_suffix(end).relative_to(out)) for name in FILES[kind] for end in (".pdf", ".csv", ".html")
    }
    new = set(after) - set(before) - set(FILES[kind])
    assert all(name in beside or name.endswith("_figure.csv") for name in new)
    assert before.items() <= after.items()  # what the runs wrote is as it was


def test_numbers_of_the_runs_are_on_the_page(tmp_path):
    singles(tmp_path / "out")
    files = figures.redraw(tmp_path / "out")
    # from -0.25 to 0.75 in every run
    assert "+1.000 (+1.000\u00a0to\u00a0+1.000)" in files[-1].read_text()
    before = contents(tmp_path)
    assert figures.redraw(tmp_path / "out") == files
    assert contents(tmp_path) == before


def test_no_device_is_taken(tmp_path):
    """A backend that does not exist ends any attempt to use one."""
    singles(tmp_path / "out")
    words = [sys.executable, "-m", "experiments.figures", str(tmp_path / "out")]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "none_such"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out" / "report.html") in done.stdout


def unended(out):
    (out / "long_suffix" / "seed1" / "preference" / "done.json").unlink()


def unreadable(name):
    def spoil(out):
        (out / name).write_text("{")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unended, "long_suffix/seed1/preference: this run has not ended; run the experiment to its end first"),
        (lambda out: (out / "pairs.json").unlink(), "pairs.json is missing"),
        (unreadable("config.json"), "config.json cannot be read as JSON: "),
        (unreadable("environment.json"), "environment.json cannot be read as JSON: "),
        (unreadable("long_suffix/seed0/token_cosines.json"), "token_cosines.json cannot be read as JSON: "),
        (
            lambda out: training.write_json(out / "config.json", {"kind": "magic"}),
            "no figures are known for kind 'magic'",
        ),
        (lambda out: training.write_json(out / "config.json", ["kind"]), "preference: no figures are known for kind"),
    ],
)
def test_what_cannot_be_drawn_ends_in_one_line_and_nothing_is_written(spoil, message, fail, tmp_path):
    WRITERS["sentiment"](tmp_path / "out")
    spoil(tmp_path / "out")
    before = contents(tmp_path)
    assert message in fail([str(tmp_path)], main=figures.main)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["unlearning", "single_token", "one_step"])
def test_unfinished_runs_of_every_kind_end_in_one_line(kind, fail, tmp_path):
    WRITERS[kind](tmp_path / "out")
    sorted((tmp_path / "out").rglob("done.json"))[-1].unlink()
    before = contents(tmp_path)
    assert "run the " in fail([str(tmp_path)], main=figures.main)
    assert contents(tmp_path) == before


def test_an_unknown_kind_beside_others_is_said_before_any_is_drawn(fail, tmp_path):
    singles(tmp_path / "a")
    (tmp_path / "b").mkdir()
    training.write_json(tmp_path / "b" / "config.json", {"kind": "magic"})
    before = contents(tmp_path)
    assert f"{tmp_path / 'b'}: no figures are known" in fail([str(tmp_path)], main=figures.main)
    assert contents(tmp_path) == before


def test_folders_without_experiments_end_in_one_line(fail, tmp_path):
    (tmp_path / "gpt2").mkdir()
    training.write_json(tmp_path / "gpt2" / "config.json", {"model_type": "gpt2"})  # a model is none
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert f"{folder}: no experiment's folder, and none below it" in fail([str(folder)], main=figures.main)
