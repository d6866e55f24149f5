"""The drawings: well-formed, complete, and seen by a real browser, on machines from one core to 1,024 CPUs."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from benchmarks.harness import archives
from benchmarks.harness.server import TorchServe
from tests.browser import Browser
from tests.machines import machine
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.machine.topology import Topology
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.planning.policy import Lend, Policy
from ts_plugin.trial.properties import Property
from ts_plugin.view.html import html
from ts_plugin.view.svg import svg
from ts_plugin.view.terminal import Map, utilisation
from ts_plugin.view.tiles import PALETTE
from ts_plugin.view.view import View, Worker, tag

SVG = "{http://www.w3.org/2000/svg}"
MACHINES = {
    "one core": machine(cores=1),
    "two cores": machine(cores=2),
    "SMT": machine(packages=2, cores=8, smt=2),
    "hybrid": machine(cores=12, smt=1, slow=8),
    "SNC": machine(packages=2, nodes=4, l3=2, cores=3, smt=2),
    "SMT4": machine(packages=2, cores=28, smt=4),
    "1024 CPUs": machine(packages=4, nodes=4, l3=4, cores=8, smt=2),
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as started:
        yield started


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """One Chromium for all tests of this module, with a tab of its own for each."""
    yield chromium
    chromium.renew()


@cache
def drawn(topology: Topology, workers: int, policy: Policy = Policy(lend=Lend.AUTO)) -> View:
    result = plan(topology, [Demand(topology.online, policy)] * workers)
    people = tuple(
        Worker(piece, 4000 + number, "resnet<18>", "1.0", str(9000 + number), notes=("a & b",) if number == 0 else ())
        for number, piece in enumerate(result.slices)
    )
    return View(topology, people, topology.online, result.reserved, notes=result.notes, unbound=((99, "why <not>"),))


CASES = [
    pytest.param(topology, workers, id=f"{name}, {workers} workers")
    for name, topology in MACHINES.items()
    for workers in (1, 2, 3, 16)
] + [pytest.param(MACHINES["1024 CPUs"], 256, id="1024 CPUs, 256 workers")]


def attributes(element: ElementTree.Element, *names: str) -> tuple[float, ...]:
    return tuple(float(element.attrib[name]) for name in names)


def named(view: View, index: int) -> str:
    return f"A.{index}" if view.summed_up else tag(index)


@pytest.mark.parametrize(("topology", "workers"), CASES)
def test_svg_shows_every_core_with_its_owners(topology: Topology, workers: int) -> None:
    view = drawn(topology, workers)
    root = ElementTree.fromstring(svg(view))
    cells = [cell for cell in root.iter(f"{SVG}g") if cell.get("class") == "cell" and "data-tags" in cell.attrib]
    assert len(cells) == len(topology.cores)
    shown = {}
    for cell in cells:
        title = cell.find(f"{SVG}title")
        assert title is not None
        assert title.text
        number = re.match(r"core (\d+), CPUs (\S+):", title.text)
        assert number is not None
        shown[int(number[1])] = (number[2], cell.attrib["data-tags"])
    assert shown == {
        core.number: (format_cpulist(core.cpus), " ".join(named(view, index) for index in view.owners(core)))
        for core in topology.cores
    }


@pytest.mark.parametrize(("topology", "workers"), CASES)
def test_svg_stays_inside_its_canvas(topology: Topology, workers: int) -> None:
    root = ElementTree.fromstring(svg(drawn(topology, workers)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width <= 1300
    in_patterns = {shape for pattern in root.iter(f"{SVG}pattern") for shape in pattern.iter(f"{SVG}rect")}
    for shape in root.iter(f"{SVG}rect"):
        if "x" in shape.attrib and shape not in in_patterns:
            x, y, w, h = attributes(shape, "x", "y", "width", "height")
            assert x >= 0
            assert y >= 0
            assert x + w <= width + 0.5
            assert y + h <= height + 0.5
    for text in root.iter(f"{SVG}text"):
        x, y = attributes(text, "x", "y")
        assert 0 <= x <= width
        assert 0 <= y <= height


def lent(view: View, *, borrower: int, lender: int) -> View:
    """Return ``view`` at a moment at which one worker computes on its own slice and on another's."""
    both = view.workers[borrower].slice.cpus + view.workers[lender].slice.cpus
    pid = view.workers[borrower].pid
    assert pid is not None
    return replace(view, users=dict.fromkeys(both, pid))


