"""Predictions against derivatives by complex steps, the toy's known numbers, verdicts that can fail, the study as run."""

import csv
import dataclasses

import numpy as np
import pytest

from experiments import theory
from experiments.reports import theory_claims
from experiments.theorems import theory_points, theory_rows
from experiments.theorems.theory_predictions import predict
from experiments.theorems.theory_setups import Point, problem

# each kind of prediction; the coefficients that weigh the two gradients are 1 and 1 but in the last
CASES = {
    "uniform": Point("uniform", seed=3, vocabulary=9, width=3, tokens=5),
    "one token": Point("last_token", seed=1, vocabulary=7, width=3, prefix=0, scale=3.0, position=0),
    "last token": Point("last_token", seed=2, vocabulary=7, width=3, prefix=3, scale=2.0, overlap=0.9, position=3),
    "repeated": Point(
        "last_token", seed=4, vocabulary=7, width=3, prefix=3, scale=0.0, overlap=0.5, repeats=2, position=3
    ),
    "toy": Point("suffix", suffix=3, position=4),
    "less likely": Point("suffix", suffix=2, gap=-2.0, position=1),
    "random": Point("random", seed=5, prefix=1, suffix=2, spread=1.0, position=2),
    "differs": Point("random", seed=6, prefix=1, suffix=2, spread=1.0, position=1),
    "unequal": Point("random", seed=7, prefix=1, suffix=2, spread=1.0, position=2),
}
WEIGHTS = {"unequal": (0.4, 1.0)}


def scores(made, params, places=slice(None)):
    """Log-probabilities of both responses, or of some of their positions, written out token by token."""
    found = []
    for side in (0, 1):
        total = 0.0
        for i in range(made.pair.tokens.shape[1])[places]:
            if hasattr(made.pair, "hidden"):
                logits = sum(made.pair.hidden[side, i, d] * params[d] for d in range(len(params)))
            else:
                logits = params[i] + made.pair.offsets[side, i]
            total = total + logits[made.pair.tokens[side, i]] - np.log(np.exp(logits).sum())
        found.append(total)
    return np.array(found)


