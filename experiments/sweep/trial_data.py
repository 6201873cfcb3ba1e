"""What trials are made from: model, tokenizer, pairs, and text for a base model, from a corpus or a preference file."""

from __future__ import annotations

import math

import numpy as np

from entangle import data, losses, models
from entangle.errors import UserError
from experiments.pairs import pair_data, preference_files, sentiment_data
from experiments.pairs.sentiment_data import Materials
from experiments.sweep.trial_config import TrialConfig
from experiments.sweep.trial_masks import MASKS


def check(config: TrialConfig) -> None:
    """Refuse what cannot work, without reading data.

    Raises:
      UserError: the objective, its hyperparameters, the pair chain, a number, or a pair set that is not there.

    Example:
      >>> from experiments.sweep.trial_config import TrialConfig
      >>> from experiments.sweep.trial_data import check
      >>> check(TrialConfig(pair_set="tweet"))
      Traceback (most recent call last):
      entangle.errors.UserError: unknown pair set 'tweet': choose from single_token, short_suffix, long_suffix, tweets,
      spliced
    """
    pair_data.check(config)
    known = sentiment_data.known_sets()
    if config.pair_set not in known:
        raise UserError(f"unknown pair set {config.pair_set!r}: choose from {', '.join(known)}")
    if config.masks not in MASKS:
        raise UserError(f"unknown masks {config.masks!r}: choose from {', '.join(MASKS)}")
    usual = TrialConfig.sparsity
    if config.masks != "learned" and config.sparsity != usual:
        raise UserError(f"sparsity {config.sparsity:g} has no effect: masks are {config.masks}, not learned")
    if not (math.isfinite(config.sparsity) and config.sparsity >= 0):
        raise UserError(f"sparsity {config.sparsity}: it must be 0 or more")
    if config.masks == "learned" and (config.objective != "dpo" or config.layers):
        what = "layers are not told" if config.objective == "dpo" else f"objective {config.objective!r}"
        raise UserError(f"{what}: learned masks are trained by dpo, without layers")
    if not config.from_file and config.held_out:
        raise UserError(f"--held-out {config.held_out} has no effect: --data {config.data} is no preference file")


def name_of_pairs(config: TrialConfig) -> str:
    """The pair set's name; a preference file has one of its own."""
    return preference_files.PAIR_SET if config.from_file else config.pair_set


def gather(config: TrialConfig) -> Materials:
    """Read, check and encode everything that a wrong flag or file can spoil.

    Raises:
      UserError: bad input.
    """
    check(config)
    return _from_file(config) if config.from_file else sentiment_data.gather_sets(config, (config.pair_set,))


def _from_file(config: TrialConfig) -> Materials:
    records = preference_files.read_records(config.data, config.held_out)
    trained = ("sft", "preference") if config.sft_first else ("preference",)
    if config.model not in models.PRESETS:
        base = pair_data.load_checkpoint(config, config.model)
        pairs, report = preference_files.encode_records(config, base.tokenizer, records, trained)
        model, checkpoint, tokenizer, text = base.model, base.params, base.tokenizer, np.zeros(0, np.int32)
    else:
        # the base model reads what is preferred, and nothing that is held out
        texts = [f"{record.prompt}{record.chosen}" for record in records.train[: config.train_pairs]]
        tokenizer = data.train_bpe(texts, config.vocab_size)
        shape = models.preset(config.model, tokenizer.vocab_size)
        pair_data.check_length(config, config.model, shape)
        model, checkpoint = models.language_model(shape), None
        text = data.encode_text(texts, tokenizer)
        windows = len(text) // config.max_length
        pair_data.check_size("base", config.base, windows, f"windows of {config.max_length} tokens")
        pairs, report = preference_files.encode_records(config, tokenizer, records, trained)
    name = preference_files.PAIR_SET
    model = pair_data.with_head(config, model, [pairs])
    return Materials(tokenizer, model, checkpoint, text, {name: pairs}, {name: report})


def remembers(config: TrialConfig) -> bool:
    """Whether its objective remembers earlier batches, so that its training state is unlike others'."""
    objective = losses.get_objective(config.objective, **config.objective_args)
    return isinstance(objective, losses.RunningObjective)
