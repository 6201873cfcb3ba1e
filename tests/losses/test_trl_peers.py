"""Every loss type of TRL that can be called against ours, values and derivatives; needs the extra ``peers``."""

import ast
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.losses import with_hyperparameters as at
from entangle.types import PairLogProbs

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from tests.losses import trl_calls  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]


class Case(NamedTuple):
    """A loss type of TRL, its settings there, and ours at the same hyperparameters."""

    loss_type: str
    settings: dict[str, Any]
    objective: losses.Objective

    def __str__(self):
        beyond = {name: value for name, value in self.settings.items() if name != "beta"}
        return " ".join([self.loss_type, *(f"{name}={value}" for name, value in beyond.items())])


BATCHES = {"even": {"seed": 0}, "rising": {"seed": 1, "shift": 0.2}, "falling": {"seed": 2, "shift": -0.2}}


def _each_batch(**settings):
    drawn = [pytest.param(trl_calls.draw(**batch, **settings), id=name) for name, batch in BATCHES.items()]
    return pytest.mark.parametrize("responses", drawn)


each_batch = _each_batch()
each_batch_of_single_token_prompts = _each_batch(longest_prompt=1)


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def pairs_of(responses):
    sums = [(x * responses.scored).sum(1) for x in (responses.log_probs, responses.ref_log_probs)]
    return PairLogProbs(*(jnp.array(half) for x in (*sums, responses.scored.sum(1)) for half in np.split(x, 2)))


def without_reference(lp):
    return lp._replace(ref_chosen=jnp.zeros_like(lp.chosen), ref_rejected=jnp.zeros_like(lp.chosen))


def ours(responses, objective):
    """The mean loss, and its derivatives by every token from the two coefficients."""
    values, (d_w, d_l) = losses.loss_and_coefficients(objective, pairs_of(responses))
    slopes = np.concatenate([-d_w, d_l])[:, None] * responses.scored / values.size
    return trl_calls.Result(np.asarray(jnp.mean(values)), slopes)


def assert_same(theirs, mine):
    assert np.isfinite(theirs.loss) and np.isfinite(theirs.slopes).all() and theirs.slopes.any()
    np.testing.assert_allclose(mine.loss, theirs.loss, rtol=1e-6, atol=0)
    np.testing.assert_allclose(mine.slopes, theirs.slopes, rtol=1e-6, atol=0)


DPO_CASES = [
    Case("sigmoid", {"beta": 0.3}, at(losses.dpo, beta=0.3)),
    Case("hinge", {"beta": 0.7}, at(losses.hinge, beta=0.7)),
    Case("ipo", {"beta": 1.3}, at(losses.ipo_averaged, beta=1.3)),
    Case("exo_pair", {"beta": 0.3, "label_smoothing": 0.07}, at(losses.exo_pair, beta=0.3, label_smoothing=0.07)),
    Case("nca_pair", {"beta": 0.3}, at(losses.nca_pair, beta=0.3)),
    Case("robust", {"beta": 0.3, "label_smoothing": 0.0}, at(losses.robust_dpo, beta=0.3, label_smoothing=0.0)),
    Case("robust", {"beta": 0.3, "label_smoothing": 0.2}, at(losses.robust_dpo, beta=0.3, label_smoothing=0.2)),
    Case("robust", {"beta": 0.3, "label_smoothing": 0.3}, losses.robust(at(losses.dpo, beta=0.3), 0.3)),
    Case("bco_pair", {"beta": 0.3}, at(losses.bco_pair, beta=0.3)),
    Case("sppo_hard", {"beta": 0.3}, at(losses.sppo, beta=0.3)),
    Case("aot", {"beta": 0.3}, at(losses.aot, beta=0.3)),
    Case("aot", {"beta": 0.3, "label_smoothing": 0.2}, at(losses.aot, beta=0.3, label_smoothing=0.2)),
    Case("aot_unpaired", {"beta": 0.3}, at(losses.aot_unpaired, beta=0.3)),
    Case("aot_unpaired", {"beta": 0.3, "label_smoothing": 0.2}, at(losses.aot_unpaired, beta=0.3, label_smoothing=0.2)),
    Case("apo_zero", {"beta": 0.3}, at(losses.apo_zero, beta=0.3)),
    Case("apo_down", {"beta": 0.3}, at(losses.apo_down, beta=0.3)),
    Case("discopop", {"beta": 0.3}, at(losses.discopop, beta=0.3, temperature=0.05)),
    Case("discopop", {"beta": 0.3, "discopop_tau": 0.8}, at(losses.discopop, beta=0.3, temperature=0.8)),
    Case("sft", {"beta": 0.3}, losses.nll_token_mean),
    Case("sigmoid_norm", {"beta": 3.0}, at(losses.dpo_norm, beta=3.0)),
]


