"""Log-probs and top-20 divergences from hidden states: this package beside full logits, TRL and Liger.

    python benchmarks/token_statistics.py            # the tables of docs/performance.md, about ten minutes
    python benchmarks/token_statistics.py --quick    # a smaller size, under a minute

Each form computes log pi of the sampled token, differentiable in the hidden states and the output weight, and without
a gradient log pi of the rollout policy's 20 likeliest tokens and the top-K TV; where it gives no top-20, this package
adds that from the form's log-probs. The loss is sum_t -A log pi(y_t) / N, with one advantage A per response: GRPO's at
a ratio of 1, so that a library whose unit is the whole loss can be compared too.

Correctness first: every form's values and gradients are compared with float64 on some of the tokens, and at the timed
size with the form on full logits. Where that is red, the row says WRONG and has no number.

CPU time is that of the one thread that computes (RUSAGE_THREAD), in two parts: user, and kernel, which is page faults.
Fresh memory costs them, and a form that needs little is flattered by counting them: the first ratio is of user time
alone, as if all memory stood ready; the second of both, which a process pays where its allocator maps each block anew,
as the C library does by default from 32 MiB on (here: every block, so that small ones cost more than usual). The forms
take turns; ratios are medians over the rounds of the ratio to that round's baseline, with their range. Other libraries
take two turns.

The C allocator is told to give memory back at once, so that the peak (VmHWM after it was reset, less what was resident
before, the gradients included) is what a form needs. Told to keep memory, as for benchmarks/mask.py, it would not find
aligned blocks of this size again; counting the kernel's time apart asks nothing of it.

TRL comes with ``pip install 'cppo[train]'``; Liger with ``pip install --no-deps liger-kernel`` (what is used of it
here is plain torch). Without them their rows say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import os
import resource
import statistics
import subprocess
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import cppo

K, RESPONSES, CHECKED_TOKENS = 20, 8, 384
# Absolute for log-probs (nats) and divergences, of the norm for gradients. float32 on logits of size 10 gives 1e-6.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-5
MIB = 1 << 20
INSTALL = {"trl": "pip install 'cppo[train]'", "liger_kernel": "pip install --no-deps liger-kernel"}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclasses.dataclass(frozen=True)
class Task:
    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H]
    ids: torch.Tensor  # [N]
    rollout_logp: torch.Tensor  # [N]
    topk_ids: torch.Tensor  # [N, K]
    rollout_topk_logp: torch.Tensor  # [N, K]
    advantages: torch.Tensor  # [RESPONSES]

    def first(self, tokens, dtype=None):
        """Return a task of the first tokens, with leaves of its own."""
        hidden, weight = (x.detach().to(dtype or x.dtype) for x in (self.hidden[:tokens], self.weight))
        return Task(
            hidden.clone().requires_grad_(),
            weight.requires_grad_(self.weight.requires_grad),
            *(x[:tokens] for x in (self.ids, self.rollout_logp, self.topk_ids, self.rollout_topk_logp)),
            self.advantages,
        )

    def frozen(self):
        return dataclasses.replace(self, weight=self.weight.detach())

    def loss(self, logp):
        """Return the loss; None where no gradient was asked for."""
        rows = logp.view(RESPONSES, -1) * self.advantages[:, None].to(logp.dtype)
        return -rows.sum() / len(self.ids) if torch.is_grad_enabled() else None

    def wanted(self):
        return torch.cat([self.ids[:, None], self.topk_ids], 1)

    def tv(self, every):
        """Return the top-K TV from log pi of the sampled token and the K others, ``[N, K + 1]``."""
        every = every.detach()
        return cppo.topk_tv(
            every[:, 0], self.rollout_logp, self.ids, every[:, 1:], self.rollout_topk_logp, self.topk_ids
        )


def make_task(tokens, vocabulary, width, *, dtype=torch.float32, seed=0):
    """Make logits of a standard deviation of 3, and a rollout policy a little off; half of the ids are in its top K."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(3 / math.sqrt(width))
    noise = 0.05 * torch.randn(tokens, width, generator=generator)
    column = torch.randint(K, (tokens, 1), generator=generator)
    anywhere = torch.randint(vocabulary, (tokens, 1), generator=generator)
    ids, logp, topk_ids, topk_logp = [], [], [], []
    for rows in torch.arange(tokens).split(256):
        z = (hidden[rows] + noise[rows]) @ weight.t()
        z -= z.logsumexp(1, keepdim=True)
        best = z.topk(K, dim=1)
        chosen = torch.where(rows[:, None] % 2 == 0, best.indices.gather(1, column[rows]), anywhere[rows])
        ids.append(chosen[:, 0])
        logp.append(z.gather(1, chosen)[:, 0])
        topk_ids.append(best.indices)
        topk_logp.append(best.values)
    advantages = torch.randn(RESPONSES, generator=generator)
    rollout = (torch.cat(pieces) for pieces in (ids, logp, topk_ids, topk_logp))
    return Task(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), *rollout, advantages)


