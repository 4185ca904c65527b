"""MOSAIC's training loop: sample a group of trajectories per task, let a judge compare them, push
the adapter towards those that win.

One step of the loop, and the code that does it. Marks: see preference.py.

    1. Draw tasks, and sample n = 4 [1] trajectories of each, in the free
       grammar at temperature 1.                                             draw_tasks, sample
    2. Ask the judge about every pair of a group, in both orders [2+]; every
       ten steps also about pairs with known answers.                        judge_pairs, canaries
    3. R = r_align + r_fmt - p_len [2+].                                     reward_terms
    4. Group-relative advantages [2+]; in a group that is all tied r_fmt
       alone acts, and one with an unscored pair gives none [ours].          group_advantages
    5. Logprobs under the distribution that sampled, of the policy and of
       the reference, which is the policy with its adapter switched off;
       the GRPO loss [2+], or the direct preference loss on the same groups'
       pairs [ours]; its gradient.                                           gradient, accumulate
    6. One AdamW step.                                                       in `train` itself
    7. One line: does it win against the frozen base, where does the gate
       open, which term owns the reward?                                     log_row, log_line

Deviations and choices, all [ours]
1. LoRA instead of all weights; learning rate, KL weight, clip, steps and tasks a step (`RECIPE`):
   nothing of it is published.
2. One optimiser step a batch, so the ratio of new to old probability starts at 1 and the clip
   rarely bites; linear warm-up and decay of the learning rate.
3. Which tasks a step takes (`draw_tasks`).

    python train.py                # builds the tiny base if it is absent; then a line a step, such
                                   # as "  0 loss +0.115 |g| 0.04 ..." (`log_line` explains each
                                   # word); then base beside trained on held-out suites
    python train.py --model qwen2.5-7b --data DIR \\
        --judge endpoint --judge-url http://host:8000/v1 --judge-model NAME
    torchrun --nproc-per-node 2 train.py       # data-parallel: each process samples and
                                               # differentiates its share of the tasks

Of several processes the first one judges, logs and writes; all take the same step. If one dies, all
end. Four names speak of it in the method's part: `my_part` (this process's share of a list),
`gather` (the shares, whole again), `add_up` (sums gradients and logs) and `from_first` (what the
first process computed, handed to all). Next file: model.py.
"""
import functools
import json
import math
import os
import platform
import random
import sys
import time
from collections import Counter, defaultdict, namedtuple
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import chain, permutations
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import data
import eval as evaluation
from data import page
from data.controls import CANARIES
from data.explain import explain
from data.record import git_commit, group_records, versions
from model import (
    CHECKPOINTS,
    Config,
    Tokenizer,
    Transformer,
    adapter_state,
    add_lora,
    default_device,
    find,
    fingerprint,
    is_finite,
    json_line,
    load,
    load_adapter_state,
    progress,
    read_family,
    read_json,
    read_lines,
    save_adapter,
    write_json,
    write_whole,
)
from mosaic import (
    SYSTEMS,
    Parser,
    count_option,
    gate_option,
    rollout,
    run_command,
    run_folder,
    sampled_logprobs,
)
from preference import (
    Judge,
    add_judge_flags,
    all_tied,
    audit,
    check_judge_flags,
    compare,
    compare_sparingly,
    digest,
    dpo_loss,
    group_advantages,
    grpo_loss,
    judge_from_flags,
    length_penalty,
    pairs,
    reward_terms,
    rule_judge,
    shares,
    transcript,
    win_rate,
)
from tools import Task, play

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a run, with the defaults of a real model. All [ours] but those
    marked."""
    # LoRA adds (alpha / rank) B A to the weight of every linear layer of a block: at rank 16 some
    # 0.5 % of a 7B's weights are trained.
    rank: int = 16
    alpha: float = 32  # twice the rank: the usual start
    # The peak of AdamW's learning rate. LoRA bears some ten times the rate of full fine-tuning.
    lr: float = 2e-5
    # One step of the optimiser takes tasks x group_size trajectories: 64.
    tasks: int = 16
    group_size: int = 4  # n trajectories a task [1]
    steps: int = 200  # an estimated 9 to 15 hours for the three real models, on one H100
    # Weight of the KL to the base. It holds the policy near it: a reward says nothing of language.
    kl_coef: float = 0.02
    length_budget: int = 400  # L0 of the length penalty, in sampled tokens of a trajectory [1]
    # Padded tokens of one forward and backward: bounds the memory, changes nothing in the gradient.
    micro_tokens: int = 8192
    # A block keeps only its input for the backward pass and computes the rest again: a third more
    # work, but a 14B does not fit 80 GB without it.
    recompute: bool = True
    data: str = "train"  # the tasks: an embedded name, a .jsonl file, Agent-SafetyBench's folder
    # What a run is about: the method by default; every other value is an ablation, or saves.
    objective: str = "grpo"  # or dpo: the direct loss, on each pair that one side won
    reward: str = "pairwise"  # or scalar: each trajectory's own outcome in the place of r_align
    pairs: str = "all"  # or sorted: what follows from the judge's other verdicts is not asked
    gate: str | float = "learned"  # always, never, or a bias on the logit that opens a check
    # Every so many steps the policy plays the tasks of the win rate: 16 rollouts, which are much
    # beside a step's 40 (SmolLM2-135M) and little beside 192 (tiny).
    watch_every: int = 1
    seed: int = 0  # of all that is random: which tasks, which tokens, the adapter's first weights
    # The closing tables: of which held-out splits, and of how many tasks of each suite in each of
    # them (None: all; twins count).
    splits: tuple = ("domains",)
    limit: int | None = None


# By family. tiny learns in minutes, on two CPU cores: a high rate under a stronger KL, more tasks
# in fewer steps. Its whole trajectory is some 80 tokens, and its activations fit anywhere.
RECIPE = {
    "tiny": Recipe(lr=1.5e-3, kl_coef=0.05, length_budget=80, tasks=48, steps=60,
                   micro_tokens=4096, recompute=False),
    # SmolLM2-135M after its warm start: minutes a step on two cores, so few tasks. At 1e-3, with 5
    # tasks of 8 trajectories, its gate swung from step to step. After 24 steps a third of the gates
    # that should open stood at .3 to .5, closed for greedy decoding; after 32, on a base whose gate
    # was wider, nearly all were open, and half of those that need not be. Half of the phrases are
    # new to it: RL hardly corrects what is said of those that its warm start has shown.
    "compact": Recipe(lr=5e-4, length_budget=170, tasks=10, steps=32, micro_tokens=4096,
                      recompute=False, watch_every=4, splits=("domains", "wordings"), limit=40,
                      data="train_varied"),
    "qwen2.5": Recipe(),
    "qwen3": Recipe(lr=3e-5),  # the smallest of the three
    "phi-4": Recipe(lr=1e-5),  # the largest
}

# A run stops when the sampler's and the trainer's logprobs of the same tokens differ by more:
# (largest, mean). fp32: 1e-4 and 1e-6 are usual, one token of some four million was off by 1.6e-3,
# and a wrong mask or cache gives 0.1 and more. In 16 bits a card rounds a product of 10 rows
# (sampling) differently from one of 8,192 (training): with random weights single tokens differed by
# 0.35. So only the mean is checked there; 0.2 means ratios wrong by a fifth.
MAX_DRIFT = {
    torch.float32: (1e-2, 1e-4),
    torch.bfloat16: (math.inf, 0.2),
    torch.float16: (math.inf, 0.2),
}
# Tasks of the win rate: the base plays each at the start, the policy every `watch_every` steps.
N_FIXED = 16


def train(model: Transformer, tokenizer: Tokenizer, tasks: list, judge: Judge | None,
          folder: "Folder", recipe: Recipe) -> None:
    """The loop. Trains the model's adapter in place; writes logs and states to the folder.

    tasks: [Task] to draw from. judge: None in all processes but the first.
    """
    generator, rng = seeded_generators(recipe.seed, model.device)
    # Learning shows in a win rate against the base on fixed tasks: the mean of r_align cannot rise.
    base_rollouts = sample_base(model, tokenizer, fixed_tasks(tasks, recipe.seed), recipe)
    # No weight decay: the KL already pulls towards the base, which is an adapter of zeros.
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=recipe.lr, weight_decay=0.0)

    # start: where the newest step began, or the folder's state; saved when a run is stopped.
    with resumable(folder, model, optimizer, generator, rng) as start:
        for step in progress_bar(start.step, recipe.steps):
            times = [clock()]  # for tokens a second, see `speed`
            # 1. Sample. `watched`: one rollout of each fixed task, to compare with the base's.
            drawn = draw_tasks(tasks, recipe.tasks, rng)
            compared = base_rollouts if step % recipe.watch_every == 0 else []
            groups, watched = sample(
                model, tokenizer, drawn, [each.task for each in compared], recipe, generator)
            times.append(clock())
            # A state is written only now: one whose samples no longer parse is not.
            folder.keep(model, optimizer, start, groups)

            # 2. Judge, in the first process only, which holds the ledger of what was asked.
            verdicts = from_first(
                lambda: judge_pairs(judge, groups, watched, compared, recipe.pairs, step))
            times.append(clock())

            # 3. Rewards: of each group the terms that add up to R, each (n,).
            rewards = [reward_terms(group, P, recipe.reward, recipe.length_budget)
                       for group, P in zip(groups, verdicts.preferences)]

            # 4. Advantages (n,) of each group.
            advs = [group_advantages(terms) for terms in rewards]

            # 5. Logprobs, loss and gradient, checked and clipped.
            log = gradient(model, tokenizer, groups, advs, verdicts.preferences, recipe, step)

            # 6. One optimiser step. A stop from here to the next step goes back to the last save.
            start.can_repeat = False
            take_step(optimizer, learning_rate(step, recipe.steps, recipe.lr))
            times.append(clock())

            # 7. Write down what happened, and say it.
            row = log_row(step, log, groups, watched, verdicts, rewards, advs, times)
            folder.log_step(row, groups, verdicts, rewards, advs)
            start.move_to(step + 1, random_states(generator, rng))
            print_step(row)


# --------------------------------------------------------------------------- 1: sample trajectories
def sample(model: Transformer, tokenizer: Tokenizer, tasks: list, fixed: list,
           recipe: Recipe, generator: torch.Generator) -> tuple:
    """-> (groups [[Rollout]], one a task; [Rollout], one of each fixed task).

    All in one batch, so that the fixed tasks cost little. Each process samples its share, and gets
    what all sampled.
    """
    tasks = my_part(tasks)
    fixed = my_part(fixed)
    sizes = [recipe.group_size] * len(tasks) + [1] * len(fixed)
    # free: the agent may err in the form of a turn. r_fmt teaches the form, and eval.py, which is
    # strict, then has little to correct.
    rollouts = rollout(
        model, tokenizer, tasks + fixed, sizes,
        grammar="free", gate_mode=recipe.gate, generator=generator,
    )
    first_watched = len(rollouts) - len(fixed)  # rollouts come back in the order of the tasks
    in_groups = gather(rollouts[:first_watched])
    watched = gather(rollouts[first_watched:])
    return slices(in_groups, recipe.group_size), watched


def draw_tasks(tasks: list, n: int, rng: random.Random) -> list:
    """n tasks for a step: of each suite its share, and a harmful task beside its twin [ours].

    Drawn blindly a step of few tasks is lopsided: one of harmless tasks alone teaches only that
    checks are idle, and the gate, which all tasks share, follows the last few steps. (Where n cuts
    the last pair, one of them stands alone.)
    """
    share = Counter(task.suite for task in tasks)
    waiting = defaultdict(list)  # {suite: [its tasks, twins together]}
    for unit in twins_together(rng.sample(tasks, len(tasks))):
        waiting[unit[0].suite].append(unit)

    drawn = []
    while len(drawn) < n:
        so_far = Counter(task.suite for task in drawn)
        due = {suite: share[suite] / len(tasks) * (len(drawn) + 1) for suite in waiting}
        suite = max(waiting, key=lambda suite: due[suite] - so_far[suite])  # furthest behind
        drawn += waiting[suite].pop()
        if not waiting[suite]:
            del waiting[suite]
    return drawn[:n]


def twins_together(tasks: list) -> list:
    """[[a task, and its twin if that is there, too], ...]"""
    units = {}
    for task in tasks:
        both = min(task.id, task.twin or task.id)  # the same for a task and its twin
        units.setdefault(both, []).append(task)
    return list(units.values())


def fixed_tasks(tasks: list, seed: int) -> list:
    """The tasks of the win rate: the same in every step, and in a run that is resumed."""
    picker = random.Random(seed + 1)  # not the stream that draws this run's tasks
    return picker.sample(tasks, min(N_FIXED, len(tasks)))


def sample_base(model: Transformer, tokenizer: Tokenizer, fixed: list, recipe: Recipe) -> list:
    """One rollout of the base for each fixed task. It has a generator of its own: a run that is
    resumed samples the same ones again."""
    generator, _ = seeded_generators(recipe.seed, model.device)
    with model.adapter_off():
        _, rollouts = sample(model, tokenizer, [], fixed, recipe, generator)
    return rollouts


# ----------------------------------------------------------------------------------- 2: ask a judge
@dataclass(frozen=True)
class Verdicts:
    """What the judge said of one step."""
    preferences: list  # P (n, n) of each group, as preference.compare gives it, or all NaN
    win_rate: float | None  # of the policy against the base; None where no pair was scored
    audit: dict  # what the verdicts say of their judge: {"flip", "tie", ..., "canaries"}
    asked: list  # one dict a pair that the judge was asked about, as `compare` records it


def judge_pairs(judge: Judge, groups: list, watched: list, base_rollouts: list, how: str,
                step: int) -> Verdicts:
    """Every pair of every group, in both orders; then the watched rollouts against the base's.

    how: all | sorted (`compare_sparingly`). RuntimeError: the judge fails its canaries, or is away.
    """
    # Asked anew every tenth step, which is often enough to find out that a judge has changed.
    canaries_won = canaries(judge, step) if step % 10 == 0 else None

    asked = []  # one dict a pair: what the judge said in either order, for its audit
    if how == "all":
        # In bulk first: a model judges in batches, and a server takes a few calls at a time.
        judge.prepare(ordered_pairs(groups))
        found = [compare(judge, group, asked.append) for group in groups]
    else:
        found = compare_sparingly(judge, groups, asked.append)
    about_judge = audit(groups, found, asked)  # before unscored groups are blanked
    about_judge["canaries"] = canaries_won

    judge.prepare(ordered_pairs(zip(watched, base_rollouts)))
    won, _ = win_rate(judge, watched, base_rollouts)  # asks nothing more: all of it is known by now
    return Verdicts([blank_if_unscored(P) for P in found], won, about_judge, asked)


def ordered_pairs(groups) -> list:
    """Both orders of every pair of each group."""
    found = []
    for group in groups:
        found += permutations(group, 2)
    return found


def blank_if_unscored(P: torch.Tensor) -> torch.Tensor:
    """P (n, n) -> P, or all NaN if any pair has no verdict.

    GRPO's advantages do this by themselves, but the direct loss would train on the pairs that are
    left: an outage must not choose what is learned.
    """
    return torch.full_like(P, math.nan) if P.isnan().any() else P


def canaries(judge: Judge, step: int) -> float:
    """Pairs whose better side is known, one a suite -> the share that the better side wins.

    RuntimeError: the worse one wins somewhere, or the better one nowhere.
    """
    suites = list(CANARIES)
    played = [canary_pair(suite, step) for suite in suites]
    try:
        judge.prepare(ordered_pairs(played))
    except RuntimeError as error:  # too many of them have no verdict
        words = judge.words_on(*played[0])
        raise RuntimeError(f"step {step}: at its canaries: {error}{words}") from None
    results = [compare(judge, pair)[0, 1].item() for pair in played]  # 1: the better one won
    if 0 in results or 1 not in results:
        words = {1.0: "won", 0.0: "lost"}
        each = [f"{suite} {words.get(result, 'not won')}" for suite, result in zip(suites, results)]
        # The first that was lost; where none was, the first of all, for none was won.
        worst = played[results.index(0) if 0 in results else 0]
        raise RuntimeError(f"step {step}: judge {judge.name} fails its canaries: {', '.join(each)}"
                           f"{judge.words_on(*worst)}")
    return results.count(1) / len(results)


def canary_pair(suite: str, step: int) -> list:
    """[the better, the worse] Rollout of one task of a suite, both played by scripts."""
    task = canary_task(suite)
    # With the step in its id the question is a new one, which the ledger cannot answer.
    task = replace(task, id=f"canary {step}: {task.id}")
    better, worse = CANARIES[suite]
    return [play(task, better(task)), play(task, worse(task))]


@functools.cache  # a suite of 1,000 tasks would be read again for each canary
def canary_task(suite: str) -> Task:
    """The first task of a suite that has a goal and something that can go wrong in this suite's
    way."""
    for task in data.load(suite):
        # Elsewhere an injection or a secret is what can go wrong; in these two any call may.
        if task.goal and (task.injected or task.secrets or suite in ("harm", "benign")):
            return task
    raise AssertionError(f"no task of suite {suite} can be a canary")


# ------------------------------------------------------------------------------------ 5: a gradient
def gradient(model: Transformer, tokenizer: Tokenizer, groups: list, advs: list,
             preferences: list, recipe: Recipe, step: int) -> dict:
    """The gradient of the whole step, of all processes, clipped at a norm of 1 -> what the log says
    of it. RuntimeError, before any weight has moved: sampler and trainer disagree."""
    log = accumulate(model, tokenizer, groups, advs, preferences, recipe)
    trained = trained_parameters(model)
    log = add_up(log, trained)  # with the other processes' gradients
    log["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
    drift_sum = log.pop("drift_sum")
    n_tokens = log.pop("drift_tokens")
    log["drift_mean"] = drift_sum / max(1, n_tokens)

    # A policy gradient is only right under the distribution that was sampled from. Another mask,
    # temperature or cache position in the trainer does not crash: it only learns from noise.
    largest, mean = MAX_DRIFT[model.dtype]
    agree = log["drift"] <= largest and log["drift_mean"] <= mean  # NaN compares as False: no
    if not (agree and math.isfinite(log["grad_norm"])):
        raise RuntimeError(
            f"step {step}: gradient norm {log['grad_norm']}, |logprob difference| "
            f"{log['drift']:.3g}, mean {log['drift_mean']:.3g}: sampler and trainer disagree, or "
            "the run diverged; --resume repeats this step: give it a lower --lr"
        )
    return log


# Trajectories that stay together, because their loss needs all of them or because they begin with
# the same prompt, which is then computed once. advantages: (len(rollouts),), or None in a pair.
Unit = namedtuple("Unit", "rollouts advantages")


def accumulate(model: Transformer, tokenizer: Tokenizer, groups: list, advs: list,
               preferences: list, recipe: Recipe) -> dict:
    """Adds up the gradient of this process's groups, micro-batch by micro-batch.

    groups: [[Rollout]], advs: [(n,)] and preferences: [(n, n)] of the whole step. -> {"loss", "kl",
    "clipped": sums that were already divided by the step's normaliser; "drift", "drift_sum": the
    largest |logprob - that of the sampling| and the sum of them; "drift_tokens": over how many}.
    """
    grpo = recipe.objective == "grpo"
    # One normaliser for all micro-batches, all processes and all groups, tied ones included. A mean
    # of each micro-batch would weigh a token by the batch that it fell into.
    if grpo:
        units = live_slices(groups, advs, recipe.micro_tokens)
        normaliser = sum(len(rollout.logprobs) for rollout in flat(groups))  # sampled tokens
    else:
        units = won_pairs(groups, preferences)
        normaliser = sum(len(pairs(P)) for P in preferences)

    log = {"loss": 0.0, "kl": 0.0, "clipped": 0.0}
    log |= {"drift": 0.0, "drift_sum": 0.0, "drift_tokens": 0}
    batches = micro_batches(units, recipe.micro_tokens)
    for batch in progress(batches, what="update", unit="micro-batch"):
        rollouts = flat(unit.rollouts for unit in batch)
        # All (N,): the sampled tokens of these rollouts, one after the other, and no others.
        old = torch.tensor(flat(rollout.logprobs for rollout in rollouts), device=model.device)
        as_drawn = {"gate_mode": recipe.gate, "strict": False}  # `sample` drew in the free grammar
        # The reference is the same weights without the adapter: no second model in memory.
        with torch.no_grad(), model.adapter_off():
            ref = sampled_logprobs(model, tokenizer, rollouts, **as_drawn)
        new = sampled_logprobs(model, tokenizer, rollouts, **as_drawn)

        if grpo:
            token_advs = per_token(batch).to(model.device)
            loss, kl, clipped = grpo_loss(
                new, old, ref, token_advs, normaliser, kl_coef=recipe.kl_coef)
            log["kl"] += kl.item()
            log["clipped"] += clipped.item()
        else:
            loss = direct_loss(new, ref, rollouts, normaliser, recipe.length_budget)
        loss.backward()  # adds to the gradient, and frees this micro-batch's activations

        difference = (new.detach() - old).abs()  # (N,)
        log["loss"] += loss.item()
        log["drift"] = max(log["drift"], difference.max().item())
        log["drift_sum"] += difference.sum().item()
        log["drift_tokens"] += len(difference)
    return log


def live_slices(groups: list, advs: list, budget: int) -> list:
    """GRPO's units: of this process's part of the groups that carry an advantage, each group whole,
    or the fewest slices of it that stay under the budget (`Recipe.micro_tokens`)."""
    live = [(group, adv) for group, adv in zip(groups, advs) if is_live(adv)]
    units = []
    for group, adv in my_part(live):
        size = largest_fitting(group, budget)
        for rollouts, rollout_advs in zip(slices(group, size), slices(adv, size)):
            units.append(Unit(rollouts, rollout_advs))
    return units


def is_live(adv: torch.Tensor) -> bool:
    """adv (n,) of a group -> does it give a gradient? It is all zeros where a pair is unscored, or
    where r_align ties and r_fmt, too."""
    return bool(adv.any())


def won_pairs(groups: list, preferences: list) -> list:
    """The direct loss's units: [chosen, rejected] of every pair that one side won."""
    units = []
    for group, P in my_part(list(zip(groups, preferences))):  # ties and unscored pairs are not in
        for chosen, rejected in pairs(P).tolist():
            units.append(Unit([group[chosen], group[rejected]], None))
    return units


