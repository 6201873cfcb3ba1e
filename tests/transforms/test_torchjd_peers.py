"""TorchJD's aggregators against our weightings on random pairs of gradients; needs the extra ``peers``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import transforms
from entangle.types import PairGradients

torch = pytest.importorskip("torch")
pytest.importorskip("torchjd")

from torchjd import aggregation  # noqa: E402
from torchjd.linalg import QuadprogProjector  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]


def jacobians(count=50, width=6):
    """Rows g1 = chosen and g2 = -rejected: norms within three orders of magnitude, half of them in conflict."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(0.05, np.pi - 0.05, count)
    sizes = 10 ** rng.uniform(-0.5, 1.0, (count, 2))
    for angle, (first, second) in zip(angles, sizes, strict=True):
        plane = np.linalg.qr(rng.standard_normal((width, 2)))[0].T
        yield np.stack([first * plane[0], second * (np.cos(angle) * plane[0] + np.sin(angle) * plane[1])])


JACOBIANS = list(jacobians())


def ours(weighting, sequence):
    """The ascent steps, one after the other through one head of a chain."""
    tx = transforms.combine_pair(weighting)
    update = jax.jit(tx.update)
    state, steps = tx.init(jnp.zeros(sequence[0].shape[1])), []
    for g1, g2 in sequence:
        step, state = update(PairGradients(jnp.asarray(g1), jnp.asarray(-g2)), state)
        steps.append(-np.asarray(step))
    return np.stack(steps)


def theirs(aggregator, sequence):
    return np.stack([aggregator(torch.from_numpy(rows)).numpy() for rows in sequence])


def relative_errors(ours, theirs):
    return np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)


def _projector():
    """Without their additions to the Gram, which are for singular ones."""
    return QuadprogProjector(norm_eps=0.0, reg_eps=0.0)


# Direct formulas and an active set of two rows are good to rounding, 1e-16 over the least 1 - k^2 of 2.5e-3; IMTL-G inverts
# the Gram itself, whose condition number is 1e3 times that for norms 1 : 30. Frank-Wolfe's first line search on two rows is
# exact. The interior-point solver of CAGrad stops at a gap of 1e-8, and t is as good as its root.
PEERS = {
    "pcgrad": (transforms.pcgrad, aggregation.PCGrad, 1e-12),
    "upgrad": (transforms.upgrad, lambda: aggregation.UPGrad(projector=_projector()), 1e-12),
    "dual_projection": (transforms.dual_projection, lambda: aggregation.DualProj(projector=_projector()), 1e-12),
    "mgda": (transforms.mgda, lambda: aggregation.MGDA(epsilon=1e-12, max_iters=1000), 1e-12),
    "config": (transforms.config, aggregation.ConFIG, 1e-12),
    "imtl_g": (transforms.imtl_g, aggregation.IMTLG, 1e-10),
    "aligned_mtl": (transforms.aligned_mtl, lambda: aggregation.AlignedMTL(scale_mode="min"), 1e-11),
    "cagrad c=0": (lambda: transforms.cagrad(0.0), lambda: aggregation.CAGrad(c=0.0, norm_eps=0.0), 1e-12),
    "cagrad c=0.4": (lambda: transforms.cagrad(0.4), lambda: aggregation.CAGrad(c=0.4, norm_eps=0.0), 1e-4),
    "cagrad c=0.9": (lambda: transforms.cagrad(0.9), lambda: aggregation.CAGrad(c=0.9, norm_eps=0.0), 1e-4),
    # the sequence's targets come from the steps before; their beta is the share of the new cosine
    "gradvac_ema": (lambda: transforms.gradvac_ema(0.7), lambda: aggregation.GradVac(beta=0.3, eps=0.0), 1e-12),
}


@pytest.mark.parametrize("name", PEERS)
def test_aggregator(name):
    make, peer, tolerance = PEERS[name]
    assert np.max(relative_errors(ours(make(), JACOBIANS), theirs(peer(), JACOBIANS))) < tolerance


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP:UserWarning")
def test_nash_mtl_where_its_solver_gets_there():
    """Its loop over convex problems sometimes stops short; a solution of ``G w = 1 / w`` has a step of length sqrt(2)."""
    aggregator = aggregation.NashMTL(n_tasks=2, max_norm=0.0)
    steps = []
    for rows in JACOBIANS:
        aggregator.reset()  # or it starts from the weights of other gradients
        steps.append(theirs(aggregator, [rows])[0])
    steps = np.stack(steps)
    solved = np.abs(np.linalg.norm(steps, axis=1) - np.sqrt(2)) < 1e-4
    assert np.sum(solved) > 0.9 * len(steps)
    # what is that near to the length is as near to the direction
    assert np.max(relative_errors(ours(transforms.nash(), JACOBIANS), steps)[solved]) < 1e-4