@each_batch
@each(DPO_CASES)
def test_dpo_loss_type(case, responses):
    assert_same(trl_calls.dpo_loss(responses, case.loss_type, **case.settings), ours(responses, case.objective))


@each_batch
def test_precomputed_reference(responses):
    theirs = trl_calls.dpo_loss(responses, "sigmoid", beta=0.3, precompute_ref_logps=True)
    assert_same(theirs, ours(responses, at(losses.dpo, beta=0.3)))


MIXTURES = {
    "mpo": (
        ("sigmoid", "bco_pair", "sft"),
        {"beta": 0.3, "loss_weights": [0.8, 0.2, 1.0]},
        at(losses.mpo_token_mean, beta=0.3),
    ),
    "mpo of other weights": (
        ("sigmoid", "bco_pair", "sft"),
        {"beta": 0.3, "loss_weights": [0.5, 0.7, 0.1]},
        at(losses.mpo_token_mean, beta=0.3, preference_weight=0.5, quality_weight=0.7, generation_weight=0.1),
    ),
    "weighted sum": (
        ("hinge", "aot", "sigmoid_norm"),
        {"beta": 0.7, "loss_weights": [0.3, 2.0, 0.9]},
        losses.weighted_sum(
            (0.3, at(losses.hinge, beta=0.7)), (2.0, at(losses.aot, beta=0.7)), (0.9, at(losses.dpo_norm, beta=0.7))
        ),
    ),
    "weighted sum on a divergence": (
        ("sigmoid", "sft"),
        {"beta": 0.3, "loss_weights": [0.9, 0.4], "f_divergence_type": "forward_kl"},
        losses.weighted_sum((0.9, at(losses.f_dpo_forward_kl, beta=0.3)), (0.4, losses.nll_token_mean)),
    ),
}


@each_batch
@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_of_loss_types(name, responses):
    loss_types, settings, objective = MIXTURES[name]
    assert_same(trl_calls.dpo_loss(responses, *loss_types, **settings), ours(responses, objective))


class Divergence(NamedTuple):
    settings: dict[str, Any]
    transform: Any
    f_dpo: losses.Objective


def _alpha(alpha):
    return Divergence(
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha},
        functools.partial(losses.alpha_divergence, alpha=alpha),
        at(losses.f_dpo_alpha, alpha=alpha),
    )


DIVERGENCES = {
    "forward_kl": Divergence({"f_divergence_type": "forward_kl"}, losses.forward_kl, losses.f_dpo_forward_kl),
    "js_divergence": Divergence(
        {"f_divergence_type": "js_divergence"}, losses.jensen_shannon, losses.f_dpo_jensen_shannon
    ),
    "alpha_divergence 0.5": _alpha(0.5),
    "alpha_divergence 1.25": _alpha(1.25),
    "alpha_divergence 1": _alpha(1.0),
}
# TRL's constructor refuses divergences with the other loss types.
OF_DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


@each_batch
@each([case for case in DPO_CASES if case.loss_type in OF_DIVERGENCES])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_of_loss_type(name, case, responses):
    settings, transform, f_dpo = DIVERGENCES[name]
    if case.loss_type == "sigmoid":
        objective = at(f_dpo, **case.settings)
    elif case.loss_type == "sft":
        objective = case.objective  # it has no log-ratios
    else:
        objective = lambda lp: case.objective(transform(lp))  # noqa: E731
    theirs = trl_calls.dpo_loss(responses, case.loss_type, **case.settings, **settings)
    assert_same(theirs, ours(responses, objective))