# ---------------------------------------------------------------- the forms
# Each returns (loss, log pi of the sampled tokens, divergence), or None for what it does not give.


def full_log_softmax(task, widen=lambda logits: logits):
    logp = widen(task.hidden @ task.weight.t()).log_softmax(1)
    own = logp.gather(1, task.ids[:, None])[:, 0]
    return task.loss(own), own, task.tv(logp.detach().gather(1, task.wanted()))


def trl_selective(task):
    from trl.trainer.utils import selective_log_softmax

    shape = (RESPONSES, len(task.ids) // RESPONSES, -1)
    every = selective_log_softmax((task.hidden @ task.weight.t()).view(shape), task.wanted().view(shape)).flatten(0, 1)
    return task.loss(every[:, 0]), every[:, 0], task.tv(every)


def trl_fused(task):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    own = ChunkedLogProbFunction.apply(task.hidden, task.weight, None, task.ids, 1.0, WIDTH, None, 1.0, ())[0]
    return task.loss(own), own, ours(task, logp=own.detach())[2]


def liger_loss(task):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = (RESPONSES, -1)
    form = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)
    ids = task.ids.view(shape)
    hidden = task.hidden.view(*ids.shape, -1)
    return form(hidden, task.weight, ids, torch.ones(ids.shape), task.advantages)[0], None, None


def liger_log_probs(task):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    own = LigerFusedLinearPPOBase.chunk_forward(task.hidden[None], task.weight, task.ids[None])[0]
    return task.loss(own), own, ours(task, logp=own.detach())[2]


def ours(task, logp=None):
    found = cppo.token_statistics(
        task.hidden, task.weight, task.ids, rollout_logp=task.rollout_logp, topk_ids=task.topk_ids,
        rollout_topk_logp=task.rollout_topk_logp, divergence="topk_tv", logp=logp,
    )  # fmt: skip
    return task.loss(found.logp), found.logp, found.divergence


def bare_products(task, *, backward):
    """Do nothing but multiply: logits, and what the two gradients cost, in chunks of 512 tokens."""
    hidden, weight = task.hidden.detach(), task.weight.detach()
    logits = torch.empty(min(512, len(hidden)), len(weight))
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight) if backward else None
    for rows in torch.arange(len(hidden)).split(len(logits)):
        chunk, out = slice(int(rows[0]), int(rows[-1]) + 1), logits[: len(rows)]
        torch.mm(hidden[chunk], weight.t(), out=out)
        if weight_gradient is not None:
            torch.mm(out, weight, out=hidden_gradient[chunk])
            weight_gradient.addmm_(out.t(), hidden[chunk])
    return None, None, None


def our_topk(task):
    cppo.topk_log_probs(task.hidden, task.weight, K)
    return None, None, None


THREE_PRODUCTS = functools.partial(bare_products, backward=True)
ONE_PRODUCT = functools.partial(bare_products, backward=False)
OTHERS = (trl_selective, trl_fused, liger_loss, liger_log_probs)
UNCHECKED = (THREE_PRODUCTS, ONE_PRODUCT, our_topk)  # no log-probs come out; our_topk has a check of its own


