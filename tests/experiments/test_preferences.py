"""A preference file, from its lines to figures; and what a user can get wrong about it."""

import csv
import dataclasses
import json
import linecache
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from entangle import data, losses, models, sharding, training, transforms
from entangle.errors import UserError
from entangle.types import PairBatch
from experiments import preferences
from experiments.pairs import pair_data, pair_runs, placement, programs, references
from experiments.preferences import presets
from tests.training.processes import finish, start

WORDS = ("tea", "coffee", "milk", "water", "juice", "soda", "cocoa", "cider")


def line(number):
    prompt = f"guest {number // 2} asks for {WORDS[number % 8]}"
    return {"prompt": prompt, "chosen": f" {WORDS[number % 8]}, please", "rejected": f" no {WORDS[(number + 1) % 8]}"}


def write(path, numbers, *others):
    path.write_text("".join(f"{text}\n" for text in (*(json.dumps(line(n)) for n in numbers), *others)))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    tokenizer = data.train_bpe([" ".join(map(str, line(n).values())) for n in range(64)], 300)
    config = models.DecoderConfig(vocab_size=tokenizer.vocab_size, max_positions=64, width=8, layers=1, heads=2)
    models.save_pretrained(folder, config, models.language_model(config).init(jax.random.key(0)))
    tokenizer.save(folder)
    return folder