def gradients(made, places=slice(None)):
    """Of both scores, ``[2, P]``, by complex steps: exact to rounding, without a derivative written down."""
    found = []
    for i in range(made.params.size):
        params = made.params.astype(complex)
        params.flat[i] += 1e-30j
        found.append(scores(made, params, places).imag / 1e-30)
    return np.stack(found, 1)


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_what_derivatives_give(name):
    point, (x, y) = CASES[name], WEIGHTS.get(name, (1.0, 1.0))
    made = problem(point)
    found = predict(point, made, (x, y))
    g_w, g_l = gradients(made)
    step = x * g_w - y * g_l
    expected = {"chosen": g_w @ step, "rejected": g_l @ step}
    if "inner_product" in found:
        expected |= {"chosen_sq_norm": g_w @ g_w, "rejected_sq_norm": g_l @ g_l, "inner_product": g_w @ g_l}
        expected["cosine"] = g_w @ g_l / np.sqrt((g_w @ g_w) * (g_l @ g_l))
    if "needed_ratio" in found:
        expected |= {"needed_ratio": g_w @ g_l / (g_w @ g_w), "allowed_ratio": g_l @ g_l / (g_w @ g_l)}
    if point.position >= 0:
        h_w, h_l = gradients(made, slice(point.position, point.position + 1))
        # Theorem 3's table is that of DPO, whatever the coefficients; the corollary's last token moves by the whole step
        expected |= {"position_chosen": h_w @ (g_w - g_l), "position_rejected": h_l @ (g_w - g_l)}
        if "position_inner_product" in found:
            expected["position_inner_product"] = h_w @ h_l
    # second order: half the second derivative along the step, by central differences
    size, along = 1e-3, step.reshape(made.params.shape)
    beyond = [scores(made, made.params + sign * size * along) - scores(made, made.params) for sign in (1, -1)]
    second = (beyond[0] + beyond[1]) / 2 / size**2
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-10, atol=1e-12, err_msg=key)
    np.testing.assert_allclose([found["second_chosen"], found["second_rejected"]], second, rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = dataclasses.replace(
        theory.presets()["smoke"],
        out=tmp_path_factory.mktemp("theory") / "out",
        suffix=16,
        objectives=("dpo", "dpop,penalty=0.25", "cpo,nll_weight=0.02", "slic_hf,nll_weight=0"),
    )
    return settings, theory.run(settings)


@pytest.fixture(scope="module")
def rows(finished):
    return theory_rows.read(finished[0].out)


# Computed by hand and in NumPy before any of this was written: s^w[y] = e^2 / (e^2 + 7) = .5135, s^l[y] = e / (e + 7) =
# .2797, so that a suffix token adds -.1300 and -.1925; at the differing position s[y_w] = s[y_l].
TOY = {
    0: (1.00, -1.00, 0.05),
    1: (0.87, -1.19, 0.31),
    2: (0.74, -1.39, 0.45),
    4: (0.48, -1.77, 0.61),
    8: (-0.04, -2.54, 0.75),
    16: (-1.08, -4.08, 0.86),
}


def test_the_toys_numbers(rows):
    part = {row["suffix"]: row for row in theory_points.toy(rows)}
    for suffix, expected in TOY.items():
        found = [part[suffix][name] for name in ("realised_chosen", "realised_rejected", "cosine")]
        np.testing.assert_allclose(found, expected, atol=0.0051)  # two decimals, and 1e-6 C of second order


def test_the_longer_gradient_of_the_suffix_is_k_times_the_other(rows):
    # k = (1 - .2797) / (1 - .5135); needed and allowed ratio of d_w and d_l go to it from both sides
    part = theory_points.toy(rows)
    assert part[-1]["theory_limit_ratio"] == pytest.approx((7 / (np.e + 7)) / (7 / (np.e**2 + 7)), rel=1e-12)
    low, high = (theory_rows.column(part, f"theory_{name}_ratio") for name in ("needed", "allowed"))
    assert (np.diff(low) > 0).all() and (np.diff(high) < 0).all()
    assert low[-1] < part[-1]["theory_limit_ratio"] < high[-1]


def test_measured_rows_are_what_derivatives_give(rows):
    for fields in (
        {"setup": "uniform", "vocabulary": 16, "tokens": 8, "seed": 1},
        {"setup": "last_token", "vocabulary": 16, "scale": 2.0, "prefix": 4, "overlap": 0.9, "position": 4, "seed": 2},
        {"setup": "random", "prefix": 1, "suffix": 3, "spread": 2.0, "position": 2, "seed": 3},
    ):
        (row,) = theory_rows.pick(rows, **fields)
        made = problem(Point(**fields))
        g_w, g_l = gradients(made)
        expected = [g_w @ g_w, g_l @ g_l, g_w @ g_l, g_w @ (g_w - g_l), g_l @ (g_w - g_l)]
        names = ("chosen_sq_norm", "rejected_sq_norm", "inner_product", "first_order_chosen", "first_order_rejected")
        np.testing.assert_allclose([row[name] for name in names], expected, rtol=1e-10, atol=1e-12)
        # the step that was made, in NumPy: DPO's coefficient times the rate is C
        moved = scores(made, made.params + row["step"] * (g_w - g_l).reshape(made.params.shape)) - scores(
            made, made.params
        )
        np.testing.assert_allclose([row["realised_chosen"], row["realised_rejected"]], moved / row["step"], atol=1e-8)


def test_coefficients_are_those_of_the_objectives(rows):
    found = {name: theory_points.with_objective(rows, name)[5] for name in theory_rows.values(rows, "objective")}
    assert found["dpo"]["d_w"] == found["dpo"]["d_l"] == pytest.approx(0.1 / (1 + np.exp(-0.01)), rel=1e-12)
    # the chosen response has fallen by 0.1 nats: the penalty is on, inside of the sigmoid and on d_w
    assert found["dpop,penalty=0.25"]["d_w"] == pytest.approx(1.25 * found["dpop,penalty=0.25"]["d_l"], rel=1e-12)
    assert found["cpo,nll_weight=0.02"]["d_w"] == pytest.approx(found["cpo,nll_weight=0.02"]["d_l"] + 0.02, rel=1e-12)


def test_a_pair_without_coefficients_stays_put(rows):
    # log pi_w - log pi_l is .61 a suffix token: from two on the hinge of one nat is off, and there is no likelihood term
    on, *off = theory_points.with_objective(rows, "slic_hf,nll_weight=0")[1:]
    assert (on["d_w"], on["d_l"]) == (1.0, 1.0)
    for row in off:
        assert (row["d_w"], row["d_l"], row["case"]) == (0.0, 0.0, 4.0)
        assert [row[f"{kind}_{side}"] for kind in ("realised", "theory") for side in ("chosen", "rejected")] == [
            0.0
        ] * 4


def test_all_that_follows_is_shown_and_what_does_not_is_not(rows):
    for verdict in theory_claims.judged(rows):
        follows = "taken further" not in verdict.where
        assert verdict.verdict.startswith("shown") == follows, verdict


@pytest.mark.parametrize(
    ("column", "claim"),
    [
        ("theory_cosine", "M tokens share"),
        ("theory_inner_product", "M tokens share"),
        ("realised_rejected", "the same: the ideal case"),
        ("theory_chosen", "single tokens, any softmax"),
        ("realised_chosen", "the same: ideal under a step of any size"),
        ("position_realised_chosen", "responses equal but for their last token"),
        ("theory_rejected", "the whole responses, any head: both move"),
        ("theory_position_inner_product", "the table's row before"),
        ("theory_position_chosen", "the table's row at"),
        ("theory_position_rejected", "the table's row after"),
        ("position_realised_rejected", "the suffix token is likelier in the chosen context, and no other"),
        ("theory_chosen", "the toy: cosine and both changes"),
        ("theory_crossing", "suffix token likelier"),
        ("theory_crossing", "suffix token less likely"),
        ("theory_rejected", "unequal coefficients"),
        ("theory_chosen", "the error of first order"),
        ("theory_second_chosen", "the error of first and second order"),
        ("theory_second_rejected", "the error of first and second order"),
    ],
)
def test_a_wrong_number_is_not_shown(rows, column, claim):
    def wrong(row):  # by its sign, and by enough where it is zero
        return row | ({column: -row[column] - 0.01} if column in row else {})

    found = {v.claim: v.verdict for v in theory_claims.judged([wrong(row) for row in rows])}
    (verdict,) = (verdict for text, verdict in found.items() if text.startswith(claim))
    assert not verdict.startswith("shown")


def test_a_prediction_that_is_off_by_a_millionth_is_not_shown(rows):
    off = [row | {"theory_cosine": row.get("theory_cosine", 0.0) * (1 + 1e-6)} for row in rows]
    assert theory_claims.judged(off)[0].verdict == "not shown"


PAGES = ("report.md", "report.html")


def test_the_report_and_the_figures_say_what_was_measured(finished, rows):
    settings, files = finished
    names = ("cosine", "positions", "suffix", "crossing", "step_size", "objectives")
    assert files == [*(settings.out / "figures" / f"{name}.png" for name in names), *map(settings.out.joinpath, PAGES)]
    report = files[-2].read_text()
    assert "| 8 | -0.0400 | -0.0400 | -2.5398 | -2.5398 | +0.7542 | +0.7542 |" in report
    assert "| +1 | 1.481 | chosen falls | 7.69 | 8 | 8 |" in report
    assert "| `dpop,penalty=0.25` | 1.25 | 1.25 | never | never | never | never |" in report
    assert "theory.csv with every point" in report
    with (settings.out / "figures" / "suffix.csv").open() as file:
        plotted = [(float(line["suffix"]), float(line["realised_chosen"])) for line in csv.DictReader(file)]
    assert plotted == [(row["suffix"], row["realised_chosen"]) for row in theory_points.toy(rows)]


def test_again_measures_nothing_and_changes_nothing(finished, monkeypatch):
    settings, files = finished
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in settings.out.rglob("*") if p.is_file()}
    monkeypatch.setattr(theory, "measure_all", lambda points: pytest.fail("measured again"))
    assert theory.run(settings) == files
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in settings.out.rglob("*") if p.is_file()}
    # a file that is lost is made again, from what is on the disk
    files[-1].unlink()
    monkeypatch.setattr(theory.theory_figures, "draw", lambda out, rows: files[:-2])
    assert theory.run(settings) == files
    assert files[-1].read_bytes() == before[files[-1]][0]


