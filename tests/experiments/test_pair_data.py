"""What experiments on preference pairs are made from."""

import jax
import numpy as np
import pytest

from entangle import data, models
from entangle.errors import UserError
from entangle.types import PairBatch
from experiments.pairs import pair_data, stages
from experiments.pairs.pair_config import PairConfig
from tests.toy import draw_pairs


def encoded(seed):
    return data.EncodedPairs(*map(np.asarray, draw_pairs(seed, 2, 12, 40)[:2]), ["x"] * 2)


def test_a_large_vocabulary_is_multiplied_in_slices_at_completions_of_either_split():
    model = models.language_model(models.DecoderConfig(vocab_size=40, max_positions=12, width=4, layers=1, heads=1))
    both = stages.PreferenceData(encoded(0), encoded(1))
    settings = PairConfig(head_chunk=16)
    sliced = pair_data.with_head(settings, model, [both])
    assert pair_data.with_head(PairConfig(head_chunk=40), model, [both]) is model
    params = jax.tree.map(lambda leaf: 20 * leaf, model.init(jax.random.key(0)))
    longest = [int(split.completion_mask.sum(-1).max()) for split in both]
    assert longest[0] != longest[1] and max(longest) < 11  # or one split alone would do
    for split in both:
        pairs = PairBatch(*map(jax.numpy.asarray, split[:2]))
        expected, found = (jax.jit(m.log_probs)(params, pairs) for m in (model, sliced))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    shapes = {eqn.outvars[0].aval.shape for eqn in jax.make_jaxpr(sliced.log_probs)(params, pairs).eqns}
    assert (2, 2, max(longest), 4) in shapes


def test_a_head_chunk_of_nothing_is_refused():
    with pytest.raises(UserError, match="--head-chunk 0: at least one is needed"):
        pair_data.check(PairConfig(head_chunk=0))
