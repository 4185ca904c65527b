"""MOSAIC's training loop: sample a group per task, let a judge compare the trajectories, push the adapter.

One step (marks as in preference.py):
    1. draw tasks; sample n = 4 trajectories of each, in the free grammar at temperature 1     mosaic.rollout
    2. ask the judge about every pair of a group, in both orders                               preference.compare
       (every ten steps: about pairs with known answers, too)                                  canaries
    3. R = r_align + r_fmt - p_len                                                             preference.total_reward
    4. group-relative advantages; a group that is all tied, or unscored, gives none            preference.advantages
    5. logprobs under the distribution that sampled, reference = the adapter switched off      mosaic.sampled_logprobs
    6. GRPO (or the direct preference loss on the same groups' pairs), one AdamW step          preference.grpo_loss
    7. one line: does it win against the frozen base, where does the gate open, who owns the reward

Deviations and choices, all [ours]
1. LoRA; learning rate, KL weight, clip, steps and tasks a step (RECIPE): nothing of it is published.
2. One optimiser step a batch, so the ratio starts at 1 and the clip rarely bites; linear warm-up and decay.

    python train.py                      # builds the tiny base if absent; a line a step, " 0 loss +0.115 |g| 0.04 ...";
                                         # then base beside trained on held-out suites
    python train.py --model qwen2.5-7b --data DIR --judge endpoint --judge-url http://host:8000/v1 --judge-model NAME
    torchrun --nproc-per-node 2 train.py        # data-parallel: each process samples and differentiates its share

Of several processes the first judges, logs and writes; all take the same step. If one dies, all end.
Next file: eval.py.
"""
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import model as model_
from data.controls import CANARIES
from mosaic import SYSTEM_VERSION, Parser, gate_option, play, rollout, sampled_logprobs
from preference import (advantages, alignment_rewards, audit, compare, compare_sparingly, digest, dpo_loss,
                        format_reward, grpo_loss, length_penalty, open_judge, pairs, scalar_reward, shares,
                        total_reward, transcript, win_rate)

# Per family, all [ours]; LoRA on every linear layer of a block. length_budget: L0 of p_len [1: 400], small for tiny:
# its whole trajectory is about 80 tokens; micro_tokens: padded tokens of one forward and backward; recompute:
# a block keeps its input alone for the backward pass.
REAL = dict(rank=16, alpha=32, lr=2e-5, length_budget=400, tasks=16, steps=200, kl_coef=0.02, micro_tokens=8192,
            recompute=True)
RECIPE = {"tiny": REAL | dict(lr=1.5e-3, kl_coef=0.05, length_budget=80, tasks=48, steps=60, micro_tokens=4096,
                             recompute=False),
          "qwen2.5": REAL, "qwen3": REAL | dict(lr=3e-5), "phi-4": REAL | dict(lr=1e-5), "chatml": REAL}