def per_token(batch: list) -> torch.Tensor:
    """Each sampled token gets its trajectory's advantage -> (N,): the whole trajectory was judged,
    so turns before a tool's result share in the verdict."""
    rollouts = flat(unit.rollouts for unit in batch)
    counts = [len(rollout.logprobs) for rollout in rollouts]
    advs = torch.cat([unit.advantages for unit in batch])  # (trajectories,)
    return advs.repeat_interleave(torch.tensor(counts))  # (N,)


def direct_loss(new: torch.Tensor, ref: torch.Tensor, rollouts: list, normaliser: int,
                length_budget: int) -> torch.Tensor:
    """`dpo_loss` of rollouts [chosen, rejected, chosen, rejected, ...]; new and ref (N,) are the
    logprobs of their sampled tokens."""
    policy = sum_each(new, rollouts)  # (2 pairs,)
    reference = sum_each(ref, rollouts)  # (2 pairs,)
    lengths = [rollout.n_written for rollout in rollouts]
    p_len = length_penalty(lengths, length_budget).to(new.device)  # (2 pairs,)

    # Chosen and rejected take turns, so as rows of two they are the two columns, (pairs,) each.
    chosen, rejected = policy.view(-1, 2).unbind(1)
    ref_chosen, ref_rejected = reference.view(-1, 2).unbind(1)
    p_len_chosen, p_len_rejected = p_len.view(-1, 2).unbind(1)
    return dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, p_len_chosen, p_len_rejected, normaliser)


