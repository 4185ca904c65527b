"""Makes the six files importable from any directory, keeps the oracles (transformers, peft) off the
network, and runs a folder of tests in several processes.

`python -m pytest tests` takes a process a core; `-n 0`, or the name of one file, all in this one.
"""
import os
import signal
import sys
from pathlib import Path

# A shell starts what a script puts behind "&" with SIGINT ignored, and Python leaves it so: the
# tests of Ctrl-C would wait for ever, and so would a process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402  (torch brings it)

MOST_PROCESSES = 4  # each holds torch, transformers and its own checkpoints: some 2 GB
# A file's tests stay together in one process. These take longest, and so they begin: a long file
# that came last would run alone.
LONGEST = ["test_judges.py", "test_smollm2.py", "test_real.py", "test_learning.py", "test_train.py",
           "test_rollout.py"]


# ---------------------------------------------------------------------------- in several processes
def n_cores():
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use, of all there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)  # before xdist reads what it is to do
def pytest_cmdline_main(config):
    """A folder of tests is run in a process a core, unless the command line says otherwise."""
    option = config.option
    # One of the processes comes here, too: it must not start processes of its own.
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    is_asked = option.numprocesses is not None or option.dist != "no"
    is_watched = option.capture == "no" or option.usepdb  # what another process prints is lost
    has_folder = any(Path(name).is_dir() for name in config.args)
    if n_cores() > 1 and has_folder and not is_asked and not is_watched:
        option.numprocesses = min(n_cores(), MOST_PROCESSES)
        option.dist = "loadfile"
        option.loadscopereorder = False  # it would begin with the file of most tests
        # Threads of several processes would wait for each other. Set before torch is imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """The longest files first, the others as they were."""
    def place(item):
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)
    items.sort(key=place)


# --------------------------------------------------------------------------- what several files use
@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny base after a few steps: it can close a turn now and then, and its logits are far from
    flat. Built once, by the process that is first: none may change it."""
    from data import tiny
    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent  # of all processes of this run
    with FileLock(home / "base.lock"):
        if not (home / "base" / "config.json").exists():
            tiny.build(0, home / "base", steps=25, n=150)
    return home / "base"


@pytest.fixture
def decided(monkeypatch):
    """One side wins every pair: rollouts of an untrained model would all tie, and no step would
    have a gradient."""
    import train
    compare = train.compare

    def larger_ids_win(a, b):
        if a.ids == b.ids:
            return 0.5
        return 1.0 if a.ids > b.ids else 0.0

    def compare_by_ids(judge, group, record_pair=None):
        return compare(larger_ids_win, group, record_pair)

    monkeypatch.setattr(train, "compare", compare_by_ids)
    # These pairs have no ids.
    monkeypatch.setattr(train, "canaries", lambda judge, step: None)
