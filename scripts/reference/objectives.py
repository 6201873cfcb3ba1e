"""Writes ``entangle/losses/README.md`` from the code: ``python -m scripts.reference.objectives`` (``--check`` compares)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from entangle import losses
from entangle.losses.hyperparameters import ranges
from scripts.reference.formulas import Formulas, parse
from scripts.reference.page import ROOT, flowing, paragraphs, source, write_or_check

PAGE = ROOT / "entangle" / "losses" / "README.md"

USE = """
Ranges of hyperparameters are checked where objectives are looked up by name (`losses.get_objective`, command lines), not at
every call. An objective that sees "the whole batch" is a `losses.BatchObjective`; one that sees "all batches so far" a
`losses.RunningObjective`: `memory = objective.init()`, at every step `memory = objective.update(memory, lp)`, then the losses
of `objective.given(memory)`; called like any other it is at its first step, which is also what its formulas say.
"""

HEAD = """\
# Objectives

This page is made from the code by `python -m scripts.reference.objectives`; a test holds the two equal, evaluates every
formula below in plain NumPy, and compares it with the code and its automatic derivatives.

```python
from entangle import losses
from entangle.types import PairLogProbs

lp = PairLogProbs(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length)  # each [B]
loss = losses.dpo(lp, beta=0.1)  # [B]
d_w, d_l = losses.coefficients(losses.dpo, lp, beta=0.1)  # [B], [B]
```

## Notation

`l_w`, `l_l`: summed completion log-probability of the chosen and the rejected response under the policy, in nats; `ref_w`,
`ref_l`: under the reference. `r_w = l_w - ref_w`, `r_l = l_l - ref_l`, `h = r_w - r_l`. `len_w`, `len_l`: completion
tokens; `n_w`, `n_l`: the same, but an empty completion counts as one. `lbar_w = l_w / n_w`, `lbar_l = l_l / n_l`. `s(x)` is
the sigmoid, `1[...]` is 1 where the condition holds and else 0. `mean`, `std` (over B - 1), `sort` (ascending) and `rank` (of
each in the ascending order) are taken over the B pairs of the global batch. `L` is the loss of a pair; the mean over pairs is
taken in the training step. `d_w = -dL/dl_w` and `d_l = dL/dl_l`, so that the gradient is `-(d_w grad l_w - d_l grad l_l)`.

Condition 2 for coefficients of any sign, with `a = |grad l_w|^2`, `b = |grad l_l|^2` and `e = <grad l_w, grad l_l>`: the
chosen response rises where `d_w a > d_l e`, the rejected one falls where `d_l b > d_w e`. For `d_w, d_l > 0` that is
`e < (d_w / d_l) a` and `e < (d_l / d_w) b`, and for `d_w = d_l > 0` it is Condition 1, `e < min(a, b)`; where equal ones
are negative, it is Condition 1 of the exchanged pair. The column below says what `d_w / d_l` is; where it is "-" there is no
shorter form than the two coefficients. At kinks the derivative is the one that the formulas give: a hinge that is met and a
penalty that is not yet due have derivative 0.
"""

LEFT_OUT = """\
## Left out, and why

- TPO (arXiv 2405.16681) needs a third response a prompt.
- BCO's match of prompt distributions needs a trained classifier; `prompt_match_weights` turns its output into weights.
- beta-DPO's selection of pairs draws lots inside the loss; the dynamic beta is here.
- SPPO with soft probabilities and ODPO's scores need a reward model; `margin_dpo` takes margins from anywhere.
- TR-DPO (arXiv 2404.09656) is DPO against a reference that follows the policy: `training.moving_reference`.
- The normalised gradient (arXiv 2410.13828, `transforms.normalized`) and reward calibration (arXiv 2604.18239,
  `transforms.reward_calibrated`) change gradients or coefficients, not the loss: see `entangle/transforms`. The CHES score
  (arXiv 2410.08847) ranks data.
"""


def main() -> None:
    """Write the page, or say that it differs (status 1)."""
    write_or_check(PAGE, render(), "scripts.reference.objectives")


def render() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD + USE,
            "## Objectives of pairs\n",
            *_overview(losses.OBJECTIVES),
            "",
            *_sections(losses.OBJECTIVES),
            "## Objectives of tokens\n",
            "They take `PairTokenLogProbs` of fields `[B, 2, T]`, and give a coefficient a token:",
            "`losses.row_loss_and_coefficients`. All need a reference.\n",
            *_sections(losses.TOKEN_OBJECTIVES | {"masked_dpo": losses.masked_dpo}),
            "## Objectives of single responses\n",
            "They take `UnpairedLogProbs` of fields `[N]`; `d` is the one coefficient of a response.\n",
            *_sections({f.__name__: f for f in (losses.kto_unpaired, losses.apo_zero_unpaired, losses.bco_unpaired)}),
            LEFT_OUT,
        ]
    )


def _overview(table: Mapping[str, Callable[..., Any]]) -> Iterator[str]:
    yield "| name | defaults | reference | sees | Condition 2: d_w / d_l | d_w, d_l | source |"
    yield "|---|---|---|---|---|---|---|"
    for name, objective in table.items():
        found = parse(objective)
        cells = [
            f"[`{name}`](#{name})",
            ", ".join(f"{p} {default}" for p, default, _ in _hyperparameters(objective)) or "none",
            "needed" if found.needs_reference else "free",
            _sees(objective),
            _ratio(found),
            _signs(found),
            found.source.rstrip("."),
        ]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sees(objective: Callable[..., Any]) -> str:
    if isinstance(objective, losses.RunningObjective):
        return "all batches so far"
    return "the whole batch" if isinstance(objective, losses.BatchObjective) else "its pair"


def _ratio(found: Formulas) -> str:
    if found.ratio is None:
        return "-"
    return "1 (Condition 1)" if found.ratio == "1" else f"`{found.ratio}`"


def _signs(found: Formulas) -> str:
    if not found.negative:
        return "never negative"
    return f"{', '.join(found.negative)} may be negative"


def _hyperparameters(objective: Callable[..., Any]) -> list[tuple[str, str, str]]:
    within = ranges(objective)
    parameters = list(inspect.signature(objective).parameters.values())[1:]
    return [
        (p.name, "" if p.default is inspect.Parameter.empty else f"{p.default:g}", str(within.get(p.name, "")))
        for p in parameters
    ]


def _sections(table: Mapping[str, Callable[..., Any]]) -> Iterator[str]:
    for name, objective in table.items():
        doc = inspect.cleandoc(objective.__doc__ or "")
        yield f"### {name}\n"
        for paragraph in _prose(doc):
            yield f"{paragraph}\n"
        found = [
            f"`{p}`" + (f" = {default}" if default else "") + (f" in {within}" if within else "")
            for p, default, within in _hyperparameters(objective)
        ]
        yield f"Hyperparameters: {', '.join(found) or 'none'}. Source: {source(doc)}\n"


def _prose(doc: str) -> Iterator[str]:
    """Summary, formulas and remarks: all that stands before the section of arguments."""
    for paragraph in paragraphs(doc):
        if paragraph.startswith("Formulas:"):
            block = inspect.cleandoc(paragraph.removeprefix("Formulas:"))
            yield f"```text\n{block}\n```"
        else:
            yield flowing(paragraph)


if __name__ == "__main__":
    main()
