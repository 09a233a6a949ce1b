"""Wan 2.2 itself: facts, flow, encoders, experts, sampling, files. Knows nothing of training."""

import logging

# bitsandbytes, where it is installed, is imported by PEFT at every start of every program, and
# warns on some CPUs that it would like a package for a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "from kernels-community" not in record.getMessage()
)
