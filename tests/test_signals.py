"""SIGTERM and Ctrl-C: with a checkpoint, the batch is finished and the state written first."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from helpers.models import compiled, points
from helpers.paths import TESTS
from helpers.runs import call_of, differences, result_of
from helpers.seeds import seed

from minikeras import Callback, LambdaCallback
from minikeras.checkpoint.file import read


def send(number, at, times=1):
    """Sends this process a signal, after so many batches."""

    def count_down(batch, logs):
        nonlocal at
        at -= 1
        if at == 0:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return LambdaCallback(on_batch_end=count_down)


class Ends(Callback):
    ended = False

    def on_fit_end(self):
        self.ended = True


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_signal_after_the_last_write_is_acted_on(number, error, tmp_path):
    late = LambdaCallback(on_fit_end=lambda: os.kill(os.getpid(), number))
    with pytest.raises(error):
        compiled().fit(1, points(8), checkpoint=tmp_path / "run.pt", callbacks=[late], verbose=0)
    assert len(read(tmp_path / "run.pt")["history"]) == 1


def sleeps(begun):
    begun.set()  # Python forgets a signal that comes while it is still forking
    while True:  # one that comes just before a sleep is heard after it
        time.sleep(0.05)


def test_signal_ends_a_child_that_a_callback_starts(tmp_path):
    found = []

    def start():
        context = multiprocessing.get_context("fork")
        begun = context.Event()
        child = context.Process(target=sleeps, args=(begun,))
        child.start()
        assert begun.wait(60)
        child.terminate()
        child.join(20)
        found.append(child.exitcode)
        child.kill()

    starts = LambdaCallback(on_epoch_end=lambda epoch, logs: start())
    compiled().fit(1, points(8), checkpoint=tmp_path / "run.pt", callbacks=[starts], verbose=0)
    assert found == [-signal.SIGTERM]


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
    ids=["SIGTERM", "Ctrl-C"],
)
@pytest.mark.parametrize("at", [1, 3, 5, 7, 10])
def test_signal_lets_the_batch_finish_the_state_be_written_and_the_run_resume(
    number, error, at, tmp_path
):
    before = signal.getsignal(number)
    path = tmp_path / "run.pt"
    seed(1)
    model, arguments = call_of("noisy")
    expected = result_of(model, model.fit(**arguments))
    seed(1)
    model, arguments = call_of("noisy")
    ends = Ends()
    with pytest.raises(error) as raised:
        model.fit(**arguments, checkpoint=path, callbacks=[ends, send(number, at)])
    if error is SystemExit:
        assert raised.value.code == 143
    assert ends.ended
    assert signal.getsignal(number) is before
    assert len(model.history) == len(read(path)["history"]) == (at - 1) // 5
    seed(9)
    model, arguments = call_of("noisy")
    assert differences(expected, result_of(model, model.fit(**arguments, checkpoint=path))) == []


@pytest.mark.parametrize("steps_per_epoch", [None, 3])
def test_signal_in_the_middle_of_validation_lets_the_run_resume(steps_per_epoch, tmp_path):
    path = tmp_path / "run.pt"
    calls = []
    seed(1)
    model, arguments = call_of("noisy", steps_per_epoch=steps_per_epoch)
    expected = result_of(model, model.fit(**arguments))

    def signalling(*args):
        calls.append(args)
        if len(calls) == 7:  # the second of the five batches of epoch 2
            os.kill(os.getpid(), signal.SIGTERM)
        return type(model).evaluate_step(model, *args)

    seed(1)
    model, arguments = call_of("noisy", steps_per_epoch=steps_per_epoch)
    model.evaluate_step = signalling
    with pytest.raises(SystemExit):
        model.fit(**arguments, checkpoint=path)
    assert len(calls) == 7
    assert read(path)["position"]["logs"] is not None
    seed(9)
    model, arguments = call_of("noisy", steps_per_epoch=steps_per_epoch)
    assert differences(expected, result_of(model, model.fit(**arguments, checkpoint=path))) == []


def test_signal_is_reported_in_a_line(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        compiled().fit(
            1, points(96), checkpoint=tmp_path / "run.pt", callbacks=[send(signal.SIGINT, at=2)]
        )
    assert capsys.readouterr().out == (
        f"{tmp_path / 'run.pt'}: stopped in epoch 1 after step 2; the same call resumes from "
        "there\n"
    )


def test_signal_that_comes_twice_acts_at_once(tmp_path):
    seen = []
    after = LambdaCallback(on_batch_end=lambda batch, logs: seen.append(batch))
    with pytest.raises(SystemExit) as raised:
        compiled().fit(
            1,
            points(96),
            verbose=0,
            checkpoint=tmp_path / "run.pt",
            callbacks=[send(signal.SIGTERM, at=2, times=2), after],
        )
    assert raised.value.code == 143
    assert seen == [1]
    assert not (tmp_path / "run.pt").exists()


def test_signal_handler_of_the_user_is_called_when_the_state_is_written(tmp_path):
    path = tmp_path / "run.pt"
    seen = []

    def handler(number, frame):
        seen.append((number, read(path)["position"]["step"]))

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit):
            compiled().fit(
                1, points(96), verbose=0, checkpoint=path, callbacks=[send(signal.SIGTERM, at=2)]
            )
        assert seen == [(signal.SIGTERM, 2)]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        dfhistory = compiled().fit(
            1,
            points(96),
            verbose=0,
            checkpoint=tmp_path / "run.pt",
            callbacks=[send(signal.SIGTERM, at=2)],
        )
        assert len(dfhistory) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_without_a_checkpoint_acts_at_once_and_keeps_the_history():
    seen = []
    model = compiled()
    after = LambdaCallback(on_batch_end=lambda batch, logs: seen.append(batch))
    with pytest.raises(KeyboardInterrupt):
        model.fit(2, points(64), verbose=0, callbacks=[send(signal.SIGINT, at=3), after])
    assert seen == [1, 2]
    assert list(model.history.index) == [0]


def test_signal_handlers_are_left_alone_by_a_fit_in_a_thread(tmp_path):
    model = compiled()
    thread = threading.Thread(
        target=model.fit, args=(2, points(64)), kwargs={"verbose": 0, "checkpoint": tmp_path / "r"}
    )
    thread.start()
    thread.join()
    assert len(model.history) == 2


def test_signal_ends_a_process_with_status_143_and_its_workers_let_it_finish_the_batch(tmp_path):
    """Ctrl-C reaches the whole group of processes, workers included."""
    script = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(TESTS)!r})
        import signal
        from helpers.runs import *
        model, arguments = call_of("noisy, 2 workers")
        ended = minikeras.LambdaCallback(on_fit_end=lambda: print("ended", flush=True))
        def send(batch, logs):
            if batch == 2 and len(sys.argv) == 2:
                os.killpg(os.getpgid(0), getattr(signal, sys.argv[1]))
        both = [ended, minikeras.LambdaCallback(on_batch_end=send)]
        model.fit(**arguments, checkpoint={str(tmp_path / "run.pt")!r}, callbacks=both)
        print(len(model.history))
    """)

    def run(*args):
        done = subprocess.run(
            [sys.executable, "-c", script, *args], capture_output=True, text=True, process_group=0
        )
        return done.returncode, done.stdout, done.stderr.strip().splitlines()[-1:]

    status, out, last = run("SIGINT")
    assert (status, out, last) == (-signal.SIGINT, "ended\n", ["KeyboardInterrupt"])
    assert read(tmp_path / "run.pt")["position"]["step"] == 2
    (tmp_path / "run.pt").unlink()
    status, out, last = run("SIGTERM")
    assert (status, out) == (143, "ended\n")
    assert run() == (0, "ended\n3\n", [])
