"""The folder of a training run: config.json, metrics.jsonl, rollouts.jsonl, verdicts.jsonl, adapter/, state/."""
import json
import platform
import subprocess
from pathlib import Path

import torch

from data.processes import RANK, WORLD
from model import adapter_state, load_adapter_state, replace


class Folder:
    def __init__(self, args):
        self.dir = Path(args.out or f"runs/{Path(args.model).name}")
        self.state = self.dir / "state" / "state.pt"
        if args.resume and not self.state.exists():
            raise ValueError(f"--resume: no {self.state}; start without --resume")
        self.logs = {}

    def write_config(self, args, model):
        """config.json: all arguments, and what else it takes to say which run this was."""
        config = vars(args) | dict(commit=git_commit(), python=platform.python_version(), torch=torch.__version__,
                                   device=str(model.device), threads=torch.get_num_threads())
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "config.json").write_text(json.dumps(config, indent=1))

    def open_logs(self, step):
        """Logs of steps >= step (written after the state that is resumed, or by an older run) are dropped."""
        if RANK:
            return
        for name in ("metrics", "rollouts"):
            path = self.dir / f"{name}.jsonl"
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < step] \
                if step and path.exists() else []
            path.write_text("".join(line + "\n" for line in kept))
            self.logs[name] = path.open("a")

    def log(self, name, row):
        self.logs[name].write(json.dumps(row, ensure_ascii=False) + "\n")

    def save(self, model, optimizer, random_states, step):
        """All that the next step depends on."""
        for log in self.logs.values():
            log.flush()
        state = {"step": step, "adapter": adapter_state(model), "optimizer": optimizer.state_dict(),
                 "random": random_states}
        replace(self.state, lambda path: torch.save(state, path))

    def restore(self, model, optimizer, generator, rng):
        """-> the step to go on with."""
        try:
            state = torch.load(self.state, weights_only=False, map_location="cpu")
        except Exception as error:  # a cut file raises almost anything
            kind = type(error).__name__
            raise ValueError(f"{self.state}: not a whole state ({kind}); start without --resume") from None
        load_adapter_state(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        if len(state["random"][0]) != WORLD:
            raise ValueError(f"{self.state}: of {len(state['random'][0])} processes; resume with as many")
        generator.set_state(state["random"][0][RANK])
        rng.setstate(state["random"][1])
        return state["step"]


def git_commit():
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip() or None
    except OSError:
        return None
