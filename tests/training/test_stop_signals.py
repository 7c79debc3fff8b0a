import os
import signal
import threading
from types import SimpleNamespace

import pytest

from mpoe.training.stop_signals import Interrupted, StopSignals

EACH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@pytest.fixture(autouse=True)
def no_nohup():
    """The tests themselves may be running under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def control():
    return SimpleNamespace(should_save=False, should_log=False)


@EACH
def test_in_training_a_signal_waits_for_the_step_and_its_checkpoint(number, capsys):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.on_train_begin(None, None, None)
        nothing = control()
        signals.on_step_end(None, None, nothing)
        signals.on_save(None, None, None)
        assert not nothing.should_save
        os.kill(os.getpid(), number)
        assert "once more to stop at once" in capsys.readouterr().err
        save = control()
        signals.on_step_end(None, None, save)
        assert save.should_save
        assert save.should_log
        with pytest.raises(Interrupted) as stopped:
            signals.on_save(None, SimpleNamespace(global_step=7), None)
    assert stopped.value.args == (number, 7)
    assert signal.getsignal(number) is before


@EACH
@pytest.mark.parametrize("phase", ["before", "after", "twice"])
def test_elsewhere_or_twice_it_stops_at_once(number, phase):
    with StopSignals() as signals:
        if phase != "before":
            signals.on_train_begin(None, None, None)
        if phase == "after":
            signals.on_train_end(None, None, None)
        if phase == "twice":
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            os.kill(os.getpid(), number)
    assert stopped.value.args == (number, None)


def test_in_another_thread_nothing_is_caught():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def work():
        with StopSignals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