def test_the_sweep_is_overrides_of_the_default_point():
    settings = theory.presets()["smoke"]
    points = [dataclasses.replace(theory.config(), **fields) for fields in theory.sweep(settings)]
    assert {point.setup for point in points} == {"uniform", "last_token", "suffix", "random"}
    assert {"suffix": 4, "gap": 1.0} in list(theory.sweep(settings))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "1"], "--tokens 1: a number from 2 to 1024 is needed"),
        (["--suffix", "-1"], "--suffix -1: a number from 0 to 256 is needed"),
        (["--seeds", "0"], "--seeds 0: a number from 1 to"),
        (["--prefixes", "4", "0"], "--prefixes 0: a number from 1 to"),
        (["--overlaps", "1.5"], "--overlaps 1.5: a cosine from 0 to 1 is needed"),
        (["--steps", "0"], "--steps 0: a size above"),
        (["--gaps", "nan"], "--gaps nan: a number of nats"),
        (["--fallen", "inf"], "--fallen inf: a number of nats"),
        (["--steps"], "--steps: name at least one"),
        (["--objectives", "dppo"], "unknown objective 'dppo' (did you mean dpo?)"),
        (["--objectives", "cpo,nll_weight"], "objective cpo,nll_weight: write it as"),
        (["--objectives", "cpo,nll_weight=-1"], "nll_weight"),
        (["--objectives", "kto"], "objective kto: it looks at other pairs"),
        (["--preset", "paper"], "unknown preset 'paper'"),
    ],
)
def test_bad_flags_end_in_one_line(words, message, fail, tmp_path):
    start = ["--preset", "smoke", "--out", str(tmp_path / "out")]
    assert message in fail([*start, *words], main=theory.main)
    assert not (tmp_path / "out").exists()


def test_another_folder_is_refused_whole(finished, fail, tmp_path):
    out = finished[0].out
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    error = fail(["--preset", "smoke", "--seeds", "2", "--out", str(out)], main=theory.main)
    assert f"{out} holds a run of another configuration: seeds is 4 there and 2 here" in error
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in fail(["--out", str(tmp_path)], main=theory.main)
