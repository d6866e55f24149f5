"""What a comparison found: the document that people send each other, and the figures in it. Pure."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ts_plugin.compare.ways import Way
from ts_plugin.trial.load import percentile
from ts_plugin.trial.spread import Spread, ratio, spread_of
from ts_plugin.trial.turns import Load, Round, Sample

FORMAT = 1


class FormatError(ValueError):
    """The file holds no comparison; the message starts with what is wrong."""


@dataclass(frozen=True, slots=True)
class Server:
    """How a way came up: seconds until every worker was READY, memory in MiB, or why it did not."""

    ready_seconds: float | None = None
    memory_mib: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """``machine`` and ``settings`` are for people, ``models`` names; ``inside`` what --pictures saw, by way.

    ``busy_before`` and each round's ``elsewhere`` are how many CPUs others used.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    models: tuple[str, ...]
    loads: tuple[Load, ...]
    servers: Mapping[str, Server]
    rounds: tuple[Round, ...]
    busy_before: float = 0.0
    interrupted: bool = False
    inside: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"ts_cores_comparison": FORMAT} | dataclasses.asdict(self)) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Comparison:
        """Return what ``to_json`` wrote.

        Raises:
            FormatError: it is something else.
        """
        try:
            flat = json.loads(text)
            if (found := flat.pop("ts_cores_comparison")) != FORMAT:
                raise FormatError(
                    f"format {found}, and this ts-cores reads {FORMAT}; draw it with the version that made it"
                )
            flat["models"] = tuple(flat["models"])
            flat["loads"] = tuple(map(Load.from_json, flat["loads"]))
            flat["servers"] = {way: Server(**server) for way, server in flat["servers"].items()}
            flat["rounds"] = tuple(map(Round.from_json, flat["rounds"]))
            return Comparison(**flat)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                f"no comparison that `ts-cores compare` wrote ({type(error).__name__}: {error})"
            ) from error

    def samples(self, way: str, load: str, model: int = 0) -> dict[int, Sample]:
        """Return what was measured, by repetition."""
        turns = (turn for turn in self.rounds if (turn.contender, turn.load) == (way, load))
        return {turn.repetition: turn.samples[model] for turn in turns}

    def spread(self, way: str, load: str, figure: str, model: int = 0) -> Spread | None:
        """Return a figure over the repetitions: "throughput", or "mean", "p50", "p99" in seconds.

        The middle of a 99th percentile is that of all answers together: one repetition has few for one in a hundred.
        """
        found = spread_of(self._values(way, load, figure, model).values())
        if found is None or figure != "p99":
            return found
        together = [value for sample in self.samples(way, load, model).values() for value in sample.latencies]
        return dataclasses.replace(found, median=percentile(together, 99))

    def ratio(self, way: str, other: str, load: str, figure: str, model: int = 0) -> Spread | None:
        """Return ``way / other``, formed within each repetition."""
        return ratio(self._values(way, load, figure, model), self._values(other, load, figure, model))

    def saturated(self, way: str, load: str, model: int = 0) -> bool:
        """Tell whether the queue only grew in half of the repetitions or more."""
        found = [sample.saturated for sample in self.samples(way, load, model).values()]
        return bool(found) and 2 * sum(found) >= len(found)

    def failed(self, way: str, load: str | None = None, model: int = 0) -> int:
        rounds = (turn for turn in self.rounds if turn.contender == way and load in (None, turn.load))
        return sum(turn.samples[model].failed for turn in rounds)

    def rate(self, load: str, model: int = 0) -> float | None:
        """Return the requests/s that an open loop had; None for a closed one."""
        return next((turn.samples[model].rate for turn in self.rounds if turn.load == load), None)

    def measured(self, load: str) -> bool:
        return any(turn.load == load for turn in self.rounds)

    @property
    def elsewhere(self) -> Spread | None:
        return spread_of(turn.elsewhere for turn in self.rounds)

    @property
    def ways(self) -> list[Way]:
        """The ways that were tried, as tables and pictures show them: stock first, ts-cores last."""
        order = (Way.DEFAULT, Way.THREADS, Way.LAUNCHER, Way.NEVER, Way.OURS)
        return [way for way in order if way in self.servers]

    def _values(self, way: str, load: str, figure: str, model: int) -> dict[int, float]:
        found = {}
        for repetition, sample in self.samples(way, load, model).items():
            if figure == "throughput":
                found[repetition] = sample.throughput
            elif sample.latencies:
                mean = figure == "mean"
                found[repetition] = (
                    statistics.fmean(sample.latencies) if mean else percentile(sample.latencies, float(figure[1:]))
                )
        return found
