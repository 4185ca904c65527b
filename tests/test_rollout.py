"""The sampler, the rollouts and the trainer on an untrained tiny base: what is sampled is what is trained, exactly."""
import copy
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import model as model_
import mosaic
import preference
import train
from data import tiny
from mosaic import FORCED, SAMPLED, TOOL, USER, rollout, sampled_logprobs
from preference import advantages, grpo_loss, open_judge


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base after a few steps: it can close a turn now and then, and its logits are far from flat."""
    path = tiny.build(0, tmp_path_factory.mktemp("base") / "tiny", steps=25, n=150)
    return path, *model_.load(path, device="cpu")


def test_fresh_weights_copy_what_came_before(base):
    """The heads written into the tiny base's fresh weights did nearly nothing (loss 7.4 of 7.6), and nobody noticed:
    the warm start hid it. Forty random tokens that come back after twenty others must be known at once."""
    tokenizer, generator = base[2], torch.Generator().manual_seed(0)
    model = model_.Transformer(model_.Config(tiny.CONFIG)).init_weights(generator)
    first, between = (torch.randint(len(tiny.CONTROL), tokenizer.n, (8, n), generator=generator) for n in (40, 20))
    ids = torch.cat([first, between, first], 1)  # (8, 100)

    @torch.no_grad()
    def loss():
        logits = model(ids[:, :-1])[:, -38:].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, -38:].flatten()).item()
    before = loss()
    tiny.induction_circuit(model, tokenizer)
    print(f"loss {before:.2f} -> {loss():.2f}")  # -rP shows it
    assert before > 7 and loss() < 0.3


@torch.no_grad()
def test_a_decoded_token_is_a_forward_of_one(base, monkeypatch, capsys):
    """A card's step goes block by block around compiled parts: a layer's cache taken for another's, a row that waits
    and moves on; without a compiler it goes on, and says so in a line. tests/test_cuda.py compiles and makes graphs."""
    def no_compiler(part, **options):
        raise RuntimeError("no gcc\nand forty lines more")
    monkeypatch.setattr(torch, "compile", no_compiler)
    model_.compiled.cache_clear()
    model, prompt = base[1], torch.arange(60).view(3, 20) + 300
    caches = [model_.Cache(model.config, 4, 40) for _ in range(2)]
    for cache in caches:
        model.hidden(prompt, cache)
    decode = model_.Decoder(model, caches[0])
    for lengths in ([1, 1, 1], [1, 0, 1], [0, 1, 1]):
        decode.ids[:3, 0], decode.lengths[:3] = torch.tensor([300, 310, 320]), torch.tensor(lengths)
        assert torch.equal(decode.step(3), model.hidden(decode.ids[:3], caches[1], decode.lengths[:3]))
        assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert caches[0].lengths.tolist() == [22, 22, 23, 0]
    assert capsys.readouterr().err == "decoding is not compiled, and so 10 to 40 % slower: no gcc\n"
    model_.compiled.cache_clear()


@pytest.mark.parametrize("layout, rank", [("qwen2", 4), ("phi3", 0)])
@torch.no_grad()
def test_a_lone_row_of_bf16_is_compiled_on_a_cpu(layout, rank):
    """A bias, an adapter or a layer's own weights left out of what is compiled; sums that round to bf16 on the way."""
    generator = torch.Generator().manual_seed(0)
    exact = model_.Transformer(model_.Config(tiny.CONFIG | {"model_type": layout})).init_weights(generator)
    if rank:
        model_.add_lora(exact, rank, 2 * rank, generator=generator)
    for name, p in exact.named_parameters():
        if "norm" not in name:
            p.copy_((torch.randn(p.shape, generator=generator) * 0.1).bfloat16())
    model, ids = copy.deepcopy(exact), torch.randint(0, 2560, (1, 24), generator=generator)
    for name, p in model.named_parameters():
        p.data = p if "lora" in name else p.bfloat16()  # an adapter stays in fp32
    cache = model_.Cache(model.config, 1, 40, dtype=model.dtype)
    model.hidden(ids[:, :16], cache)
    decode = model_.Decoder(model, cache)
    if decode.functions is model_.EAGER:
        pytest.skip("no C compiler: nothing was compiled")
    ours = torch.cat([decode.head(decode(ids[:, t:t + 1], torch.ones(1, dtype=torch.long))) for t in range(16, 24)], 1)
    want, plain = exact(ids)[:, 16:], model(ids)[:, 16:]
    assert (ours - want).abs().mean() < 1.1 * (plain - want).abs().mean() < 0.02 * want.abs().max()


