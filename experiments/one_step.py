"""What each remedy keeps of its promise after one small step, under plain SGD and under Adam.

Claim: a weighting of the two gradients promises the ideal case (chosen rises, rejected falls) to first order, for the batch
sums, or pair by pair in its pairwise form, and under a plain gradient step only (arXiv 2410.13828, section 5, and the
``Scope`` of every weighting). Here one small step is made and looked at, also where nothing is promised.

Settings, on the same pairs at the same parameters: ``pair_sgd``, every pair alone, its own plain step; ``batch_sgd``, one
plain step on all pairs; ``adam_first``, Adam's first; ``adam_warm``, Adam with the moments of plain margin steps on other
batches, the parameters held; ``adam_own``, the same with the moments of the remedy's own steps. Every step is as long as
every other, and so short, in float64, that first order decides.

Command: ``python -m experiments.one_step --out DIR`` (with ``--data FOLDER`` and ``--model BASE/huggingface`` on other data
and from another base model).
Hardware and time: two CPU cores: about a minute of one core a start point, eighteen start points, after some ten minutes of
training.
Result: experiments/results/one_step/one_step.md (three seeds): every promise is kept where it is made and none of them on the
batch for single pairs; under Adam the batch sums are kept by protect_chosen alone of those that promise a side.
Output: ``one_step.csv``, a row for every remedy, setting, set, start point and seed; ``one_step.md``; ``one_step.png``;
``report.html``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from entangle import command_line, losses, models, training
from entangle.errors import UserError
from entangle.training import OptimizerConfig, RunFolder
from entangle.types import PairBatch, Params
from experiments import figures, one_step_measure
from experiments.pairs import pair_runs, programs, stages
from experiments.pairs.pair_config import NOT_EVALUATED, objective_identity
from experiments.pairs.sentiment_config import SentimentConfig
from experiments.pairs.sentiment_config import presets as sentiment_presets
from experiments.pairs.sentiment_data import Materials, gather
from experiments.reports import one_step_report

MAIN = (
    *("margin", "normalized", "one_sided", "band", "pcgrad", "pairwise_normalized", "pairwise_one_sided"),
    *("pairwise_band", "pairwise_pcgrad", "protect_chosen"),
)
OTHERS = ("scale_preserving", "dual_projection", "mgda", "cagrad", "aligned_mtl")
UNUSED = ("pair_chain", "pair_chain_args", "reference_cache", "changes", "probe_pairs", "preference.eval_every")


@dataclasses.dataclass(frozen=True)
class OneStepConfig(SentimentConfig):
    """The study.

    Attributes:
      pairs: training pairs that the step is made on, drawn by the seed.
      remedies: as --pair-chain takes them. margin is measured always.
      step: length of the update, in the Euclidean norm of all parameters.
      warm_steps: batches of --preference.batch-size pairs behind Adam's warm moments.
    """

    out: Path = Path("runs/one_step")
    pairs: int = 256
    remedies: tuple[str, ...] = (*MAIN, *OTHERS)
    step: float = 1e-8
    warm_steps: int = 20


def presets() -> dict[str, OneStepConfig]:
    """The sentiment experiment's ``embedded`` preset as default, its preference stage at twice the rate; and its ``smoke``.

    Example:
      >>> from experiments.one_step import presets
      >>> presets()["default"].preference.optimizer.learning_rate
      0.0001
    """
    found = {}
    for name, source in (("default", "embedded"), ("smoke", "smoke")):
        fields = {f.name: getattr(sentiment_presets()[source], f.name) for f in dataclasses.fields(SentimentConfig)}
        steps = fields["preference"].steps
        preference = dataclasses.replace(
            fields["preference"], optimizer=OptimizerConfig(learning_rate=1e-4), eval_every=steps
        )
        fields |= {"out": OneStepConfig.out, "preset": name, "preference": preference, "probe_pairs": 0}
        found[name] = OneStepConfig(**fields)
    found["smoke"] = dataclasses.replace(
        found["smoke"], sets=("single_token",), pairs=16, held_out_pairs=8, warm_steps=2, remedies=MAIN
    )
    return found


def check(settings: OneStepConfig) -> None:
    """Refuse what the study cannot measure, before anything is written.

    Raises:
      UserError: it cannot.

    Example:
      >>> import dataclasses
      >>> from experiments.one_step import check, presets
      >>> check(dataclasses.replace(presets()["default"], remedies=("magic",)))
      Traceback (most recent call last):
      entangle.errors.UserError: --remedies magic: choose from margin, ...
    """
    for name in settings.remedies:
        if name not in training.pair_chains():
            raise UserError(f"--remedies {name}: choose from {', '.join(training.pair_chains())}")
    for field in ("pairs", "warm_steps"):
        if getattr(settings, field) < 1:
            raise UserError(f"--{field.replace('_', '-')} {getattr(settings, field)}: at least one is needed")
    if not 0 < settings.step <= 1e-3:
        raise UserError(f"--step {settings.step:g}: a small length is needed, above 0 and at most 0.001")
    objective = losses.get_objective(settings.objective, **settings.objective_args)
    if isinstance(objective, (losses.BatchObjective, losses.RunningObjective)):
        raise UserError(
            f"--objective {settings.objective}: it looks at other pairs, so that no pair can be taken alone"
        )


def run(settings: OneStepConfig) -> list[Path]:
    """Train the start points and measure the steps that are not there yet, and write the table and the figure.

    Returns:
      The files.

    Raises:
      UserError: bad input; nothing has been overwritten.
      NonFiniteError: see ``training.train``.
    """
    check(settings)
    materials = gather(settings)
    needed = settings.pairs + settings.warm_steps * settings.preference.batch_size
    for name, both in materials.pairs.items():
        if len(both.train.tokens) < needed:
            what = f"--pairs {settings.pairs}: with the {needed - settings.pairs} behind Adam's moments"
            raise UserError(f"{what} they are more than {name}'s {len(both.train.tokens)} training pairs")
    experiment = pair_runs.open_folder(settings, "one_step", materials.pairs, materials.report)
    most = max(int(both.train.completion_mask.sum(-1).max()) for both in materials.pairs.values())
    # the head at the completions' positions alone: it is most of a small model's work
    model = models.language_model(materials.model.config, completion_length=most, chunk=settings.head_chunk)
    made = one_step_measure.programs(model.log_probs, _objective(settings), settings.remedies)
    for pair_set, both in materials.pairs.items():
        for seed, (supervised, preferred) in enumerate(_models(settings, materials, pair_set, both)):
            examples, warm = _sample(settings, both, seed)
            for when, params in (("SFT", supervised), ("DPO", preferred)):
                _measure(settings, made, (pair_set, seed, when), params, supervised, examples, warm)
    return figures.redraw(experiment.path)


def _objective(settings: OneStepConfig) -> losses.Objective:
    return losses.get_objective(settings.objective, **settings.objective_args)


def _models(
    settings: OneStepConfig, materials: Materials, pair_set: str, both: stages.PreferenceData
) -> Iterator[tuple[Params, Params]]:
    """Parameters after SFT and after preference optimisation by plain margin, seed by seed."""
    tracker, model = pair_runs.trackers(settings), materials.model
    base = materials.checkpoint
    if base is None:
        program = programs.likelihood_program(model, settings.base)
        base = stages.pretrain(settings.out / "base", model, program, materials.text, settings.max_length, 0, tracker)
    sft = programs.likelihood_program(model, settings.sft)
    preference = programs.preference_program(
        model,
        settings.preference,
        _objective(settings),
        training.pair_chain("margin"),
        with_geometry=False,
        changes=False,
        eval_batch=settings.eval_batch,
    )._replace(diagnose=lambda *_: {})  # what is read of these runs is their parameters
    for seed in range(settings.seeds):
        folder = settings.out / pair_set / f"seed{seed}"
        supervised, preferred = pair_runs.identities(settings, pair_set, both, seed)
        start = stages.supervise(folder / "sft", model, sft, base, both.train, supervised, tracker)
        yield start, stages.prefer(folder / "preference", preference, start, both, preferred, tracker, probe_pairs=0)


def _sample(settings: OneStepConfig, both: stages.PreferenceData, seed: int) -> tuple[PairBatch, PairBatch]:
    """The pairs that the step is made on, and other batches of pairs ``[K, B, ...]``, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(both.train.tokens))
    size = settings.preference.batch_size
    warm = order[settings.pairs :][: settings.warm_steps * size].reshape(settings.warm_steps, size)
    arrays = both.train.tokens, both.train.completion_mask
    one, other = (PairBatch(*(jnp.asarray(a[i]) for a in arrays)) for i in (order[: settings.pairs], warm))
    return one, other