@pytest.mark.parametrize("name", ["two cores", "SMT", "SNC"])
def test_svg_shows_who_computes_on_borrowed_cores(name: str) -> None:
    workers = 2 if name == "two cores" else 16
    view = lent(drawn(MACHINES[name], workers), borrower=0, lender=1)
    assert view.workers[1].slice.cpus[0] in view.workers[0].slice.reach, "slices that the planner lets lend"
    root = ElementTree.fromstring(svg(view))
    borrowed = [cell for cell in root.iter(f"{SVG}g") if "data-guest" in cell.attrib]
    assert {(cell.attrib["data-tags"], cell.attrib["data-guest"]) for cell in borrowed} == {("B", "A")}
    assert len(borrowed) == len(view.topology.cores_of(view.workers[1].slice.cpus))
    for cell in borrowed:
        title, corner = cell.find(f"{SVG}title"), [*cell.iter(f"{SVG}polygon")][-1]
        assert title is not None
        assert (title.text or "").endswith("A (resnet<18> 1.0) computes here now")
        assert corner.attrib["fill"] == PALETTE[0][0]
    assert any("borrowed" in (text.text or "") for text in root.iter(f"{SVG}text"))
    idle = svg(replace(view, users={}))
    assert "data-guest" not in idle
    assert "polygon" not in idle


