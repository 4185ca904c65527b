"""Several processes of one training run (torchrun): each samples and differentiates its share, and all take the same
step. With one process nothing is sent. The first one judges, logs and writes; if one dies, all end."""
import os

import torch
import torch.distributed as dist

RANK, WORLD, LOCAL = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def connect():
    if WORLD > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL)


def disconnect():
    if WORLD > 1:
        dist.destroy_process_group()


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
