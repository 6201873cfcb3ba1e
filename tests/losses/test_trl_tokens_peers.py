"""TRL's length-desensitised and weighted DPO against ours, values and derivatives by token; needs the extra ``peers``."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.types import PairTokenLogProbs

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from tests.losses import trl_calls  # noqa: E402
from tests.losses.test_trl_peers import assert_same, each_batch  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]


def ours(responses, objective):
    """The mean loss, and its derivatives by every token from the tokens' coefficients."""
    policy, reference, scored, squares = (
        jnp.array(np.stack(np.split(x, 2), 1))
        for x in (responses.log_probs, responses.ref_log_probs, responses.scored, responses.log_sum_squares)
    )
    tokens = PairTokenLogProbs(policy, reference, scored, squares, jnp.zeros_like(policy))
    values, c = losses.row_loss_and_coefficients(objective, tokens)
    slopes = np.asarray(c.log_probs) / values.size
    return trl_calls.Result(np.asarray(values.mean()), np.concatenate([-slopes[:, 0], slopes[:, 1]]))


@each_batch
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised_dpo(responses, alpha):
    theirs = trl_calls.dpo_loss(responses, "sigmoid", beta=0.3, ld_alpha=alpha)
    assert_same(theirs, ours(responses, functools.partial(losses.ld_dpo, beta=0.3, alpha=alpha)))


@each_batch
def test_length_desensitised_hinge_is_a_composition(responses):
    def hinge(tokens):
        return losses.hinge(losses.summed(tokens, losses.ld_weights(tokens.completion_mask, 0.4)), beta=0.3)

    assert_same(trl_calls.dpo_loss(responses, "hinge", beta=0.3, ld_alpha=0.4), ours(responses, hinge))


@each_batch
@pytest.mark.parametrize(
    ("loss_type", "objective"), [("sigmoid", losses.dpo), ("ipo", losses.ipo_averaged), ("apo_zero", losses.apo_zero)]
)
def test_weights_without_clipping(responses, loss_type, objective):
    def weighted(tokens):
        return losses.wpo_weights(tokens) * objective(losses.summed(tokens), beta=0.3)

    theirs = trl_calls.dpo_loss(responses, loss_type, beta=0.3, use_weighting=True)
    assert_same(theirs, ours(responses, weighted))
