"""Writes ``entangle/transforms/README.md`` from the code: ``python -m scripts.reference.transforms`` (or ``--check``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from entangle import transforms
from entangle.transforms import RunningWeighting
from scripts.reference.page import ROOT, flowing, paragraphs, source, write_or_check

PAGE = ROOT / "entangle" / "transforms" / "README.md"

HEAD = """\
# Pair transforms

Gradient surgery for preference pairs, as optax transforms. This page is made from the code by
`python -m scripts.reference.transforms`; a test holds the two equal and evaluates every formula of the table in plain NumPy.
Nothing but jax and optax is needed.

```python
import jax.numpy as jnp
import optax
from entangle import transforms
from entangle.types import PairGradients

params = {"w": jnp.zeros(2)}
# mean(d_w grad log pi_w) and mean(d_l grad log pi_l), trees like the parameters; here any two
gradients = PairGradients(chosen={"w": jnp.array([1.0, 0.0])}, rejected={"w": jnp.array([3.0, 1.0])})
tx = optax.chain(
    transforms.combine_pair(transforms.pcgrad()),  # PairGradients in, one gradient tree out: first in the chain
    optax.clip_by_global_norm(1.0),
    optax.adamw(5e-6),
)
updates, state = tx.update(gradients, tx.init(params), params)
```

The two gradients come from `geometry.pair_vjp` (one forward and backward of chosen and rejected rows side by side), from
`geometry.vjp_with_geometry(..., apart=True)` (with the geometry of every pair), or from two `jax.grad` of your own; with
`margin()` the chain is exactly the ordinary gradient step on the mean loss `rejected - chosen`.

## Which one?

- To see first: `margin()`, and what the head saw: see Logging below.
- The paper's remedy is `normalize_coefficients`, pair by pair (on command lines `pairwise_normalized`): its step still follows
  the loss's coefficients. `normalized()` does the same to the two batch means and `per_pair(normalized())` to every pair
  with the coefficients gone: their steps do not vanish with the loss. `scale_preserving()` has the direction of
  `normalized()` at the loss's own scale. A normalised rule's learning rate under SGD is its own, not the plain step's.
- As little intervention as possible: `band()`, which leaves the ideal case alone.
- Only the chosen side must not fall: `one_sided()`; whatever the optimizer makes of it: `protect_chosen(chain)`.
- Forget one set and keep another: `project_retain()` with plain gradient steps; `retain_invariant(chain)` with any optimizer.
- Several attributes, groups of pairs or losses: `combine_groups`.

## Weightings

x and y of the step `x chosen - y rejected`, in `n1 = |chosen|`, `n2 = |rejected|` and the cosine `k` of `chosen` and
`-rejected` (`k < 0` is conflict, that is `<chosen, rejected> > 0`); in `cagrad` `g0` is the length of the mean, `gt` that of
`t chosen - (1 - t) rejected`, and t minimises the dual. "keeps" is what holds at every Gram, to first order, under a plain
gradient step with positive coefficients, at the default settings: C the chosen batch sum does not fall, R the rejected one
does not rise, M the weighted margin does not fall (the loss does not rise). A test finds a counterexample for every promise
that is not made. Degree 1: the step scales with the gradients; 0: it has a length of its own, so plain SGD needs another
learning rate. All but `one_sided` treat the two sides alike. Norms may be from 1e-18 to 1e18; a gradient that is not finite
gives NaN for both weights, but for `margin` and `fixed`. Beside the two gradients nothing of their size is held; bfloat16 is
widened in passing.

**Batch sums.** The chosen batch sum is that of `d_w log pi_w` over the batch, the coefficients held as they are at this step:
its gradient is what `chosen` is. It is not the plain sum of `log pi_w`, in which pairs count in full that the loss has almost
done with: that one can fall where the promise is kept. Who wants a promise about it needs a `chosen` without coefficients.
"""

SCOPES = """\
## Scopes

| scope | how | what the promise is about |
|---|---|---|
| batch | `combine_pair(weighting)` | the two batch sums of log-probabilities, weighed by the coefficients |
| group | `combine_pair(weighting, group=lambda path: path.split("/")[0])` | each group's share of both sums, so the sums |
| layer | with a group, `stacked=lambda path: path.startswith("blocks")` | the same for each layer of a scan's stack |
| pair | `per_pair(weighting)` on the coefficients before the mean | every pair under a step on that pair alone |

`group` takes the path of a parameter as `jax.tree_util.keystr(path, simple=True, separator="/")` writes it;
`combine_pair({"body": pcgrad(), "head": margin()}, group=...)` has a weighting for every group. Every promise is one of first
order about a plain gradient step with positive coefficients. Adam's metric, momentum and weight decay can break it, other
pairs of the batch can break the one about pairs, and a step can be too long for first order: where a rule holds a change at
0 to first order, step after step, curvature moves it all the same. `protect_chosen` and `retain_invariant` wrap the whole
chain and keep their first-order promise under any optimizer; on command lines `--pair-chain protect_chosen`.

A weighting of your own is a function of the Gram, element by element (in pair scope its fields are `[B]`):

```python
def halved(gram):  # chosen_sq_norm, rejected_sq_norm, inner_product
    conflict = gram.inner_product > 0
    return jnp.ones_like(gram.inner_product), jnp.where(conflict, 0.5, 1.0)


tx = optax.chain(transforms.combine_pair(halved), optax.sgd(1e-3))
```

Pair scope needs every pair's norms before the mean, so the same forward is pulled back twice:

```python
log_probs, pull_back = geometry.vjp_with_geometry(log_prob_fn, params, batch, apart=True)
d = losses.coefficients(objective, lp)
mended = transforms.per_pair(transforms.pcgrad())(d, pull_back(*d)[1])
gradients, _ = pull_back(*mended)  # and margin() at the head of the chain
```

