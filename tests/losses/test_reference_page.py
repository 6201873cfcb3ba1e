"""The reference page is what the code says, and nothing is missing from it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from entangle import losses
from scripts.reference import objectives
from scripts.reference.formulas import parse

ROOT = Path(__file__).parents[2]
EVERY = losses.OBJECTIVES | losses.TOKEN_OBJECTIVES | {"masked_dpo": losses.masked_dpo}


def test_the_page_is_what_the_code_says():
    assert objectives.PAGE.read_text(encoding="utf-8") == objectives.render()


def test_a_page_that_differs_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objectives, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["objectives", "--check"])
    with pytest.raises(SystemExit) as stopped:
        objectives.main()
    assert stopped.value.code == 1
    assert (
        capsys.readouterr().err == "README.md is not what the code says: run python -m scripts.reference.objectives\n"
    )
    monkeypatch.setattr(sys, "argv", ["objectives"])
    objectives.main()
    monkeypatch.setattr(sys, "argv", ["objectives", "--check"])
    objectives.main()


def test_the_command_runs():
    done = subprocess.run([sys.executable, "-m", "scripts.reference.objectives", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", EVERY)
def test_every_objective_has_its_section_and_its_hyperparameters_their_ranges(name):
    page = objectives.PAGE.read_text(encoding="utf-8")
    section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
    parameters = list(inspect.signature(EVERY[name]).parameters)[1:]
    assert "```text" in section and "Source: " in section
    for parameter in parameters:
        assert f"`{parameter}`" in section


def test_every_public_function_of_log_probabilities_is_in_a_table():
    """What looks like an objective and is exported is in the table, so in the page and in the tests of the table."""
    exported = {name: getattr(losses, name) for name in losses.__all__}
    looks = {
        name
        for name, thing in exported.items()
        if callable(thing) and "\nFormulas:" in inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    }
    unpaired = {"kto_unpaired", "apo_zero_unpaired", "bco_unpaired"}
    assert looks == set(EVERY) | unpaired


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_formulas_can_be_read(name):
    found = parse(losses.OBJECTIVES[name])
    assert [key for key, _ in found.assignments][-3:] == ["L", "d_w", "d_l"]
    assert found.summary and found.source
