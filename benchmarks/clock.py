"""What a benchmark measures with, on a processor or on a GPU: seconds and memory."""

import resource
import time

import torch


def wall(device: str) -> float:
    """The clock's seconds, once a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def busy(device: str) -> float:
    """Seconds of the processor, as those of the clock say little where others work too; on a GPU the clock's."""
    return wall(device) if device == "cuda" else time.process_time()


def milliseconds(seconds: float) -> float:
    """To a tenth, and to a thousandth where it is less than ten."""
    return round(1000 * seconds, 1 if seconds >= 0.01 else 3)


def peak_memory(device: str) -> dict[str, float]:
    """The most that this process took."""
    found = {"peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    if device == "cuda":
        found["peak memory of the GPU, GB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found