def test_gate_weights_keep_the_base_where_the_mixture_says(base):
    """A demonstration holds checks far more often than the base shall open them: without the importance weights on the
    branching token the base opened them as often, and with zero weights it never learned when."""
    rng, opened, total = random.Random(0), {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for task in data.load("train")[:400]:
        agent, episode = tiny.Demonstrator(task, rng, tiny.MIX), mosaic.Episode(task, max_turns=8)
        while episode.ended is None:
            risky, text = episode.sandbox.risky(), agent.turn(episode.sandbox)
            episode.step(text)
            total[risky] += agent.gates[-1]
            opened[risky] += agent.gates[-1] * ("<safety_thoughts>" in text)
    assert abs(opened[True] / total[True] - tiny.MIX["check_risky"]) < 0.05
    assert abs(opened[False] / total[False] - tiny.MIX["check_harmless"]) < 0.02


def test_a_slip_carries_no_loss_and_what_follows_it_does(base):
    """A base whose demonstrations never met an error refused after each ("this looks like sabotage"); one that learns
    the slips themselves makes them."""
    tokenizer, rng, slips = base[2], random.Random(0), 0
    for task in data.load("train")[:100]:
        ids, weights = tiny.demonstration(task, rng, tokenizer, tiny.MIX | {"slip": 0.5})
        turns = [i for i, token in enumerate(ids) if token == tokenizer.added["<think>"]]
        for start, after in zip(turns, [*turns[1:], len(ids)]):
            end = ids.index(tokenizer.stop_ids[0], start) + 1
            slipped = '{"error"' in tokenizer.decode(ids[end:after])
            assert any(weights[start:end]) != slipped
            slips += slipped
    assert slips > 30


def test_a_plan_names_the_call_that_comes_next():
    """A base that had to find its place in the user's words again in every turn stopped early and read the first record
    twice: each plan (after an order, the check that ignores it) names this call and the next, "it" for the same record,
    a new value where the user gave one (without it the second of two writes had none), and the next turn makes it."""
    rng, pairs, valued, calm = random.Random(0), 0, 0, tiny.MIX | dict(slip=0, obey=0, stop_early=0, false_alarm=0)
    for task in data.load("train"):
        if task.label == "benign":
            agent, episode, promised = tiny.Demonstrator(task, rng, calm | {"verdict": 1}), mosaic.Episode(task), None
            while episode.ended is None:
                episode.step(agent.turn(episode.sandbox))
                turn = episode.turns[-1]
                about, *values = turn.arguments.values() if turn.kind == "call" else ("",)
                made = f"{turn.name} {about}" if about else "done"
                if promised is not None:
                    said, _, value = promised.partition(" to ")
                    assert said == made and (not value or value.removesuffix(" euro").removeprefix("room ") in values)
                    pairs, valued = pairs + 1, valued + bool(value)
                said = turn.check if turn.check and "ignore it" in turn.check else turn.plan
                promised = said.split(", then ")[-1].replace(" it", f" {about}")
    assert pairs > 1500 and valued > 30, (pairs, valued)


@pytest.fixture(scope="module")
def groups(base):
    """24 rollouts of 6 tasks in the free and in the strict grammar, in a batch that makes rows leave and enter."""
    _, model, tokenizer = base
    tasks = data.load("train")[:6]
    out = {}
    for grammar in ("free", "strict"):
        generator = torch.Generator().manual_seed(1)
        out[grammar] = rollout(model, tokenizer, tasks, 4, grammar=grammar, max_rows=10, generator=generator)
    return tasks, out


@pytest.mark.parametrize("grammar", ["free", "strict"])
def test_sampler_and_trainer_agree(base, groups, grammar):
    """The trainer's logprobs differed from the sampler's (other mask, other cache position, a re-encoded token)."""
    _, model, tokenizer = base
    for batch in (groups[1][grammar], groups[1][grammar][:1], groups[1][grammar][::-1]):
        old = torch.tensor([lp for r in batch for lp in r.logprobs])
        with torch.no_grad():
            new = sampled_logprobs(model, tokenizer, batch, strict=grammar == "strict")
        assert len(new) == len(old) > 50
        assert (new - old).abs().max() < 5e-4, (new - old).abs().max()


@pytest.mark.parametrize("grammar", ["free", "strict"])
def test_every_token_has_one_origin(base, groups, grammar):
    """Masks from `ids != pad` or from re-encoded text are off by some tokens: here they come from provenance alone."""
    _, model, tokenizer = base
    for r in groups[1][grammar]:
        assert len(r.provenance) == len(r.ids) and len(r.logprobs) == len(r.states) == r.provenance.count(SAMPLED)
        prompt = mosaic.Dialogue(tokenizer, r.task.messages, r.task.offered)
        assert r.ids[:len(prompt.ids)] == prompt.ids and SAMPLED not in r.provenance[:r.spans[0][0]]
        own = [i for a, b in r.spans for i in range(a, b)]
        assert own == [i for i, p in enumerate(r.provenance) if p in (SAMPLED, FORCED)]
        assert len(r.spans) == len(r.turns) == len(r.gates) and r.n_sampled == len(own)
        for (a, b), turn in zip(r.spans, r.turns):  # text of a turn, decoded as a whole, is what was parsed
            text = tokenizer.decode([i for i in r.ids[a:b] if i not in tokenizer.stop_ids])
            assert (turn is None) == (not _parses(text))


def _parses(text):
    try:
        return bool(mosaic.parse_turn(text))
    except mosaic.FormatError:
        return False


def test_stop_token_is_trained(groups, base):
    """The end-of-turn token had loss_mask 0, so nobody ever learned to stop (three of six minimal trainers)."""
    tokenizer = base[2]
    tokens = [pair for r in groups[1]["free"] for pair in zip(r.ids, r.provenance)]
    stops = [p for i, p in tokens if i in tokenizer.stop_ids and p >= SAMPLED]
    assert stops and set(stops) == {SAMPLED}


def test_strict_turns_always_parse(groups):
    """A strict sampler that can produce a malformed turn, or one beyond its budget, is not strict."""
    limit = mosaic.LIMITS["tiny"]["turn_tokens"]
    for r in groups[1]["strict"]:
        assert all(t is not None for t in r.turns) and all(b - a <= limit for a, b in r.spans)


def test_forced_tokens_need_no_forward(groups):
    """Tags and separators are the grammar's, not the agent's: they carry no loss and no forward of their own."""
    codes = [p for r in groups[1]["strict"] for p in r.provenance]
    assert codes.count(FORCED) > 50
    assert not any(p == FORCED for r in groups[1]["free"] for p in r.provenance)


def test_rows_of_a_group_differ(groups):
    """nanochat 8f979a8: all rows of a group got the same first token, because the fork copied a sampled one."""
    turns = [[tuple(r.ids[r.spans[0][0]:r.spans[0][1]]) for r in groups[1]["free"][i:i + 4]] for i in range(0, 24, 4)]
    assert all(len(set(group)) > 1 for group in turns)


def test_same_seed_same_rollouts(base, groups):
    """A second run with the same seed must repeat the first token for token; another seed must not."""
    _, model, tokenizer = base
    again = {s: rollout(model, tokenizer, groups[0], 4, grammar="free", max_rows=10,
                        generator=torch.Generator().manual_seed(s)) for s in (1, 2)}
    assert [r.ids for r in again[1]] == [r.ids for r in groups[1]["free"]] != [r.ids for r in again[2]]


@pytest.mark.parametrize("gate", ["always", "never", 3.0])
def test_gate_is_the_same_dial_in_training(base, groups, gate):
    """A forced or shifted gate that the trainer forgets makes its logprobs those of another policy."""
    _, model, tokenizer = base
    generator = torch.Generator().manual_seed(3)
    rs = rollout(model, tokenizer, groups[0][:2], 2, grammar="strict", gate_mode=gate, generator=generator)
    old = torch.tensor([lp for r in rs for lp in r.logprobs])
    with torch.no_grad():
        new = sampled_logprobs(model, tokenizer, rs, gate_mode=gate, strict=True)
    assert (new - old).abs().max() < 5e-4
    opened = [o for r in rs for _, o, _ in r.gates]
    assert gate != "always" or all(o for r in rs for p, o, _ in r.gates if p)
    assert gate != "never" or not any(opened)
    assert all(0 <= p <= 1 for r in rs for p, _, _ in r.gates if p is not None)


def test_tool_tokens_have_no_gradient(base, groups):
    """RAGEN #71: the mask was inverted and the gradient sat on observations. Here: exactly 0 on every token that the
    agent did not sample, by the gradient of the loss with respect to each position's logits."""
    _, model, tokenizer = base
    r = max(groups[1]["free"], key=lambda r: len(r.turns))
    assert TOOL in r.provenance
    logits = {}

    def catch(module, inputs, output):
        output.retain_grad()
        logits["h"] = output
    handle = model.model["norm"].register_forward_hook(catch)
    for p in model.parameters():
        p.requires_grad_(True)
    lp = sampled_logprobs(model, tokenizer, [r])
    grpo_loss(lp, lp.detach(), lp.detach(), torch.ones_like(lp), len(lp))[0].backward()
    handle.remove()
    grad = logits["h"].grad[0].abs().sum(-1)  # (T,): position t - 1 predicts token t
    for p in model.parameters():
        p.requires_grad_(False), setattr(p, "grad", None)
    carries = torch.tensor([p == SAMPLED for p in r.provenance[1:]] + [False])
    assert (grad[~carries] == 0).all() and (grad[carries] > 0).all()


def test_advantage_reaches_every_turn(base, groups):
    """verl PR #6376: the return was reset at each observation, so turns before a tool result lost the reward."""
    _, model, tokenizer = base
    r = max(groups[1]["free"], key=lambda r: len(r.turns))
    assert len(r.turns) > 1
    with torch.no_grad():
        old = sampled_logprobs(model, tokenizer, [r])
    lp = old.clone().requires_grad_()
    args = train.arguments(["--length-budget", "80"])
    adv = torch.full_like(lp, 0.7)
    grpo_loss(lp, old, old, adv, len(lp), kl_coef=0.0)[0].backward()
    assert torch.allclose(lp.grad, torch.full_like(lp, -0.7 / len(lp))) and args.group_size == 4


def test_micro_batches_change_nothing(base, groups):
    """GRPO-Zero 8ca8b08: a mean per micro-batch weighs tokens by the batch they fell into."""
    _, model, tokenizer = base
    model_.add_lora(model, 4, 8, ["q_proj", "v_proj"], torch.Generator().manual_seed(0))
    grads = []
    batch = train.Batch(groups[1]["free"], train.arguments(["--length-budget", "80"]), open_judge("rule"))
    sizes = [len(r.ids) for r in batch.groups[0]]
    for budget in (max(sizes) + 30, 600, 100_000):  # the first cuts a group into slices
        args = train.arguments(["--length-budget", "80"])
        args.micro_tokens, args.kl_coef = budget, 0.02
        batch = train.Batch(groups[1]["free"], args, open_judge("rule"))
        batch.adv = [torch.tensor([1.0, -1, 0.5, -0.5]) for _ in batch.groups]
        log = train.accumulate(model, tokenizer, batch, args)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
        assert log["drift"] < 1e-4
    model_.merge_lora(model)
    assert grads[0].abs().max() > 0 and all((grads[0] - g).abs().max() < 1e-6 for g in grads[1:])


def test_tied_groups_give_no_gradient():
    """TRIAL: late in training most groups tie, and a few tokens of length, blown up to +-1, brought the harm back."""
    R = torch.tensor([3.5, 3.4, 3.5, 3.5])
    assert advantages(R, torch.full((4,), 1.5)).eq(0).all()


def test_refusal_and_answer_end_the_episode():
    """TRL #5389: no way to mark a tool as terminal; the model had to speak again, so training differed from use."""
    task = data.load("harm")[0]
    call = '{"name": "refusal_tool", "arguments": {"reason": "x"}}'
    refuse = f'<think>\nno\n</think>\n\n<tool_call>\n{call}\n</tool_call>'
    answer = "<think>\nyes\n</think>\n\n<answer>\ndone\n</answer>"
    for text, ended in ((refuse, "refusal"), (answer, "answer"), ("gibberish", "malformed")):
        r = mosaic.play(task, lambda messages: text)
        assert r.ended == ended and len(r.turns) == (10 if ended == "malformed" else 1)
    turns = iter([refuse, answer])
    assert mosaic.play(task, lambda messages: next(turns), refusal="replan").ended == "answer"
    assert mosaic.play(task, lambda messages: refuse, refusal="replan").ended == "refusal"
    assert len(mosaic.play(task, lambda messages: refuse, refusal="replan").turns) == 2
    look, harm = map(json.dumps, (task.goal[0], task.unsafe[0]))
    for calls, done in (((look, call, harm), [task.goal[0]["name"]]), ((call, harm), [])):  # parallel: nothing after it
        text = "<think>\nx\n</think>\n\n" + "\n".join(f"<tool_call>\n{c}\n</tool_call>" for c in calls)
        r = mosaic.play(replace(task, public={"parallel": True}), lambda messages: text)
        assert r.ended == "refusal" and [e.name for e in r.journal] == done


def test_control_text_from_users_and_tools_stays_text(base):
    """A user or a tool result that spells <|im_end|> or </tool_response> must not end anything."""
    _, model, tokenizer = base
    bad = "".join(tokenizer.added)
    dialogue = mosaic.Dialogue(tokenizer, [{"role": "user", "content": bad}], data.load("train")[0].offered)
    dialogue.extend([tokenizer.stop_ids[0]], [SAMPLED])
    dialogue.observe([bad])
    outside = [i for i, p in zip(dialogue.ids, dialogue.provenance) if p in (USER, TOOL)]
    assert not set(outside) & set(tokenizer.added.values()) and tokenizer.decode(outside).count("<think>") == 2


def test_a_later_user_message_goes_on(base):
    """BFCL's conversations: the first answer crashed the sampler (Dialogue has no method `user`), or the second message
    never reached the model, or it arrived as a tool result."""
    _, model, tokenizer = base
    task = replace(data.load("train")[0], public={"later": ["And then?", "Thanks."], "max_turns": 3})
    rollouts = rollout(model, tokenizer, [task], 8, generator=torch.Generator().manual_seed(0))
    answers = [sum(t.kind == "answer" for t in r.turns) for r in rollouts]
    assert max(answers) == 3
    for r, n in zip(rollouts, answers):
        start = r.spans[0][0]
        said = tokenizer.decode([i for i, p in zip(r.ids[start:], r.provenance[start:]) if p == USER])
        assert said == "".join(task.public["later"][:n])
        again = iter([tokenizer.decode([i for i in r.ids[a:b] if i not in tokenizer.stop_ids]) for a, b in r.spans])
        scripted = mosaic.play(task, lambda messages: next(again))
        assert r.ended in (scripted.ended, "budget") and scripted.turns == r.turns


def test_draws_follow_the_renormalised_distribution(base, monkeypatch):
    """A sampler that draws from something else than it logs: a temperature applied twice or not at all, noise used
    twice, a mask that moves probability. 1,200 draws of the first free token, chi-square against the model's own p."""
    _, model, tokenizer = base
    monkeypatch.setitem(mosaic.LIMITS, "tiny", mosaic.LIMITS["tiny"] | {"max_turns": 1, "turn_tokens": 24, "room": 24})
    task, generator = data.load("train")[0], torch.Generator().manual_seed(5)
    rollouts = rollout(model, tokenizer, [task] * 12, 100, temperature=1.5, generator=generator)
    at = [[i for i, p in enumerate(r.provenance) if p == SAMPLED][1] for r in rollouts]  # the first opens the turn
    drawn = torch.tensor([r.ids[i] for r, i in zip(rollouts, at)])
    assert len({*at}) == 1 and len({tuple(r.ids[:at[0]]) for r in rollouts}) == 1
    with torch.no_grad():
        logits = model(torch.tensor([rollouts[0].ids[:at[0]]]))[:, -1].float() / 1.5
    grammar, where = mosaic.get_grammar(tokenizer, "cpu"), [torch.tensor([x]) for x in rollouts[0].states[1]]
    live = grammar.mask(*where)[0]
    p = torch.where(live, logits[0].exp(), 0) / logits[0][live].exp().sum()
    assert torch.allclose(p[drawn].log(), torch.tensor([r.logprobs[1] for r in rollouts]), atol=1e-4)
    want, seen = len(drawn) * p, torch.bincount(drawn, minlength=len(p)).float()
    common = want >= 5  # the rest is one bin
    want, seen = (torch.cat([x[common], x[~common].sum()[None]]) for x in (want, seen))
    chi, degrees = ((seen - want) ** 2 / want).sum().item(), len(want) - 1
    assert degrees >= 5 and chi < degrees + 6 * (2 * degrees) ** 0.5, (chi, degrees)  # by chance: once in 100,000 bases


def test_parallel_calls_are_live_where_every_task_takes_them(base):
    """One BFCL task of the parallel category in a batch let strict turns of all others hold two calls: malformed."""
    _, model, tokenizer = base
    plain = data.load("train")[0]
    parallel = replace(plain, public={"parallel": True})
    for tasks, more in (([plain], False), ([parallel], True), ([plain, parallel], False)):
        grammar = mosaic.Sampler(model, tokenizer, tasks, [1] * len(tasks)).grammar
        assert grammar is (mosaic.get_grammar(tokenizer, "cpu", True) if more else mosaic.get_grammar(tokenizer, "cpu"))


def test_room_counts_from_the_end_of_each_prompt(base, monkeypatch):
    """A context of fixed length: a long prompt was refused, or ended its neighbours, or was cut off in silence."""
    _, model, tokenizer = base
    short = data.load("train")[0]
    long = replace(short, messages=[{"role": "user", "content": "go on and on " * 200}])
    monkeypatch.setitem(mosaic.LIMITS, "tiny", mosaic.LIMITS["tiny"] | {"max_turns": 2, "turn_tokens": 48})
    alone = rollout(model, tokenizer, [short, long], max_rows=1, temperature=0)
    both = rollout(model, tokenizer, [short, long], temperature=0)
    assert [r.ids for r in alone] == [r.ids for r in both] and both[1].spans[0][0] > 640
    monkeypatch.setitem(mosaic.LIMITS, "tiny", mosaic.LIMITS["tiny"] | {"room": 49, "positions": 1})
    for r in rollout(model, tokenizer, [short, long], 3):  # a group is sampled together, whatever the cache takes
        assert len(r.turns) == 1 or r.spans[0][1] == r.spans[0][0] + 1
        assert len(r.ids) == len(r.provenance) == r.spans[-1][1]  # a result without a turn after it is not trained over
    monkeypatch.setattr(model.config, "max_position_embeddings", 640)
    with pytest.raises(ValueError, match="tokens leaves no room for a turn in the model's 640 positions"):
        rollout(model, tokenizer, [short, long])
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "stop_ids", [0])  # as a base model's
    with pytest.raises(ValueError, match="generation_config.json"):
        rollout(model, tokenizer, [short])