def sum_each(logprobs: torch.Tensor, rollouts: list) -> torch.Tensor:
    """logprobs (N,) of all the rollouts' sampled tokens -> the sum of each rollout's."""
    counts = [len(rollout.logprobs) for rollout in rollouts]
    return torch.stack([part.sum() for part in logprobs.split(counts)])  # (rollouts,)


# --------------------------------------------------------------------------------- 5: micro-batches
def packed_length(rollouts: list) -> int:
    """Tokens of rollouts that begin with one prompt, which is computed once."""
    prompt_length = rollouts[0].prompt_length
    return prompt_length + sum(len(rollout.ids) - prompt_length for rollout in rollouts)


def largest_fitting(group: list, budget: int) -> int:
    """The largest size of slices of the group that all stay under the budget; at least 1, for a
    trajectory cannot be cut."""
    for size in range(len(group), 1, -1):
        if all(packed_length(part) <= budget for part in slices(group, size)):
            return size
    return 1  # over the budget, and tried all the same


def micro_batches(units: list, budget: int) -> list:
    """Units in batches of at most `budget` padded tokens, if each unit is a row.

    (Units side by side that have the same prompt are later joined into one longer row, see
    mosaic.share_prompts. The other rows are then padded to that length, so a batch may exceed the
    budget.) Sorted by length; the order changes nothing in the gradient.
    """
    batches = []
    # By length, so that little is padded; each unit then sets the width of the batch it joins.
    for unit in sorted(units, key=lambda unit: packed_length(unit.rollouts)):
        length = packed_length(unit.rollouts)
        if not batches or (len(batches[-1]) + 1) * length > budget:  # rows x the longest of them
            batches.append([])
        batches[-1].append(unit)
    return batches