@each_batch
def test_alpha_divergence_in_float32(responses):
    """As TRL runs it: its code takes at most float32, and the other tests put float64 in that place."""
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5, "dtype": torch.float32}
    theirs = trl_calls.dpo_loss(responses, "sigmoid", beta=0.3, **settings)
    assert theirs.slopes.dtype == np.float32
    assert_same(theirs, ours(responses, at(losses.f_dpo_alpha, beta=0.3, alpha=0.5)))


def reference_free(objective, **hyperparameters):
    return lambda lp: objective(without_reference(lp), **hyperparameters)


def smoothed(objective, label_smoothing=0.2):
    return losses.label_smoothed(objective, label_smoothing)


def smoothed_after_target(objective, gamma, label_smoothing=0.2):
    """TRL's smoothing: a wrong label exchanges the responses, but the target margin stays with the chosen one."""
    exchanged = lambda lp: objective(losses.exchanged(lp), gamma=-gamma)  # noqa: E731
    return losses.weighted_sum((1.0 - label_smoothing, at(objective, gamma=gamma)), (label_smoothing, exchanged))


_cpo = at(losses.cpo, beta=0.3, nll_weight=0.0)
_simpo = at(losses.simpo, beta=1.7)
_alphapo = at(losses.alphapo, beta=1.7, alpha=0.25)

CPO_CASES = [
    Case("sigmoid", {"beta": 0.3}, _cpo),
    Case("sigmoid", {"beta": 0.3, "label_smoothing": 0.2}, smoothed(_cpo)),
    Case("sigmoid", {"beta": 0.3, "label_smoothing": 0.1}, reference_free(losses.cdpo, beta=0.3, label_smoothing=0.1)),
    Case("hinge", {"beta": 0.3}, reference_free(losses.hinge, beta=0.3)),
    Case("ipo", {"beta": 1.3}, reference_free(losses.ipo_averaged, beta=1.3)),
    Case("simpo", {"beta": 1.7, "simpo_gamma": 0.4}, at(_simpo, gamma=0.4)),
    Case("simpo", {"beta": 1.7, "simpo_gamma": 0.0, "label_smoothing": 0.2}, smoothed(at(_simpo, gamma=0.0))),
    Case("simpo", {"beta": 1.7, "simpo_gamma": 0.4, "label_smoothing": 0.2}, smoothed_after_target(_simpo, 0.4)),
    Case("alphapo", {"beta": 1.7, "simpo_gamma": 0.4, "alpha": 0.25}, at(_alphapo, gamma=0.4)),
    Case("alphapo", {"beta": 1.7, "simpo_gamma": 0.4, "alpha": -0.6}, at(_alphapo, gamma=0.4, alpha=-0.6)),
    Case(
        "alphapo",
        {"beta": 1.7, "simpo_gamma": 0.4, "alpha": 0.25, "label_smoothing": 0.2},
        smoothed_after_target(_alphapo, 0.4),
    ),
]


@each_batch
@each(CPO_CASES)
def test_cpo_loss_type(case, responses):
    assert_same(trl_calls.cpo_step(responses, case.loss_type, **case.settings), ours(responses, case.objective))


@each_batch
@each(CPO_CASES)
def test_cpo_loss_of_each_pair(case, responses):
    lp = pairs_of(responses)
    given = lp if case.loss_type in ("sigmoid", "hinge") else losses.per_token(lp)
    theirs = trl_calls.cpo_loss(np.asarray(given.chosen), np.asarray(given.rejected), case.loss_type, **case.settings)
    np.testing.assert_allclose(case.objective(lp), theirs, rtol=1e-6, atol=0)


@each_batch
def test_ipo_of_sums(responses):
    lp = without_reference(pairs_of(responses))
    theirs = trl_calls.cpo_loss(np.asarray(lp.chosen), np.asarray(lp.rejected), "ipo", beta=0.3)
    np.testing.assert_allclose(losses.ipo(lp, beta=0.3), theirs, rtol=1e-6, atol=0)


@each_batch
@each([case for case in CPO_CASES if case.loss_type in ("sigmoid", "simpo") and len(case.settings) < 3])
def test_cpo_with_likelihood(case, responses):
    theirs = trl_calls.cpo_step(responses, case.loss_type, cpo_alpha=0.7, **case.settings)
    assert_same(theirs, ours(responses, losses.weighted_sum((1.0, case.objective), (0.7, losses.nll_token_mean))))