def _train(base, out, *more):
    args = train.arguments(["--model", str(base[0]), "--out", str(out), "--tasks", "3", "--no-eval", *more])
    return train.run(args)


def test_repeat_and_resume_are_exact(base, tmp_path, monkeypatch):
    """ms-swift PR #9935: resume overwrote the restored generator. Same seed: same rollouts, verdicts, adapter bytes;
    stopped inside of a step or between two, and resumed: the same again, and the logs hold each step once. Another
    judge's run is not gone on with, nor the run that --out held before a fresh start."""
    monkeypatch.setattr(train, "canaries", lambda judge, step: None)  # under the rule an untrained base ties everywhere
    monkeypatch.setattr(preference, "rule_judge", lambda a, b: 0.5 + 0.5 * ((a.ids < b.ids) - (a.ids > b.ids)))
    _train(base, tmp_path / "a", "--steps", "3")
    _train(base, tmp_path / "b", "--steps", "3")
    with pytest.raises(ValueError, match="no room"):  # any error: here a prompt too long, found when it is drawn
        _interrupt(base, tmp_path / "c", 2, ValueError("no room"))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, "tqdm", Bar)
        _train(base, tmp_path / "d", "--steps", "3")
    for name in "cd":
        with pytest.raises(ValueError, match="--judge of .* is rule, not human"):
            _train(base, tmp_path / name, "--steps", "3", "--resume", "--judge", "human")
        _train(base, tmp_path / name, "--steps", "3", "--resume")

    def read(name, file):
        return (tmp_path / name / file).read_bytes()
    for name in "bcd":
        for file in ("adapter/adapter_model.safetensors", "rollouts.jsonl", "verdicts.jsonl"):
            assert read("a", file) == read(name, file), (name, file)
        times = {"sample_tok/s", "train_tok/s", "seconds"}
        rows = [[{k: v for k, v in json.loads(line).items() if k not in times}
                 for line in read(n, "metrics.jsonl").splitlines()] for n in ("a", name)]
        assert rows[0] == rows[1] and [r["step"] for r in rows[0]] == [0, 1, 2]
        assert all(r["grad_norm"] > 0 for r in rows[0])

    def killed(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        _train(base, tmp_path / "a", "--steps", "3")
    assert not (tmp_path / "a" / "state" / "state.pt").exists()


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_a_sampler_that_differs_stops_the_run(base, tmp_path, monkeypatch, objective):
    """verl #7495: two months on a trail of samples that another model had drawn. One token of each trajectory whose
    logprob is off by 0.05 stops a run in fp32 in its first step, and nothing has moved."""
    def off(*given, real=train.rollout, **options):
        rollouts = real(*given, **options)
        for r in rollouts:
            r.logprobs[0] += 0.05
        return rollouts
    monkeypatch.setattr(train, "rollout", off)
    monkeypatch.setattr(train, "canaries", lambda judge, step: None)
    monkeypatch.setattr(preference, "rule_judge", lambda a, b: 0.5 + 0.5 * ((a.ids < b.ids) - (a.ids > b.ids)))
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        _train(base, tmp_path, "--steps", "3", "--objective", objective)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "metrics.jsonl").read_text("utf-8")


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_a_group_with_an_unscored_pair_gives_no_gradient(base, objective):
    """An outage that becomes an opinion: the direct loss took the pairs that were left of such a group."""
    _, model, tokenizer = base
    model = copy.deepcopy(model)
    model_.add_lora(model, 2, 4)
    args = train.arguments(["--objective", objective, "--kl-coef", "0", "--length-budget", "80", "--group-size", "3"])
    args.micro_tokens = 4096
    done = rollout(model, tokenizer, data.load("train")[:1], 3, grammar="free", generator=torch.Generator())
    for silent in (False, True):
        def judge(a, b):
            i, j = done.index(a), done.index(b)
            return None if silent and {i, j} == {0, 1} else float(i < j)
        judge.prepare = lambda pairs: None
        model.zero_grad()
        train.accumulate(model, tokenizer, train.Batch(done, args, judge), args)
        trained = any(p.grad is not None and p.grad.any() for p in model.parameters())
        assert trained != silent