def slices(items, size: int) -> list:
    """A list, or a tensor's first dimension, cut into pieces of `size`; the last may be shorter."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def flat(lists) -> list:
    """The items of the lists, in one list."""
    return list(chain.from_iterable(lists))


# --------------------------------------------------------------------------------- 6: the optimiser
def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up in five steps, while Adam's averages are young; then linearly to a tenth of the peak."""
    return peak * min((step + 1) / 5, 1 - 0.9 * step / steps)


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One AdamW step. The gradients are gone after it, and the next ones add up from nothing."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def trained_parameters(model: Transformer) -> list:
    """The adapter's; `add_lora` froze all others."""
    return [p for p in model.parameters() if p.requires_grad]


# ---------------------------------------------------------------------------------- 7: the log line
def log_line(row: dict) -> str:
    """One step in one line. Its words, in their order ("-": there is nothing to say it of):

    loss    GRPO: near 0 is expected. At ratio 1 it is minus the mean advantage of a token: those
            of a group sum to 0, but a longer trajectory counts with more tokens. It is no curve to
            watch. The direct loss starts at .69 and falls.
    |g|     Norm of the gradient before it is clipped at 1; 0: no group carried any, no update.
    kl      KL to the base over the groups that give a gradient, per sampled token of the step;
            0 with the direct loss.
    win     Share of (trajectory, frozen base trajectory) pairs won on 16 fixed tasks out of those
            trained on, ties half; "-" in a step that does not play them (`watch_every`): *the*
            curve to watch.
            r_align's mean is (n - 1) / 2 = 1.5 whatever is learned, for each pair hands out one
            point.
    shares  How much of the reward's variance each term owns, by its first letter (or as many as
            tell it from the others): a, f, l for r_align, r_fmt and p_len. They sum to 1; a
            negative one works against the sum.
    tied    Share of groups whose r_align all ties: r_fmt alone acts in them. At 1 nothing but the
            form is learned.
    flip    Share of pairs whose two orders disagree, and so tie.
    cyc     Share of groups in which the judge contradicts itself: a beats b beats c beats a. The
            rule judge never does.
    fail    Share of pairs without a verdict; their groups give no gradient.
    kappa   Agreement of the judge with the rule beyond chance, where tasks have labels: 1 for the
            rule itself, "-" where all tie.
    gate    Rate of opened checks on risky / on harmless steps.
    valid   Share of turns that parse in the free grammar. Near 0 the model does not keep the form,
            and all groups tie.
    tok     The agent's tokens a trajectory.
    safety  Share of them inside of checks.
    tok/s   Sampled tokens a second / tokens of the trained trajectories, each with its prompt, a
            second of the update.
    diff    Largest |logprob in sampling - in training| of a token; above .01 (fp32) the run stops.
    mean    Mean of the same; above 1e-4 (fp32) or .2 (16 bits) the run stops. See `MAX_DRIFT`.

    The last number is the seconds of the step.
    """
    about_judge = row["judge"]
    owned = shares_text(row["shares"])
    return " ".join([
        f"{row['step']:3d} loss {row['loss']:+.3f} |g| {row['grad_norm']:.2f} kl {row['kl']:.4f}",
        f"win {rate_text(row['win_rate'])} shares {owned} tied {row['tied']:.2f}",
        f"flip {rate_text(about_judge['flip'])} cyc {rate_text(about_judge['cyclic'])}",
        f"fail {rate_text(about_judge['failed'])} kappa {rate_text(about_judge['kappa'])}",
        f"gate {rate_text(row['gate_risky'])}/{rate_text(row['gate_harmless'])}",
        f"valid {row['valid']:.2f}",
        f"tok {row['tokens']:.0f} safety {row['safety_share']:.2f}",
        f"tok/s {row['sample_tok/s']:.0f}/{row['train_tok/s']:.0f}",
        f"diff {row['drift']:.1e} mean {row['drift_mean']:.1e} {row['seconds']:.1f}s",
    ])


# --------------------- the method ends here; what follows is plumbing -----------------------------
# -------------------------------------------------------------------------- what a step's log holds
def print_step(row: dict) -> None:
    """The first process prints the step's line."""
    if RANK != 0:
        return
    tqdm.write(log_line(row))
    if row["cores"] < ENOUGH_CORES and torch.get_num_threads() > 1 and not threads_are_patient():
        say_once("other programs are on the cores, and torch's threads spin while they wait for "
                 "one another: with OMP_WAIT_POLICY=PASSIVE or OMP_NUM_THREADS=1 in the "
                 "environment (Ctrl-C, then --resume) steps were 4 to 6 times faster")


# Processor seconds a second of a step. A process that has a core to itself comes near 1, whatever
# it computes, and its threads add to that.
ENOUGH_CORES = 0.75


def threads_are_patient() -> bool:
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


@functools.cache
def say_once(text: str) -> None:
    tqdm.write(text)


def progress_bar(first_step: int, steps: int):
    """The numbers of the steps that are left, with a bar in the first process."""
    hidden = True if RANK else None  # None: shown if standard error is a terminal
    return tqdm(range(first_step, steps), initial=first_step, total=steps, disable=hidden)


def rate_text(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2f}"


def shares_text(owned: dict) -> str:
    """{a term's name: its share} -> "a +0.98 f +0.00 ..."; "-" if no group carried a gradient."""
    texts = [f"{short} {owned[name]:+.2f}" for name, short in short_names(list(owned)).items()]
    return " ".join(texts) or "-"


def short_names(names: list) -> dict:
    """{name: its first letter, or as many as tell it from the other names}.
    >>> short_names(["align", "format", "length", "latency"])
    {'align': 'a', 'format': 'f', 'length': 'le', 'latency': 'la'}
    """
    found = {}
    for name in names:
        others = [other for other in names if other != name]
        size = 1
        # A name that another one begins with, such as "len" of "length", stays whole.
        while size < len(name) and any(other.startswith(name[:size]) for other in others):
            size += 1
        found[name] = name[:size]
    return found


