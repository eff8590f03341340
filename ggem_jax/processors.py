"""The processors that this process may use.

`neupims` has the same module: neither package imports the other.
"""

import os


def count_processors() -> int:
    """Returns the number of processors that this process may run on, at least 1.

    Where the operating system tells, it is fewer than the computer has if `taskset`, a batch system
    or a container allows some of them only.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
