"""What ``cpu_launcher_args`` asks for: its words in, one immutable Policy out.

The words are those of TorchServe's own launcher, ``torch.backends.xeon.run_cpu``, and of ``ipexrun`` with the meaning
they have there, and a few of ours. One table says all of it; the reference in the docs is printed from the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ts_plugin.machine.cpulist import CpuListError, parse_cpulist

MOST = 65535  # of anything that is counted: no machine has more CPUs


class LauncherArgsError(ValueError):
    """``cpu_launcher_args`` cannot be understood; the message names the word and its nearest match."""


class Pin(StrEnum):
    AUTO = "auto"  # pin unless a CFS quota says that other containers use the CPUs too
    ALWAYS = "always"
    NEVER = "never"


class Lend(StrEnum):
    AUTO = "auto"  # requests also compute on the slices of idle workers, until these want them back
    NEVER = "never"


class Memory(StrEnum):
    PREFERRED = "preferred"
    BIND = "bind"
    LOCAL = "local"
    NONE = "none"


class Allocator(StrEnum):
    DEFAULT = "default"  # glibc's
    TCMALLOC = "tcmalloc"
    JEMALLOC = "jemalloc"


class OmpRuntime(StrEnum):
    DEFAULT = "default"  # the one inside the torch wheel
    INTEL = "intel"


@dataclass(frozen=True, slots=True)
class Policy:
    """How slices are cut and workers are bound.

    ``node_ids`` and ``core_list`` (CPU numbers) narrow the allowed CPUs; None means no narrowing.
    ``cores_per_worker`` is one number for all workers or one per worker in order of arrival.
    ``logical`` gives a slice both SMT siblings of its cores. ``allocator`` and ``omp_runtime`` are None where no
    option asks. ``notes`` say which words were accepted without effect.
    """

    node_ids: frozenset[int] | None = None
    core_list: frozenset[int] | None = None
    cores_per_worker: tuple[int, ...] = ()
    logical: bool = False
    skip_cross_node_cores: bool = False
    equal: bool = False
    latency: bool = False
    use_e_cores: bool = False
    reserve_cores: int = 0
    pin: Pin = Pin.AUTO
    lend: Lend = Lend.AUTO
    memory: Memory = Memory.PREFERRED
    allocator: Allocator | None = None
    omp_runtime: OmpRuntime | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table: an option, under all its names, and what it sets.

    ``value`` names the argument in the reference, ``LIST`` for several numbers, empty for a flag; ``field`` is the
    Policy's, empty where the option is accepted without effect and ``meaning`` says why.
    ``parse`` turns the argument, nothing for a flag, into the field's value; its ValueError says what it expects.
    """

    names: tuple[str, ...]
    value: str
    field: str
    parse: Callable[[str], Any]
    meaning: str
    default: str = ""


def parse_launcher_args(text: str) -> Policy:
    """Return the Policy that ``text``, the value of ``cpu_launcher_args``, describes.

    Dashes and underscores are the same, ``--x=y`` is ``--x y``, an option may be cut as long as it stays unambiguous,
    and of one option given twice the last counts, as with argparse.

    Raises:
        LauncherArgsError: an unknown or ambiguous word, an impossible value, or two options that contradict.

    Source: torch/backends/xeon/run_cpu.py (create_args, _Launcher.launch); intel_extension_for_pytorch/cpu/launch.
    """
    fields: dict[str, Any] = {}
    set_by: dict[str, str] = {}
    notes: list[str] = []
    for option, name, value in _arguments(_words(text)):
        try:
            parsed = option.parse(value)
        except ValueError as error:
            raise LauncherArgsError(f"{name}: {value!r} is not {error}") from None
        if not option.field:
            notes.append(f"{name} has no effect: {option.meaning}")
            continue
        other = set_by.get(option.field, name)
        if _BY_NAME[other] is not option:
            if parsed in (None, fields[option.field]):
                continue
            if fields[option.field] is not None:
                raise LauncherArgsError(f"{other} and {name} contradict each other; leave one out")
        fields[option.field], set_by[option.field] = parsed, name
    mode = fields.pop("mode", None)
    if mode:
        notes += [f"{set_by[name]} has no effect: {mode} overrules it" for name in _apply_mode(mode, fields)]
    if fields.get("core_list") and fields.pop("node_ids", None):
        notes.append(f"{set_by['node_ids']} has no effect: {set_by['core_list']} says which CPUs to use")
    return Policy(**fields, notes=tuple(notes))


def option_reference() -> Iterator[tuple[str, str, str]]:
    """Yield option, meaning and default of everything that ``cpu_launcher_args`` may contain, for a reference."""
    for option in OPTIONS:
        names = ", ".join(f"{name} {option.value}".rstrip() for name in option.names)
        meaning = option.meaning if option.field else f"accepted without effect: {option.meaning}"
        yield names, meaning, option.default