# ---------------------------------------------------------------- measuring and comparing


@dataclasses.dataclass(frozen=True)
class Sample:
    user: float  # seconds
    kernel: float  # seconds
    peak: int  # bytes


@dataclasses.dataclass(frozen=True)
class Values:
    logp: torch.Tensor | None
    divergence: torch.Tensor | None
    hidden: torch.Tensor | None  # gradients
    weight: torch.Tensor | None


def resident_bytes(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def measure(form, task):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before, start = resident_bytes("VmRSS"), resource.getrusage(resource.RUSAGE_THREAD)
    loss, logp, divergence = form(task)
    if loss is not None:
        loss.backward()
    end, peak = resource.getrusage(resource.RUSAGE_THREAD), resident_bytes("VmHWM") - before
    values = Values(None if logp is None else logp.detach(), divergence, task.hidden.grad, task.weight.grad)
    task.hidden.grad = task.weight.grad = None
    return Sample(end.ru_utime - start.ru_utime, end.ru_stime - start.ru_stime, peak), values


def errors(found, expected):
    """Return name: error of what both have, absolute for values, relative to the norm for gradients."""
    out = {}
    for name in ("logp", "divergence", "hidden", "weight"):
        a, b = getattr(found, name), getattr(expected, name)
        if a is not None and b is not None:
            difference = a.double() - b.double()
            gradient = name in ("hidden", "weight")
            out[name] = (difference.norm() / b.double().norm() if gradient else difference.abs().max()).item()
    return out


def complaint(found, expected):
    """Return what is wrong, or an empty string."""
    seen = errors(found, expected)
    wrong = ["no gradient"] if torch.is_grad_enabled() and "hidden" not in seen else []
    for name, error in seen.items():
        limit = GRADIENT_TOLERANCE if name in ("hidden", "weight") else VALUE_TOLERANCE
        if not error <= limit:  # NaN is wrong too
            wrong.append(f"{'d ' if name in ('hidden', 'weight') else ''}{name} off by {error:.0e}")
    return ", ".join(wrong)


def check_with_float64(forms, task, truth):
    """Return name: what is wrong with a form on some of the tokens."""
    small = task.first(CHECKED_TOKENS)
    wrong = {}
    for name, form in forms.items():
        if form not in UNCHECKED:
            try:
                found = measure(form, small)[1]
            except ImportError as missing:
                package = (missing.name or "").split(".")[0]
                wrong[name] = f"not installed: {INSTALL[package]}" if package in INSTALL else f"no number: {missing}"
                continue
            text = complaint(found, truth)
            if text:
                wrong[name] = f"WRONG against float64: {text}; no number"
    return wrong


def check_topk(task):
    """Return what is wrong with our_topk on some of the tokens."""
    small = task.first(CHECKED_TOKENS, torch.float64)
    every = (small.hidden @ small.weight.t()).log_softmax(1)
    expected = every.topk(K, dim=1)
    found = cppo.topk_log_probs(task.hidden[:CHECKED_TOKENS], task.weight, K)
    error = (found.logp.double() - expected.values).abs().max().item()
    # Neighbours whose float64 log-probs differ by less than the tolerance may swap.
    apart = (expected.values - every.gather(1, found.ids)).abs().max().item()
    return "" if max(error, apart) <= VALUE_TOLERANCE else f"WRONG: off by {max(error, apart):.0e}; no number"


def run_group(title, forms, task, truth, *, baseline, rounds, goals=None):
    """Print a row for each form: seconds, ratios to the baseline, peak; ``goals``: name: what stands at the end."""
    print(f"\n{title}\n{HEADER}", flush=True)
    wrong = check_with_float64(forms, task, truth)
    if our_topk in forms.values():
        wrong |= {name: text for name, form in forms.items() if form is our_topk and (text := check_topk(task))}
    samples = {name: [] for name in forms}
    reference = None
    # The form on full logits comes first: the others' values are compared with its.
    order = sorted(forms, key=lambda name: forms[name] is not full_log_softmax)
    for turn in range(rounds):
        for name in order:
            if name in wrong or (turn >= 2 and forms[name] in OTHERS):
                continue
            sample, values = measure(forms[name], task)
            samples[name].append(sample)
            if turn == 0 and forms[name] is full_log_softmax:
                reference = values
            elif turn == 0 and forms[name] not in UNCHECKED:
                text = "nothing to compare" if reference is None else complaint(values, reference)
                if text:
                    wrong[name] = f"WRONG against full logits: {text}; no number"
            del values
        reference = None
    for name in forms:
        if name in wrong or baseline in wrong:
            print(f"{name:52s} {wrong.get(name, 'no number without its baseline')}")
        else:
            print_row(name, samples[name], samples[baseline], (goals or {}).get(name, ""))
    sys.stdout.flush()


HEADER = f"{'':52s} {'user s':>7s} {'kernel s':>8s}   {'user ratio':17s}  {'both':>5s} {'peak MiB':>9s} {'ratio':>6s}"


def print_row(name, mine, base, goal=""):
    base = base[: len(mine)]
    ratios = sorted(a.user / b.user for a, b in zip(mine, base, strict=True))
    both = statistics.median((a.user + a.kernel) / (b.user + b.kernel) for a, b in zip(mine, base, strict=True))
    ratio = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
    user, kernel, peak = (statistics.median(getattr(s, part) for s in mine) for part in ("user", "kernel", "peak"))
    share = peak / statistics.median(s.peak for s in base)
    print(f"{name:52s} {user:7.2f} {kernel:8.2f}   {ratio:17s}  {both:5.2f} {peak / MIB:9.0f} {share:6.3f}  {goal}")


# ---------------------------------------------------------------- the tables


def print_comparisons(task, rounds):
    _, truth = measure(full_log_softmax, task.first(CHECKED_TOKENS, torch.float64))
    # They were set for this size.
    goals = (len(task.ids), len(task.weight)) == (4096, 49152)
    full = "full log_softmax, autograd"
    run_group(
        "Forward and backward, weight trained; ratios to full log_softmax",
        {
            "three bare products (no log-probs)": THREE_PRODUCTS,
            full: full_log_softmax,
            "TRL selective_log_softmax on full logits": trl_selective,
            "TRL fused head (CPU path) + top-20 by cppo": trl_fused,
            "Liger fused GRPO loss (neither top-20 nor log-probs)": liger_loss,
            "cppo.token_statistics": ours,
        },
        task, truth, baseline=full, rounds=rounds,
        goals={"cppo.token_statistics": "goals: time 1.15, peak 0.10"} if goals else None,
    )  # fmt: skip
    run_group(
        "Forward and backward, weight frozen",
        {full: full_log_softmax, "cppo.token_statistics": ours},
        task.frozen(), truth, baseline=full, rounds=rounds,
    )  # fmt: skip
    with torch.no_grad():
        run_group(
            "Forward only (no_grad); ratios to one bare product",
            {
                "one bare product (no log-probs)": ONE_PRODUCT,
                "full log_softmax": full_log_softmax,
                "TRL selective_log_softmax on full logits": trl_selective,
                "TRL fused head (CPU path) + top-20 by cppo": trl_fused,
                "Liger chunked log-probs + top-20 by cppo (logp=)": liger_log_probs,
                "cppo.token_statistics": ours,
                "cppo.topk_log_probs, k = 20": our_topk,
            },
            task, truth, baseline="one bare product (no log-probs)", rounds=rounds,
            goals={"cppo.token_statistics": "goal: time 1.30"} if goals else None,
        )  # fmt: skip


def slope(sizes, seconds):
    """Return the least-squares slope of log seconds by log size."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope


def print_growth(tokens, vocabularies, width, vocabulary, rounds):
    print("\nGrowth of cppo.token_statistics, forward and backward (checked above; user seconds, peak in MiB)")
    whole = make_task(tokens[-1], vocabulary, width)
    seconds = grown([whole.first(count) for count in tokens], rounds)
    print(f"  time grows as N^{slope(tokens, seconds):.2f}")
    del whole
    seconds = grown([make_task(tokens[0], size, width) for size in vocabularies], rounds)
    print(f"  time grows as V^{slope(vocabularies, seconds):.2f}", flush=True)


def grown(tasks, rounds):
    """Print and return the time of each size: the least of its turns, which others' work disturbed least."""
    samples = [[] for _ in tasks]
    for _ in range(rounds):
        for task, taken in zip(tasks, samples, strict=True):
            taken.append(measure(ours, task)[0])
    seconds = []
    for task, taken in zip(tasks, samples, strict=True):
        seconds.append(min(sample.user for sample in taken))
        peak = statistics.median(sample.peak for sample in taken)
        own = peak - task.hidden.numel() * task.hidden.itemsize
        rest = own - task.weight.numel() * task.weight.itemsize
        print(
            f"  N = {len(task.ids):6d}, V = {len(task.weight):6d}   {seconds[-1]:6.2f} s   peak {peak / MIB:5.0f}, "
            f"less d hidden {own / MIB:5.0f}, less both gradients {rest / MIB:5.0f}",
            flush=True,
        )
    return seconds


def print_bfloat16(tokens, vocabulary, width, rounds):
    print(f"\nbfloat16 hidden states and weight, N = {tokens}, forward and backward; errors against float64")
    task = make_task(tokens, vocabulary, width, dtype=torch.bfloat16)
    _, truth = measure(full_log_softmax, task.first(tokens, torch.float64))
    forms = {
        "full log_softmax in bfloat16": full_log_softmax,
        "bfloat16 logits, log_softmax in float32": functools.partial(full_log_softmax, widen=torch.Tensor.float),
        "cppo.token_statistics": ours,
    }
    samples = {name: [] for name in forms}
    for turn in range(rounds):
        for name, form in forms.items():
            sample, values = measure(form, task)
            samples[name].append(sample)
            if turn == 0:
                seen = errors(values, truth)
                print(
                    f"{name:52s} log-prob {seen['logp']:.1e} nats   divergence {seen['divergence']:.1e}   "
                    f"d hidden {seen['hidden']:.1e}   d weight {seen['weight']:.1e}",
                    flush=True,
                )
                # Float32 logits of bfloat16 factors are exact to float32; only the gradients are rounded to bfloat16.
                if form is ours and (seen["logp"] > VALUE_TOLERANCE or seen["hidden"] > 4e-3):
                    print(f"{name:52s} WRONG; no number")
                    return
    print(HEADER)
    for name in forms:
        print_row(name, samples[name], samples["full log_softmax in bfloat16"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=None, help="turns that each form takes (3; quick: 2)")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in GIVE_BACK.items()):
        # The allocator reads its settings when a process starts.
        command = [sys.executable, __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | GIVE_BACK | {"OMP_NUM_THREADS": "1"}, check=False).returncode)
    torch.set_num_threads(1)
    rounds = options.rounds or (2 if options.quick else 3)
    tokens, vocabulary, width = (768, 16384, 576) if options.quick else (4096, 49152, 576)
    task = make_task(tokens, vocabulary, width)
    print(
        f"torch {torch.__version__}, one thread: N = {tokens} tokens, V = {vocabulary}, H = {width}, K = {K}, float32",
        flush=True,
    )
    print_comparisons(task, rounds)
    del task
    if options.quick:
        print_growth((256, 512, 1024), (4096, 8192, 16384), width, vocabulary, 1)
        print_bfloat16(384, vocabulary, width, rounds)
    else:
        print_growth((1024, 2048, 4096, 8192), (12288, 24576, 49152, 98304), width, vocabulary // 2, 3)
        print_bfloat16(1024, vocabulary, width, 2)


if __name__ == "__main__":
    main()
