"""report.md of the theory: verdicts, tables and figures from the measured points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.reports import preference_report
from experiments.reports.theory_claims import EXACT, REALISED, SLOPE, SMALL, judged
from experiments.reports.theory_figures import NAMES
from experiments.theorems.theory_points import (
    first,
    last_token,
    measured_first,
    objectives,
    predicted_first,
    ratio,
    repeated,
    toy,
    uniform,
    with_objective,
)
from experiments.theorems.theory_rows import Row, column, pick, values

SHOWN = (0, 1, 2, 4, 8, 16, 32, 64)
"""Suffix lengths of the table."""
HEAD = """# The theory: Theorem 1, its corollary and Theorem 3 against measurement

Every point is one pair on one of the paper's two model set-ups (arXiv 2410.13828, section 4). Set-up 1: hidden states h_i are
fixed, the head is trained. Set-up 2: the logits of every position are trained, the contexts are equal up to the differing
position m. Predictions are closed forms of next-token probabilities s; measured are the geometry and the coefficients of this
package, and what one plain gradient step of DPO changes. Changes are in units of the step C, learning rate times coefficient
(eta beta c of DPO): times C they are nats."""
TOLERANCES = f"""Products and first-order changes: relative error below {EXACT:g}, in float64. Realised changes, at C = 1e-6:
within {REALISED:g} C. Slopes: within {SLOPE:g} of the order, read from steps of {SMALL[0]:g} to {SMALL[1]:g}. What is "taken
further" does not follow from the derivation, and is judged all the same."""
COROLLARY = """Both responses share the prefix, so that g_w - g_l has the last position's part alone: its logits move by
C |h_m|^2 (e_w - e_l), and the chosen token gains at every size of the step. The prefix need not stay put, since it shares the
head: to first order both responses gain sum_i <h_i, h_m> ([y_i = w] - [y_i = l] - s_i[w] + s_i[l]) over its positions. That is
0 where the model there does not tell the two tokens apart and neither occurs. Drawn heads of scale 2, and the uniform model;
shares of pairs whose whole response moves so under a small step:"""
TOY = """V = 8; two prefix tokens and the suffix tokens have logit 2, at the differing position both contrast tokens have logit
3, all other logits are 0; in the rejected context the suffix token's logit is 1 lower. Realised changes:"""
PARALLEL = """Contexts that differ in the suffix token's logit alone have parallel gradients there, g_l = k g_w with
k = (1 - s^l[y]) / (1 - s^w[y]): a suffix token adds -(k - 1) |g_w|^2 to the chosen change, k times that to the rejected one.
So the cosine goes to 1, and the chosen change passes through 0 at (1 - s[y_w] + s[y_l]) / ((k - 1) |g_w|^2) suffix tokens, g_w
that of one of them. With the token less likely in the chosen context k is below 1, both terms are positive, and it is the
rejected one that begins to rise."""
CONDITION_2 = """The chosen one rises where d_w / d_l is above <g_w, g_l> / |g_w|^2, the rejected one falls where it is below
|g_l|^2 / <g_w, g_l>. In the toy both bounds go to k with the length of the suffix: a larger ratio keeps the chosen one up and
takes the rejected one with it."""


def write(out: Path, rows: Sequence[Row]) -> Path:
    """Write ``report.md``.

    Args:
      out: the study's folder, with ``environment.json`` and the figures.
      rows: of its table.

    Returns:
      The file.
    """
    parts = [
        HEAD,
        _claims(rows),
        _theorem_1(rows),
        _corollary(rows),
        _toy(rows),
        _crossings(rows),
        _objectives(rows),
        "\n\n".join(["## Figures", *(f"![{name}](figures/{name}.png)" for name in NAMES)]),
        preference_report.provenance(out, "theory.csv with every point"),
    ]
    file = out / "report.md"
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def _section(title: str, text: str, head: Sequence[str], lines: Iterable[Sequence[str]], after: str = "") -> str:
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(x) + " |" for x in lines)]
    return "\n".join([f"## {title}", "", text, "", *table, *(["", after] if after else [])])


def _claims(rows: Sequence[Row]) -> str:
    lines = [[v.claim.replace("|", "\\|"), v.where, v.verdict, v.numbers] for v in judged(rows)]
    return _section("Claims", TOLERANCES, ["claim", "where", "this run", "numbers"], lines)


def _theorem_1(rows: Sequence[Row]) -> str:
    lines = []
    for tokens in values(uniform(rows), "tokens"):
        part, narrow = ([r for r in uniform(rows, bits) if r["tokens"] == tokens] for bits in (64, 32))
        errors = [np.abs(column(p, "cosine") / column(p, "theory_cosine") - 1).max() for p in (part, narrow)]
        ideal = (column(part, "case") == 0).mean()
        cells = (part[0]["theory_cosine"], column(part, "cosine").mean())
        lines.append([f"{tokens:g}", *(f"{x:+.6f}" for x in cells), *(f"{x:.0e}" for x in errors), f"{ideal:.0%}"])
    head = ["M", "predicted cosine", "measured, mean", "relative error, float64", "float32", "ideal case"]
    return _section("Theorem 1", "M tokens share all the probability; hidden states are drawn.", head, lines)