@each_batch
def test_odds_ratio_of_each_pair(responses):
    lp = pairs_of(responses)
    averages = losses.per_token(lp)
    theirs = trl_calls.odds_ratio_loss(np.asarray(averages.chosen), np.asarray(averages.rejected), beta=0.3)
    mine = losses.orpo(lp, odds_weight=0.3) - losses.nll_averaged(lp)
    np.testing.assert_allclose(mine, -theirs, rtol=1e-6, atol=0)


@each_batch_of_single_token_prompts
def test_orpo(responses):
    """TRL takes the likelihood of prompt and completion: the same if the prompt is the first token, which none predicts."""
    objective = losses.weighted_sum(
        (1.0, at(losses.orpo, odds_weight=0.3)), (-1.0, losses.nll_averaged), (1.0, losses.nll_token_mean)
    )
    assert_same(trl_calls.orpo_step(responses, beta=0.3), ours(responses, objective))


TPO_CASES = [
    *(case for case in CPO_CASES if case.loss_type in ("sigmoid", "hinge", "ipo")),
    Case("tpo-l", {"beta": 1.7, "tpo_l_gamma": 0.4}, at(_simpo, gamma=0.4)),
    Case("tpo-l", {"beta": 1.7, "tpo_l_gamma": 0.4, "label_smoothing": 0.2}, smoothed_after_target(_simpo, 0.4)),
]


@each_batch
@each(TPO_CASES)
@pytest.mark.parametrize("tpo_alpha", [0.0, 0.7])
def test_tpo_loss_type_with_the_chosen_response_as_its_third(case, responses, tpo_alpha):
    theirs = trl_calls.tpo_loss(responses, case.loss_type, tpo_alpha=tpo_alpha, **case.settings)
    assert_same(theirs, ours(responses, losses.weighted_sum((1.0, case.objective), (tpo_alpha, losses.nll_token_mean))))


ONLINE_DPO_CASES = [
    Case("sigmoid", {"beta": 0.3}, at(losses.dpo, beta=0.3)),
    Case("ipo", {"beta": 0.3}, at(losses.ipo, beta=0.3)),
]


@each_batch_of_single_token_prompts
@each(ONLINE_DPO_CASES)
def test_online_dpo_loss_type(case, responses):
    assert_same(trl_calls.online_dpo_step(responses, case.loss_type, **case.settings), ours(responses, case.objective))


KTO_WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.8}


def ours_unpaired(responses, desirable, objective):
    """The mean loss of single responses, and its derivatives by every token."""
    policy, reference = (
        jnp.array((x * responses.scored).sum(1)) for x in (responses.log_probs, responses.ref_log_probs)
    )

    def mean(policy):
        return jnp.mean(objective(losses.UnpairedLogProbs(policy, reference, jnp.array(desirable))))

    loss, slopes = jax.value_and_grad(mean)(policy)
    return trl_calls.Result(np.asarray(loss), np.asarray(slopes)[:, None] * responses.scored)


def labels(responses):
    return np.random.default_rng(5).random(len(responses.bits)) < 0.4


def mean_log_ratio(responses):
    return ((responses.log_probs - responses.ref_log_probs) * responses.scored).sum(1).mean()


@each_batch
@pytest.mark.parametrize("kl_shift", [0.3, -0.3])
@pytest.mark.parametrize("weights", [{}, KTO_WEIGHTS], ids=["plain", "weighed"])
def test_kto(responses, kl_shift, weights):
    mismatched = trl_calls.draw(seed=7, shift=kl_shift)
    desirable = labels(responses)
    theirs = trl_calls.kto_loss(responses, "kto", desirable, mismatched, beta=0.3, **weights)
    assert (mean_log_ratio(mismatched) > 0) == (kl_shift > 0)
    objective = functools.partial(
        losses.kto_unpaired,
        reference_point=max(0.0, mean_log_ratio(mismatched)),
        beta=0.3,
        desirable=weights.get("desirable_weight", 1.0),
        undesirable=weights.get("undesirable_weight", 1.0),
    )
    assert_same(theirs, ours_unpaired(responses, desirable, objective))


