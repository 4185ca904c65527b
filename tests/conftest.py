"""Makes the six files importable from any directory and keeps the oracles (transformers, peft) off the network."""
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402


@pytest.fixture
def decided(monkeypatch):
    """One side wins every pair: rollouts of an untrained model would all tie, and no step would have a gradient."""
    import train

    def by_ids(judge, group, ledger=None, compare=train.compare):
        return compare(lambda a, b: (1 + (a.ids > b.ids) - (a.ids < b.ids)) / 2, group, ledger)
    monkeypatch.setattr(train, "compare", by_ids)
    monkeypatch.setattr(train, "canaries", lambda judge, step: None)  # they have no ids
