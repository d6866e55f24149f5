"""A kernel that says no: as in a container whose seccomp profile does not list a system call."""

from __future__ import annotations

import ctypes
import os
import struct

PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, ALL_THREADS = 38, 1, 1
NUMBERS = {"x86_64": (203, 317), "aarch64": (122, 277), "riscv64": (122, 277)}  # sched_setaffinity, seccomp
RETURN_EPERM, ALLOW = 0x0005_0001, 0x7FFF_0000


def forbid_affinity() -> None:
    """Let sched_setaffinity fail with EPERM in all threads of this process and all that they start, for ever.

    Source: man 2 seccomp; <linux/filter.h>, struct sock_filter and sock_fprog.
    """
    forbidden, seccomp = NUMBERS[os.uname().machine]
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load seccomp_data.nr
            (0x15, 0, 1, forbidden),  # the next one if equal, else skip it
            (0x06, 0, 0, RETURN_EPERM),
            (0x06, 0, 0, ALLOW),
        )
    )
    buffer = ctypes.create_string_buffer(program)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    argument = Program(len(program) // 8, ctypes.addressof(buffer))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(seccomp, SET_MODE_FILTER, ALL_THREADS, ctypes.byref(argument)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