class Bar(list):
    """tqdm's, left by Ctrl-C between two steps."""
    write = staticmethod(print)

    def __init__(self, steps, **options):
        super().__init__(steps)

    def __iter__(self):
        yield from self[:2]
        raise KeyboardInterrupt


def _interrupt(base, out, after, error=KeyboardInterrupt):
    original, count = train.Batch, iter(range(100))

    def batch(*a):
        if next(count) == after:
            raise error
        return original(*a)
    train.Batch = batch
    try:
        _train(base, out, "--steps", "3")
    finally:
        train.Batch = original


REPLAY = """import os, sys, zlib
sys.path.insert(0, sys.argv.pop(1))
import mosaic, torch, train
real, calls, judged = train.rollout, [], train.compare
mosaic.LIMITS["tiny"] |= dict(max_turns=2, turn_tokens=24)
train.N_FROZEN = 3
train.compare = lambda judge, group, ledger=None: judged(lambda a, b: 0.5 + 0.5 * (sum(a.ids) > sum(b.ids)) - 0.5 * (
    sum(a.ids) < sum(b.ids)), group, ledger)  # an untrained base ties everywhere
train.canaries = lambda judge, step: None  # they have no ids

def alone(model, tokenizer, tasks, sizes, **options):  # what a task samples depends on nothing but task and step
    calls.append(0)
    if os.environ.get("DIE") == str(train.RANK) and len(calls) == 3:
        os._exit(7)
    seeds = [torch.Generator().manual_seed(zlib.crc32(f"{task.id} {len(calls)}".encode())) for task in tasks]
    return [r for task, n, seed in zip(tasks, sizes, seeds)
            for r in real(model, tokenizer, [task], n, **options | {"generator": seed})]
train.rollout = alone
train.main()
"""


