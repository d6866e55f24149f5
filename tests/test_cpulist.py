"""CPU lists: every form that the kernel or a person writes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_plugin.machine.cpulist import CpuListError, format_cpulist, parse_cpulist, short_cpulist

TEXTS = [
    pytest.param("", set(), id="nothing"),
    pytest.param("\n", set(), id="an empty sysfs file"),
    pytest.param("0", {0}, id="one CPU"),
    pytest.param("0-3,8\n", {0, 1, 2, 3, 8}, id="ranges and single CPUs"),
    pytest.param("3-3", {3}, id="a range of one"),
    pytest.param("8,0-3,2", {0, 1, 2, 3, 8}, id="unordered, twice"),
    pytest.param(" 0, 1 ,2 3 ", {0, 1, 2, 3}, id="blanks, as people type them"),
    pytest.param("0-10:2/5", {0, 1, 5, 6, 10}, id="strides"),
    pytest.param("0-3:1/2", {0, 2}, id="every other CPU"),
    pytest.param("0-3:2", {0, 2}, id="every other CPU, as taskset writes it"),
]

MALFORMED = [
    pytest.param("3-0", r"'3-0' \(3 > 0\)", id="backwards"),
    pytest.param("a", r"'a' is not a number or range", id="a word"),
    pytest.param("0-", "'0-' is not", id="no upper bound"),
    pytest.param("-1", "'-1' is not", id="negative"),
    pytest.param("1-2-3", "'1-2-3' is not", id="two dashes"),
    pytest.param("+1", r"'\+1' is not", id="a sign"),
    pytest.param("1_0", "'1_0' is not", id="an underscore"),
    pytest.param("٣", "'٣' is not", id="another script's digit"),
    pytest.param("0x3", "'0x3' is not", id="hexadecimal"),
    pytest.param("0-3:0/2", "need 0 < used <= group", id="a stride of nothing"),
    pytest.param("0-3:3/2", "need 0 < used <= group", id="a stride larger than its group"),
    pytest.param("0-99999999999", "99999999999 is above", id="more CPUs than any kernel has"),
]


@pytest.mark.parametrize(("text", "cpus"), TEXTS)
def test_parse(text: str, cpus: set[int]) -> None:
    assert parse_cpulist(text) == cpus


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(CpuListError, match=message):
        parse_cpulist(text)


@given(st.sets(st.integers(0, 2048)))
def test_round_trip(cpus: set[int]) -> None:
    text = format_cpulist(cpus)
    assert parse_cpulist(text) == cpus
    assert format_cpulist(parse_cpulist(text)) == text


@given(st.sets(st.integers(0, 2048)))
def test_the_short_form_is_read_too(cpus: set[int]) -> None:
    assert parse_cpulist(short_cpulist(cpus)) == cpus


@pytest.mark.parametrize(
    ("cpus", "text"),
    [
        (range(0, 35, 2), "0-34:2"),
        ([0, 2, 4], "0,2,4"),
        ([0, 2, 3, 4, 8], "0,2-4,8"),
        ([1, 5, 9, 13, 14, 15], "1-13:4,14-15"),
        ([], ""),
    ],
)
def test_cpus_at_equal_distances_are_written_as_taskset_takes_them(cpus: Iterable[int], text: str) -> None:
    assert short_cpulist(cpus) == text


def test_format_is_the_shortest() -> None:
    assert format_cpulist([8, 3, 2, 1, 0, 10, 8]) == "0-3,8,10"
    assert format_cpulist([]) == ""