def _corollary(rows: Sequence[Row]) -> str:
    lines = []
    for scale, name in ((0.0, "uniform"), (2.0, "drawn")):
        keys = dict.fromkeys((row["prefix"], row["overlap"]) for row in last_token(rows, scale))
        for prefix, overlap in sorted(keys):
            some = [r for r in last_token(rows, scale) if (r["prefix"], r["overlap"]) == (prefix, overlap)]
            lines.append([name, f"{prefix:g}", "0", f"{overlap:g}", *_moves(some)])
    for count in values(repeated(rows), "repeats"):
        some = [row for row in repeated(rows) if row["repeats"] == count]
        lines.append(["uniform", f"{some[0]['prefix']:g}", f"{count:g}", f"{some[0]['overlap']:g}", *_moves(some)])
    head = ["model", "prefix tokens", "of them the rejected token", "cosine of hidden states", "chosen rises"]
    return _section("The corollary", COROLLARY, [*head, "rejected falls"], lines, _large_steps(rows))


def _moves(rows: Sequence[Row]) -> tuple[str, str]:
    chosen, rejected = (column(rows, f"realised_{side}") for side in ("chosen", "rejected"))
    return f"{(chosen > 0).mean():.0%}", f"{(rejected < 0).mean():.0%}"


def _large_steps(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["setup"] == "last_token" and row["position"] >= 0 and row["scale"] == 0]
    found = [row for row in found if row["step"] > 1e-5]
    shares = {
        step: (column([r for r in found if r["step"] == step], "realised_chosen") > 0).mean()
        for step in values(found, "step")
    }
    smaller = [step for step, share in shares.items() if share < 1]
    listed = [f"{shares[step]:.0%} at C = {step:g}" for step in smaller] or [f"all up to C = {max(shares):g}"]
    return (
        "That the uniform model's whole response is ideal holds to first order only, unlike what the last token does: with "
        f"{found[0]['prefix']:g} prefix tokens and cosine {found[0]['overlap']:g} the chosen one rises in {', '.join(listed)}."
    )


def _toy(rows: Sequence[Row]) -> str:
    lines = []
    for row in toy(rows):
        if row["suffix"] in SHOWN or row is toy(rows)[-1]:
            names = (
                "realised_chosen",
                "theory_chosen",
                "realised_rejected",
                "theory_rejected",
                "cosine",
                "theory_cosine",
            )
            lines.append([f"{row['suffix']:g}", *(f"{row[name]:+.4f}" for name in names)])
    head = ["suffix", "chosen", "predicted", "rejected", "predicted", "cosine", "predicted"]
    return _section("Theorem 3: the toy", TOY, head, lines)


def _crossings(rows: Sequence[Row]) -> str:
    lines = []
    for gap in values(pick(rows, "suffix", "gap"), "gap"):
        part = toy(rows, gap)
        if len(part) < 2:
            continue
        last, none = part[-1], f"not up to {part[-1]['suffix']:g}"
        found = [none if n is None else f"{n}" for n in (predicted_first(part), measured_first(part))]
        what = "chosen falls" if gap > 0 else "rejected rises" if gap < 0 else "neither"
        lines.append([f"{gap:+g}", f"{last['theory_limit_ratio']:.3f}", what, f"{last['theory_crossing']:.2f}", *found])
    head = ["gap, nats", "k", "what happens", "beyond so many tokens", "first length, predicted", "measured"]
    text = "The gap is how much higher the suffix token's logit is in the chosen context.\n\n" + PARALLEL
    return _section("Theorem 3: the length at which both move together", text, head, lines)


def _objectives(rows: Sequence[Row]) -> str:
    lines = []
    names = dict.fromkeys(row["objective"] for row in objectives(rows))
    for name in names:
        part = with_objective(rows, name)
        none, found = "never", []
        for side, sign in (("chosen", -1), ("rejected", 1)):
            for kind in ("theory", "realised"):
                n = first(sign * column(part, f"{kind}_{side}") > 0, part)
                found.append(none if n is None else f"{n}")
        ends = ratio(part)[[0, -1]]
        lines.append([f"`{name}`", *(f"{end:.2f}" for end in ends), *found])
    part = with_objective(rows, next(iter(names)))
    bounds = [f"{part[-1][f'theory_{kind}_ratio']:.3f}" for kind in ("needed", "allowed")]
    text = (
        f"{CONDITION_2} At {part[-1]['suffix']:g} suffix tokens the bounds are {bounds[0]} and {bounds[1]}. The chosen "
        f"log-probability is {part[0]['fallen']:g} nats below the reference's, the rejected one at it. The first suffix "
        'length from which on it holds; "never" is up to the longest:'
    )
    head = ["objective", "d_w / d_l without a suffix", "with the longest"]
    head += ["chosen falls from, predicted", "realised", "rejected rises from, predicted", "realised"]
    return _section("Beyond the paper: unequal coefficients in the toy", text, head, lines)
