"""Time and memory of mask + loss + gradient: this package against plain autograd, and every method beside CPPO.

    python benchmarks/mask.py            # the table of docs/performance.md
    python benchmarks/mask.py --quick    # fewer repeats

CPU time of the calling thread, one thread, medians; each pair is timed alternately, so that the machine's mood hits
both. Nothing is timed before the two forms agree: where the correctness check is red, no ratio is printed.

The C allocator is told to keep freed memory while timing (page faults, of which a fresh process has many and a training
process few, would decide the outcome otherwise), and to give it back at once while measuring the peak.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time

import torch

import cppo

DELTA, DELTA_B, W_MIN = 0.15, 0.02, 0.8


def plain_autograd(logp, rollout_logp, advantages, mask, *, adaptive):
    """CPPO written the obvious way on [B, T], letting autograd find the gradient."""
    ratio = torch.exp(logp - rollout_logp)
    with torch.no_grad():
        divergence = (logp.exp() - rollout_logp.exp()).abs() * mask
        position = mask.cumsum(1) - 1
        lengths = mask.sum(1, keepdim=True)
        weight = (1 - (1 - W_MIN) * position / (lengths - 1).clamp(min=1)) * mask
        spent = weight * divergence
        delta_b = DELTA_B
        if adaptive:
            p90 = torch.nanquantile(divergence.masked_fill(mask == 0, float("nan")), 0.9, dim=1, keepdim=True)
            delta_b = p90.clamp(DELTA_B, 2 * DELTA_B)
        prior = (delta_b * weight - spent).cumsum(1) - (delta_b * weight - spent)
        within = spent <= torch.clamp(DELTA + prior, max=DELTA)
        keep = (within | (advantages[:, None] * (ratio - 1) <= 0)).float()
    return -(keep * ratio * advantages[:, None] * mask).sum() / mask.sum()


def per_response_loop(logp, rollout_logp, advantages, lengths, *, adaptive):
    """The packed batch, one response at a time, as several public implementations do it."""
    loss, start = logp.new_zeros(()), 0
    for index, length in enumerate(lengths):
        piece = slice(start, start + length)
        ones = torch.ones(1, length)
        loss = loss + length * plain_autograd(
            logp[None, piece], rollout_logp[None, piece], advantages[index : index + 1], ones, adaptive=adaptive
        )
        start += length
    return loss / start


def make_batch(responses, width, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.empty(responses, width).exponential_(1.0, generator=generator)
    # Noise of another size in each response, so that the adaptive budget is at its floor, between, and at its ceiling.
    noise = torch.logspace(-2.3, 0, responses)[torch.randperm(responses, generator=generator), None]
    logp = (rollout + noise * torch.randn(responses, width, generator=generator)).clamp(max=0)
    lengths = torch.randint(width // 4, width + 1, (responses,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).float()
    return logp, rollout, torch.randn(responses, generator=generator), mask, lengths


def gradient(form, logp):
    leaf = logp.clone().requires_grad_()
    form(leaf).backward()
    return leaf.grad


def cpu_seconds(form, leaf):
    start = time.thread_time()
    form(leaf).backward()
    elapsed = time.thread_time() - start
    leaf.grad = None
    return elapsed


def compare(name, ours, theirs, logp, tokens, repeats):
    mine, reference = gradient(ours, logp), gradient(theirs, logp)
    flipped = ((mine == 0) != (reference == 0)).float().mean().item()
    error = (mine - reference)[(mine == 0) == (reference == 0)].abs().max().item() / reference.abs().max().item()
    if flipped > 1e-5 or error > 1e-5:
        print(f"{name:44s} WRONG: {flipped:.1e} of the decisions differ, gradient error {error:.1e}; no ratio")
        return
    leaf = logp.clone().requires_grad_()
    pairs = [(cpu_seconds(ours, leaf), cpu_seconds(theirs, leaf)) for _ in range(repeats + 1)][1:]
    mine, reference = (statistics.median(side) * 1e9 / tokens for side in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    print(
        f"{name:44s} {mine:7.1f} {reference:7.1f} ns/token   ratio {statistics.median(ratios):.2f} "
        f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]   {1 / statistics.median(ratios):.1f}x faster"
    )


def resident_bytes(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def peak_bytes(form, logp):
    leaf = logp.clone().requires_grad_()
    form(leaf).backward()
    leaf.grad = None
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident_bytes("VmRSS")
    form(leaf).backward()
    return resident_bytes("VmHWM") - before


def padded_forms(adaptive):
    logp, rollout, advantages, mask, _ = make_batch(64, 8192)
    keep = mask.bool()
    method = cppo.CPPO(delta=DELTA, delta_b=DELTA_B, w_min=W_MIN, budget="adaptive" if adaptive else "fixed")

    def ours(x):
        return cppo.policy_loss(method, x, rollout, advantages, keep).loss

    def theirs(x):
        return plain_autograd(x, rollout, advantages, mask, adaptive=adaptive)

    return logp, ours, theirs


def print_peaks():
    for adaptive in (False, True):
        logp, ours, theirs = padded_forms(adaptive)
        mine, reference = (peak_bytes(form, logp) / logp.numel() for form in (ours, theirs))
        label = f"peak extra, {'adaptive' if adaptive else 'fixed'} budget"
        print(f"{label:44s} {mine:7.1f} {reference:7.1f} bytes/token, gradient included")


def run_with(environment, *arguments):
    subprocess.run([sys.executable, __file__, *arguments], env=os.environ | environment, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=["time", "peak"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "peak":
        print_peaks()
    elif options.part == "time":
        print_times(5 if options.quick else 15)
    else:
        keep = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
        run_with(keep, "--part", "time", *(["--quick"] if options.quick else []))
        run_with({"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}, "--part", "peak")


def print_times(repeats):
    print("Padded [64, 8192], float32: cppo.policy_loss + backward against plain autograd", flush=True)
    for adaptive in (False, True):
        logp, ours, theirs = padded_forms(adaptive)
        label = "adaptive budget (theirs: nanquantile)" if adaptive else "fixed budget"
        compare(label, ours, theirs, logp, logp.numel(), repeats)
    print("Packed, ragged: one pass against a loop over responses")
    for responses, width in ((256, 1600), (32, 13000)):
        logp, rollout, advantages, mask, lengths = make_batch(responses, width)
        keep = mask.bool()
        flat, flat_rollout = logp[keep], rollout[keep]
        for adaptive in (False, True):
            method = cppo.CPPO(delta=DELTA, delta_b=DELTA_B, w_min=W_MIN, budget="adaptive" if adaptive else "fixed")
            host = lengths.tolist()

            def ours(x, method=method, flat_rollout=flat_rollout, advantages=advantages, lengths=lengths):
                return cppo.policy_loss(method, x, flat_rollout, advantages, lengths=lengths).loss

            def theirs(x, adaptive=adaptive, flat_rollout=flat_rollout, advantages=advantages, host=host):
                return per_response_loop(x, flat_rollout, advantages, host, adaptive=adaptive)

            label = f"T ~ {flat.numel() // responses}, {responses} responses, {method.budget} budget"
            compare(label, ours, theirs, flat, flat.numel(), repeats)
    print_methods(repeats)


def print_methods(repeats):
    """Every method's time a token beside CPPO's with a fixed budget, in both layouts, once these agree."""
    print(
        "Every method: padded and packed, 256 responses of about 1,000 tokens, ns/token and ratio to CPPO, fixed budget"
    )
    logp, rollout, advantages, mask, lengths = make_batch(256, 1600)
    keep = mask.bool()
    entropy = torch.rand(logp.shape, generator=torch.Generator().manual_seed(1))
    required = {cppo.ESTR: {"tau": 1.0}, cppo.CTPO: {"epsilon": 0.1}}
    baseline = cppo.CPPO(budget="fixed")
    methods = [baseline, *(kind(**required.get(kind, {})) for kind in cppo.METHODS.values())]

    def form(method, layout):
        entropies = entropy if layout == "padded" else entropy[keep]
        more = {"rollout_entropy": entropies} if isinstance(method, cppo.ESTR) else {}
        if layout == "padded":
            return lambda x: cppo.policy_loss(method, x, rollout, advantages, keep, **more).loss
        return lambda x: cppo.policy_loss(method, x, rollout[keep], advantages, lengths=lengths, **more).loss

    for method in methods[1:]:
        cells = []
        padded_gradient = gradient(form(method, "padded"), logp)
        packed_gradient = gradient(form(method, "packed"), logp[keep])
        wrong = ((padded_gradient[keep] - packed_gradient).abs() > 1e-5 * packed_gradient.abs().max()).float().mean()
        if wrong > 1e-4:
            print(f"{cppo.method_name(method):16s} WRONG: the layouts disagree at {wrong:.1e} of the tokens; no time")
            continue
        for layout in ("padded", "packed"):
            leaf = (logp if layout == "padded" else logp[keep]).clone().requires_grad_()
            mine, base = form(method, layout), form(baseline, layout)
            pairs = [(cpu_seconds(mine, leaf), cpu_seconds(base, leaf)) for _ in range(repeats + 1)][1:]
            seconds = statistics.median(pair[0] for pair in pairs)
            ratio = statistics.median(a / b for a, b in pairs)
            cells.append(f"{layout} {seconds * 1e9 / leaf.numel():6.1f}  {ratio:5.2f}")
        print(f"{cppo.method_name(method):16s} " + "    ".join(cells), flush=True)


if __name__ == "__main__":
    main()
