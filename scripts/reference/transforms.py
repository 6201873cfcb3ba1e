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
import optax
from entangle import transforms
from entangle.types import PairGradients

tx = optax.chain(
    transforms.combine_pair(transforms.pcgrad()),  # PairGradients in, one gradient tree out: first in the chain
    optax.clip_by_global_norm(1.0),
    optax.adamw(5e-6),
)
# mean(d_w grad log pi_w) and mean(d_l grad log pi_l): trees like the parameters
gradients = PairGradients(chosen, rejected)
updates, state = tx.update(gradients, state, params)
```

The two gradients come from `geometry.pair_vjp` (one forward and backward of chosen and rejected rows side by side), from
`geometry.vjp_with_geometry(..., apart=True)` (with the geometry of every pair), or from two `jax.grad` of your own; with
`margin()` the chain is exactly the ordinary gradient step on the mean loss `rejected - chosen`.

## Which one?

- To see first: `margin()`; `transforms.combined(state)` reads the Gram and the weights of every step from the chain's state.
- The paper's remedy: `normalize_coefficients` pair by pair, or `normalized()` for the two batch means. Their steps do not
  vanish with the loss; `scale_preserving()` has the same direction at the loss's own scale.
- As little intervention as possible: `band()`, which leaves the ideal case alone.
- Only the chosen side must not fall: `one_sided()`; whatever the optimizer makes of it: `protect_chosen(chain)`.
- Forget one set and keep another: `project_retain()`, `retain_invariant(chain)`.
- Several attributes, groups of pairs or losses: `combine_groups`.

## Weightings

x and y of the step `x chosen - y rejected`, in `n1 = |chosen|`, `n2 = |rejected|` and the cosine `k` of `chosen` and
`-rejected` (`k < 0` is conflict, that is `<chosen, rejected> > 0`); in `cagrad` `g0` is the length of the mean, `gt` that of
`t chosen - (1 - t) rejected`, and t minimises the dual. "keeps" is what holds at every Gram, to first order, under a plain
gradient step with positive coefficients, at the default settings: C the chosen batch sum does not fall, R the rejected one
does not rise, M the weighted margin does not fall (the loss does not rise). A test finds a counterexample for every promise
that is not made. Degree 1: the step scales with the gradients; 0: it has a length of its own, so plain SGD needs another
learning rate. All but `one_sided` treat the two sides alike. Norms may be from 1e-18 to 1e18; a gradient that is not finite
gives NaN for both weights, but for `margin` and `fixed`.
"""

SCOPES = """\
## Scopes

| scope | how | what the promise is about |
|---|---|---|
| batch | `combine_pair(weighting)` | the two batch sums of log-probabilities, weighed by the coefficients |
| group | `combine_pair(weighting, group=lambda path: path.split("/")[0])` | each group's share of both sums, so the sums |
| layer | `combine_pair(weighting, stacked=lambda path: path.startswith("blocks"))` | the same for each layer of a stack |
| pair | `per_pair(weighting)` on the coefficients before the mean | every pair under a step on that pair alone |

`group` takes the path of a parameter as `jax.tree_util.keystr(path, simple=True, separator="/")` writes it;
`combine_pair({"body": pcgrad(), "head": margin()}, group=...)` has a weighting for every group. Every promise is one of first
order about a plain gradient step with positive coefficients. Adam's metric, momentum and weight decay can break it, other
pairs of the batch can break the one about pairs, and a step can be too long for first order. `protect_chosen` and
`retain_invariant` wrap the whole chain and keep theirs under any optimizer.

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
## Order in a chain

| with | where |
|---|---|
| `optax.clip_by_global_norm` | after `combine_pair` clips the step; before it both gradients together, by one factor |
| `optax.adamw`, `trace`, `add_decayed_weights`, `masked`, `multi_transform` | after `combine_pair` |
| `optax.MultiSteps` | after `combine_pair`: averages what is combined; `accumulate_pairs(chain, every)` averages before |
| `optax.inject_hyperparams` | around the whole chain; settings of weightings (c, target, inset, decay) may be injected |
| `optax.named_chain`, `apply_if_finite` | as usual: `combine_pair` first |

`chain_pair(...)` is `optax.chain` with errors that name the transform in the wrong place and the fix; `training.make_step`
says the same. `combined(state)` finds the heads' states inside of all of these.
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
