"""What is freed is there for the next allocation."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.train
# Page faults of fifty blocks of 8 MiB, one after the other: 2,048 each where every one is fresh.
FAULTS = """
import resource, torch
{first}
def blocks(count):
    for _ in range(count):
        a, b = torch.zeros(1 << 21), torch.zeros(1 << 21)
        del a, b
blocks(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks(50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first):
    return int(
        subprocess.run([sys.executable, "-c", FAULTS.format(first=first)], capture_output=True, check=True).stdout
    )


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the GNU C library's")
def test_freed_memory_is_used_again():
    kept = faults("from cppo.lab.allocator import keep_freed_memory; keep_freed_memory()")
    assert kept < 100  # fewer than a block has pages
