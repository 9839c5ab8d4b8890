"""Ask torch to put large tensors on large pages: imported before torch, for its first allocation.

A step on a CPU takes and frees gigabytes, and each page of 4 KiB costs microseconds when it is first written
to: 6 to 9 % of a step of SD1.5 (benchmarks/LOG.md). Linux gives pages of 2 MiB where a program asks for them.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