def log_row(step: int, log: dict, groups: list, watched: list, verdicts: Verdicts, rewards: list,
            advs: list, times: list) -> dict:
    """One line of metrics.jsonl.

    `log_line` explains the fields that it prints (its diff and mean are "drift" and "drift_mean").
    The others: "clipped", the share of sampled tokens whose ratio the clip held; in "judge", "tie",
    the share of pairs that tie, flips among them, and "canaries", the share of pairs with a known
    answer that the better side won (null in steps that asked none); "cores", processor seconds a
    second of sampling and update.
    """
    tied = [all_tied(terms["align"]) for terms in rewards]
    # Inside the groups whose gradient R gives: in a tied one r_fmt acts alone, in others nothing.
    live = []
    for terms, adv, is_tied in zip(rewards, advs, tied):
        if is_live(adv) and not is_tied:
            live.append(terms)
    row = {"step": step}
    row.update(log)
    row["win_rate"] = verdicts.win_rate
    row["shares"] = shares(stacked(live))
    row["tied"] = sum(tied) / len(tied)
    row["judge"] = verdicts.audit
    row.update(describe(flat(groups)))
    row.update(speed(groups, watched, advs, times))
    return row


def stacked(rewards: list) -> dict:
    """[{name: (n,)}] of groups -> {name: (groups, n)}; {} of none."""
    names = rewards[0] if rewards else {}
    stacks = {}
    for name in names:
        stacks[name] = torch.stack([terms[name] for terms in rewards])  # (groups, n)
    return stacks


def describe(rollouts: list) -> dict:
    """What a step's rollouts look like: where checks open, what parses, how long they are."""
    n_written = sum(rollout.n_written for rollout in rollouts)
    return {
        "gate_risky": opened_rate(rollouts, risky=True),
        "gate_harmless": opened_rate(rollouts, risky=False),
        "valid": share_parsed(rollouts),
        "safety_share": sum(rollout.safety_tokens for rollout in rollouts) / max(1, n_written),
        "tokens": n_written / len(rollouts),
    }


def share_parsed(rollouts: list) -> float:
    """Share of all turns that parse in the free grammar."""
    turns = flat(rollout.turns for rollout in rollouts)
    return sum(turn is not None for turn in turns) / len(turns)


def opened_rate(rollouts: list, risky: bool) -> float | None:
    """Share of risky, or of harmless, steps in which the agent opened a check; None where there are
    none. Steps of tasks without a label (None) are neither."""
    gates = flat(rollout.gates for rollout in rollouts)
    opened = [gate.opened for gate in gates if gate.risky is risky]
    return sum(opened) / len(opened) if opened else None


def speed(groups: list, watched: list, advs: list, times: list) -> dict:
    """Seconds of a step, tokens a second, and how many cores it had for itself; times: its start,
    then when it had sampled, judged and updated."""
    began, sampled, judged, updated = times
    # A judge may wait for a server or a person: that takes no processor, on an idle machine, too.
    working = (sampled.wall - began.wall) + (updated.wall - judged.wall)
    processor = (sampled.processor - began.processor) + (updated.processor - judged.processor)
    n_written = sum(rollout.n_written for rollout in flat(groups) + watched)
    live = [group for group, adv in zip(groups, advs) if is_live(adv)]
    n_trained = sum(len(rollout.ids) for rollout in flat(live))
    return {
        "seconds": updated.wall - began.wall,
        "sample_tok/s": n_written / (sampled.wall - began.wall),
        "train_tok/s": n_trained / (updated.wall - judged.wall),
        "cores": processor / working,
    }


Clock = namedtuple("Clock", "wall processor")  # seconds; of the processor: of all its threads


def clock() -> Clock:
    return Clock(time.perf_counter(), time.process_time())


def rollout_lines(step: int | None, groups: list, verdicts: Verdicts, rewards: list,
                  advs: list) -> list:
    """The lines of rollouts.jsonl of one step, group after group: see data/record.py."""
    asked = defaultdict(list)
    for pair in verdicts.asked:
        asked[pair["task"]].append(pair)
    lines = []
    for group, P, terms, adv in zip(groups, verdicts.preferences, rewards, advs):
        names = [digest(transcript(rollout)) for rollout in group]  # as verdicts.jsonl has them
        terms = {name: values.tolist() for name, values in terms.items()}
        about_pairs = asked[group[0].task.id]
        lines += group_records(step, group, names, P.tolist(), about_pairs, terms, adv.tolist())
    return lines


# ---------------------------------------------------------------------------- to stop, and to go on
# A run stops after so many steps in a row in which less than half as many turns parse as once did.
# By then all groups tie, and that r_fmt acts in them has not brought the form back.
MAX_LOST = 3
# A base that hardly ever kept the form has none to lose.
LEAST_VALID = 0.5


@dataclass
class StepStart:
    """Where the newest step began: what it takes to do that step again."""
    step: int
    random: tuple  # of `random_states`
    best_valid: float = 0.0  # the largest share of turns that parsed in a step so far
    can_repeat: bool = True  # False from the moment the weights move until the step is written down
    lost: int = 0  # how many steps in a row have lost the form, this one included

    def move_to(self, step: int, states: tuple) -> None:
        self.step = step
        self.random = states
        self.can_repeat = True

    def check_form(self, valid: float, state_file: Path) -> None:
        """valid: the share of this step's turns that parse. RuntimeError: the form is lost."""
        self.best_valid = max(self.best_valid, valid)
        if self.best_valid >= LEAST_VALID and valid < self.best_valid / 2:
            self.lost += 1
        else:
            self.lost = 0
        if self.lost >= MAX_LOST:
            raise RuntimeError(
                f"step {self.step}: {valid:.2f} of the turns parse, where {self.best_valid:.2f} "
                f"did; the form has been lost for {MAX_LOST} steps, and nothing will bring it "
                f"back. The last good state is {state_file}: --resume goes on from it; give it a "
                "lower --lr"
            )


@contextmanager
def resumable(folder: "Folder", model, optimizer, generator: torch.Generator, rng: random.Random):
    """Goes on from the folder's state, if it has one, and yields a StepStart for the loop to keep.

    Ctrl-C, SIGTERM, or any error (a prompt too long, found when it is drawn): the state of the
    newest step's start is saved, so that --resume does that step again. Of several processes the
    first one saves, wherever the others are: all have the same weights, and it knows their
    generators as of there. Two states are not saved: one that has lost the form, and one whose
    logits are not finite. The last that was saved is still there then.
    """
    first_step = folder.restore(model, optimizer, generator, rng)
    best_valid = from_first(lambda: folder.open_logs(first_step))
    start = StepStart(first_step, random_states(generator, rng), best_valid)
    try:
        yield start
        folder.keep_last(model, optimizer, start)
    except (KeyboardInterrupt, Exception) as stop:
        # The weights are those of the start as long as the optimiser has not moved.
        is_kept = start.can_repeat and not start.lost and not isinstance(stop, FloatingPointError)
        if is_kept:
            save_undisturbed(folder, model, optimizer, start)
        if isinstance(stop, FloatingPointError):
            raise FloatingPointError(f"step {start.step}: {stop}; --resume goes on from the last "
                                     "step that was saved: give it a lower --lr") from None
        if not isinstance(stop, KeyboardInterrupt):
            raise
        advice = "go on with the same arguments and --resume"
        if not is_kept:
            advice += ", from the last step that was saved"
        raise KeyboardInterrupt(f"stopped in step {start.step}; {advice}") from None


def save_undisturbed(folder: "Folder", model, optimizer, start: StepStart) -> None:
    """A signal that came during a wait for other processes is only noticed after it: here."""
    try:
        folder.save(model, optimizer, start)
    except KeyboardInterrupt:
        folder.save(model, optimizer, start)


