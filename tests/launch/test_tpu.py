"""scripts/launch_tpu against a stand-in for gcloud, whose workers are folders where the commands really run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest

from scripts.launch.commands import RefusedError
from scripts.launch.tpu import parse

TYPE = ("pod", "--type", "v5litepod-16", "--zone", "us-east5-a", "--poll", "0.02")
BEGIN = ["describe", "create", "describe", "scp", "unpack", "setup", "start"]
WHOLE = [*BEGIN, "follow", "state", "delete"]


def launch(place, *words, flags=(), **more):
    return place.launch("launch_tpu", *TYPE, *flags, "--", *words, **more)


def begin(place, *words, flags=()):
    return place.begin("launch_tpu", *TYPE, *flags, "--", *words)


def begin_to_train(place, flags=()):
    """The launcher, once the first line of the training's log has come through."""
    training = "echo ready; until [ -f $FAKE/go ]; do sleep 0.05; done; echo gone on"
    process = begin(place, "bash", "-c", training, flags=flags)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_run_from_nothing_to_the_end(place):
    said = 'echo begin from "$1"; sleep 0.3; echo err >&2; pwd >$HOME/where; cat .venv/log >$HOME/log; echo end'
    status, out, error = launch(
        place,
        "bash",
        "-c",
        f"cp -r $HOME/where $FAKE 2>/dev/null; {said}; cp -r $HOME $FAKE/home-$WORKER",
        "me",
        'it\'s a "quoted" $word\\',
        flags=("--setup", 'touch "$HOME/a mark"'),
        WORKERS="2",
    )
    assert status == 0, error
    assert out == 'begin from it\'s a "quoted" $word\\\nerr\nend\n'
    assert place.lines() == WHOLE
    assert not (place.fake / "slice").exists()
    for worker in "01":
        home = place.fake / f"home-{worker}"
        assert (home / "where").read_text().endswith(f"slice/{worker}/entangle\n")
        assert (home / "a mark").exists()
        installed = (home / "log").read_text()
        assert installed.startswith("scripts/setup train\n") and "pip install" in installed and "jax[tpu]" in installed


