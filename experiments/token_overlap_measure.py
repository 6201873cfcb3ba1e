"""How alike the two responses of every held-out pair are, and what became of them: one row a pair, from a trial's models."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from entangle import geometry, training
from entangle.models import LanguageModel
from entangle.types import PairBatch, Params
from experiments.reports.token_overlap_report import FILE
from experiments.sweep import Trial, folder_of, trial_runs
from experiments.sweep.trial_config import TrialConfig


def measure(out: Path, trials: Sequence[Trial[TrialConfig]]) -> None:
    """Write ``pairs.csv`` into the folder of every trial that has none.

    Args:
      out: the sweep's folder.
      trials: its trials that are done.

    Raises:
      UserError: bad input, or a checkpoint is gone.
    """
    todo = [trial for trial in trials if not (folder_of(out, trial) / FILE).exists()]
    for trial, found in trial_runs.finished(out, todo):
        held_out = PairBatch(*(jnp.asarray(array) for array in found.pairs.held_out[:2]))
        columns = pair_columns(found.model, found.start, found.end, held_out, trial.config.eval_batch)
        _write(folder_of(out, trial) / FILE, columns)


def pair_columns(
    model: LanguageModel, start: Params, end: Params, pairs: PairBatch, batch_size: int = 8
) -> dict[str, np.ndarray]:
    """Likeness of every pair's responses before training, and the change of their log-probabilities.

    Args:
      model: the policy.
      start: parameters before training.
      end: parameters after it.
      pairs: N pairs.
      batch_size: pairs at a time.

    Returns:
      Name to ``[N]``: ``edit_distance`` in tokens and ``edit_share``, over the longer response's length; ``ches`` and
      ``ches_per_token``, see ``ches_scores``; ``cosine`` of the gradients; all of them at the start. Then
      ``chosen_length`` and ``rejected_length``, tokens, ``chosen_change`` and ``rejected_change``, nats.
    """
    lengths = np.asarray(pairs.completion_mask.sum(-1))
    distances = np.array([edit_distance(*both) for both in _completions(pairs)])

    @jax.jit
    def before(params: Params) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
        def hidden(pair: PairBatch) -> jax.Array:
            return model.hidden_states(params, pair.tokens)

        scores = ches_scores(jax.lax.map(hidden, pairs, batch_size=batch_size), pairs.completion_mask)
        found = geometry.pair_geometry(model.log_probs, params, pairs, batch_size=batch_size)
        return scores, geometry.cosine(found), scored(params)

    @jax.jit
    def scored(params: Params) -> jax.Array:
        return training.score_pairs(model.log_probs, params, pairs, batch_size)

    (ches, ches_per_token), cosine, first = before(start)
    change = np.asarray(scored(end) - first)
    return {
        "edit_distance": distances,
        "edit_share": distances / np.maximum(lengths.max(-1), 1),
        "ches": np.asarray(ches),
        "ches_per_token": np.asarray(ches_per_token),
        "cosine": np.asarray(cosine),
        "chosen_length": lengths[:, 0],
        "rejected_length": lengths[:, 1],
        "chosen_change": change[:, 0],
        "rejected_change": change[:, 1],
    }


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions that lead from one to the other.

    Example:
      >>> from experiments.token_overlap_measure import edit_distance
      >>> edit_distance([1, 2, 3], [1, 3]), edit_distance([], [5, 5])
      (1, 2)
    """
    row = list(range(len(other) + 1))
    for place, token in enumerate(one, start=1):
        before, row = row, [place]
        for column, against in enumerate(other, start=1):
            row.append(min(before[column] + 1, row[-1] + 1, before[column - 1] + (token != against)))
    return row[-1]


def ches_scores(hidden: jax.Array, completion_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """CHES, the centred hidden embedding similarity, of every pair, and its length-normalised form.

    With h the hidden state from which a response's token is predicted, so that of the token before it (the prompt's last one
    for the first; that of the response's last token takes no part):
    ``<sum h_w, sum h_l> - |sum h_w|^2``, and ``<mean h_w, mean h_l> - |mean h_w|^2``.

    Args:
      hidden: ``[N, 2, T, D]``, what the head reads at every token.
      completion_mask: ``[N, 2, T]``.

    Returns:
      Two ``[N]``.

    References:
      Razin et al., arXiv 2410.08847. Of their code (princeton-nlp/unintentional-unalignment) ``ches/ches.py`` is followed; the
      script ``compute_preference_similarity_per_example.py`` counts the last token's hidden state, too.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.token_overlap_measure import ches_scores
      >>> hidden = jnp.array([[[1.0, 2.0, 9.0], [1.0, 3.0, 9.0]]])[..., None]  # a prompt token, two response tokens
      >>> [score.tolist() for score in ches_scores(hidden, jnp.array([[[False, True, True]] * 2]))]  # 3 * 4 - 3 * 3; a quarter
      [[3.0], [0.75]]
    """
    before = jnp.concatenate([completion_mask[..., 1:], jnp.zeros_like(completion_mask[..., :1])], -1)
    sums = jnp.sum(jnp.where(before[..., None], hidden, 0.0), axis=-2)
    means = sums / jnp.maximum(before.sum(-1), 1).astype(sums.dtype)[..., None]

    def score(both: jax.Array) -> jax.Array:
        return jnp.sum(both[:, 0] * (both[:, 1] - both[:, 0]), axis=-1)

    return score(sums), score(means)


def _completions(pairs: PairBatch) -> list[tuple[list[int], list[int]]]:
    tokens, masks = np.asarray(pairs.tokens), np.asarray(pairs.completion_mask)
    return [(t[0][m[0]].tolist(), t[1][m[1]].tolist()) for t, m in zip(tokens, masks, strict=True)]


def _write(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pair", *columns])
        writer.writerows(
            [place, *row] for place, row in enumerate(zip(*(c.tolist() for c in columns.values()), strict=True))
        )
    partial.replace(path)
