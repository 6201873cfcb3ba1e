"""The command: what is asked for is compiled, said and written."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from entangle import command_line
from entangle.plan.chips import devices, parse_topology
from entangle.plan.compiled import measure
from entangle.plan.config import PlanConfig, from_experiment
from entangle.plan.report import FILE, Plan, as_json, check_folder, lines, tried
from entangle.plan.search import Try, smallest_slice, try_until_fits
from entangle.plan.step import decoder
from entangle.training import write_json

DESCRIPTION = "Compile a training step for a TPU slice that is not there, and say what it needs."


def run(settings: PlanConfig) -> Plan:
    """Compile, and search where that is asked for.

    Raises:
      UserError: bad settings.
      MissingExtraError: the compiler is not installed.
    """
    kind, shape = parse_topology(settings.topology)
    config = decoder(settings)
    print(f"compiling {config.parameters:,} parameters for {settings.topology}", flush=True)
    tries: list[Try] = []
    if shape is None:
        settings, tries = smallest_slice(settings, _say)
        measured = tries[-1].measured
        assert measured is not None
    else:
        devices(kind, shape)
        measured = measure(settings)
    if not measured.fits and settings.search:
        print("does not fit; trying:", flush=True)
        tries = try_until_fits(settings, _say)
    plain = None
    if settings.geometry and measured.fits:
        plain = measure(dataclasses.replace(settings, geometry=False))
    return Plan(settings, measured, plain, tuple(tries))


def _say(one: Try) -> None:
    print(f"  {tried(one)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--experiment", default="")
    experiment = first.parse_known_args(arguments)[0].experiment
    default = from_experiment(experiment) if experiment else PlanConfig()
    settings = command_line.parse({"default": default}, arguments, description=DESCRIPTION)
    if settings.out is not None:
        check_folder(settings.out)
    plan = run(settings)
    print("\n".join(["", *lines(plan)]))
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / FILE, as_json(plan))
        command_line.name_files([settings.out / FILE])