def settings(out, file, model, **changes):
    smoke = presets()["smoke"]
    stages = {
        name: dataclasses.replace(getattr(smoke, name), steps=3, batch_size=4, checkpoint_every=2, log_every=2)
        for name in ("sft", "preference")
    }
    stages["preference"] = dataclasses.replace(stages["preference"], eval_every=2)
    small = {
        "out": out,
        "data": str(file),
        "model": str(model),
        "max_length": 64,
        "held_out_pairs": 6,
        "probe_pairs": 4,
    }
    return dataclasses.replace(smoke, track=False, **stages, **(small | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("preferences")
    file = write(folder / "pairs.jsonl", range(64), "not JSON")
    asked = settings(folder / "out", file, checkpoint)
    return asked, preferences.run(asked)


def test_files_are_there_and_named(finished):
    asked, files = finished
    names = [str(f.relative_to(asked.out)) for f in files]
    assert names == [
        "figures/log_ratios.png",
        "figures/cosine.png",
        "figures/agreement.png",
        "report.md",
        "report.html",
        "preferences/seed0/huggingface",
    ]
    with (asked.out / "figures" / "log_ratios.csv").open() as file:
        rows = list(csv.DictReader(file))
    records = training.read_metrics(asked.out / "preferences" / "seed0" / "preference")
    for row in rows:
        found = [r for r in records if r["step"] == int(row["step"]) and "eval/log_ratio/chosen" in r]
        assert float(row["log_ratio_nats"]) == found[0][f"eval/log_ratio/{row['side']}"]


def test_what_was_trained_is_a_checkpoint_to_start_from(finished, tmp_path):
    """The last evaluation's log-probabilities are those of the folder's weights; its tokenizer is the checkpoint's."""
    asked, files = finished
    folder = asked.out / "preferences" / "seed0" / "huggingface"
    assert files[-1] == folder
    assert (folder / "tokenizer.json").read_bytes() == Path(asked.model, "tokenizer.json").read_bytes()
    again = dataclasses.replace(asked, model=str(folder), out=tmp_path / "next")
    found = preferences.gather(again)
    (tokens, mask, *_) = found.pairs.held_out
    scored = found.checkpoint.model.log_probs(found.checkpoint.params, PairBatch(tokens, mask))
    last = training.read_metrics(asked.out / "preferences" / "seed0" / "preference")[-1]
    assert last["eval/log_prob/chosen"] == pytest.approx(float(scored[:, 0].mean()), abs=1e-4)
    # killed while the tokenizer was copied, it is copied when the command is given again
    (folder / "tokenizer.json").unlink()
    assert preferences.run(asked)[-1] == folder and (folder / "tokenizer.json").is_file()


def test_the_report_says_what_became_of_the_lines(finished):
    report = (finished[0].out / "report.md").read_text()
    assert "pairs.jsonl: 64 of 65 lines read, 1 bad; pairs.jsonl:65: not JSON" in report
    assert "2410.13828" not in report  # the paper's claims are about its own experiment
    for name in ("log_ratios", "cosine", "agreement"):
        assert f"![{name}](figures/{name}.png)" in report


def test_no_prompt_is_on_both_sides(finished):
    asked, _ = finished
    pairs = preferences.gather(asked).pairs
    prompts = [{line(int(source.split(":")[1]) - 1)["prompt"] for source in split.sources} for split in pairs]
    assert prompts[1]
    assert not prompts[0] & prompts[1]


def test_a_held_out_file_takes_its_prompts_from_training(finished, tmp_path):
    asked, _ = finished
    test = write(tmp_path / "test.jsonl", range(0, 64, 8))
    found = preferences.gather(dataclasses.replace(asked, held_out=str(test)))
    assert "8 training pairs left out: their prompt is held out" in found.report["files"]
    few = preferences.gather(dataclasses.replace(asked, train_pairs=20))
    assert few.report["files"][-2:] == [
        "the first 20 of 56 train pairs are taken (--train-pairs)",
        "the first 6 of 8 held-out pairs are taken (--held-out-pairs)",
    ]
    assert {source.split(":")[0] for source in found.pairs.held_out.sources} == {"test.jsonl"}


@pytest.fixture(scope="module")
def without_sft(finished, tmp_path_factory):
    asked, _ = finished
    too_large = dataclasses.replace(asked.sft, batch_size=999)  # SFT is left out, so its batch size does not matter
    out = tmp_path_factory.mktemp("without_sft") / "out"
    asked = dataclasses.replace(asked, out=out, sft_first=False, sft=too_large, changes=False, probe_pairs=0)
    asked = dataclasses.replace(asked, objective="beta_dpo")  # one with a memory, which has to go through checkpoints
    return asked, preferences.run(asked)


def test_without_sft_the_checkpoint_itself_is_the_start(without_sft):
    asked, files = without_sft
    # and nothing is recorded of what the steps did, so nothing is drawn or said of it
    assert [file.name for file in files] == ["log_ratios.png", "cosine.png", "report.md", "report.html", "huggingface"]
    assert "What moved the rows" not in files[-3].read_text() and "nothing is checked" in files[-3].read_text()
    assert sorted(p.name for p in (asked.out / "preferences" / "seed0").iterdir()) == ["huggingface", "preference"]
    _, params = models.load_pretrained(asked.model, scan_layers=True)
    pairs = preferences.gather(asked).pairs
    model = preferences.gather(asked).checkpoint.model
    scored = model.log_probs(params, PairBatch(pairs.held_out.tokens, pairs.held_out.completion_mask))
    first = training.read_metrics(asked.out / "preferences" / "seed0" / "preference")[0]
    assert first["eval/log_prob/chosen"] == pytest.approx(float(scored[:, 0].mean()), abs=1e-4)
    assert "from the checkpoint itself" in (asked.out / "report.md").read_text()


def metrics(out, seed):
    records = training.read_metrics(out / "preferences" / f"seed{seed}" / "preference")
    assert records
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_reference_cache_serves_seeds_and_runs_and_changes_no_number(without_sft, tmp_path, monkeypatch, capsys):
    asked, _ = without_sft
    cached = dataclasses.replace(asked, out=tmp_path / "first", seeds=2, reference_cache=tmp_path / "cache")
    preferences.run(cached)
    file = tmp_path / "cache" / "preferences_eval_batch8.safetensors"
    said = [line for line in capsys.readouterr().out.splitlines() if "reference log-probabilities" in line]
    assert said == [f"reference log-probabilities {done} {file}" for done in ("computed and written to", "read from")]
    assert metrics(cached.out, 0) == metrics(asked.out, 0)
    before = file.read_bytes()

    def again(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(training, "score_pairs", again)
    preferences.run(dataclasses.replace(cached, out=tmp_path / "second"))
    for seed in (0, 1):  # the first run computed the numbers of seed 0 and read those of seed 1
        assert metrics(tmp_path / "second", seed) == metrics(cached.out, seed)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before
    # where pairs are scored, numbers are rounded as the eval batch says: another one has a file of its own
    with pytest.raises(AssertionError, match="computed again"):
        preferences.run(dataclasses.replace(cached, out=tmp_path / "third", eval_batch=1))


def scored(asked, seed):
    """Put a file of zeros, as of the checkpoint itself, where the experiment looks for a reference; return its path."""
    made = preferences.gather(dataclasses.replace(asked, reference_cache=None))
    both = made.pairs
    file = references.find(asked, made.checkpoint, preferences.PAIR_SET, both, seed)
    counts = {name: len(split.tokens) for name, split in both._asdict().items()}
    zeros = {name: np.zeros((count, 2), np.float32) for name, count in counts.items()}
    training.reference_log_probs(file.path, file.fingerprint, counts, lambda: zeros)
    return file.path


def test_a_stale_reference_cache_is_refused_by_name_before_anything_is_written(without_sft, checkpoint, tmp_path, fail):
    asked = dataclasses.replace(without_sft[0], reference_cache=tmp_path / "cache")
    path = scored(asked, None)
    before = path.read_bytes()
    config, params = models.load_pretrained(checkpoint)
    tokenizer = data.load_tokenizer(checkpoint)
    models.save_pretrained(tmp_path / "other", config, jax.tree.map(lambda leaf: 1.5 * leaf, params))
    tokenizer.save(tmp_path / "other")
    words = ["--preset", "smoke", "--no-track", "--no-sft-first", "--reference-cache", str(tmp_path / "cache")]
    words += ["--max-length", "64", "--held-out-pairs", "6", "--probe-pairs", "0", "--out", str(tmp_path / "out")]
    usual = ["--data", asked.data, "--model", asked.model]
    longer = write(tmp_path / "longer.jsonl", range(66))
    for changed, parts in (
        (["--model", str(tmp_path / "other")], ["model"]),
        (["--data", str(longer)], ["data"]),
        (["--max-length", "60"], ["length"]),
        (["--model", str(tmp_path / "other"), "--max-length", "60"], ["model", "length"]),
    ):
        error = fail([*words, *usual, *changed], main=preferences.main)
        assert error.startswith(f"error: {path}: stale reference log-probabilities: ")
        assert error.endswith("; name another path, or delete the file to have it computed anew")
        assert re.findall(r"(\w+) is \w+ there and \w+ here", error) == parts
        assert not (tmp_path / "out").exists()
    path.write_bytes(before[:-9])
    assert f"{path}: cannot be read as safetensors" in fail([*words, *usual], main=preferences.main)
    assert path.read_bytes() == before[:-9]
    assert not (tmp_path / "out").exists()
    blocked = fail([*words, *usual, "--reference-cache", asked.data], main=preferences.main)
    assert blocked.endswith(f"cannot be written: {asked.data} is a file")
    assert not (tmp_path / "out").exists()


def test_with_sft_first_every_seed_has_its_own_reference(finished, tmp_path, fail):
    asked = dataclasses.replace(
        finished[0], out=tmp_path / "out", reference_cache=tmp_path / "cache", max_length=60, probe_pairs=0
    )
    path = scored(asked, 0)
    assert path.name == "preferences_seed0_eval_batch8.safetensors"
    before = path.read_bytes()
    # it is known only after SFT that its model is not the one that the file is of, and nothing is trained on it
    with pytest.raises(UserError, match=r"seed0_eval_batch8\.safetensors: stale reference log-probabilities: model is"):
        preferences.run(asked)
    assert [p.name for p in (asked.out / "preferences" / "seed0").iterdir()] == ["sft"]
    assert path.read_bytes() == before
    # but what can be known is looked at first, for all seeds
    scored(dataclasses.replace(asked, max_length=64), 1)
    with pytest.raises(UserError, match=r"seed1_eval_batch8\.safetensors: stale .*: length is 64 there and 60 here"):
        preferences.run(dataclasses.replace(asked, seeds=2, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_pair_chains_wrapper_has_the_last_word_in_a_run():
    model = models.language_model(models.DecoderConfig(vocab_size=11, max_positions=9, width=8, layers=1, heads=2))
    chain = training.pair_chain("retain_invariant", memory=2)
    stage = presets()["smoke"].preference
    tx = programs.preference_program(model, stage, losses.dpo, chain, with_geometry=False, changes=False).program.tx
    state = jax.eval_shape(lambda: tx.init(model.init(jax.random.key(0))))
    assert isinstance(state, transforms.RetainInvariantState)


def test_geometry_does_not_depend_on_how_many_pairs_are_held_at_a_time(finished, tmp_path):
    asked, _ = finished
    again = dataclasses.replace(asked, out=tmp_path / "out", eval_batch=1)
    preferences.run(again)
    one, other = (training.read_metrics(s.out / "preferences" / "seed0" / "preference") for s in (asked, again))
    names = [name for name in one[1] if name.startswith("geometry/")]
    assert names
    for a, b in zip(one, other, strict=True):
        for name in names:
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)


def test_a_policy_that_is_its_own_reference_has_log_ratios_of_exactly_zero(finished):
    first = training.read_metrics(finished[0].out / "preferences" / "seed0" / "preference")[0]
    for split in ("eval", "eval_train"):
        assert [first[f"{split}/log_ratio/{side}"] for side in ("chosen", "rejected")] == [0.0, 0.0]


def test_other_data_under_the_same_name_is_refused_and_nothing_changes(finished, checkpoint, tmp_path):
    file = write(tmp_path / "pairs.jsonl", range(64))
    asked = settings(tmp_path / "out", file, checkpoint)
    preferences.run(asked)
    before = {p: p.read_bytes() for p in asked.out.rglob("*") if p.is_file()}
    write(file, range(8, 64))
    with pytest.raises(UserError, match=r"holds a run of another configuration: pairs\.preferences is"):
        preferences.run(asked)
    assert before == {p: p.read_bytes() for p in asked.out.rglob("*") if p.is_file()}


def test_bad_input_ends_in_one_line(finished, checkpoint, tmp_path, fail):
    asked, _ = finished
    start = ["--preset", "smoke", "--max-length", "64", "--out", str(tmp_path / "out")]
    model = ["--model", str(checkpoint)]
    cases = [
        ([], "name a preference file (.jsonl or .jsonl.gz) with --data"),
        (["--data", asked.data], "name a Hugging Face checkpoint folder with --model"),
        (["--data", "nowhere.jsonl", *model], "nowhere.jsonl: cannot be read"),
        (["--data", asked.data, "--model", str(tmp_path)], f"{tmp_path}: has no model.safetensors"),
        (["--data", asked.data, *model, "--max-length", "65"], "--max-length 65: model"),
        (["--data", asked.data, *model, "--eval-batch", "0"], "--eval-batch 0: at least one is needed"),
        (["--data", asked.data, *model, "--no-sft-first", "--sft.steps", "9"], "--sft.steps 9 has no effect"),
    ]
    for words, message in cases:
        assert message in fail([*start, *words], main=preferences.main)
        assert not (tmp_path / "out").exists()
    short = write(tmp_path / "short.jsonl", range(2))
    words = [*start, "--data", str(short), *model]
    error = fail(words, main=preferences.main)
    assert "short.jsonl:1 and after: 2 different prompts are too few to hold every 8th out" in error
    assert error.endswith("name a held-out file with --held-out (short.jsonl: 2 of 2 lines read, 0 bad)")
    write(short, range(9), "{}")
    error = fail([*words, "--sft.batch-size", "9"], main=preferences.main)
    assert "there are only 8 training pairs (short.jsonl: 9 of 10 lines read, 1 bad; short.jsonl:10: " in error
    assert not (tmp_path / "out").exists()


def test_an_objective_of_ones_own_that_was_edited_is_another_experiment(finished, tmp_path, monkeypatch):
    asked, _ = finished
    module = tmp_path / "own_objective_of_a_test.py"
    module.write_text("from entangle import losses\ndef mine(lp):\n    return losses.dpo(lp, beta=0.2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = dataclasses.replace(asked, out=tmp_path / "out", objective="own_objective_of_a_test:mine")
    pairs = {preferences.PAIR_SET: preferences.gather(asked).pairs}
    pair_runs.open_folder(asked, preferences.PAIR_SET, pairs, {})
    pair_runs.open_folder(asked, preferences.PAIR_SET, pairs, {})  # the same again: gone on with
    module.write_text(module.read_text().replace("0.2", "0.3"))
    linecache.checkcache()
    with pytest.raises(UserError, match=r"objective_source"):
        pair_runs.open_folder(asked, preferences.PAIR_SET, pairs, {})


@pytest.mark.slow
def test_two_processes_make_what_one_makes(finished, tmp_path):
    asked, _ = finished
    words = ["--preset", "smoke", "--no-track", "--max-length", 64, "--held-out-pairs", 6, "--probe-pairs", 4]
    for stage in ("sft", "preference"):
        for name, value in {"steps": 3, "batch-size": 4, "checkpoint-every": 2, "log-every": 2}.items():
            words += [f"--{stage}.{name}", value]
    words += ["--preference.eval-every", 2, "--data", asked.data, "--model", asked.model, "--out", tmp_path / "out"]
    finish(start([sys.executable, "-m", "experiments.preferences", *map(str, words)]))
    for stage in ("sft", "preference"):
        one, two = (
            training.read_metrics(out / "preferences" / "seed0" / stage) for out in (asked.out, tmp_path / "out")
        )
        assert [sorted(record) for record in one] == [sorted(record) for record in two]
        for before, after in zip(one, two, strict=True):
            for name in before.keys() - {"seconds"}:
                np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-5, err_msg=name)
    files = [sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) for out in (asked.out, tmp_path / "out")]
    kept = [[name for name in names if "checkpoints" not in name] for names in files]
    assert kept[0] == kept[1]


def test_on_a_mesh_no_device_has_the_whole_model_before_training(checkpoint, monkeypatch):
    asked = []
    read = models.load_pretrained

    def watched(folder, *, shardings, **options):
        shape, params = read(folder, **options)
        asked.append(shardings(shape, params)["layers"]["attention"]["qkv"]["kernel"].spec)
        return shape, params

    monkeypatch.setattr(models, "load_pretrained", watched)
    where = placement.Placement(sharding.make_mesh("fsdp=2", jax.devices()[:1] * 2))
    loaded = pair_data.load_checkpoint(preferences.PreferencesConfig(max_length=8), str(checkpoint), where)
    assert asked == [P(None, "fsdp", "tensor")]
    assert loaded.model.config.scan_layers and loaded.model.config.remat == "full"


def test_adapters_alone_are_trained_on_a_frozen_checkpoint(tmp_path, checkpoint):
    file = write(tmp_path / "pairs.jsonl", range(48))
    lora = "rank=2,alpha=4,targets=qkv+down,dropout=0.2"
    config = settings(tmp_path / "run", file, checkpoint, lora=lora)
    preferences.run(config)
    run = tmp_path / "run" / "preferences" / "seed0"
    records = _metrics(run / "preference")
    assert all(record["geometry/chosen_norm"] > 0 for record in records if "loss" in record)
    base, params = models.load_pretrained(checkpoint)
    shape, adapters = models.load_adapters(run / "adapter", base)
    assert shape.lora.rank == 2 and shape.lora.dropout == 0.2
    moved = models.language_model(shape).logits(models.join_params(adapters, params), np.arange(6)[None])
    assert np.abs(moved - models.language_model(base).logits(params, np.arange(6)[None])).max() > 0
    # a second time it is done; on another base it is another run
    preferences.run(config)
    with pytest.raises(UserError, match="holds a run of another configuration: lora is"):
        preferences.run(dataclasses.replace(config, lora="rank=3,alpha=4,targets=qkv"))


def test_dropout_is_drawn_from_the_runs_seed_the_row_and_the_step():
    seeds = [programs.row_seeds(True, (3, 2), seed)(np.arange(3)) for seed in (0, 1)]
    drawn = [programs._at_step(True, jnp.asarray(some), jnp.int32(step)) for some in seeds for step in (0, 1)]
    assert len(np.unique(drawn)) == 4 * 3 * 2

    config = dataclasses.replace(
        models.preset("tiny", 11), lora=models.lora_config("rank=2,alpha=4,targets=qkv,dropout=0.5")
    )
    model = models.language_model(config)
    params = model.init(jax.random.key(0))
    adapters, frozen = models.split_params(params)
    program = programs.likelihood_program(model, training.StageConfig(4, 3), frozen=frozen)
    assert program.draws
    tokens = jnp.arange(15).reshape(3, 5) % 11

    def adapted(seeds):
        state = program.begin(adapters)
        for _ in range(2):  # what an adapter draws is multiplied by zeros at first
            before = state
            state, _ = program.step(state, training.TokenBatch(tokens, jnp.ones((3, 5), bool), seeds))
            # two states are never there at once, and what training begins from is left alone
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])

    one, again, other = (adapted(jnp.asarray(programs.row_seeds(True, (3,), seed)(np.arange(3)))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0
    with pytest.raises(ValueError, match="a batch without seeds for a model that draws dropout"):
        adapted(None)


def _metrics(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": "rank=2"}, "LoRA 'rank=2': alpha and targets missing"),
        ({"lora": "rank=2,alpha=1,targets=gate"}, "no matrix of this decoder is called 'gate'"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16: parameters that are trained are float32; give adapters with --lora"),
        ({"lora": "attention", "dtype": "int8"}, "--dtype int8: choose from float32, bfloat16"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_anything_is_written(tmp_path, checkpoint, changes, message):
    file = write(tmp_path / "pairs.jsonl", range(48))
    with pytest.raises(UserError, match=re.escape(message)):
        preferences.run(settings(tmp_path / "run", file, checkpoint, **changes))
    assert not (tmp_path / "run").exists()