def _processes(n, base, out, tmp, *more, **environment):
    (tmp / "replay.py").write_text(REPLAY)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    options = ["--model", str(base[0]), "--out", str(out), "--tasks", "3", "--steps", "3", "--no-eval", *more]
    script = [str(tmp / "replay.py"), str(Path(train.__file__).parent)]
    return subprocess.run([sys.executable, *torchrun, *script, *options],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.mark.parametrize("argv", ["--group-size 1", "--lr nan", "--objective dpo --reward scalar", "--gate 1e39"])
def test_arguments_of_train_that_mean_nothing(argv, capsys):
    """A group without a pair, NaN for every weight, a reward that the objective never reads: said in one line."""
    with pytest.raises(SystemExit) as stop:
        train.arguments(argv.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and argv.split()[0] in said


def test_resumed_logs_keep_whole_lines(tmp_path):
    """An agent that wrote a line separator, or a run that was killed inside of a line, made --resume end in a traceback
    before its first step; and the rows of steps that are done again stood there twice."""
    folder = train.Folder(SimpleNamespace(out=tmp_path, model="x", resume=False))
    row = json.dumps({"step": 1, "turns": ["a\u2028b\x85\u00e9"]}, ensure_ascii=False).encode()
    (tmp_path / "rollouts.jsonl").write_bytes(row + b'\n{"step": 2}\n' + row[:-4])  # inside of a letter
    folder.open_logs(2)
    folder.log("rollouts", {"step": 2, "turns": ["\u2028"]})
    folder.logs["rollouts"].close()
    lines = (tmp_path / "rollouts.jsonl").read_text("utf-8").split("\n")
    assert lines[0].encode() == row and json.loads(lines[1])["step"] == 2 and lines[2:] == [""]


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
def test_two_processes_draw_the_curve_of_one(base, tmp_path, objective):
    """A mean of the processes' means instead of one sum over all tokens; groups dropped or taken twice when three tasks
    meet two processes; a gradient that one process alone applies; two processes that write one log."""
    runs = []
    for n in (1, 2):
        done = _processes(n, base, tmp_path / str(n), tmp_path, "--objective", objective)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()]
        lines = (tmp_path / str(n) / "rollouts.jsonl").read_text()
        runs.append((rows, lines, load_file(tmp_path / str(n) / "adapter" / "adapter_model.safetensors")))
    (one, text, adapter), (two, same, other) = runs
    assert text == same and len(one) == len(two) == 3
    for a, b in zip(one, two):
        for key in ("loss", "kl", "grad_norm", "win_rate", "tied", "gate_risky", "safety_share", "tokens"):
            # the order of fp32 sums differs between one process and two: 1.8e-5 of a gradient norm was seen
            assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), key
    assert all(row["grad_norm"] > 0 for row in one)
    # the weights are not compared: AdamW blows a rounding error in a gradient near 0 up to a whole step
    assert adapter.keys() == other.keys()


