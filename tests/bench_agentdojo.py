"""AgentDojo's controls over all 949 pairs, and the tokens that its episodes take.

    python tests/bench_agentdojo.py             # the controls, under one attack
    python tests/bench_agentdojo.py --tokens    # prompts and results, in the tokens of each family

Needs `pip install agentdojo==0.1.35`, and for --tokens the families' files: ../shared/models, or
--models DIR."""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import eval as ev  # noqa: E402
import model as model_  # noqa: E402
import mosaic  # noqa: E402
from data.controls import oracle  # noqa: E402
from tools import play  # noqa: E402

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
FAMILIES = ("qwen2.5-7b", "qwen3-4b-thinking", "phi-4")
SUITES = ("workspace", "travel", "banking", "slack")


def controls(attack):
    for suite in SUITES:
        start = time.process_time()
        tasks = data.load(f"agentdojo:{suite}", "none") + data.load(f"agentdojo:{suite}", attack)
        loaded = time.process_time()
        print(f"{suite}: {len(tasks)} tasks")
        ev.controls({"injection": tasks})
        played = time.process_time()
        print(f"{suite}: seconds of processor time, loading {loaded - start:.1f}, controls "
              f"{played - loaded:.1f}", flush=True)


def tokens(folder):
    """Of each user task: its prompt, and what the ground truth's turns and results add to it."""
    tokenizers = {}
    for name in FAMILIES:
        config = model_.Config(model_.read_json(folder / name / "config.json"))
        tokenizers[name] = model_.Tokenizer(folder / name, config)
    for suite in SUITES:
        rollouts = [play(task, oracle(task)) for task in data.load(f"agentdojo:{suite}", "none")]
        for name, tokenizer in tokenizers.items():
            prompts = []
            added = []
            for rollout in rollouts:
                task = rollout.task
                dialogue = mosaic.Dialogue(tokenizer, task.messages, task.offered)
                prompts.append(len(dialogue.ids))
                for message in rollout.messages[len(task.messages):]:
                    if message["role"] == "tool":
                        dialogue.observe([message["content"]])
                    else:
                        ids = tokenizer.encode(message["content"])
                        dialogue.extend(ids, [mosaic.SAMPLED] * len(ids))
                added.append(len(dialogue.ids) - prompts[-1])
            added.sort()
            print(f"{suite} {name}: prompt {min(prompts)} to {max(prompts)}, added: median "
                  f"{added[len(added) // 2]}, the four longest {added[-4:]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--attack", default="important_instructions")
    parser.add_argument("--tokens", action="store_true", help="prompts and results, in tokens")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the families' files")
    args = parser.parse_args()
    if args.tokens:
        tokens(args.models)
    else:
        controls(args.attack)


if __name__ == "__main__":
    main()