@each_batch
def test_kto_of_pairs(responses):
    """The paired form is TRL's with the responses at hand for its mismatched ones, twice: its mean is over both sides."""
    chosen = np.arange(len(responses.bits)) < len(responses.bits) // 2
    theirs = trl_calls.kto_loss(responses, "kto", chosen, responses, beta=0.3, **KTO_WEIGHTS)
    objective = at(losses.kto, beta=0.3, desirable=1.3, undesirable=0.8)
    assert_same(theirs, ours(responses, losses.weighted_sum((0.5, objective))))


@each_batch
@pytest.mark.parametrize("weights", [{}, KTO_WEIGHTS], ids=["plain", "weighed"])
def test_apo_zero_unpaired(responses, weights):
    desirable = labels(responses)
    theirs = trl_calls.kto_loss(responses, "apo_zero_unpaired", desirable, beta=0.3, **weights)

    def objective(examples):
        weight = jnp.where(examples.desirable, *(jnp.array(w) for w in weights.values())) if weights else 1.0
        return weight * losses.apo_zero_unpaired(examples, beta=0.3)

    assert_same(theirs, ours_unpaired(responses, desirable, objective))


def test_a_small_difference_is_seen():
    responses = trl_calls.draw(seed=0)
    theirs = trl_calls.dpo_loss(responses, "sigmoid", beta=0.3)
    near = ours(responses, at(losses.dpo, beta=0.3001))
    for changed in (near, near._replace(loss=theirs.loss), near._replace(slopes=theirs.slopes)):
        with pytest.raises(AssertionError):
            assert_same(theirs, changed)


COVERED = {
    "dpo_trainer": {case.loss_type for case in DPO_CASES},
    "cpo_trainer": {case.loss_type for case in CPO_CASES} - {"alphapo"},
    "cpo_config": {"alphapo"},
    "tpo_trainer": {case.loss_type for case in TPO_CASES},
    "online_dpo_trainer": {case.loss_type for case in ONLINE_DPO_CASES},
    "kto_trainer": {"kto", "apo_zero_unpaired"},
}
LEFT_OUT = {
    ("cpo_trainer", "kto_pair"): "refused by TRL itself, which points to its KTO trainer",
    ("sft_trainer", "nll"): "supervised; beside preferences it is DPO's loss type sft",
    ("sft_trainer", "dft"): "supervised, and it weighs tokens by their probability",
    ("sft_config", "chunked_nll"): "supervised; the same as nll",
}
OTHER_TRAINERS = {
    "grpo_trainer": "policy gradients of groups of samples with rewards, no pairs",
    "sdpo_trainer": "policy gradients of groups of samples with rewards, no pairs",
}


def _strings(node):
    return [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]


def named_in_source(variable):
    """Strings that TRL compares a variable with, or gives as its alternatives: pairs of module and string."""
    found = set()
    for path in Path(trl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Compare):
                sides = {ast.unparse(side).split(".")[-1] for side in (node.left, *node.comparators)}
                names = _strings(node) if sides & {variable, f"{variable}s"} else []
            elif isinstance(node, ast.Raise):
                error = "".join(_strings(node))
                unknown = re.search(f"unknown {variable}".replace("_", "[_ ]"), error, re.IGNORECASE)
                names = re.findall(r"'([\w-]+)'", error) if unknown else []
            found.update((path.stem, name) for name in names)
    return found


def test_every_loss_type_is_covered_or_left_out_for_a_reason():
    named = named_in_source("loss_type")
    here = {(module, name) for module, name in named if module not in OTHER_TRAINERS}
    assert here == {(module, name) for module, names in COVERED.items() for name in names} | set(LEFT_OUT)
    assert {module for module, _ in named - here} == set(OTHER_TRAINERS)


def test_every_divergence_is_covered():
    names = {"reverse_kl", *(d.settings["f_divergence_type"] for d in DIVERGENCES.values())}
    assert named_in_source("f_divergence_type") == {("dpo_trainer", name) for name in names}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_alphapo_is_simpo_in_trl(tmp_path):
    from trl.experimental.cpo import CPOConfig

    config = CPOConfig(output_dir=str(tmp_path), loss_type="alphapo", use_cpu=True, bf16=False)
    assert (config.loss_type, config.cpo_alpha) == ("simpo", 0.0)