def _apply_mode(mode: str, fields: dict[str, Any]) -> list[str]:
    """Set what ``mode`` stands for; return the fields that it overrules, as in TorchServe's launcher."""
    overruled = [name for name in ("cores_per_worker", "node_ids", "logical") if fields.pop(name, None)]
    fields["latency" if mode == "--latency-mode" else "skip_cross_node_cores"] = True
    return overruled


def _words(text: str) -> list[str]:
    if not any(quote in text for quote in "'\"\\"):
        return text.split()
    import shlex

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise LauncherArgsError(f"{text!r}: {error}; close the quotation or leave the quotes out") from None
    joined = [word for word in words if word.startswith("-") and len(word.partition("=")[0].split()) > 1]
    if joined:
        raise LauncherArgsError(f"{joined[0]!r} is one word because of the quotes around it; leave these quotes out")
    return words


def _arguments(words: list[str]) -> Iterator[tuple[Option, str, str]]:
    """Yield every option in ``words`` with the name it was found under and its argument."""
    position = 0
    while position < len(words):
        word, equals, value = words[position].partition("=")
        position += 1
        option, name = _find(word)
        if not option.value:
            if equals:
                raise LauncherArgsError(f"{name} takes no value, but got {value!r}; write {name} alone")
            yield option, name, ""
            continue
        values = [value] if equals else []
        # A list may be spread over several words: `4 2`, or `0, 1, 2, 3` without quotes.
        while position < len(words) and not _is_option(words[position]) and (option.value == "LIST" or not values):
            values.append(words[position])
            position += 1
        if not values:
            raise LauncherArgsError(f"{name} needs a value: {name} {option.value} ({option.meaning})")
        yield option, name, " ".join(values)


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:].isdecimal()