In training: `training.preference_gradients(..., pair_rule=...)`; on command lines `--pair-chain pairwise_pcgrad`.
"""

ORDER = """\
## Freezing

A promise is about the parameters whose gradients are in the Gram. Differentiate the trainable ones alone (close over the
rest), or name them: `where=lambda path: ...` in `combine_pair`, `project_retain`, `retain_invariant` and `protect_chosen`. A
`masked` or `multi_transform` that freezes parameters after a head that counts them breaks the promise, and a wrapper that
counts them moves what the chain inside has frozen.

## Logging

```python
seen = transforms.combined(state)[0]  # of every combine_pair in the chain, however deep
x, y = seen.weights
cosine = geometry.cosine(seen.gram)  # of chosen and rejected; k above is its negative
```

With groups these are dictionaries by name. `transforms.retained(state)` finds the states of `project_retain` and
`retain_invariant` in the same way, whose `removed` is the share of the step's squared length that the projection took;
`protect_chosen` has `state.removed` itself. `training.make_step` logs all of it (`retain/removed`, `protect/removed`).

## Two attributes

Rows for `combine_groups` are descent gradients, one a group; here each attribute has pairs of its own, and BideDPO's balance:

```python
def descent(gradients):  # PairGradients of one attribute's pairs; or combine_pair(...) of them, for a remedy in each
    return jax.tree.map(lambda w, l: l - w, gradients.chosen, gradients.rejected)


rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), descent(of_style), descent(of_content))
tx = optax.chain(transforms.combine_groups(transforms.adaptive_balance(), 2), optax.adamw(5e-6))
updates, state = tx.update(rows, state, params, group_losses=jnp.stack([style_loss, content_loss]))
```

## Order in a chain

| with | where |
|---|---|
| `optax.clip_by_global_norm` | after `combine_pair` clips the step; before it both gradients together, by one factor |
| `optax.adamw`, `trace`, `add_decayed_weights`, `masked`, `multi_transform` | after `combine_pair` |
| `optax.MultiSteps` | after `combine_pair`: averages what is combined; `accumulate_pairs(chain, every)` averages before |
| `accumulate_pairs` | around everything else, `protect_chosen` and `retain_invariant` included |
| `protect_chosen`, `retain_invariant` | around the whole chain, learning rate included; after them only `apply_if_finite` |
| `optax.inject_hyperparams` | around a function that makes the whole chain, see below |
| `optax.apply_if_finite` | after `combine_pair`, and after a wrapper, never around them |
| `optax.named_chain` | as `optax.chain` |

`chain_pair(...)` is `optax.chain` with errors that name the transform in the wrong place and the fix; `training.make_step`
says the same. Settings of weightings (c, target, inset, decay) follow schedules; inside `jit` what is injected is not checked
for its range:

```python
tx = optax.inject_hyperparams(
    lambda lr, c: optax.chain(transforms.combine_pair(transforms.cagrad(c)), optax.adamw(lr))
)(lr=5e-6, c=optax.linear_schedule(0.0, 0.5, 1000))
```
"""


def main() -> None:
    """Write the page, or say that it differs (status 1)."""
    write_or_check(PAGE, render(), "scripts.reference.transforms")


def render() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD,
            *_overview(),
            "",
            *_sections([entry.make for entry in transforms.WEIGHTINGS.values()], 3),
            SCOPES,
            *_sections([transforms.normalize_coefficients, transforms.per_pair], 3),
            "## Heads and wrappers\n",
            *_sections([transforms.combine_pair, transforms.project_retain], 3),
            *_sections([transforms.retain_invariant, transforms.protect_chosen, transforms.accumulate_pairs], 3),
            "## Groups of gradients\n",
            "Rows of leaves `[N, ...]` are the descent gradients of N groups of pairs, or of N losses.\n",
            *_sections([transforms.combine_groups, transforms.group_mean, transforms.soft_aggregation], 3),
            *_sections([transforms.projected_on_last, transforms.adaptive_balance], 3),
            "## Bridges to `optax.experimental.aggregating`\n",
            *_sections([transforms.stack_pair, transforms.unstack_pair], 3),
            *_sections([transforms.pair_aggregator, transforms.aggregate_pair], 3),
            ORDER,
        ]
    )


def _overview() -> Iterator[str]:
    yield "| name | settings | x | y | keeps | degree | remembers |"
    yield "|---|---|---|---|---|---|---|"
    for name, entry in transforms.WEIGHTINGS.items():
        kept = zip("CRM", entry.promises[:3], strict=True)
        cells = [
            f"[`{name}`](#{name})",
            ", ".join(f"{p.name} {p.default:g}" for p in inspect.signature(entry.make).parameters.values()) or "none",
            *(f"`{weight}`" if len(weight) < 60 else f"[below](#{name})" for weight in entry.weights),
            " ".join(letter for letter, keeps in kept if keeps) or "-",
            str(entry.promises.degree),
            "earlier steps" if isinstance(entry.make(), RunningWeighting) else "-",
        ]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sections(functions: Sequence[Callable[..., Any]], level: int) -> Iterator[str]:
    for function in functions:
        doc = function.__doc__ or ""
        yield f"{'#' * level} {function.__name__}\n"
        for paragraph in paragraphs(doc):
            if not paragraph.startswith("Example:"):
                yield f"{flowing(paragraph)}\n"
        entry = transforms.WEIGHTINGS.get(function.__name__)
        if entry is not None:
            yield "```text\nx = {}\ny = {}\n```\n".format(*entry.weights)
        if source(doc):
            yield f"Source: {flowing(source(doc))}\n"


if __name__ == "__main__":
    main()
