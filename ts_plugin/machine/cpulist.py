"""CPU lists: the kernel's text form of a set of CPU numbers, such as ``0-3,8``."""

from __future__ import annotations

from collections.abc import Iterable

SHORTENED = 4  # of so many CPUs at equal distances: 0,2,4 is as short, and read more easily
_HIGHEST = 65535  # far above any kernel's NR_CPUS; keeps a slip of the finger from filling the memory


class CpuListError(ValueError):
    """A text that is no CPU list; the message quotes the offending part."""


def parse_cpulist(text: str) -> frozenset[int]:
    """Return the CPU numbers that ``text`` names; an empty text names none.

    Accepts the kernel's list format with strides (``0-10:2/5``), those of taskset (``0-10:5``) and, because people type
    them, blanks between entries.

    Raises:
        CpuListError: a part is no number, too high, or runs backwards: ``invalid CPU list '3-0' (3 > 0)``.

    Source: Documentation/admin-guide/kernel-parameters.rst, "cpu lists"; man 7 cpuset, "List format".
    """
    cpus: set[int] = set()
    for part in text.replace(",", " ").split():
        bounds, _, stride = part.partition(":")
        first, dash, last = bounds.partition("-")
        used, _, group = (stride if "/" in stride else f"1/{stride}").partition("/")
        try:
            low = _number(first)
            high = _number(last) if dash else low
            take, step = (_number(used), _number(group)) if stride else (1, 1)
        except ValueError:
            raise CpuListError(f"invalid CPU list {text.strip()!r} ({part!r} is not a number or range)") from None
        if high > _HIGHEST:
            raise CpuListError(
                f"invalid CPU list {text.strip()!r} ({high} is above the highest possible CPU, {_HIGHEST})"
            )
        if low > high:
            raise CpuListError(f"invalid CPU list {text.strip()!r} ({low} > {high})")
        if not 0 < take <= step:
            raise CpuListError(f"invalid CPU list {text.strip()!r} ({part!r}: need 0 < used <= group)")
        for start in range(low, high + 1, step):
            cpus.update(range(start, min(start + take, high + 1)))
    return frozenset(cpus)


def format_cpulist(cpus: Iterable[int]) -> str:
    """Return ``cpus`` as the shortest ascending list, for example ``0-3,8``; nothing for no CPU.

    The result can be pasted into ``taskset -c``.
    """
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def short_cpulist(cpus: Iterable[int]) -> str:
    """Return ``cpus`` as ``format_cpulist`` does, but ``0-34:2`` for CPUs at equal distances: for people and taskset.

    Source: man 1 taskset. The kernel's own form of it is ``0-34:1/2``.
    """
    left = sorted(set(cpus))
    parts = []
    while left:
        length, step = 1, left[1] - left[0] if len(left) > 1 else 1
        while length < len(left) and left[length] - left[length - 1] == step:
            length += 1
        if step > 1 and length < SHORTENED:
            length = 1
        run, left = left[:length], left[length:]
        parts.append(format_cpulist(run) if step == 1 or length == 1 else f"{run[0]}-{run[-1]}:{step}")
    return ",".join(parts)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):  # int() would take '+1', '1_0' and other scripts' digits
        raise ValueError(text)
    return int(text)
