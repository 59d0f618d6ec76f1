"""Responses cut over ranks: the cutting, and two ways to run the ranks: threads of this process, and gloo processes.

The threads exchange through a stand-in for the one collective that the package uses, so that mutants of the package can
be killed in-process; the processes use torch.distributed as it is. Run as a script, this file is one such process:

    python tests/ranks.py RANK WORLD RENDEZVOUS_FILE MODULE QUESTION ANSWER_FILE
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import pathlib
import random
import subprocess
import sys
import threading

import torch
import torch.distributed as dist
from layouts import Response, packed, padded

import cppo
from cppo.ops import collectives

HERE = pathlib.Path(__file__).resolve()
SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to cut one batch: how many chunks each rank holds, in which layout, at random places."""

    method: object
    responses: tuple[Response, ...]
    layout: str = "padded"
    zigzag: bool = False
    reduction: str = "token-mean"
    seed: int = 0
    correction: object = None
    dtype: torch.dtype = torch.float64
    per_token: bool = True  # advantages a token, or one a row

    def chunks(self, world):
        """Return the chunks of each rank, in time order."""
        return [(r, 2 * world - 1 - r) if self.zigzag else (r,) for r in range(world)]

    def pieces(self, world):
        """Return, for each response, its pieces in time order; some are empty."""
        dice = random.Random(self.seed)
        count = world * (2 if self.zigzag else 1)
        cut = []
        for response in self.responses:
            places = sorted(dice.randint(0, len(response)) for _ in range(count - 1))
            edges = [0, *places, len(response)]
            cut.append([take(response, slice(a, b)) for a, b in itertools.pairwise(edges)])
        return cut

    def reduction_arguments(self):
        return {"reduction": self.reduction, "fixed_length": 9 if self.reduction == "fixed-length" else None}

    def local_batch(self, rank, world):
        """Return this rank's rows as a batch of tests/layouts.py: the pieces of each response, one after the other."""
        rows = [pieces[chunk] for pieces in self.pieces(world) for chunk in self.chunks(world)[rank]]
        same = {"per_token": self.per_token, "dtype": self.dtype}
        if self.layout == "packed":
            return packed(rows, extra=self.seed % 2, **same)
        return padded(rows, side=("right", "left", "holes")[self.seed % 3], extra=rank, garbage=0.5, **same)


def take(response, where):
    """Return some tokens of a response."""
    return Response(*(None if f is None else f[where] for f in dataclasses.astuple(response)))


def judge_locally(case, rank, world, context):
    """Return what one rank says of its own tokens: a list a row, and the gradient of the loss."""
    batch = case.local_batch(rank, world)
    positional, named = batch.arguments(case.method, case.correction)
    decision = cppo.decide(case.method, *positional, **named, context_parallel=context)
    leaf = batch.logp.clone().requires_grad_()
    out = cppo.policy_loss(
        case.method, leaf, *positional[1:], **named, context_parallel=context, **case.reduction_arguments()
    )
    out.loss.backward()
    assert torch.equal(out.decision.gate, decision.gate)
    answer = {
        "gate": batch.per_response(decision.gate),
        "coefficient": batch.per_response(decision.coefficient),
        "rejected_by": batch.per_response(decision.rejected_by),
        "gradient": batch.per_response(leaf.grad),
        "loss": out.loss.item(),
        "tally": cppo.metrics.tally(out.decision),
        "outside": not (batch.outside(decision.gate).any() or batch.outside(leaf.grad).any()),
    }
    for field in dataclasses.fields(decision.trace):
        value = getattr(decision.trace, field.name)
        if value is not None:
            token_shaped = value.shape == batch.logp.shape
            answer[field.name] = batch.per_response(value) if token_shaped else value.tolist()
    return answer


def whole(case, world, answers):
    """Return the ranks' answers as one list a response, tokens in time order; response quantities from every row."""
    joined = {}
    for name in answers[0]:
        if name in ("loss", "tally", "outside"):
            joined[name] = [answer[name] for answer in answers]
            continue
        chunk_rows = {}
        for rank, chunks in enumerate(case.chunks(world)):
            for row, value in enumerate(answers[rank][name]):
                response, place = divmod(row, len(chunks))
                chunk_rows.setdefault(response, {})[chunks[place]] = value
        rows = [[chunk_rows[b][c] for c in sorted(chunk_rows[b])] for b in sorted(chunk_rows)]
        if all(isinstance(value, list) for pieces in rows for value in pieces):
            rows = [[number for piece in pieces for number in piece] for pieces in rows]
        joined[name] = rows
    return joined


# ---------------------------------------------------------------- threads


class _Meeting:
    """Where the threads of one run exchange tensors, in the order of their ranks."""

    def __init__(self, world):
        self.world = world
        self.barrier = threading.Barrier(world, timeout=SECONDS)
        self.table = [None] * world
        self.exchanged = []  # how many numbers each exchange carried, a rank

    def all_gather(self, rank, values):
        self.table[rank] = values.clone()
        self.barrier.wait()
        gathered = torch.stack(self.table)
        if rank == 0:
            self.exchanged.append(values.numel())
        self.barrier.wait()
        return gathered

    def all_reduce_(self, rank, values, operation, group):
        gathered = self.all_gather(rank, values)
        return values.copy_(gathered.amax(0) if operation == dist.ReduceOp.MAX else gathered.sum(0))


def run_threads(world, job, monkeypatch):
    """Return [job(rank, context) for each rank], each in a thread, and the sizes of what rank 0 exchanged.

    ``context(chunks)`` builds the rank's ContextParallel.
    """
    meeting = _Meeting(world)
    here = threading.local()
    monkeypatch.setattr(collectives, "all_gather", lambda values, group: meeting.all_gather(here.rank, values))
    monkeypatch.setattr(collectives, "all_reduce_", lambda *arguments: meeting.all_reduce_(here.rank, *arguments))
    monkeypatch.setattr(collectives, "rank_of", lambda group, argument: here.rank)
    answers, errors = [None] * world, []

    def live(rank):
        here.rank = rank
        try:
            answers[rank] = job(rank, lambda chunks: cppo.ContextParallel(chunks=chunks))
        except BaseException as error:  # noqa: BLE001  handed to the test below
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return answers, meeting.exchanged


# ---------------------------------------------------------------- processes


def run_processes(world, folder, question, module="test_context_parallel"):
    """Return the answers of ``world`` gloo processes to one of the questions of a module's ``QUESTIONS``."""
    processes = []
    for rank in range(world):
        command = [sys.executable, str(HERE), str(rank), str(world), str(folder / "meeting"), module, question]
        processes.append(subprocess.Popen([*command, str(folder / f"answer-{rank}")], cwd=HERE.parent))
    codes = [process.wait(timeout=SECONDS) for process in processes]
    assert codes == [0] * world, codes
    return [torch.load(folder / f"answer-{rank}", weights_only=False) for rank in range(world)]


def leave_together():
    """End this process of a group, once all have come so far.

    Not by the interpreter's own end: where one of gloo's threads still holds a tensor then, it asks for a GIL that is
    gone, and the process is aborted ("terminate called without an active exception").
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main():
    rank, world, meeting, module, question, answer = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.save(importlib.import_module(module).QUESTIONS[question](rank, world), answer)
    leave_together()


if __name__ == "__main__":
    main()