def _measure(
    settings: OneStepConfig,
    made: one_step_measure.Programs,
    where: tuple[str, int, str],
    params: Params,
    reference: Params,
    pairs: PairBatch,
    warm: PairBatch,
) -> None:
    """Leave the rows of one start point in its folder, where they are not there yet."""
    pair_set, seed, when = where
    identity = {
        "kind": "one_step_rows",
        "inputs": stages.digest(*jax.tree.leaves((params, reference, pairs, warm))),
        **{name: getattr(settings, name) for name in ("objective", "objective_args", "remedies", "step")},
        **objective_identity(settings),
    }
    folder = RunFolder(one_step_report.folder(settings.out, *where), identity)
    if not folder.done:
        print(f"{pair_set}, seed {seed}, after {when}: {len(made.remedies)} remedies", flush=True)
        with folder.locked():
            found = one_step_measure.measure(made, reference, params, pairs, warm, settings.step)
            folder.mark_done({"rows": one_step_report.rows(found)})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.one_step --help``."""
    settings = command_line.parse(presets(), arguments, description=(__doc__ or "").split("\n")[0])
    default = presets()[settings.preset]
    command_line.refuse_unused(settings, default, UNUSED, "this study sets it itself")
    command_line.refuse_unused(settings, default, *NOT_EVALUATED)
    if settings.model not in models.PRESETS:
        command_line.refuse_unused(
            settings, default, ("base", "vocab_size"), f"the base model is --model {settings.model}"
        )
    command_line.say_where(settings.out)
    command_line.name_files(run(settings))


if __name__ == "__main__":
    command_line.run(main)
