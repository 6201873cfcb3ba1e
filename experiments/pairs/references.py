"""The files in which ``--reference-cache`` keeps the references' log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from entangle import models, training
from experiments.pairs import stages
from experiments.pairs.pair_config import PairConfig
from experiments.pairs.pair_data import Checkpoint


def find(
    settings: PairConfig, reference: Checkpoint, pair_set: str, both: stages.PreferenceData, seed: int | None
) -> stages.ReferenceFile | None:
    """The file of one reference, whether it is there or not.

    Its name has the ``--eval-batch``, too: what a row's log-probability is rounded to depends on the rows beside it.

    Args:
      settings: the configuration.
      reference: the reference with its tokenizer; params are None where they are not known yet.
      pair_set: name of the pair set.
      both: its splits.
      seed: of the SFT that made the reference; None where it is the checkpoint itself, which serves every seed.

    Returns:
      Path and fingerprint; None without ``--reference-cache``.

    Example:
      >>> import numpy as np
      >>> from pathlib import Path
      >>> from entangle import data, models
      >>> from experiments.pairs import references, stages
      >>> from experiments.pairs.pair_config import PairConfig
      >>> from experiments.pairs.pair_data import Checkpoint
      >>> tokens = np.zeros((1, 2, 16), np.int32)
      >>> pairs = data.EncodedPairs(tokens, tokens > 0, ["pairs.jsonl:1"])
      >>> base = Checkpoint(models.language_model(models.preset("tiny", 300)), None, data.train_bpe(["so"], 300))
      >>> settings = PairConfig(reference_cache=Path("cache"))
      >>> file = references.find(settings, base, "mine", stages.PreferenceData(pairs, pairs), seed=0)
      >>> str(file.path), file.fingerprint.length
      ('cache/mine_seed0_eval_batch8.safetensors', 16)
    """
    if settings.reference_cache is None:
        return None
    config = dataclasses.asdict(reference.model.config)
    if reference.frozen:
        config["frozen"] = models.checksum(reference.frozen)
    made_from = training.reference_fingerprint(
        config, reference.params, reference.tokenizer.fingerprint, both._asdict()
    )
    whose = pair_set if seed is None else f"{pair_set}_seed{seed}"
    name = f"{whose}_eval_batch{settings.eval_batch}.safetensors"
    return stages.ReferenceFile(settings.reference_cache / name, made_from)


def check(
    settings: PairConfig,
    base: Checkpoint,
    pairs: Mapping[str, stages.PreferenceData],
    *,
    sft_first: bool = True,
) -> None:
    """Refuse a reference cache that cannot be used, before anything is written.

    With SFT first the references are not known yet: their parameters are compared when they are.

    Args:
      settings: the configuration.
      base: the model that SFT, or preference optimisation, starts from.
      pairs: pair set -> both splits.
      sft_first: whether SFT comes before.

    Raises:
      UserError: a file is stale or broken, or the folder cannot be written; see ``training.check_reference``.

    Example:
      >>> import numpy as np
      >>> from pathlib import Path
      >>> from entangle import data, models
      >>> from experiments.pairs import references, stages
      >>> from experiments.pairs.pair_config import PairConfig
      >>> from experiments.pairs.pair_data import Checkpoint
      >>> tokens = np.zeros((1, 2, 16), np.int32)
      >>> pairs = data.EncodedPairs(tokens, tokens > 0, ["pairs.jsonl:1"])
      >>> base = Checkpoint(models.language_model(models.preset("tiny", 300)), None, data.train_bpe(["so"], 300))
      >>> settings = PairConfig(reference_cache=Path(references.__file__))
      >>> references.check(settings, base, {"mine": stages.PreferenceData(pairs, pairs)})
      Traceback (most recent call last):
      entangle.errors.UserError: ...: cannot be written: ...references.py is a file
    """
    seeds = range(settings.seeds) if sft_first else (None,)
    reference = base._replace(params=None) if sft_first else base
    for pair_set, both in pairs.items():
        for seed in seeds:
            file = find(settings, reference, pair_set, both, seed)
            if file is not None:
                counts = {split: len(encoded.tokens) for split, encoded in both._asdict().items()}
                training.check_reference(file.path, file.fingerprint, counts)