def _find(word: str) -> tuple[Option, str]:
    """Return the option that ``word`` names, and its full name there."""
    if not word.startswith("-"):
        raise LauncherArgsError(f"unexpected word {word!r}; options begin with --, and only a list has several values")
    wanted = word.replace("_", "-")
    exact = _BY_NAME.get(wanted)
    if exact is not None:
        return exact, wanted
    if wanted in _NUMBER_OR_LIST:
        raise LauncherArgsError(f"{word!r} may mean a number or a list: {_NUMBER_OR_LIST[wanted]}")
    longer = {name: option for name, option in _BY_NAME.items() if name.startswith(wanted) and len(wanted) > 2}
    if len({option.names for option in longer.values()}) == 1:
        return next((option, name) for name, option in longer.items())
    if longer:
        raise LauncherArgsError(f"{word!r} is ambiguous: it may be {' or '.join(longer)}; write it out")
    import difflib

    nearest = [_OF_OTHERS[wanted]] if wanted in _OF_OTHERS else difflib.get_close_matches(wanted, _BY_NAME, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known options: {' '.join(_BY_NAME)}"
    raise LauncherArgsError(f"unknown option {word!r}; {hint}")


def _flag(value: Any) -> Callable[[str], Any]:
    return lambda _: value


def _member(choices: type[StrEnum], *, auto: bool = False) -> Callable[[str], StrEnum | None]:
    """Parse a member of ``choices``; with ``auto`` also that word, which leaves the choice to us."""
    words = [*["auto"] * auto, *choices]

    def parse(text: str) -> StrEnum | None:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return None if auto and text == "auto" else choices(text)

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    sizes = text.replace(",", " ").split()
    if sizes == ["-1"]:
        return ()
    if not sizes or not all(_is_number(size) and int(size) > 0 for size in sizes):
        raise ValueError(f"a number of cores from 1 to {MOST}, or one number per worker such as 4,2")
    return tuple(int(size) for size in sizes)


def _numbers(text: str) -> frozenset[int] | None:
    if text in ("-1", ""):
        return None
    try:
        numbers = parse_cpulist(text)
    except CpuListError as error:
        raise ValueError(f"a list of numbers and ranges such as 0-3,8: {error}") from None
    if not numbers:
        raise ValueError("a list of numbers and ranges such as 0-3,8")
    return numbers


def _count(text: str) -> int:
    if not _is_number(text):
        raise ValueError(f"a whole number from 0 to {MOST}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MOST)) and int(text) <= MOST


# What other launchers have and ts-cores accepts, so that their lines work: why it has no effect here -> the options.
_WITHOUT_EFFECT = {
    "a slice lies where it crosses the fewest boundaries": ("--strategy scatter|close",),
    "every live worker gets a slice, in order of arrival": (
        "--ninstances N",
        "--rank N",
        "--instance-idx LIST",
        "--multi-instance",
    ),
    "binding needs no external tool": ("--disable-numactl", "--disable-taskset", "--multi-task-manager NAME"),
    "the worker starts in place, as TorchServe starts it": ("--module -m", "--no-python"),
    "the worker's output stays in TorchServe's logs": ("--log-path --log-dir DIR", "--log-file-prefix NAME"),
    "it tunes jemalloc; set MALLOC_CONF yourself for that": ("--benchmark",),
    "the model stays as it is; a handler may call ipex.optimize": (
        "--auto-ipex",
        "--auto-ipex-verbose",
        "--disable-ipex-graph-mode",
        "--dtype float32|bfloat16",
    ),
    "TorchServe starts the workers, on this machine alone and without MPI": (
        "--distributed",
        "--nnodes N",
        "--nprocs-per-node --nproc-per-node N",
        "--hostfile FILE",
        "--master-addr ADDRESS",
        "--master-port N",
        "--extra-mpi-params --more-mpi-params WORDS",
        "--ccl-worker-count N",
        "--logical-cores-for-ccl --logical-core-for-ccl",
    ),
}


def _without_effect(usage: str, reason: str) -> Option:
    words = usage.split()
    names = tuple(word for word in words if word.startswith("-"))
    return Option(names, " ".join(words[len(names) :]), "", str, reason)


OPTIONS: tuple[Option, ...] = (
    Option(
        ("--node-id", "--nodes-list", "--socket-id"),
        "LIST",
        "node_ids",
        _numbers,
        "use only these NUMA nodes",
        "all nodes",
    ),
    Option(("--core-list", "--cores-list"), "LIST", "core_list", _numbers, "use only these CPUs", "all allowed CPUs"),
    Option(
        ("--ncores-per-instance", "--ncore-per-instance"),
        "LIST",
        "cores_per_worker",
        _sizes,
        "cores of one worker: one number for all, or one per worker in order of arrival, such as 4,2",
        "all cores are divided",
    ),
    Option(
        ("--use-logical-core", "--use-logical-cores"),
        "",
        "logical",
        _flag(True),
        "a slice holds all SMT siblings of its cores, one thread each",
        "one CPU per core",
    ),
    Option(
        ("--skip-cross-node-cores", "--bind-numa-node"),
        "",
        "skip_cross_node_cores",
        _flag(True),
        "no slice crosses a NUMA node, even if cores stay idle for it",
        "off",
    ),
    Option(("--latency-mode",), "", "mode", _flag("--latency-mode"), "4 cores per worker", "off"),
    Option(("--throughput-mode",), "", "mode", _flag("--throughput-mode"), "a NUMA node at most per worker", "off"),
    Option(
        ("--equal",), "", "equal", _flag(True), "equal sizes within one core, even if slices cross NUMA nodes", "off"
    ),
    Option(("--reserve-cores",), "N", "reserve_cores", _count, "keep N cores free of workers", "0"),
    Option(
        ("--use-e-cores",),
        "",
        "use_e_cores",
        _flag(True),
        "treat all cores of a hybrid processor alike, E-cores included",
        "E-cores may stay idle",
    ),
    Option(
        ("--pin",),
        "auto|always|never",
        "pin",
        _member(Pin),
        "bind workers to CPUs; auto bounds only their threads where a CFS quota is below the allowed cores",
        "auto",
    ),
    Option(
        ("--lend",),
        "auto|never",
        "lend",
        _member(Lend),
        "auto lets a request also compute on the cores of idle workers of its NUMA node, which get them back at the "
        "request's next parallel region, within about a millisecond",
        "auto",
    ),
    Option(
        ("--memory",),
        "preferred|bind|local|none",
        "memory",
        _member(Memory),
        "the slice's NUMA nodes first, only those, the node of the allocating CPU, or no memory policy",
        "preferred",
    ),
    Option(
        ("--memory-allocator",),
        "auto|default|tcmalloc|jemalloc",
        "allocator",
        _member(Allocator, auto=True),
        "preload this allocator where it is found; auto is tcmalloc",
        "auto",
    ),
    Option(("--enable-tcmalloc",), "", "allocator", _flag(Allocator.TCMALLOC), "as --memory-allocator tcmalloc"),
    Option(("--enable-jemalloc",), "", "allocator", _flag(Allocator.JEMALLOC), "as --memory-allocator jemalloc"),
    Option(("--use-default-allocator",), "", "allocator", _flag(Allocator.DEFAULT), "as --memory-allocator default"),
    Option(
        ("--omp-runtime",),
        "auto|default|intel",
        "omp_runtime",
        _member(OmpRuntime, auto=True),
        "preload Intel's OpenMP runtime where it is found, or keep the one of the torch wheel",
        "auto",
    ),
    Option(("--disable-iomp",), "", "omp_runtime", _flag(OmpRuntime.DEFAULT), "as --omp-runtime default"),
    *(_without_effect(usage, reason) for reason, usages in _WITHOUT_EFFECT.items() for usage in usages),
)

# Abbreviations that argparse would take for a list, and a reader for a number.
_CORES = "--ncores-per-instance N is a worker's number of cores, --core-list LIST names CPUs"
_NUMBER_OR_LIST = {"--core": _CORES, "--cores": _CORES, "--nodes": "--node-id LIST names NUMA nodes"}
# What numactl and taskset call it.
_OF_OTHERS = {
    "--membind": "--memory bind",
    "--preferred": "--memory preferred",
    "--localalloc": "--memory local",
    "--cpunodebind": "--node-id",
    "--physcpubind": "--core-list",
    "--cpu-list": "--core-list",
}
_BY_NAME = {name: option for option in OPTIONS for name in option.names}
