"""Strict sampling at the real vocabularies: 1,000 turns a family from a random narrow model, each
within its budget.

    python tests/bench_real.py [--turns 1000] [--families qwen2.5 qwen3 phi-4]

Prints a line a family: valid turns, seconds to compile the grammar, sampled tokens a second. It
needs the families' public files in ../shared/models, as tests/test_real.py does, whose code it
runs.
"""
import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from test_real import FILES, checkpoint, strict_turns  # noqa: E402

BUDGETS = (0, 4, 16)  # tokens of a turn beyond the fewest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--families", nargs="+", choices=FILES, default=list(FILES))
    args = parser.parse_args()
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            path = checkpoint(family, "true", Path(folder))
            valid, sampled, compiled, seconds = strict_turns(path, args.turns, BUDGETS)
        print(f"{family}: {valid} of {args.turns} turns valid, compiled in {compiled:.1f} s, "
              f"{sampled} tokens sampled, {sampled / seconds:.0f} a second", flush=True)


if __name__ == "__main__":
    main()