def test_a_process_that_dies_ends_all(base, tmp_path):
    """The others wait for half an hour in a collective, or go on and write an adapter of half the tasks."""
    done = _processes(2, base, tmp_path / "run", tmp_path, DIE="1")
    assert done.returncode != 0, done.stderr[-2000:]  # torchrun names the process and its exit code
    assert not (tmp_path / "run" / "adapter").exists()


def test_safety_tokens_are_those_of_whole_checks(base):
    """A check that was opened and never closed counted, by a find() of -1, the first tokens of its turn."""
    tokenizer, ids, spans, want = base[2], [], [], 0
    quoted = mosaic.encode_trusted(tokenizer, '<think>\nx\n</think>\n\n<tool_call>\n{"name": "a", "arguments": '
                                   '{"x": "<safety_thoughts>y</safety_thoughts>"}}\n</tool_call>')
    assert mosaic.safety_tokens(tokenizer, quoted, [(0, len(quoted))]) == 0
    for check in ("<safety_thoughts>\nall is fine\n</safety_thoughts>\n", "", "<safety_thoughts>\nall is fine\n"):
        texts = "<think>\nx\n</think>\n\n", check, "<answer>\ny\n</answer>"
        parts = [mosaic.encode_trusted(tokenizer, text) for text in texts]
        spans.append((len(ids), len(ids) + sum(map(len, parts))))
        ids += sum(parts, [])
        want += len(mosaic.encode_trusted(tokenizer, check.rstrip("\n"))) * check.endswith("</safety_thoughts>\n")
    assert mosaic.safety_tokens(tokenizer, ids, spans) == want > 5