@pytest.mark.parametrize("width", [80, 200])
def test_terminal_shows_who_computes_on_borrowed_cores(width: int) -> None:
    view = lent(drawn(MACHINES["SMT"], 4), borrower=0, lender=1)
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(Map(view, dict.fromkeys(view.topology.online, 0.5)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    own, other = (view.workers[index].slice.cpus for index in (0, 1))
    assert text.count("B←A") == len(other)
    assert f"{format_cpulist(own)} + {format_cpulist(other)}" in text
    assert text.count("idle") == len(view.workers) - 1


def test_a_large_map_in_the_terminal_has_the_borrowers_colour() -> None:
    view = replace(lent(drawn(MACHINES["1024 CPUs"], 256), borrower=0, lender=1), whole=True)

    def coloured(shown: View) -> str:
        console = Console(width=200, file=io.StringIO(), color_system="truecolor", force_terminal=True)
        console.print(Map(shown))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    red, green, blue = rgb(PALETTE[0][0])
    fill = f"48;2;{red};{green};{blue}m"
    own = len(view.workers[0].slice.cpus)
    first, again = coloured(view).count(fill), coloured(replace(view, users={})).count(fill)
    assert first == again + len(view.workers[1].slice.cpus)
    assert again > own


def test_tiles_do_not_overlap() -> None:
    root = ElementTree.fromstring(svg(drawn(MACHINES["SNC"], 3)))
    places = []
    for cell in root.iter(f"{SVG}g"):
        if "data-tags" in cell.attrib:
            first = next(cell.iter(f"{SVG}rect"))
            places.append(attributes(first, "x", "y", "width"))
    for n, (x, y, size) in enumerate(places):
        for other_x, other_y, _ in places[:n]:
            assert abs(x - other_x) >= size or abs(y - other_y) >= size


def test_workers_beyond_the_palette_have_a_pattern_of_their_own() -> None:
    view = drawn(MACHINES["1024 CPUs"], 40)
    root = ElementTree.fromstring(svg(view))
    known = {pattern.attrib["id"] for pattern in root.iter(f"{SVG}pattern")}
    used = {fill[5:-1] for shape in root.iter(f"{SVG}rect") if (fill := shape.get("fill", "")).startswith("url(#")}
    assert used == known == {f"ts-{index % len(PALETTE)}-{index // len(PALETTE)}" for index in range(len(PALETTE), 40)}


def test_text_can_be_read_on_every_colour() -> None:
    """Source: WCAG 2.2, success criterion 1.4.3: 4.5:1, or 3:1 for large text. Tags are large."""

    def luminance(colour: str) -> float:
        channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for fill, ink in PALETTE:
        light, dark = sorted((luminance(fill), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, fill


def test_every_cpu_number_is_written_on_192_cores() -> None:
    topology = machine(packages=2, l3=12, cores=8, smt=2)
    texts = {(text.text or ""): float(text.attrib["font-size"]) for text in _texts(svg(drawn(topology, 20)))}
    assert {str(cpu) for cpu in topology.online} <= set(texts)
    assert min(texts.values()) >= 8


@pytest.mark.parametrize("name", ["SMT4", "1024 CPUs"])
def test_where_numbers_could_not_be_read_each_group_has_its_range(name: str) -> None:
    topology = MACHINES[name]
    root = ElementTree.fromstring(svg(replace(drawn(topology, 16), workers=())))
    lines = [text for text in root.iter(f"{SVG}text") if re.fullmatch(r"[\d, -]+", text.text or "")]
    words = ",".join((line.text or "").strip(" ,").replace(" ", "") for line in lines)
    assert parse_cpulist(words) == topology.online
    assert min(float(line.attrib["font-size"]) for line in lines) >= 9
    groups = len(list(root.iter(f"{SVG}rect")))
    assert len(lines) < groups, "ranges, and not number by number"


def _texts(document: str) -> Iterator[ElementTree.Element]:
    return ElementTree.fromstring(document).iter(f"{SVG}text")


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    page = html(drawn(MACHINES["SMT"], 2))
    assert "resnet<18>" not in page
    assert "resnet&lt;18&gt;" in page
    assert "why &lt;not&gt;" in page
    assert "{{" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert "@import" not in page
    assert not re.findall(r"https?://", page)


@pytest.mark.parametrize(("topology", "workers"), CASES)
@pytest.mark.parametrize("width", [80, 200])
def test_terminal_shows_every_worker(topology: Topology, workers: int, width: int) -> None:
    view = drawn(topology, workers)
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(Map(view, dict.fromkeys(topology.online, 0.5)))
    file = console.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert not view.summed_up or "256 workers" in text
    for worker in () if view.summed_up else view.workers:
        assert str(worker.pid) in text
    assert "unbound pid 99: why <not>" in text
    places = [text.index(words) for words in ("unbound pid 99", "package 0", "note on A a & b")]
    assert [*places, text.rindex("NUMA")] == sorted([*places, text.rindex("NUMA")]), (
        "what is wrong comes first, and notes before the list, which may be long"
    )


def test_utilisation() -> None:
    before, after = {0: (10, 100), 1: (0, 100), 2: (5, 50)}, {0: (60, 200), 1: (0, 200), 2: (5, 50), 3: (1, 2)}
    assert utilisation(before, after) == {0: 0.5, 1: 0.0}


def colours(image: bytes) -> set[tuple[int, int, int]]:
    with Image.open(io.BytesIO(image)) as decoded:
        found = decoded.convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {colour for _, colour in found if isinstance(colour, tuple)}  # type: ignore[misc]


def rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


BACKGROUND = {"light": "#ffffff", "dark": "#12161c"}


@pytest.mark.process
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page(tmp_path: Path, browser: Browser, scheme: str) -> None:
    page = tmp_path / "cores.html"
    page.write_text(html(drawn(MACHINES["SNC"], 6)), encoding="utf-8")
    browser.prefer(scheme)
    browser.open(page.as_uri())
    seen = colours(browser.screenshot(tmp_path / "cores.png"))
    assert {rgb(fill) for fill, _ in PALETTE[:6]} <= seen
    assert rgb(BACKGROUND[scheme]) in seen
    assert browser.run("document.querySelectorAll('tbody tr').length") == 6
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.run("document.querySelector('tr[data-tag=B]').scrollIntoView()")
    x, y = browser.run("(({x, y}) => [x + 9, y + 9])(document.querySelector('tr[data-tag=B]').getBoundingClientRect())")
    browser.tell("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    mine = "[...document.querySelectorAll('#map .mine')].every(cell => cell.dataset.tags === 'B')"
    browser.wait("document.querySelectorAll('#map .mine').length > 0")
    assert browser.run(mine)


@pytest.mark.process
def test_a_browser_shows_borrowed_cores_with_their_borrower(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "cores.html"
    view = lent(drawn(MACHINES["SNC"], 16), borrower=4, lender=5)
    page.write_text(html(view), encoding="utf-8")
    browser.open(page.as_uri())
    cells = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[9].textContent)"
    own, other = (format_cpulist(view.workers[index].slice.cpus) for index in (4, 5))
    assert browser.run(cells) == ["idle"] * 4 + [f"{own} + {other} borrowed"] + ["idle"] * 11
    browser.run("pick('E')")
    mine = "[...document.querySelectorAll('#map .mine')].map(cell => cell.dataset.tags)"
    assert browser.run(mine) == ["E"] * 3 + ["F"] * 3


@pytest.mark.process
def test_the_page_says_first_what_is_wrong_and_where_it_is(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "cores.html"
    view = replace(drawn(MACHINES["SMT"], 2), host="gpu<7>", server_pid=4711)
    page.write_text(html(view), encoding="utf-8")
    browser.open(page.as_uri())
    foot = "document.getElementById('unbound').getBoundingClientRect().bottom"
    assert browser.run(f"0 < {foot} && {foot} <= document.getElementById('map').getBoundingClientRect().top")
    red, green, blue = browser.run(
        "getComputedStyle(document.getElementById('unbound')).color.match(/\\d+/g).map(Number)"
    )
    assert red > 3 * max(green, blue)
    place = browser.run("document.getElementById('place').textContent")
    assert re.match(r"gpu<7> · server 4711 · \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+$", place)


@pytest.mark.process
@pytest.mark.parametrize("age", [0, 3600], ids=["written now", "written an hour ago"])
def test_a_page_that_is_read_from_a_file_shows_utilisation(tmp_path: Path, browser: Browser, age: int) -> None:
    page = tmp_path / "cores.html"
    view, before, now = drawn(MACHINES["two cores"], 2), {0: (10, 100), 1: (0, 100)}, {0: (60, 200), 1: (0, 200)}
    page.write_text(html(view, before=before, ticks=now, reload=60), encoding="utf-8")
    os.utime(page, times=(time.time() - age,) * 2)
    browser.open(page.as_uri())
    browser.wait("document.querySelector('.load[data-cpu=\"0\"]').style.transform === 'scaleX(0.5)'")
    assert browser.run("document.getElementById('status').className") == ("lost" if age else "live")


@cache
def crowd(workers: int = 400, *, whole: bool = False) -> View:
    """Return two models with many workers on many cores."""
    view = drawn(MACHINES["1024 CPUs"], workers)
    people = (replace(worker, model="bert" if n % 3 else "resnet18") for n, worker in enumerate(view.workers))
    return replace(view, workers=tuple(people), unbound=(), whole=whole)


def test_many_workers_are_one_line_of_the_legend_per_model() -> None:
    picture = svg(crowd())
    words = [text.text or "" for text in _texts(picture)]
    lines = [line.rpartition(" workers · ")[0] for line in words if " workers · " in line]
    assert lines == ["resnet18 1.0 · 134", "bert 1.0 · 266"]
    assert {text for text in words if text.isupper() and len(text) < 3} == {"A", "B"}
    names = [title.text or "" for title in ElementTree.fromstring(picture).iter(f"{SVG}title")]
    assert any("B (bert 1.0, worker 9001)" in name for name in names), "a core still says whose it is"
    assert len([text for text in _texts(svg(crowd(whole=True))) if " · pid " in (text.text or "")]) == 400


def test_many_workers_are_one_line_of_the_terminal_per_model() -> None:
    def lines(view: View) -> list[str]:
        console = Console(width=160, file=io.StringIO(), color_system=None)
        console.print(Map(view))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().splitlines()

    short = lines(crowd())
    rows = [line.split()[:4] for line in short if " workers " in line]
    assert rows[1:3] == [["A", "resnet18", "1.0", "134"], ["B", "bert", "1.0", "266"]]
    assert short[-1].startswith("400 workers: a line per model")
    assert len(lines(crowd(whole=True))) - len(short) > 390


def test_slices_of_one_model_are_told_apart() -> None:
    view = replace(crowd(41), workers=tuple(replace(worker, model="bert") for worker in crowd(41).workers))
    cells = [cell for cell in ElementTree.fromstring(svg(view)).iter(f"{SVG}g") if cell.get("data-tags")]
    looks: dict[str, set[bool]] = {}
    for cell in cells:
        looks.setdefault(cell.attrib["data-tags"], set()).add("url(#ts-0-1)" in ElementTree.tostring(cell).decode())
    assert [looks[f"A.{member}"] for member in range(41)] == [{bool(member % 2)} for member in range(41)]


ELEMENTS = "box = one => one.getBoundingClientRect(), (selector => [...document.querySelectorAll(selector)])"
PHONES: dict[str, Callable[[], View]] = {
    "2 cores": lambda: drawn(MACHINES["two cores"], 2),
    "2 x 28 cores": lambda: lent(drawn(machine(packages=2, cores=28, smt=2), 6), borrower=0, lender=1),
    "1024 CPUs, 400 workers": crowd,
}


@pytest.mark.process
@pytest.mark.parametrize(("name", "scheme"), [*((name, "light") for name in PHONES), ("2 x 28 cores", "dark")])
def test_the_page_on_a_phone(tmp_path: Path, browser: Browser, name: str, scheme: str) -> None:
    view, page = PHONES[name](), tmp_path / "cores.html"
    page.write_text(html(view), encoding="utf-8")
    browser.prefer(scheme)
    browser.be_a_phone(360)
    browser.open(page.as_uri())
    assert browser.run("innerWidth") == 360
    assert browser.run("document.scrollingElement.scrollWidth <= innerWidth")
    wide = "[...document.querySelectorAll('body *')].filter(one => one.scrollWidth > one.clientWidth + 1)"
    assert browser.run(f"{wide}.filter(one => getComputedStyle(one).overflowX !== 'visible').length") == 0
    assert browser.run(f"{ELEMENTS}('#map .cell').every(cell => box(cell).right <= 360)")
    if len(view.topology.cores) < 64:  # else the groups' ranges say it, and tiles are small
        assert browser.run(f"{ELEMENTS}('#map .cell').every(cell => box(cell).width >= 40)")
    assert browser.run(f"{ELEMENTS}('#map text').every(text => box(text).height >= 7)")
    assert browser.run(f"{ELEMENTS}('tr[data-tag]:not([hidden]), td button').every(one => box(one).height >= 44)")
    browser.run("document.forms[0].classList.add('wanted')")
    assert browser.run(f"{ELEMENTS}('input, form button').every(one => box(one).height >= 44)")
    assert browser.run("document.scrollingElement.scrollWidth <= innerWidth")
    assert rgb(BACKGROUND[scheme]) in colours(browser.screenshot(tmp_path / "cores.png"))


@pytest.mark.process
def test_a_finger_on_a_core_says_whose_it_is(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "cores.html"
    page.write_text(html(drawn(MACHINES["SMT"], 2)), encoding="utf-8")
    browser.be_a_phone(360)
    browser.open(page.as_uri())
    browser.tap("#map .cell[data-tags=B]")
    browser.wait("document.getElementById('hint').textContent === 'core 8, CPUs 8,24: B (resnet<18> 1.0)'")
    assert browser.run("[...document.querySelectorAll('tr.mine')].map(row => row.dataset.tag)") == ["B"]


@pytest.mark.process
@pytest.mark.parametrize("name", MACHINES)
def test_texts_do_not_lie_on_each_other(tmp_path: Path, browser: Browser, name: str) -> None:
    view = drawn(MACHINES[name], 16)
    file = tmp_path / "cores.svg"
    file.write_text(svg(replace(view, notes=("a long note on this machine " * 9, "a second one"))), encoding="utf-8")
    browser.open(file.as_uri())
    assert browser.overlapping_texts() == []
    order = browser.run("[...document.querySelectorAll('text')].map(text => [text.textContent, text.getBBox().y])")
    parts = ("unbound pid 99", "package 0", "note: a second one", "resnet<18> 1.0 · worker 9000")
    places = [next(y for words, y in order if words.startswith(part)) for part in parts]
    assert places == sorted(places)


EVERY, QUICK = "const EVERY = 5000;", "const EVERY = 200;"  # in the page: the milliseconds between two looks


class Server(ThreadingHTTPServer):
    """Serves the page as TorchServe does, behind a token that can change, but it looks more often."""

    daemon_threads = True
    token: str | None = None
    page: bytes

    def show(self, view: View) -> None:
        page = html(view, ticks={0: (1, 2)})
        assert page.count(EVERY) == 1
        self.page = page.replace(EVERY, QUICK).encode()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        allowed = self.server.token is None or self.headers["Authorization"] == f"Bearer {self.server.token}"
        body = self.server.page if allowed else b'{"code": 400}'
        self.send_response(200 if allowed else 400)
        self.send_header("Content-Type", "text/html; charset=utf-8" if allowed else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as started:
        started.show(drawn(MACHINES["SMT"], 2))
        thread = Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.mark.process
def test_the_page_follows_and_asks_for_a_new_token(server: Server, browser: Browser) -> None:
    status = "document.getElementById('status')"
    browser.open(f"http://127.0.0.1:{server.server_port}/cores")
    browser.wait(f"{status}.className === 'live'")
    server.show(drawn(MACHINES["SMT"], 3))
    browser.wait("document.querySelectorAll('tbody tr').length === 3")
    server.token = "new"
    browser.wait(f"document.forms[0].className === 'wanted' && {status}.textContent === 'token wanted'")
    browser.run("document.getElementById('token').value = 'new'; document.querySelector('button').click()")
    browser.wait(f"document.forms[0].className === '' && {status}.className === 'live'")


@pytest.mark.process
def test_a_click_unfolds_the_workers_of_a_model(server: Server, browser: Browser) -> None:
    shown = "[...document.querySelectorAll('tbody tr')].filter(row => row.checkVisibility()).length"
    server.show(crowd())
    browser.open(f"http://127.0.0.1:{server.server_port}/cores")
    assert browser.run(shown) == 2
    browser.run("document.querySelector('tr[data-tag=B] button').click()")
    assert browser.run(shown) == 2 + 266
    browser.run("pick('B.0')")
    mine = "[...document.querySelectorAll('#map .mine')].map(cell => cell.dataset.tags.split(' ').includes('B.0'))"
    assert set(browser.run(mine)) == {True}
    moved = tuple(replace(worker, moves=7) for worker in crowd().workers)
    server.show(replace(crowd(), workers=moved, notes=("news",)))
    browser.wait("document.getElementById('notes').textContent.includes('news')")
    assert browser.run("document.querySelector('tr[data-tag=\"B.0\"]').cells[8].textContent") == "7"
    assert browser.run(shown) == 2 + 266, "they stay unfolded when the page follows"


@pytest.mark.server
def test_a_real_server_behind_its_token(tmp_path: Path, checkout: Path, browser: Browser) -> None:
    """TorchServe's own token authorization, its management API, a real page in a real browser."""
    properties: dict[str, Property] = {
        "plugins_path": checkout / "ts_plugin" / "frontend",
        "cpu_launcher_enable": True,
        "disable_token_authorization": False,
    }
    with TorchServe(archives.facts(), workers=2, properties=properties) as running:
        key = json.loads((running.working_directory / "key_file.json").read_text())["management"]["key"]
        browser.open(f"{running.management_url}/cores")
        assert "Token Authorization failed" in browser.run("document.body.textContent")
        browser.open(f"{running.management_url}/cores", Authorization=f"Bearer {key}")
        browser.wait("document.getElementById('status').className === 'live'")
        pids = browser.run("[...document.querySelectorAll('tbody tr')].map(row => +row.cells[3].textContent)")
        assert sorted(pids) == sorted(piece["pid"] for piece in running.cores()["slices"])
        seen = colours(browser.screenshot(tmp_path / "cores.png"))
        assert {rgb(fill) for fill, _ in PALETTE[:2]} <= seen