def test_the_dry_run_prints_what_is_run(place):
    words = ("bash", "-c", "echo 'a b'")
    flags = ("--spot", "--project", "mine", "--setup", "true && true")
    status, out, error = launch(place, *words, flags=(*flags, "--dry-run"))
    assert (status, error, place.lines()) == (0, "", [])
    assert launch(place, *words, flags=flags)[0] == 0
    archives = [shlex.split(line)[5] for line in (out.splitlines()[3], place.lines("calls")[3])]
    ran = [shlex.split(line.replace(archives[1], archives[0])) for line in place.lines("calls")]
    assert [shlex.split(line) for line in out.splitlines()] == ran
    assert all("--zone=us-east5-a" in call and "--project=mine" in call for call in ran)
    assert "--spot" in ran[1] and "--runtime-version=v2-alpha-tpuv5-lite" in ran[1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_itself_knows_every_flag(place, tmp_path):
    lines = sorted({*launch(place, "true", flags=("--spot", "--project", "mine", "--dry-run"))[1].splitlines()})
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": line} for line in lines]))
    words = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"]
    environment = os.environ | {
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    found = json.loads(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)
    assert [one["error_message"] for one in found] == [None] * len(lines)


@pytest.mark.parametrize("failing", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_the_trainings_exit_status_is_the_launchers_whichever_worker_had_it(place, failing):
    status, _, error = launch(place, "bash", "-c", f'[ "$WORKER" != {failing} ] || exit 7', WORKERS="2")
    assert status == 7 and "ended with exit status 7" in error
    assert place.lines()[-1] == "delete"


def test_a_worker_that_fails_ends_the_others(place):
    training = (
        'trap "touch $FAKE/told; exit 143" TERM; [ "$WORKER" = 0 ] || exit 5; sleep 0.2; while :; do sleep 0.05; done'
    )
    place.cue("follow-1", "sleep 0.5; exit 1")  # a connection that ends while worker 0 trains on
    status, _, error = launch(place, "bash", "-c", training, WORKERS="2")
    assert status == 5 and "the others are stopped" in error
    assert (place.fake / "told").exists()


def test_stopped_by_a_signal_and_saved_is_told(place):
    assert launch(place, "bash", "-c", "exit 143")[0] == 143
    assert not (place.fake / "slice").exists()


@pytest.mark.parametrize(
    "call",
    ["describe-2", "setup-1", "follow-1"]
    + [pytest.param(call, marks=pytest.mark.slow) for call in ("scp-1", "unpack-1", "start-1", "state-1")],
)
def test_pre_emption_at_any_moment_ends_in_the_same_command_on_a_new_slice(place, call):
    place.cue(call, "preempt" if call != "describe-2" else "(preempt) 2>/dev/null")
    resumes = 'echo "$WORKER" >>$FAKE/shared; sleep 0.2; echo trained'
    status, out, error = launch(place, "bash", "-c", resumes, flags=("--spot",))
    assert status == 0 and "was pre-empted" in error and out.endswith("trained\n")
    verbs = place.lines()
    assert verbs.count("create") == 2 and verbs[-len(WHOLE) + 1 :] == WHOLE[1:]
    created = [call for call in place.lines("calls") if " create " in call]
    assert created[0] == created[1]


def test_a_training_that_dies_of_the_pre_emption_is_no_failure(place):
    place.cue("describe-4", "(preempt) 2>/dev/null")  # the machines are told first: the state follows two looks later
    status, _, error = launch(
        place, "bash", "-c", "echo >>$FAKE/turns; [ $(wc -l <$FAKE/turns) -gt 1 ] || exit 143", flags=("--spot",)
    )
    assert status == 0 and "was pre-empted" in error


def test_the_nodes_own_state_tells_of_pre_emption_too(place):
    place.cue("follow-1", 'echo PREEMPTED >"$FAKE/slice/node"; exit 1')
    place.cue("state-1", "exit 1")
    assert launch(place, "true")[0] == 0
    assert place.lines().count("create") == 2


def test_pre_emption_without_end_is_given_up(place):
    for n in (1, 2, 3):
        place.cue(f"setup-{n}", "preempt")
    status, _, error = launch(place, "true", flags=("--preemptions", "1"))
    assert status == 1 and "pre-empted 2 times" in error
    assert place.lines().count("create") == 2 and place.lines()[-1] == "delete"


def test_a_lost_connection_costs_nothing(place):
    place.cue(
        "follow-1",
        '(cd "$FAKE/slice/0" && until [ -s entangle-run/log ]; do sleep 0.02; done; head -c 4 entangle-run/log); exit 1',
    )
    place.cue("state-1", "exit 255")
    place.cue("describe-3", "echo 'ERROR: network is down' >&2; exit 1")
    status, out, _ = launch(place, "bash", "-c", "echo first; sleep 0.5; echo second")
    assert (status, out) == (0, "first\nsecond\n")
    assert place.lines().count("start") == 1


def test_setting_up_is_tried_three_times(place):
    for n in (1, 2):
        place.cue(f"scp-{n}", "exit 1")
    assert launch(place, "true")[0] == 0
    for n in (1, 2, 3):
        place.cue(f"setup-{n + 1}", "exit 9")
    status, _, error = launch(place, "true")
    assert status == 1 and "failed three times with exit status 9" in error and place.lines()[-1] == "delete"


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("create-1", "echo 'ERROR: quota' >&2; exit 1", "was not created"),
        ("describe-2", 'echo FAILED >"$FAKE/slice/state"', "ended in state FAILED"),
        ("describe-2", "gone", "deleted by somebody else"),
    ],
)
def test_a_slice_that_does_not_come(place, call, code, message):
    place.cue(call, code)
    status, _, error = launch(place, "true")
    assert status == 1 and message in error.splitlines()[-1]
    assert not (place.fake / "slice").exists()
    assert ("delete" in place.lines()) == ("FAILED" in code)


def test_a_slice_that_is_waited_for(place):
    place.cue("describe-4", 'echo ACTIVE >"$FAKE/slice/state"')
    status, _, error = launch(place, "true", STATE="WAITING_FOR_RESOURCES")
    assert status == 0 and error.count("pod: WAITING_FOR_RESOURCES") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_deletes_the_slice(place, number):
    process = begin_to_train(place)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert place.lines()[-1] == "delete" and not (place.fake / "slice").exists()


def test_a_signal_during_the_creation_deletes_what_was_created(place):
    place.cue("create-1", 'touch "$FAKE/creating"; sleep 0.5')
    process = begin(place, "true")
    place.wait_for((place.fake / "creating").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert place.lines() == ["describe", "create", "delete"] and not (place.fake / "slice").exists()


def test_a_deletion_that_fails_says_how(place):
    for n in (1, 2, 3):
        place.cue(f"delete-{n}", "exit 1")
    status, _, error = launch(place, "true")
    assert status == 1
    assert error.splitlines()[-1].endswith(
        "NOT deleted and costs money until it is: "
        "gcloud compute tpus queued-resources delete pod --force --quiet --zone=us-east5-a"
    )


def test_what_is_kept_is_followed_again(place):
    process = begin_to_train(place, flags=("--keep",))
    process.send_signal(signal.SIGINT)
    assert "is deleted by: gcloud compute tpus queued-resources delete pod" in process.communicate(timeout=20)[1]
    status, _, error = launch(place, "true")
    assert status == 2 and "is there already (ACTIVE)" in error
    place.cue("follow-2", 'touch "$FAKE/go"')
    status, out, _ = launch(place, "never", "run", flags=("--reuse",))
    assert (status, out) == (0, "ready\ngone on\n")
    assert place.lines().count("start") == 1 and place.lines()[-1] == "delete"


def test_a_launcher_that_is_killed_leaves_what_its_first_line_deletes(place):
    process = begin_to_train(place)
    process.kill()
    error = process.communicate(timeout=20)[1]
    command = error.splitlines()[0].split("deleted by: ")[1]
    subprocess.run(command, shell=True, check=True, env=place.environment)
    assert not (place.fake / "slice").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pod --type v5e-16 --zone z -- true", "v5e is called v5litepod"),
        ("pod --type v5litepod --zone z -- true", "--type v5litepod is unknown"),
        ("pod --type h100-8 --zone z -- true", "--type h100-8 is unknown"),
        ("pod --type v4-8 -- true", "--zone"),
        ("pod --type v4-8 --zone z", "no command"),
        ("pod --type v4-8 --zone z --", "no command"),
        ("a_pod --type v4-8 --zone z -- true", "'a_pod'"),
        ("pod --type v4-8 --zone z --sport -- true", "--sport"),
        ("pod --type v4-8 --zone z --poll 0 -- true", "--poll 0"),
        ("pod --type v4-8 --zone z --preemptions -1 -- true", "--preemptions -1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_looked_at(words, message):
    with pytest.raises(RefusedError, match=re.escape(message)):
        parse(words.split())


def test_bad_input_is_one_line_and_nothing_is_created(place):
    status, out, error = place.launch("launch_tpu", "pod", "--type", "v5e-16", "--zone", "z", "--", "true")
    assert (status, out, place.lines()) == (2, "", [])
    assert error.startswith("scripts/launch_tpu: --type v5e-16 is unknown") and len(error.splitlines()) == 1
    status, out, error = launch(place, "true", PYTHON="false")
    assert (status, out, place.lines()) == (2, "", [])
    assert error == "scripts/launch_tpu: false is not a Python >= 3.9; name one with PYTHON=/path/to/python\n"


def test_an_image_whose_python_is_too_old_gets_one_from_uv(place):
    assert launch(place, "true", OLD="yes")[0] == 0
    brought = [line for line in place.lines("python3") if "version_info" not in line]
    assert brought == [
        "python3 -m pip install --user --quiet uv",
        "python3 -m uv python install --quiet 3.12",
        "python3 -m uv python find 3.12",
    ]


def test_a_dirty_tree_is_refused_or_travels_as_it_is(place):
    (place.checkout / "new file").write_text("new")
    (place.checkout / "scripts" / "launch" / "__init__.py").unlink()
    status, _, error = launch(place, "true")
    assert status == 2 and len(error.splitlines()) == 1 and "--dirty" in error and place.lines() == []
    status, out, _ = launch(place, "bash", "-c", 'cat "new file"; ls scripts/launch', flags=("--dirty",))
    assert status == 0 and out.startswith("new") and "__init__" not in out and "worker" in out


def test_no_gcloud_and_no_login(place, tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    for program in ("bash", "git", "dirname", "tar"):
        (bare / program).symlink_to(shutil.which(program))
    status, _, error = launch(place, "true", PATH=str(bare))
    assert (status, error) == (2, "scripts/launch_tpu: gcloud is not on the PATH\n")
    place.cue("describe-1", "echo 'ERROR: you do not have an active account' >&2; echo 'To log in, ...' >&2; exit 1")
    status, _, error = launch(place, "true")
    assert status == 2 and error.splitlines() == [
        "scripts/launch_tpu: gcloud cannot look for pod: ERROR: you do not have an active account"
    ]
