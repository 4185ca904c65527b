"""Makes the six files importable from any directory and keeps the oracles (transformers, peft) off
the network."""
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402


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
