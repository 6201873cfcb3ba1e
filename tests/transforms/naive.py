"""The weightings' definitions on the two vectors themselves, in plain NumPy float64: what is projected, what is minimised.

``g1`` is the chosen gradient and ``g2`` the rejected one's opposite, flat vectors; each function returns the ascent step, or
None where the definition says nothing.
"""

import numpy as np

_length = np.linalg.norm


def _unit(v):
    """A zero vector stays one."""
    return v / (_length(v) or 1.0)


def _along(v, g):
    """The component of v along g."""
    return (v @ _unit(g)) * _unit(g)


def _conflict(g1, g2):
    return g1 @ g2 < 0


def _project_on_cone(v, g1, g2):
    """The vector nearest to v that has no negative product with either: some of the two are made orthogonal."""
    both = np.stack([g1, g2], 1)
    candidates = [v, v - _along(v, g1), v - _along(v, g2), v - both @ np.linalg.lstsq(both, v)[0]]
    inside = [d for d in candidates if all(d @ g >= -1e-14 * _length(v) * _length(g) for g in (g1, g2))]
    return min([*inside, 0 * v], key=lambda d: _length(d - v))


def _least(slope):
    """Where in [0, 1] a convex function is least, from the sign of its slope."""
    low, high = 0.0, 1.0
    if slope(low) >= 0:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


def fixed(g1, g2, chosen=1.0, rejected=1.0):
    return chosen * g1 + rejected * g2


def margin(g1, g2):
    return g1 + g2


def normalized(g1, g2):
    return _unit(g1) + _unit(g2)


def scale_preserving(g1, g2):
    return np.sqrt(_length(g1) * _length(g2)) * (_unit(g1) + _unit(g2))


def pcgrad(g1, g2):
    """Algorithm 1: each loses its component along the other."""
    if not _conflict(g1, g2):
        return g1 + g2
    return (g1 - _along(g1, g2)) + (g2 - _along(g2, g1))


def upgrad(g1, g2):
    """The mean of the projected rows."""
    return (_project_on_cone(g1, g1, g2) + _project_on_cone(g2, g1, g2)) / 2


def dual_projection(g1, g2):
    """The projected mean of the rows."""
    return _project_on_cone((g1 + g2) / 2, g1, g2)


def one_sided(g1, g2):
    return g1 + (g2 - _along(g2, g1) if _conflict(g1, g2) else g2)


def mgda(g1, g2):
    """The point of the segment nearest to the origin."""
    t = _least(lambda t: (t * g1 + (1 - t) * g2) @ (g1 - g2))
    return t * g1 + (1 - t) * g2


def cagrad(g1, g2, c=0.5):
    """Algorithm 1, the dual problem minimised by bisection."""
    mean, apart = (g1 + g2) / 2, g1 - g2
    radius = c * _length(mean)
    t = _least(lambda t: apart @ (mean + radius * _unit(t * g1 + (1 - t) * g2)))
    return mean + radius * _unit(t * g1 + (1 - t) * g2)


def nash(g1, g2):
    """``<g_i, step> = 1 / w_i``, the minimum of ``|step|^2 / 2 - sum of log w_i``, by Newton's method with shortened steps."""
    rows = np.stack([_unit(g1), _unit(g2)])
    if not rows.any(1).all() or _length(rows.sum(0)) == 0:
        return None  # no gain on a zero gradient, and none on both sides of opposite ones
    w = np.ones(2)
    for _ in range(200):
        slope = rows @ (w @ rows) - 1 / w
        newton = np.linalg.solve(rows @ rows.T + np.diag(1 / w**2), slope)
        w = w - newton / (1 + np.sqrt(slope @ newton))
    return w @ rows  # the solution for unit vectors is that for g1, g2: w_i |g_i| stands for w_i


def imtl_g(g1, g2):
    """The paper's ``alpha_2 = g1 U^T (D U^T)^-1`` with ``U = u1 - u2`` and ``D = g1 - g2``."""
    u = _unit(g1) - _unit(g2)
    if not (g1.any() and g2.any() and u.any()):
        return None
    alpha = (g1 @ u) / ((g1 - g2) @ u)
    return (1 - alpha) * g1 + alpha * g2


def config(g1, g2):
    """Equation 2: ``[U(g1), U(g2)]^-T 1`` made a unit vector, times the sum of both projections on it."""
    direction = np.linalg.pinv(np.stack([_unit(g1), _unit(g2)]), rcond=1e-12) @ np.ones(2)
    if _length(direction) < 1e-12:
        return 0 * g1  # opposite
    return ((g1 + g2) @ _unit(direction)) * _unit(direction)


def gradvac(g1, g2, target=0.0):
    """Algorithm 1's inner step: the law of sines, by equation 2."""
    if not (g1.any() and g2.any()):
        return g1 + g2  # no angle

    def vaccinated(g, other):
        k = np.clip(_unit(g) @ _unit(other), -1, 1)
        if k >= target:
            return g
        sines = np.sqrt(1 - k * k), np.sqrt(1 - target * target)
        return g + _length(g) * (target * sines[0] - k * sines[1]) / (_length(other) * sines[1]) * other

    return vaccinated(g1, g2) + vaccinated(g2, g1)


def aligned_mtl(g1, g2):
    """Algorithm 1: every singular value of the stacked gradients becomes the smallest one, then their mean."""
    u, s, v = np.linalg.svd(np.stack([g1, g2]), full_matrices=False)
    kept = s > 1e-12 * s[0]
    return np.min(s[kept], initial=s[0]) * np.mean(u[:, kept] @ v[kept], 0)


def band(g1, g2, inset=0.0):
    """The least change of the ratio of lengths, by bisection, for which neither side moves the wrong way."""
    if not _conflict(g1, g2):
        return g1 + g2

    def ideal(s):
        step = np.exp(s) * g1 + np.exp(-s) * g2
        return g1 @ step >= 0 and g2 @ step >= 0

    def edge(outside):
        inside = centre
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if ideal(middle) else (inside, middle)
        return inside + inset * (centre - inside)

    centre = np.log(_length(g2) / _length(g1)) / 2
    s = np.clip(0.0, edge(centre - 50), edge(centre + 50))
    return np.exp(s) * g1 + np.exp(-s) * g2


def reward_calibrated(sequence, decay):
    """``alpha = exp(average / 2)`` of log(|rejected| / |chosen|), the weights of every step; what has no ratio is left out."""
    average, weights = None, []
    for g1, g2 in sequence:
        if g1.any() and g2.any() and np.isfinite(g1 + g2).all():
            now = np.log(_length(g2) / _length(g1))
            average = now if average is None else decay * average + (1 - decay) * now
        weights.append((np.exp(average / 2), np.exp(-average / 2)))
    return [x * g1 + y * g2 for (x, y), (g1, g2) in zip(weights, sequence, strict=True)]


def gradvac_ema(sequence, decay):
    """Algorithm 1 with beta = 1 - decay; the target of a step is what the earlier steps left, those with an angle."""
    target, steps = 0.0, []
    for g1, g2 in sequence:
        steps.append(gradvac(g1, g2, target))
        if g1.any() and g2.any() and np.isfinite(g1 + g2).all():
            target = decay * target + (1 - decay) * (_unit(g1) @ _unit(g2))
    return steps