def seeded_generators(seed: int, device: torch.device) -> tuple:
    """-> (torch's generator, from which tokens are drawn; Python's, from which tasks are).

    Each process draws tokens of its own, but all must draw the same tasks.
    """
    generator = torch.Generator(device).manual_seed(seed + 10**6 * RANK)
    return generator, random.Random(seed)


def random_states(generator: torch.Generator, rng: random.Random) -> tuple:
    """-> ([the token generator's state in each process], the state of the tasks' generator)."""
    return gather([generator.get_state()]), rng.getstate()


# A key of config.json: this folder is a run's, and what has the names of OWN is ours to overwrite.
MARKER = "mosaic_run"
OWN = ("config.json", "metrics.jsonl", "rollouts.jsonl", "verdicts.jsonl", "report.html",
       "adapter", "state", "lock")


class Folder:
    """The folder of a run.

    config.json      all options, the recipe, versions: `run_config`
    metrics.jsonl    a line a step: `log_row`
    rollouts.jsonl   a line a trajectory: data/record.py
    verdicts.jsonl   the judge's ledger: preference.Judge
    report.html      all of it as a page, written at the end: data/page.py
    adapter/         the trained adapter, as peft writes one
    state/           what --resume goes on from: `save`
    lock             held while a run writes here: `_lock`
    """

    def __init__(self, path: str | Path, save_every: int = 10):
        """save_every: steps from one state to the next. ValueError: no folder to write in
        (`check_ours`), or another run is writing there."""
        self.path = Path(path)
        self.save_every = save_every
        self.config_file = self.path / "config.json"
        self.state_file = self.path / "state" / "state.pt"
        self.state = None  # what `open_state` found, until `restore`
        self.files = {}  # {name of a log, or "lock": its open file}
        if RANK == 0:
            check_ours(self.path)
            if self.config_file.exists():
                self._lock()

    def claim(self, config: dict) -> None:
        """Makes the folder, and marks a new one as a run's, before the judge writes into it."""
        if RANK != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if not self.config_file.exists():
            self._write_config(config)

    def _lock(self) -> None:
        """ValueError: another run is writing here. The system frees the lock when its process ends,
        however it ends. Without fcntl (Windows), and on a file system without locks, there is
        none."""
        if fcntl is None or "lock" in self.files:
            return
        file = (self.path / "lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"--out {self.path}: another run is writing there; wait for it, or "
                             "take another --out") from None
        except OSError:
            pass  # a file system without locks
        self.files["lock"] = file

    def close(self) -> None:
        """Closes the logs, and frees the lock."""
        for file in self.files.values():
            file.close()
        self.files = {}

    def open_state(self, options: dict) -> None:
        """For --resume: reads the state, if this is a folder of a run with the same options.

        A folder with a config.json and no state is of a run that was left before its first state
        was saved (by a person at the judge's first question): it starts at step 0. ValueError:
        there is nothing whole to go on from, or it is another run's.
        """
        if not self.state_file.exists() and not self.config_file.exists():
            raise ValueError(f"--resume: no {self.state_file}; start without --resume")
        config = read_json(self.config_file)
        if self.state_file.exists():
            self.state = self._read_state()
        for name, value in options.items():
            if config.get(name) != value:
                raise ValueError(
                    f"--resume: --{name.replace('_', '-')} of {self.path} is {config.get(name)}, "
                    f"not {value}; go on with that, or take another --out"
                )

    def _read_state(self) -> dict:
        try:
            # weights_only: a folder may be a stranger's, and a whole pickle runs code
            state = torch.load(self.state_file, weights_only=True, map_location="cpu")
            processes = len(state["random"][0])
            if not {"step", "adapter", "optimizer"} <= state.keys():
                raise KeyError
        except Exception as error:  # a cut file raises almost anything
            kind = type(error).__name__
            raise ValueError(
                f"{self.state_file}: not a whole state ({kind}); start without --resume") from None
        if processes != WORLD:
            raise ValueError(f"{self.state_file}: of {processes} processes; resume with as many")
        # A generator's state has another size on another kind of device.
        device = default_device()
        if len(state["random"][0][RANK]) != len(torch.Generator(device).get_state()):
            raise ValueError(f"{self.state_file}: written on another kind of device than {device}, "
                             "which draws other random numbers; resume it there")
        return state

    def check_base(self, model) -> None:
        """ValueError: the state is of another base. Weights may have been exchanged under one
        path."""
        if self.state is None or self.state.get("base") in (None, fingerprint(model)):
            return
        raise ValueError(f"{self.state_file}: trained on other weights than --model's are now; "
                         "restore them, or take another --out")

    def has_learned(self) -> bool:
        """Is there a run's state, or its adapter?"""
        return self.state_file.exists() or (self.path / "adapter" / "adapter_config.json").exists()

    def begin(self, config: dict, resume: bool) -> None:
        """From here on the folder is this run's, and --resume with the same options goes on."""
        if RANK != 0:
            return
        if not resume:
            # An older run's: a later --resume would go on with that state, and eval.py would take
            # that adapter for the new one. By name: what else lies there is not ours.
            for name in ("state/state.pt", "report.html", "adapter/adapter_model.safetensors",
                         "adapter/adapter_config.json"):
                (self.path / name).unlink(missing_ok=True)
        self._write_config(config)

    def _write_config(self, config: dict) -> None:
        with in_words(self.config_file):
            write_json(self.config_file, config)

    def restore(self, model, optimizer, generator: torch.Generator, rng: random.Random) -> int:
        """Puts everything where the state has it -> the step to go on with; 0 without a state."""
        if self.state is None:
            return 0
        state = self.state
        self.state = None  # its copy of the adapter and of AdamW's averages is not needed twice
        load_adapter_state(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        token_states, task_state = state["random"]
        generator.set_state(token_states[RANK])
        rng.setstate(task_state)
        return state["step"]

    def save(self, model, optimizer, start: StepStart) -> None:
        """Writes all that step `start.step` depends on: it is the next to be done. OSError: a full
        disk, say; the state before it is still whole."""
        if RANK != 0:
            return
        state = {
            "step": start.step,
            "base": fingerprint(model),
            "adapter": adapter_state(model),
            "optimizer": optimizer.state_dict(),
            "random": start.random,
        }

        def write(partial):
            # Through a file of Python's: by itself torch says of a full disk only "enforce fail".
            with partial.open("wb") as file:
                torch.save(state, file)

        with in_words(self.state_file):
            write_whole(self.state_file, write)

    def keep(self, model, optimizer, start: StepStart, groups: list) -> None:
        """Saves every so many steps. A state that has lost the form never replaces a good one.
        groups: what the state has sampled. RuntimeError: the form stays lost."""
        start.check_form(share_parsed(flat(groups)), self.state_file)
        if start.step % self.save_every == 0 and not start.lost:
            self.save(model, optimizer, start)

    def keep_last(self, model, optimizer, start: StepStart) -> None:
        """The same at the end of a run, where nothing more is sampled. FloatingPointError: the last
        update has made the adapter NaN or infinite."""
        if not all(is_finite(p.detach()) for p in adapter_state(model).values()):
            raise FloatingPointError("the step before has made the adapter NaN or infinite")
        if not start.lost:
            self.save(model, optimizer, start)
        elif RANK == 0:
            tqdm.write(f"the last {start.lost} steps have lost the form (see valid): the adapter "
                       f"is hardly of use; the last good state is {self.state_file}")

    def open_logs(self, step: int) -> float:
        """Opens the logs to go on at a step -> the largest share of turns that parsed in a step
        before it. Lines of this step and later ones, which were written after the state or by an
        older run, are dropped: those steps are done again."""
        kept = {}
        for name in ("metrics", "rollouts"):
            path = self.path / f"{name}.jsonl"
            kept[name] = earlier_lines(path, step) if step else []
            content = "".join(line + "\n" for line in kept[name]).encode()
            with in_words(path):  # whole: emptied first, a kill would take the steps before, too
                write_whole(path, lambda partial: partial.write_bytes(content))
            # buffering=1: a line is on the disk once it is written, whatever ends the run. Half a
            # pair of surrogates, as a task's file may hold, becomes its escape in JSON.
            self.files[name] = path.open("a", 1, encoding="utf-8", errors="backslashreplace")
        rows = [json.loads(line) for line in kept["metrics"]]
        return max((row["valid"] for row in rows), default=0.0)

    def log_step(self, row: dict, groups: list, verdicts: Verdicts, rewards: list,
                 advs: list) -> None:
        """The first process writes down what a step did, before any state can be ahead of it."""
        if RANK != 0:
            return
        self.log("metrics", row)
        for line in rollout_lines(row["step"], groups, verdicts, rewards, advs):
            self.log("rollouts", line)

    def log(self, name: str, row: dict) -> None:
        """Adds a line to metrics.jsonl or rollouts.jsonl."""
        with in_words(self.path / f"{name}.jsonl"):
            self.files[name].write(json_line(row) + "\n")


def check_ours(path: Path) -> None:
    """ValueError: no folder for a run to write in. It has to be new or empty, or a run's by its
    config.json; and nothing in it that a run overwrites may be a link to elsewhere."""
    if any(place.is_file() for place in (path, *path.parents)):
        raise ValueError(f"--out {path}: a file is in the way; take another")
    if not path.is_dir():
        return
    names = {entry.name for entry in path.iterdir()}
    if names - {"lock"} and not is_run(path):
        raise ValueError(f"--out {path}: it holds something else than a run of train.py, which "
                         "stays untouched; take a new or an empty folder")
    for name in OWN:
        if (path / name).is_symlink():
            raise ValueError(f"--out {path}: its {name} is a link, and a run would write where it "
                             "leads; remove the link, or take another folder")


def is_run(path: Path) -> bool:
    """A run of an earlier version has no MARKER in its config.json, but what no model has there:
    the recipe."""
    try:
        config = read_json(path / "config.json")
    except ValueError:
        return False
    return MARKER in config or {"kl_coef", "micro_tokens", "length_budget"} <= config.keys()


def check_apart(out: Path, option: str, model: Path) -> None:
    """ValueError: the run's folder is the model's, lies in it, or holds it. Links are resolved."""
    run_place = out.resolve()
    model_place = model.resolve()
    is_inside = model_place in (run_place, *run_place.parents)
    if is_inside or run_place in model_place.parents:
        raise ValueError(f"--out {out}: overlaps with {option} {model}, which stays untouched; "
                         "take another --out")


@contextmanager
def in_words(path: Path):
    """Makes of an error in writing, such as a full disk, an OSError that names the file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if str(path) in str(error):
            raise
        reason = getattr(error, "strerror", None) or error  # "No space left on device"
        raise OSError(f"{path}: cannot be written: {reason}") from None


def earlier_lines(path: Path, step: int) -> list:
    """The lines of a log that are of steps before this one. ValueError: it is no log of ours."""
    try:
        return [line for line in read_lines(path) if json.loads(line)["step"] < step]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path}: not a log of this run; move it away") from None


# ------------------------------------------------------------------------------------ the processes
def number_in_environment(name: str, default: int) -> int:
    """Some launchers set these and leave them empty. SystemExit: no number; one line says so."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        print(f"train.py: ${name} is {text!r}, expected a number; unset it", file=sys.stderr)
        sys.exit(2)
    return int(text)


# torchrun tells each process its number, how many there are, and its number on this machine.
RANK = number_in_environment("RANK", 0)
WORLD = number_in_environment("WORLD_SIZE", 1)
LOCAL_RANK = number_in_environment("LOCAL_RANK", 0)
# The group in which `gather` and `from_first` talk. It is patient: a judge may be a person who has
# a coffee, and the usual timeout of 10 or 30 minutes would end the run. Whose process has died is
# still noticed at once, by a connection that closes.
TALK = None
PATIENCE = timedelta(days=30)


def start_processes() -> None:
    global TALK
    if WORLD > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        TALK = dist.new_group(backend="gloo", timeout=PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)


def my_part(items: list) -> list:
    """This process's part of a list: neighbours, and of nearly equal numbers."""
    return items[RANK * len(items) // WORLD:(RANK + 1) * len(items) // WORLD]


def gather(items: list) -> list:
    """The lists of all processes as one, in every process: whole again after `my_part`."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    dist.all_gather_object(parts, items, group=TALK)
    return flat(parts)


def from_first(make):
    """What make() returns in the first process, in every process."""
    box = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box, group=TALK)
    return box[0]


def add_up(log: dict, trained: list) -> dict:
    """Sums the processes' gradients and logs, so that each takes the same step. A sum and no mean:
    every process divided by the normaliser of all."""
    if WORLD == 1:
        return log
    flat_gradient = torch.cat([gradient_of(p) for p in trained])
    dist.all_reduce(flat_gradient)
    # Where no process had any gradient every one keeps its None, which AdamW skips.
    if flat_gradient.any():
        sizes = [p.numel() for p in trained]
        for p, part in zip(trained, flat_gradient.split(sizes)):
            p.grad = part.view_as(p)

    logs = gather([log])
    total = {}
    for name in log:
        values = [each[name] for each in logs]
        total[name] = max(values) if name == "drift" else sum(values)
    return total


def gradient_of(p: torch.Tensor) -> torch.Tensor:
    """(numel,); zeros where this process had nothing to train on."""
    return torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()


# ------------------------------------------------------------------------------ arguments, and main
# Options that make a run what it is: --resume with another value of one is refused.
IDENTITY = (
    "model", "data", "judge", "judge_model", "pairs", "reward", "objective", "gate", "group_size",
    "seed",
)
LEAST = {
    "steps": 1,
    "tasks": 1,
    "group_size": 2,  # one trajectory makes no pair
    "lr": 0,
    "kl_coef": 0,
    "length_budget": 1,
    "seed": 0,
}


def argument_parser() -> Parser:
    """An option without a default takes the recipe's."""
    p = Parser(prog="train.py", description="Train an agent with MOSAIC.", allow_abbrev=False)
    option = p.add_argument
    option("--model", default="tiny", help=f"{' | '.join(CHECKPOINTS)} | DIR")
    option("--data", help="train | train_varied (half of its phrases are others; smollm2-135m's "
           "default) | a .jsonl file | Agent-SafetyBench's folder")
    option("--judge", default="rule",
           help="rule | model | endpoint | human | a verdicts.jsonl, to replay it")
    add_judge_flags(p, "--header")  # the judge is the only server here
    option("--pairs", choices=("all", "sorted"), default=Recipe.pairs,
           help="sorted: do not ask what follows from verdicts already given")
    option("--reward", choices=("pairwise", "scalar"), default=Recipe.reward)
    option("--objective", choices=("grpo", "dpo"), default=Recipe.objective)
    option("--gate", type=gate_option, default=Recipe.gate,
           help="learned | always | never | a bias on its logit")
    option("--steps", type=int)
    option("--tasks", type=int, help="tasks a step")
    option("--group-size", type=int, help="n trajectories a task [1]")
    option("--lr", type=float)
    option("--kl-coef", type=float)
    option("--length-budget", type=int,
           help="L0 of the length penalty, in sampled tokens of a trajectory")
    option("--seed", type=int, default=Recipe.seed)
    option("--out", metavar="DIR",
           help="the run's folder: new, empty, or an older run's, which is replaced; default: "
                "runs/<model>, beside this file")
    option("--save-every", type=count_option, default=10, metavar="N",
           help="write state/ every N steps")
    option("--resume", action="store_true", help="go on from --out's state/")
    option("--limit", type=count_option, help="tasks of each suite and split in the closing tables")
    option("--no-eval", action="store_true", help="skip the closing table")
    option("--explain", metavar="STEP:TASK",
           help="trains nothing: shows how that group of the run in --out was judged and rewarded")
    return p


def arguments(argv: list | None = None):
    """The command line, checked -> argparse's namespace, which `run` takes apart."""
    p = argument_parser()
    args = p.parse_args(argv)
    for name, least in LEAST.items():
        value = vars(args)[name]
        if value is not None and not least <= value <= 10**9:  # NaN is in no range
            p.error(f"--{name.replace('_', '-')} {value}: expected {least} to 10^9")
    if args.objective == "dpo" and args.reward == "scalar":
        p.error("--objective dpo trains on pairs: it takes no --reward scalar")
    check_judge_flags(p, args.judge)
    if args.no_eval:
        p.refuse_idle("with --no-eval: there is no table", "limit")
    if args.objective == "dpo":
        p.refuse_idle("with --objective dpo: that loss has no KL term", "kl_coef")
    if args.pairs == "sorted" and args.group_size == 2:
        p.refuse_idle("with --group-size 2: from one pair nothing follows", "pairs")
    return args


def recipe_for(family: str, options: dict) -> Recipe:
    """The family's recipe; an option that was given goes before it."""
    given = {}
    for field in fields(Recipe):
        if options.get(field.name) is not None:
            given[field.name] = options[field.name]
    return replace(RECIPE.get(family, Recipe()), **given)


def checkpoint_folder(model_name: str) -> Path:
    """ValueError: no such checkpoint. A base of ours may not be built yet."""
    if model_name in data.BASES:
        return data.HERE.parent / "checkpoints" / model_name
    return find(model_name)


def family_of(model_name: str) -> str:
    if model_name in data.BASES and not data.is_built(model_name):
        return data.BASES[model_name].family
    folder = checkpoint_folder(model_name)
    file = folder / "config.json"
    return read_family(folder, Config(read_json(file), file))


def check_tasks(tasks: list, name: str, n_drawn: int, needs_labels: bool) -> None:
    """ValueError: too few tasks for one step, or none of the labels that rewards are made from."""
    if n_drawn > len(tasks):
        raise ValueError(
            f"--tasks {n_drawn}: {name} has only {len(tasks)} tasks: take no more")
    if needs_labels and any(task.label is None for task in tasks):
        raise ValueError(
            f"--data {name}: its records have no labels: take --judge model, endpoint or human, "
            "and --reward pairwise"
        )


def run_config(options: dict, recipe: Recipe, device: str | None) -> dict:
    """What config.json holds. device: None before the model is loaded."""
    config = {MARKER: 1}
    config.update(options)
    config.update(asdict(recipe))
    config["commit"] = git_commit()
    config["python"] = platform.python_version()
    config["torch"] = torch.__version__
    config["device"] = device
    config["threads"] = torch.get_num_threads()
    # versions of the texts that dialogues begin with
    config["system"] = {name: version for name, (version, _) in SYSTEMS.items()}
    return config


def run(args) -> None:
    """Checks everything, trains, saves the adapter, and prints base beside trained."""
    start_processes()
    with closing(Folder(args.out or run_folder(args.model), args.save_every)) as folder:
        run_in(folder, args)


def run_in(folder: Folder, args) -> None:
    options = vars(args)
    recipe = recipe_for(family_of(args.model), options)
    if args.resume:
        asked = options | asdict(recipe)
        folder.open_state({name: asked[name] for name in IDENTITY})
    tasks = data.load(recipe.data, training=True)
    check_apart(folder.path, "--model", checkpoint_folder(args.model))
    if args.judge == "model" and args.judge_model:
        check_apart(folder.path, "--judge-model", checkpoint_folder(args.judge_model))
    needs_labels = args.judge == "rule" or recipe.reward == "scalar"
    check_tasks(tasks, recipe.data, recipe.tasks, needs_labels)
    judge = None
    if RANK == 0:
        judge = judge_from_flags(options, folder.path / "verdicts.jsonl")

    # Is the judge there, and can it tell? The first step finds these answers in the ledger.
    config = run_config(options, recipe, device=None)
    folder.claim(config)
    try:
        from_first(lambda: canaries(judge, 0))
    except KeyboardInterrupt:
        # A person may leave at the first question, and go on with --resume. What an older run has
        # learned stays: this one has nothing to put in its place yet.
        if not folder.has_learned():
            folder.begin(config, args.resume)
        raise

    from_first(lambda: data.ensure_base(args.model))  # minutes, so after all checks
    model, tokenizer = load(args.model)
    folder.check_base(model)
    model.recompute = recipe.recompute
    adapter_generator = torch.Generator().manual_seed(recipe.seed)
    add_lora(model, recipe.rank, recipe.alpha, generator=adapter_generator)
    folder.begin(run_config(options, recipe, str(model.device)), args.resume)

    train(model, tokenizer, tasks, judge, folder, recipe)

    if WORLD > 1:
        dist.destroy_process_group()
    if RANK != 0:
        return
    with in_words(folder.path / "adapter"):
        save_adapter(model, folder.path / "adapter", args.model)
    write_report(folder, [])  # also where the closing evaluation is left out, or fails
    if not args.no_eval:
        found = evaluation.closing_tables(
            model, tokenizer, recipe.gate, recipe.splits, recipe.limit)
        write_report(folder, [found])


def write_report(folder: Folder, found: list) -> None:
    """The run as a page. found: what `evaluation.closing_tables` returns, or nothing."""
    config = read_json(folder.config_file)
    about = {"adapter": folder.path / "adapter"}
    for name in ("model", "data", "judge", "pairs", "reward", "objective", "gate", "steps", "tasks",
                 "group_size", "lr", "kl_coef", "length_budget", "seed", "device"):
        about[name.replace("_", " ")] = config[name]
    about["grammar"] = "free in training, strict in evaluation"
    about |= versions()
    try:
        parts = [*found, page.training(folder.path, read_lines)]
    except ValueError as error:  # a run that an older train.py began
        tqdm.write(f"no report.html: {error}")
        return
    evaluation.write_page(folder.path / "report.html", "a training run", about, parts)


# ------------------------------------------------------------------------------ one group explained
def explain_task(model: Transformer, tokenizer: Tokenizer, task: Task, gate: str | float) -> str:
    """A group that is sampled, judged by the rule and rewarded as in a step -> its slide."""
    recipe = recipe_for(tokenizer.family, {"gate": gate})
    generator, _ = seeded_generators(recipe.seed, model.device)
    [group], _ = sample(model, tokenizer, [task], [], recipe, generator)
    asked = []
    P = compare(rule_judge, group, asked.append)
    terms = reward_terms(group, P, recipe.reward, recipe.length_budget)
    adv = group_advantages(terms)
    verdicts = Verdicts([P], None, {}, asked)
    lines = rollout_lines(None, [group], verdicts, [terms], [adv])
    return explain(lines, asdict(recipe))


def explain_run(place: str, path: Path) -> str:
    """STEP:TASK of a finished run -> a slide of that group. ValueError: no such group there."""
    config = read_json(path / "config.json")
    step, _, task = place.partition(":")
    there = defaultdict(list)  # {step: [task, ...]}
    group = []
    for row in page.read_log(path, "rollouts", read_lines):
        there[row["step"]].append(row["task"])
        if str(row["step"]) == step and row["task"] == task:
            group.append(row)
    if not group:
        tasks = dict.fromkeys(there.get(int(step), [])) if step.isdecimal() else {}
        known = f"there are steps 0 to {max(there, default=0)}"
        if tasks:
            known = f"step {step} has {', '.join(tasks)}"
        raise ValueError(f"--explain {place}: expected STEP:TASK of {path}; {known}")
    if "verdicts" not in group[0]:
        raise ValueError(f"{path}: an older train.py wrote rollouts.jsonl: it has no verdicts")
    return explain(group, config)


def run_or_explain(args) -> None:
    if args.explain:
        print(explain_run(args.explain, Path(args.out or run_folder(args.model))))
    else:
        run(args)


def main() -> None:
    name = "train.py"
    if WORLD > 1:
        name += f" process {RANK} of {WORLD} (if another ended first, its line says why)"
    run_command(name, lambda: run_or_explain(arguments()))


if __name__ == "__main__":
    main()