# largest and mean |sampling - training logprob| at which a run stops. fp32: 1e-4 and 1e-6 are usual (one token of some
# four million was off by 1.6e-3), a wrong mask or cache gives 0.1 and more. bf16: a card rounds a product of 10 rows
# otherwise than one of 8,192, and single tokens of random weights are off by 0.35; a mean of 0.2 is a ratio wrong by a
# fifth
MAX_DRIFT = {torch.float32: (1e-2, 1e-4), torch.bfloat16: (math.inf, 0.2), torch.float16: (math.inf, 0.2)}
N_FROZEN = 16  # tasks of the win rate, sampled once from the base and once a step from the policy
RANK, WORLD, LOCAL = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def arguments(argv=None):
    p = Parser(prog="train.py", description="Train an agent with MOSAIC.", allow_abbrev=False)
    p.add_argument("--model", default="tiny", help="tiny | qwen2.5-7b | qwen3-4b-thinking | phi-4 | DIR")
    p.add_argument("--data", default="train", help="an embedded suite, a .jsonl file or Agent-SafetyBench's folder")
    p.add_argument("--judge", default="rule", help="rule | model | endpoint | human | a verdicts.jsonl, to replay it")
    evaluation.judge_flags(p)
    p.add_argument("--pairs", choices=("all", "sorted"), default="all", help="sorted: skip what follows")
    p.add_argument("--reward", choices=("pairwise", "scalar"), default="pairwise")
    p.add_argument("--objective", choices=("grpo", "dpo"), default="grpo")
    p.add_argument("--gate", type=gate_option, default="learned", help="learned | always | never | a bias on its logit")
    p.add_argument("--steps", type=int)
    p.add_argument("--tasks", type=int, help="tasks a step")
    p.add_argument("--group-size", type=int, default=4, help="n trajectories a task [1]")
    p.add_argument("--lr", type=float)
    p.add_argument("--kl-coef", type=float)
    p.add_argument("--length-budget", type=int, help="L0 of the length penalty, in sampled tokens of a trajectory")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="default: runs/<model>")
    p.add_argument("--resume", action="store_true", help="go on from --out's state/")
    p.add_argument("--no-eval", action="store_true", help="skip the closing table")
    args = p.parse_args(argv)
    for name, least in (("steps", 1), ("tasks", 1), ("group_size", 2), ("lr", 0), ("kl_coef", 0), ("length_budget", 1),
                        ("seed", 0)):
        value = vars(args)[name]
        if value is not None and not least <= value <= 10 ** 9:
            p.error(f"--{name.replace('_', '-')} {value}: expected {least} to 10^9")
    if args.objective == "dpo" and args.reward == "scalar":
        p.error("--objective dpo trains on pairs: it takes no --reward scalar")
    return args


class Batch:
    """The judged rollouts of one step: rewards and advantages per group, and what the log line says of them."""

    def __init__(self, rollouts, args, judge):
        n = args.group_size
        self.groups = [rollouts[i:i + n] for i in range(0, len(rollouts), n)]
        self.adv, self.align, rows, terms = [], [], [], []
        if args.pairs == "all":
            judge.prepare([pair for group in self.groups for pair in permutations(group, 2)])
            self.P = [compare(judge, group, rows.append) for group in self.groups]
        else:
            self.P = compare_sparingly(judge, self.groups, rows.append)
        self.audit = audit(self.groups, self.P, rows)
        # one pair unscored: the direct loss gets none of the group, as GRPO does
        self.P = [torch.full_like(P, math.nan) if P.isnan().any() else P for P in self.P]
        for group, P in zip(self.groups, self.P):
            align = alignment_rewards(P)
            if args.reward == "scalar":
                align = torch.tensor([scalar_reward(r) for r in group])
            fmt = torch.tensor([format_reward(r) for r in group])
            cost = length_penalty([r.n_sampled for r in group], args.length_budget)
            adv = advantages(total_reward(align, fmt, cost), align)
            self.align.append(align), self.adv.append(adv)
            if adv.any():
                terms.append((align, fmt, -cost))
        self.shares = shares(dict(zip(("align", "format", "length"), map(torch.stack, zip(*terms)))))
        self.tied = sum((a == a[0]).all().item() for a in self.align) / len(self.groups)
        self.n_tokens = sum(len(r.logprobs) for r in rollouts)  # the one normaliser of the step, tied groups included


def length(rollouts):
    """Tokens of rollouts that begin with one prompt, which is computed once (model.Tree)."""
    prompt = rollouts[0].spans[0][0]
    return prompt + sum(len(r.ids) - prompt for r in rollouts)


def micro_batches(items, length, budget):
    """Sorts by length and cuts so that padded tokens stay under the budget, as far as neighbours do not share a prompt
    and so a row (pairs of one group may); order changes nothing in the gradient."""
    out = []
    for item in sorted(items, key=length):
        if not out or (len(out[-1]) + 1) * length(item) > budget:
            out.append([])
        out[-1].append(item)
    return out


