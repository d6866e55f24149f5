"""Handler whose parallel regions sleep, each thread for its part of the work: many cores on a small machine.

A request is REGIONS calls of GOMP_parallel, as a forward pass is; the library that makes them is compiled here. So a
slice is in use (BUSY) as long as if its threads computed. Every region sleeps until a time that was fixed when the
request began and the threads were known: where a busy machine wakes one late, the next is shorter. The body does not
matter.
"""

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler as Base

SECONDS = 0.4  # of a request on one thread
REGIONS = 50
SOURCE = """
#include <time.h>
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
static void sleeps(void *until) { clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, until, 0); }
void region(double until) {
  struct timespec time = {(time_t)until, (long)(1e9 * (until - (double)(time_t)until))};
  GOMP_parallel(sleeps, &time, 0, 0);
}
"""


class SleepsHandler(Base):  # type: ignore[misc]
    def initialize(self, context: Any) -> None:
        super().initialize(context)
        (libgomp,) = (Path(torch.__file__).parent / "lib").glob("libgomp*")
        with tempfile.TemporaryDirectory() as directory:
            source, library = Path(directory, "region.c"), Path(directory, "region.so")
            source.write_text(SOURCE)
            subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-z,now", source, libgomp, "-o", library], check=True)
            self.region = ctypes.CDLL(str(library)).region
            self.region.argtypes = (ctypes.c_double,)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        until = time.monotonic()
        for _ in range(REGIONS):
            until += SECONDS / REGIONS / torch.get_num_threads()
            self.region(until)
        return ["slept"] * len(data)
