"""What a plan reads, refuses, searches and says; the compiler itself is in test_plan_compiled.py."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest

from entangle import models, sharding
from entangle.errors import MissingExtraError, UserError
from entangle.plan import command, report, search
from entangle.plan.chips import chips_of
from entangle.plan.compiled import Measured, _said_to_need
from entangle.plan.config import PlanConfig, from_experiment
from entangle.plan.hlo import Collective, Program
from entangle.plan.step import decoder, training_step
from experiments import preferences, scale

GIB = 2**30
TEXT = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%start.1 (p: bf16[2,8]) -> bf16[4,8] {
  %g.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}
%start.2 (p: bf16[2,8]) -> bf16[4,8] {
  %g.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}
%inner (q: s32[]) -> s32[] {
  %r = (f32[3]{0}, f32[5]{0}) all-reduce(%x, %y), channel_id=2, to_apply=%add
}
%inner_cond (q: s32[]) -> pred[] {
  %c4 = s32[]{:T(128)} constant(4)
  ROOT %lt.1 = pred[] compare(%q, %c4), direction=LT
}
%body (q: s32[]) -> s32[] {
  %f.1 = bf16[4,8] fusion(%q), kind=kCustom, calls=%start.1, backend_config={"window_config":{"estimated_cycles":"10"}}
  %f.2 = bf16[4,8] fusion(%q), kind=kCustom, calls=%start.2
  %w.1 = s32[] while(%q), condition=%inner_cond, body=%inner
}
%cond (q: s32[]) -> pred[] {
  %c3 = s32[]{:T(128)} constant(3)
  %other = s32[]{:T(128)} constant(9)
  ROOT %lt.2 = pred[] compare(%q, %c3), direction=LT
}
ENTRY %main (q: s32[]) -> s32[] {
  %w.2 = s32[] while(%q), condition=%cond, body=%body
  %p.1 = (f32[2,2]{1,0}, f32[2,2]{1,0}, u32[]) collective-permute-start(%z), channel_id=9
  %f.3 = f32[] fusion(%q), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"5"}}
  %f.4 = f32[] call(%q), to_apply=%add, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}
"""


def test_a_program_runs_its_loops_bodies_so_often():
    program = Program(TEXT)
    assert {name: program.times[name] for name in ("%main", "%body", "%start.1", "%inner")} == {
        "%main": 1,
        "%body": 3,
        "%start.1": 3,
        "%inner": 12,
    }
    assert program.cycles() == 3 * 10 + 5
    # one channel in two parts is one collective
    assert sorted(program.collectives()) == [
        Collective("all-gather", 64, 3),
        Collective("all-reduce", 32, 12),
        Collective("collective-permute", 16, 1),
    ]


LOOP = """HloModule jit_step
%body (p: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %p = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%i, %y, %w)
}
%cond (q: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}
ENTRY %main (a: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %a = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %r = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%a), condition=%cond, body=%body
}
"""


def test_operations_in_a_loop_count_as_often_as_it_runs():
    flops, size = Program(LOOP).costs()
    assert 5 * 2 * 4 * 8 * 8 <= flops < 5 * 2 * 4 * 8 * 8 + 10  # and the loop's own comparison
    assert size >= 5 * 4 * (4 * 8 + 8 * 8 + 4 * 8)