def share(items):
    """This process's part of a list."""
    return items[RANK * len(items) // WORLD:(RANK + 1) * len(items) // WORLD]


def gather(items):
    """The lists of all processes as one, each process gets it: whole again after `share`."""
    parts = [items]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


def from_first(make):
    """What make() returns in the first process, in every process."""
    box = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def add_up(log, trained):
    """Sums the processes' gradients and logs, so that each takes the same step: the normaliser is that of all."""
    if WORLD == 1:
        return log
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
    dist.all_reduce(flat)
    if flat.any():  # else every process keeps its None, which AdamW skips
        for p, g in zip(trained, flat.split([p.numel() for p in trained])):
            p.grad = g.view_as(p)
    logs = gather([log])
    return {k: (max if k == "drift" else sum)(part[k] for part in logs) for k in log}


def accumulate(model, tokenizer, batch, args):
    """The gradient of this process's groups, micro-batch by micro-batch -> {"loss", "kl", "clipped", "drift", "off",
    "trained"}: drift is the largest |logprob - that of the sampling|, off their sum over the trained tokens.

    GRPO takes every trajectory of the groups that carry an advantage, the direct loss every pair that one side won."""
    log, grpo = dict(loss=0.0, kl=0.0, clipped=0.0, drift=0.0, off=0.0, trained=0), args.objective == "grpo"
    n_pairs = sum(len(pairs(P)) for P in batch.P)
    if grpo:  # a group is a unit, or slices of it that stay under the budget
        units = [(g[i:i + n], adv[i:i + n].tolist())
                 for g, adv in share([both for both in zip(batch.groups, batch.adv) if both[1].any()])
                 for n in [next((n for n in range(len(g), 1, -1) if all(
                     length(g[i:i + n]) <= args.micro_tokens for i in range(0, len(g), n))), 1)]
                 for i in range(0, len(g), n)]
    else:
        units = [((g[i], g[j]), ()) for g, P in share(list(zip(batch.groups, batch.P))) for i, j in pairs(P).tolist()]
    for part in micro_batches(units, lambda unit: length(unit[0]), args.micro_tokens):
        rollouts = [r for unit, _ in part for r in unit]
        old = torch.tensor([lp for r in rollouts for lp in r.logprobs], device=model.device)
        with torch.no_grad(), model.adapter_off():
            ref = sampled_logprobs(model, tokenizer, rollouts, gate_mode=args.gate)
        new = sampled_logprobs(model, tokenizer, rollouts, gate_mode=args.gate)
        if grpo:
            adv = torch.tensor([a for unit in part for r, a in zip(*unit) for _ in r.logprobs], device=model.device)
            loss, kl, clipped = grpo_loss(new, old, ref, adv, batch.n_tokens, kl_coef=args.kl_coef)
            log["kl"], log["clipped"] = log["kl"] + kl.item(), log["clipped"] + clipped.item()
        else:
            sizes = [len(r.logprobs) for r in rollouts]
            lp, ref_lp = (torch.stack([s.sum() for s in x.split(sizes)]) for x in (new, ref))  # (2 pairs,)
            cost = length_penalty([r.n_sampled for r in rollouts], args.length_budget).to(model.device)
            loss = dpo_loss(lp[::2], lp[1::2], ref_lp[::2], ref_lp[1::2], cost[::2], cost[1::2], n_pairs)
        loss.backward()
        log["loss"] += loss.item()
        off = (new.detach() - old).abs()
        log |= dict(drift=max(log["drift"], off.max().item()), off=log["off"] + off.sum().item(),
                    trained=log["trained"] + len(off))
    return log


def describe(rollouts):
    """What a step's rollouts look like: gate rate on risky and harmless steps, safety-token share, endings."""
    gates = [g for r in rollouts for g in r.gates]
    rate = {kind: [opened for _, opened, risky in gates if risky is kind] for kind in (True, False)}
    turns = [t for r in rollouts for t in r.turns]
    return dict(
        gate_risky=sum(rate[True]) / max(1, len(rate[True])), gate_harmless=sum(rate[False]) / max(1, len(rate[False])),
        valid=sum(t is not None for t in turns) / len(turns),
        safety_share=sum(r.safety_tokens for r in rollouts) / max(1, sum(r.n_sampled for r in rollouts)),
        tokens=sum(r.n_sampled for r in rollouts) / len(rollouts))


class Folder:
    """The folder of a run: config.json, metrics.jsonl, rollouts.jsonl, verdicts.jsonl, adapter/, state/. ValueError: of
    --resume, where there is nothing whole to go on from, or another run."""

    def __init__(self, args):
        self.dir = Path(args.out or f"runs/{Path(args.model).name}")
        self.state = self.dir / "state" / "state.pt"
        self.logs, self.old = {}, None
        if any(path.is_file() for path in (self.dir, *self.dir.parents)):
            raise ValueError(f"--out {self.dir}: a file is in the way; take another")
        if not args.resume:
            return
        try:
            self.old = torch.load(self.state, weights_only=False, map_location="cpu")
            processes, was = len(self.old["random"][0]), model_.read_json(self.dir / "config.json")
            if not {"step", "adapter", "optimizer"} <= self.old.keys():
                raise KeyError
        except FileNotFoundError:
            raise ValueError(f"--resume: no {self.state}; start without --resume") from None
        except Exception as error:  # a cut file raises almost anything
            kind = type(error).__name__
            raise ValueError(f"{self.state}: not a whole state ({kind}); start without --resume") from None
        if processes != WORLD:
            raise ValueError(f"{self.state}: of {processes} processes; resume with as many")
        for name in ("model", "data", "judge", "pairs", "reward", "objective", "gate", "group_size", "seed"):
            if was.get(name) != vars(args)[name]:
                raise ValueError(f"--resume: --{name.replace('_', '-')} of {self.dir} is {was.get(name)}, "
                                 f"not {vars(args)[name]}; go on with that, or take another --out")

    def open_logs(self, step):
        """Logs of steps >= step (written after the state that is resumed, or by an older run) are dropped."""
        if RANK:
            return
        for name in ("metrics", "rollouts"):
            path = self.dir / f"{name}.jsonl"
            try:
                kept = [line for line in model_.read_lines(path) if json.loads(line)["step"] < step] if step else []
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{path}: not a log of this run; move it away") from None
            path.write_text("".join(line + "\n" for line in kept), "utf-8")
            self.logs[name] = path.open("a", encoding="utf-8")

    def log(self, name, row):
        self.logs[name].write(json.dumps(row, ensure_ascii=False) + "\n")

    def save(self, model, optimizer, random_states, step):
        """All that the next step depends on."""
        for log in self.logs.values():
            log.flush()
        state = {"step": step, "adapter": model_.adapter_state(model), "optimizer": optimizer.state_dict(),
                 "random": random_states}
        model_.write_whole(self.state, lambda path: torch.save(state, path))

    def restore(self, model, optimizer, generator, rng):
        """-> the step to go on with."""
        state, self.old = self.old, None
        model_.load_adapter_state(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["random"][0][RANK])
        rng.setstate(state["random"][1])
        return state["step"]


def git_commit():
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip() or None
    except OSError:
        return None


def record(rollout, adv, step):
    """One line of rollouts.jsonl."""
    return dict(
        step=step, task=rollout.task.id, trajectory=digest(transcript(rollout)),  # as in verdicts.jsonl
        advantage=round(adv.item(), 4), ended=rollout.ended, tokens=rollout.n_sampled,
        gates=[[p and round(p, 3), opened, risky] for p, opened, risky in rollout.gates],
        journal=[[e.step, e.name, e.arguments, e.unsafe or e.injected or e.leaking] for e in rollout.journal],
        turns=[t and [t.plan, t.check, t.name or "answer", t.text if t.name is None else t.arguments]
               for t in rollout.turns])


def canaries(judge, step):
    """Pairs with a known answer, asked anew each time (a canary's id holds the step) -> share that the better one wins.
    RuntimeError: the worse one wins somewhere, or the better one nowhere."""
    played = []
    for suite, (better, worse) in CANARIES.items():
        task = next(t for t in data.load(suite) if t.goal and (t.injected or t.secrets or suite in ("harm", "benign")))
        task = replace(task, id=f"canary {step}: {task.id}")
        played.append([play(task, better(task)), play(task, worse(task))])
    judge.prepare([pair for two in played for pair in permutations(two, 2)])
    won = [compare(judge, two)[0, 1].item() for two in played]
    if 0 in won or 1 not in won:
        raise RuntimeError(f"step {step}: judge {judge.name} fails its canaries: " + ", ".join(
            f"{suite} {'lost' if p == 0 else 'won' if p == 1 else 'not won'}" for suite, p in zip(CANARIES, won)))
    return won.count(1) / len(won)


def sample(model, tokenizer, tasks, frozen, args, generator):
    """-> (rollouts of the tasks, group after group; one rollout of each frozen task), all in one batch a process."""
    tasks, frozen = share(tasks), share(frozen)
    sizes = [args.group_size] * len(tasks) + [1] * len(frozen)
    rollouts = rollout(model, tokenizer, tasks + frozen, sizes, grammar="free", gate_mode=args.gate, generator=generator)
    n = len(rollouts) - len(frozen)
    return gather(rollouts[:n]), gather(rollouts[n:])


def gradient(model, tokenizer, batch, args, step, optimizer):
    """Accumulates the gradient, clips it -> what the log line says of it. RuntimeError: drift or divergence."""
    for group in optimizer.param_groups:  # warm-up over 5 steps, then linearly to a tenth
        group["lr"] = args.lr * min((step + 1) / 5, 1 - 0.9 * step / args.steps)
    optimizer.zero_grad()
    trained = [p for p in model.parameters() if p.requires_grad]
    log = add_up(accumulate(model, tokenizer, batch, args), trained)
    log["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
    log["drift_mean"] = log.pop("off") / max(1, log.pop("trained"))
    most, mean = MAX_DRIFT[model.dtype]
    if not (math.isfinite(log["grad_norm"]) and log["drift"] <= most and log["drift_mean"] <= mean):
        raise RuntimeError(f"step {step}: gradient norm {log['grad_norm']}, |logprob difference| {log['drift']:.3g}, "
                           f"mean {log['drift_mean']:.3g}: sampler and trainer disagree, or the run diverged; --resume "
                           "goes on before it (one process: in this very step): take a lower --lr with it")
    return log


def train(args, model, tokenizer, tasks, folder, judge):
    """The loop. Everything random comes from --seed: tasks from `rng`, tokens from `generator`."""
    seed = args.seed + 10 ** 6 * RANK  # each process draws other tokens, and all draw the same tasks
    generator, rng = torch.Generator(model.device).manual_seed(seed), random.Random(args.seed)
    frozen = random.Random(-1 - args.seed).sample(tasks, min(N_FROZEN, len(tasks)))
    with model.adapter_off():
        base = sample(model, tokenizer, [], frozen, args, torch.Generator(model.device).manual_seed(seed))[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    first = folder.restore(model, optimizer, generator, rng) if args.resume else 0
    folder.open_logs(first)
    step, mark, updating = first, ([generator.get_state()], rng.getstate()), False
    try:
        for step in tqdm(range(first, args.steps), initial=first, total=args.steps, disable=True if RANK else None):
            start = time.perf_counter()
            rollouts, watched = sample(model, tokenizer, rng.sample(tasks, args.tasks), frozen, args, generator)
            sampled = time.perf_counter()
            def judged():
                won = None if step % 10 else canaries(judge, step)
                batch = Batch(rollouts, args, judge)
                judge.prepare([pair for two in zip(watched, base) for pair in permutations(two, 2)])
                return won, batch
            won, batch = from_first(judged)
            ready = time.perf_counter()
            row = {"step": step, **gradient(model, tokenizer, batch, args, step, optimizer)}
            updating = True
            optimizer.step()
            states = gather([generator.get_state()])
            if RANK:
                continue
            done, trained = time.perf_counter(), [r for g, a in zip(batch.groups, batch.adv) if a.any() for r in g]
            row |= dict(win_rate=win_rate(judge, watched, base)[0], shares=batch.shares, tied=batch.tied,
                        judge=batch.audit | {"canaries": won}, **describe(rollouts), seconds=done - start)
            row["sample_tok/s"] = sum(r.n_sampled for r in rollouts + watched) / (sampled - start)
            row["train_tok/s"] = sum(len(r.ids) for r in trained) / (done - ready)
            folder.log("metrics", row)
            for r, a in zip(rollouts, torch.cat(batch.adv)):
                folder.log("rollouts", record(r, a, step))
            tqdm.write(line(row))
            if (step + 1) % 10 == 0 or step + 1 == args.steps:
                folder.save(model, optimizer, (states, rng.getstate()), step + 1)
            step, mark, updating = step + 1, (states, rng.getstate()), False
    except (KeyboardInterrupt, Exception) as stop:
        # the weights are those of the step's start: with its random states (one process's), the step can be repeated
        if whole := not updating and WORLD == 1:
            folder.save(model, optimizer, mark, step)
        if not isinstance(stop, KeyboardInterrupt):
            raise
        where = "" if whole else ", from the last step that was saved, if one was"
        raise KeyboardInterrupt(f"stopped in step {step}; go on with the same arguments and --resume{where}") from None
    if RANK == 0:
        model_.save_adapter(model, folder.dir / "adapter", args.model)


def line(row):
    """One step, one line. loss near 0 is expected (ratio 1), r_align's mean is always (n - 1) / 2: watch win."""
    judge = {k: "-" if v is None else f"{v:.2f}" for k, v in ({"win": row["win_rate"]} | row["judge"]).items()}
    share = " ".join(f"{k[0]} {v:+.2f}" for k, v in row["shares"].items()) or "-"
    return (f"{row['step']:3d} loss {row['loss']:+.3f} |g| {row['grad_norm']:.2f} kl {row['kl']:.4f} "
            f"win {judge['win']} shares {share} tied {row['tied']:.2f} flip {judge['flip']} cyc {judge['cyclic']} "
            f"fail {judge['failed']} kappa {judge['kappa']} gate {row['gate_risky']:.2f}/{row['gate_harmless']:.2f} "
            f"valid {row['valid']:.2f} tok {row['tokens']:.0f} "
            f"safety {row['safety_share']:.2f} tok/s {row['sample_tok/s']:.0f}/{row['train_tok/s']:.0f} "
            f"diff {row['drift']:.1e} mean {row['drift_mean']:.1e} {row['seconds']:.1f}s")


def run(args):
    """Checks everything, then trains, saves the adapter and prints base beside trained."""
    if WORLD > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL)
    folder, tasks = Folder(args), data.load(args.data, training=True)
    family = "tiny"
    if args.model != family:  # which may not be built yet
        where = model_.find(args.model) / "config.json"
        family = model_.Config(model_.read_json(where), where).family
    for name, value in RECIPE[family].items():
        if vars(args).get(name) is None:
            setattr(args, name, value)
    if args.tasks > len(tasks):
        raise ValueError(f"--tasks {args.tasks}: {args.data} has only {len(tasks)} tasks: take no more")
    if any(task.label is None for task in tasks) and (args.judge == "rule" or args.reward == "scalar"):
        raise ValueError(f"--data {args.data}: its records have no labels: take --judge model, endpoint or human, "
                         "and --reward pairwise")
    judge = None if RANK else open_judge(args.judge, args.judge_model, args.judge_url, args.judge_calls,
                                         folder.dir / "verdicts.jsonl")
    from_first(lambda: canaries(judge, 0))  # is it there, and can it tell? The first step finds these in the ledger
    from_first(lambda: data.ensure_base(args.model))
    model, tokenizer = model_.load(args.model)
    model.recompute = args.recompute
    model_.add_lora(model, args.rank, args.alpha, generator=torch.Generator().manual_seed(args.seed))
    config = vars(args) | dict(commit=git_commit(), python=platform.python_version(), torch=torch.__version__,
                               device=str(model.device), threads=torch.get_num_threads(), system=SYSTEM_VERSION)
    if RANK == 0:
        folder.dir.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            folder.state.unlink(missing_ok=True)  # an older run's: a later --resume would go on with that one,
            shutil.rmtree(folder.dir / "adapter", ignore_errors=True)  # and eval.py take this for the new one's
        (folder.dir / "config.json").write_text(json.dumps(config, indent=1))
    train(args, model, tokenizer, tasks, folder, judge)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0 and not args.no_eval:
        evaluation.closing(model, tokenizer, args.gate)


def main():
    try:
        run(arguments())
    except KeyboardInterrupt as stop:
        sys.exit(print(f"\ntrain.py: {str(stop) or 'interrupted; no step was cut'}", file=sys.stderr) or 130)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)
    except (RuntimeError, OSError) as error:
        place = f" process {RANK} of {WORLD} (if another ended first, its line says why)" if WORLD > 1 else ""
        sys.exit(print(f"train.py{place}: {error}", file=sys.stderr) or 1)


if __name__ == "__main__":
    main()