def test_what_the_compiler_says_it_needs_is_read():
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    said += "Used 20.50G of 15.75G hbm."
    assert _said_to_need(said) == int(20.5 * GIB)
    assert _said_to_need("RESOURCE_EXHAUSTED: other") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9:2x2"], "--topology v9:2x2: no TPU is called 'v9': choose from v4, v5e, v5p, v6e"),
        (["--topology", "v5e:2x2x2"], "a slice of v5e has 2 axes, as in v5e:4x4"),
        (["--topology", "v5p:8x8"], "a slice of v5p has 3 axes"),
        (["--topology", "h100:8"], "XLA's GPU compiler needs a GPU on this machine"),
        (["--model", "llama9"], "unknown model preset 'llama9'"),
        (
            ["--experiment", "experiments.scale"],
            "--model tiny: its vocabulary comes from the tokenizer; give --vocab-size",
        ),
        (["--lora", "huge"], "LoRA 'huge': choose from none, paper, attention, all"),
        (["--dtype", "float8"], "--dtype float8: choose from float32, bfloat16"),
        (["--max-length", "9000"], "--max-length 9000: llama3_8b has 8192 positions"),
        (["--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
        (["--experiment", "experiments.nothing"], "--experiment experiments.nothing: cannot be imported"),
        (["--experiment", "json"], "the module has neither config() nor presets()"),
        (["--experiment", "experiments.scale:nothing"], "the module has no function nothing"),
        (["--remat", "some"], "remat must be one of none, dots, full"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(flags)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a plan; nothing was written"):
        command.main(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="is a file; name a folder"):
        command.main(["--out", str(tmp_path / "notes.txt")])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "libtpu" else found(name))
    with pytest.raises(MissingExtraError, match=r'libtpu not installed: it comes with the extra "plan"'):
        command.main(["--topology", "v5e:4x4"])


def test_as_a_command_it_exits_with_status_2_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "entangle.plan", "--topology", "v9:2x2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology v9:2x2: no TPU") and done.stderr.count("\n") == 1


def test_an_experiments_configuration_gives_the_defaults():
    found, trial = from_experiment("experiments.scale"), scale.config()
    assert (found.batch_size, found.optimizer) == (trial.preference.batch_size, trial.preference.optimizer)
    assert (found.model, found.max_length, found.objective) == ("tiny", trial.max_length, "dpo")
    assert (found.frozen_dtype, found.compute_dtype) == ("float32", "float32")


def test_an_experiments_mesh_and_dtype_are_planned(monkeypatch):
    settings = dataclasses.replace(preferences.PreferencesConfig(), mesh="fsdp=4", dtype="bfloat16", lora="attention")
    monkeypatch.setattr(preferences, "config", lambda: settings, raising=False)
    found = from_experiment("experiments.preferences:config")
    assert (found.mesh, found.frozen_dtype, found.compute_dtype) == ("fsdp=4", "bfloat16", "bfloat16")


def test_a_checkpoint_has_its_own_vocabulary(tmp_path):
    config = models.preset("tiny", 32)
    models.save_pretrained(tmp_path / "a", config, models.language_model(config).init(jax.random.key(0)))
    with pytest.raises(UserError, match=r"--vocab-size 999: .* has its own"):
        decoder(PlanConfig(model=str(tmp_path / "a"), vocab_size=999))


@pytest.fixture
def standard_promotion():
    """optax's Adam mixes counters and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_planned_step_is_one_that_runs(standard_promotion):
    """The same function on arrays of one device, in place of shapes: its loss is finite and its state moves."""
    settings = PlanConfig(
        model="tiny",
        vocab_size=32,
        lora="attention",
        max_length=8,
        batch_size=2,
        dtype="float32",
        compute_dtype="float32",
    )
    settings = dataclasses.replace(settings, lora="none", frozen_dtype="float32")
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    step = training_step(settings, decoder(settings), mesh)
    frozen, state, examples = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), step.arguments)
    with jax.set_mesh(mesh):
        after, result = jax.jit(step.function, out_shardings=step.results)(frozen, state, examples)
    assert int(after.step) == 2 and result.losses.shape == (2,)
    assert jax.tree.structure(after) == jax.tree.structure(step.arguments[1])
    kinds = step.bytes_by_kind()
    assert kinds["trained parameters"] == 4 * decoder(settings).parameters
    assert kinds["optimizer state"] > 2 * kinds["trained parameters"] and kinds["frozen parameters"] == 0


def test_the_pairs_must_be_divisible_over_the_mesh():
    settings = PlanConfig(model="tiny", vocab_size=32, max_length=8, batch_size=3)
    mesh = sharding.make_mesh("data=2", jax.devices()[:1] * 2)
    with pytest.raises(UserError, match=r"--batch-size 3: cannot be divided over data=2 x fsdp=1 = 2 devices"):
        training_step(settings, decoder(settings), mesh)


def fake(monkeypatch, needed):
    """A compiler that needs so many bytes, by settings."""

    def measure(settings):
        size = needed(settings)
        return Measured(size <= 16 * GIB, {"all": size}, size)

    monkeypatch.setattr(search, "measure", measure)
    monkeypatch.setattr(search, "inputs_bytes", lambda settings: 0)


def test_the_first_setting_that_fits_ends_the_search(monkeypatch):
    fake(monkeypatch, lambda settings: settings.batch_size * GIB // 2)
    heard = []
    tries = search.try_until_fits(PlanConfig(remat="none", batch_size=128, topology="v5e:2x2"), heard.append)
    assert tries == heard
    assert [(one.change, one.fits) for one in tries] == [
        ({"remat": "full"}, False),
        ({"remat": "full", "batch_size": "64"}, False),
        ({"remat": "full", "batch_size": "32"}, True),
    ]


def test_a_generation_alone_finds_its_smallest_slice(monkeypatch):
    fake(monkeypatch, lambda settings: 96 * GIB // chips_of(settings.topology.split(":")[1]))
    found, tries = search.smallest_slice(PlanConfig(topology="v5e", batch_size=8), lambda one: None)
    assert found.topology == "v5e:2x4" and [one.fits for one in tries] == [False, True]
    fake(monkeypatch, lambda settings: 99 * GIB)
    with pytest.raises(UserError, match="fits on no slice that 8 pairs can be divided over"):
        search.smallest_slice(PlanConfig(topology="v5e", batch_size=8), lambda one: None)


def test_what_it_says_and_what_it_writes():
    gather = {"all-gather": {"times": 4, "bytes": 2 * GIB}}
    measured = Measured(True, {"frozen parameters": GIB}, 3 * GIB, gather, 1.97e14, 1e12, cycles=1_800_000_000)
    plain = Measured(True, {"frozen parameters": GIB}, 2 * GIB, {}, 1.9e14, 1e12, cycles=1_500_000_000)
    plan = report.Plan(PlanConfig(lora="paper"), measured, plain)
    assert (plan.seconds()["operations"], plan.seconds()["estimated"]) == (1.0, 1.2)
    said = "\n".join(report.lines(plan))
    assert "adapters 'paper' on a frozen base" in said and "held up by operations" in said
    assert re.search(r"operations +\+3.7%", said) and re.search(r"all-gather +\+4 times", said)
    again = json.loads(json.dumps(report.as_json(plan)))
    assert again["fits"] and again["step"]["collectives"] == gather and again["seconds"]["collectives"] > 0
    short = report.Plan(
        PlanConfig(), Measured(False, {"batch": 1}, 20 * GIB), tries=(search.Try({"lora": "all"}, None),)
    )
    said = "\n".join(report.lines(short))
    assert "DOES NOT FIT" in said and "--lora all: does not fit" in said
