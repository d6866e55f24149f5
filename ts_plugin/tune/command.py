"""`ts-cores tune`: profile, choose, confirm, advise, report; interrupted, it goes on where it was."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ts_plugin.config.file import Config, read_config
from ts_plugin.errors import CommandError
from ts_plugin.machine.words import count
from ts_plugin.trial.alone import alone
from ts_plugin.trial.archive import copy_with
from ts_plugin.trial.asked import KEPT
from ts_plugin.trial.bare import BareError, explained
from ts_plugin.trial.client import TorchServeError
from ts_plugin.trial.progress import Show
from ts_plugin.trial.properties import Property
from ts_plugin.trial.room import Room, find_room
from ts_plugin.trial.store import Store, key, where
from ts_plugin.trial.turns import CPUS_ONLY, FRONTEND, STOCK, Contender, ours
from ts_plugin.tune.advise import advise
from ts_plugin.tune.asked import Wanted, wanted_models
from ts_plugin.tune.choose import choose, share
from ts_plugin.tune.confirm import Candidate, confirm, pick
from ts_plugin.tune.measure import measure
from ts_plugin.tune.report import advice, picture, sentence, table, to_json
from ts_plugin.tune.settings import Lines, archive_settings, keep, lines, write
from ts_plugin.tune.values import DEFAULT, NOW, Choice, Confirmed, Profile, Result
from ts_plugin.view.terminal import tell

A_SERVER = 30.0  # seconds that confirming one takes: a short run confirms fewer
PROFILING, CONFIRMING, ADVISING = 0.35, 0.5, 0.15  # parts of the time


def tune(options: argparse.Namespace) -> int:
    """Run the command: 0, or 1 if the target cannot be met.

    Raises:
        CommandError, OSError: and why.
    """
    config = read_config(options.config, os.environ) if options.config else None
    models = wanted_models(options)
    with alone("tune") as cache:
        try:
            room = find_room(anyway=options.anyway)
            os.sched_setaffinity(0, room.cpus)  # what we start inherits it
            with Show(len(models), options.minutes * 60) as show:
                answers = _tuned(models, room, config, _stores(cache, models, room, options), options, show)
        except KeyboardInterrupt:
            print("ts-cores: interrupted; the same command goes on from here", file=sys.stderr)
            raise
        except TorchServeError as error:
            raise CommandError(f"the real server does not serve: {error}") from error
    return report(models, answers, options)


def _tuned(
    models: Sequence[Wanted],
    room: Room,
    config: Config | None,
    stores: Sequence[Store],
    options: argparse.Namespace,
    show: Show,
) -> list[Result]:
    profiles = []
    *stores, of_servers = stores
    for model, store in zip(models, stores, strict=True):
        with show.stage(f"profiling {model.archive.path.name}", PROFILING / len(models)) as stage:
            try:
                profile = measure(
                    model.archive,
                    model.body,
                    room,
                    store=store,
                    seconds=stage.seconds,
                    memory=options.memory,
                    longest=model.target.p99,
                    tell=stage.tell,
                )
            except BareError as error:
                raise CommandError(explained(model.archive, error)) from error
            profiles.append(profile)
            _say_memory(profile, room, show)
    targets = [model.target for model in models]
    alone = len(models) == 1
    ranked = [[choice] for choice in choose(profiles[0], targets[0])] if alone else share(profiles, targets)
    memory = min(profile.free_memory for profile in profiles)
    with show.stage("confirming on the real server", CONFIRMING) as stage:
        most = max(int(stage.seconds // A_SERVER) - (2 if config else 1), 1)
        chosen = shortlist(ranked)[:most]
        found = confirm(
            models,
            candidates(chosen, profiles, room, config),
            store=of_servers,
            cpus=room.cpus,
            seconds=stage.seconds,
            memory=memory + FRONTEND,
            tell=stage.tell,
            note=show.note,
        )
    best = found[pick(found, targets)]
    answers = []
    for at, (model, profile, store) in enumerate(zip(models, profiles, stores, strict=True)):
        answer = _answer(model, profile, [division[at] for division in ranked], [rows[at] for rows in found], best[at])
        with show.stage(f"what else helps {model.archive.path.name}", ADVISING / len(models)) as stage:
            tips = advise(
                model.archive,
                model.body,
                room,
                answer.choice,
                store=store,
                seconds=stage.seconds,
                bfloat16=options.bfloat16,
                fits=profile.fits,
                tell=stage.tell,
            )
        answers.append(replace(answer, advice=tips))
    return answers


def shortlist(ranked: Sequence[Sequence[Choice]]) -> list[tuple[Choice, ...]]:
    """Return what is worth a real server: the best, the best of its divisions with another batch, the best other one.

    A division of cores is the number of workers and of cores of each, for all models.
    """

    def division(choices: Sequence[Choice]) -> list[tuple[int, int]]:
        return [(choice.workers, choice.threads) for choice in choices]

    first = ranked[0]
    found = [tuple(first)]
    same = (choices for choices in ranked[1:] if division(choices) == division(first))
    other = (choices for choices in ranked[1:] if division(choices) != division(first))
    following = (next(rest, None) for rest in (same, other))
    return found + [tuple(choices) for choices in following if choices is not None]


def candidates(
    chosen: Sequence[tuple[Choice, ...]], profiles: Sequence[Profile], room: Room, config: Config | None
) -> list[Candidate]:
    """Return the servers to measure: the choices, TorchServe's default, and what the user runs now."""

    def memory(workers: int) -> int:
        return FRONTEND + sum(profile.memory(workers) for profile in profiles)

    found = [
        Candidate(
            Contender("; ".join(map(str, choices)), ours(), tuple(map(archive_settings, choices)), must_bind=True),
            choices,
            FRONTEND + sum(choice.memory for choice in choices),
        )
        for choices in chosen
    ]
    workers = len(room.cpus)
    found.append(Candidate(Contender(DEFAULT, CPUS_ONLY, environment=STOCK), None, memory(workers)))
    if config is not None:
        kept: dict[str, Property | None] = {name: config.get(name) for name in KEPT if name in config.properties}
        number = config.get("default_workers_per_model")
        workers = int(number) if number.isascii() and number.isdecimal() else workers
        found.append(Candidate(Contender(NOW, CPUS_ONLY | kept), None, memory(workers)))
    return found


def _stores(cache: Path, models: Sequence[Wanted], room: Room, options: argparse.Namespace) -> list[Store]:
    """Return where each model's profile is kept, and what servers of all of them did.

    The names have in them all that measurements depend on.
    """
    machine = [*where(room), options.memory, options.minutes]
    each = [[model.archive.path.name, model.archive.digest, model.body] for model in models]
    return [
        Store(cache / f"{key([*machine, *one])}.json", fresh=options.fresh)
        for one in (*each, ["servers", *(part for one in each for part in one)])
    ]


def _say_memory(profile: Profile, room: Room, show: Show) -> None:
    fits, each = profile.fits, f"{profile.next_memory / 1e6:.0f} MB"
    first = f"{profile.archive}: the first worker takes {profile.first_memory / 1e6:.0f} MB, each further one {each}"
    if fits < room.cores:
        show.note(
            f"{first}: memory for {count(fits, 'worker')}, of {profile.free_memory / 1e6:.0f} MB that may be used"
        )
    else:
        show.note(f"{first}: there is memory for one per core")


def _answer(
    model: Wanted, profile: Profile, choices: Sequence[Choice], found: Sequence[Confirmed], best: Confirmed
) -> Result:
    if best.choice is None:
        raise TypeError(f"{best}: no choice")
    return Result(
        name=model.archive.model,
        version=model.archive.version,
        profile=profile,
        target=model.target,
        choices=tuple(choices),
        choice=best.choice,
        measured=best,
        confirmed=tuple(found),
    )


def report(models: Sequence[Wanted], answers: Sequence[Result], options: argparse.Namespace) -> int:
    present: Mapping[str, str] = {}
    if options.write and options.write.exists():
        present = read_config(options.write, {}).properties
    try:
        wanted = lines(answers, present)
    except ValueError as error:
        raise CommandError(f"{options.write}: {error}") from error
    met = all(answer.met for answer in answers)
    if options.json:
        print(to_json(answers, wanted))
    else:
        for answer in answers:
            tell(table(answer))
            print(*(sentence(answer), *_keep(answer), *advice(answer), ""), sep="\n")
    say = sys.stderr if options.json else sys.stdout
    if options.picture:
        for number, answer in enumerate(answers):
            stem = options.picture.stem + (f"-{answer.name}" if number else "")
            file = options.picture.with_stem(stem)
            print(picture(file, answer), file=say)
    if options.write and not met:
        print(f"{options.write}: left as it is, since the target is not met", file=say)
    elif options.write and any(answer.better for answer in answers):
        print(f"{options.write}: left as it is", file=say)
    elif options.write:
        _write(models, answers, options.write, wanted, say)
    elif not options.json:
        print("config.properties:")
        print("".join(f"  {name}={value}\n" for name, value in wanted.properties.items()), end="")
        for model in models:
            if model.archive.config or len(models) > 1:
                print(f"{model.archive.config or 'model-config.yaml'} of {model.archive.path.name}:")
                text = wanted.archives[model.archive.path.name]
                print("".join(f"  {line}\n" for line in text.splitlines()), end="")
    return int(not met)


def _keep(answer: Result) -> list[str]:
    row = answer.better
    return [] if row is None else [f"But {row.name} is better still, as measured: keep it."]


def _write(models: Sequence[Wanted], answers: Sequence[Result], target: Path, wanted: Lines, say: TextIO) -> None:
    """Write config.properties, and the settings of archives that have their own or need their own cores."""
    kept = write(target, wanted)
    print(f"{target}: written" + (f", the old one is {kept}" if kept else ""), file=say)
    for model, answer in zip(models, answers, strict=True):
        if model.archive.config or len(models) > 1:
            path = model.archive.path
            old = keep(path)
            try:
                copy_with(model.archive, path, _with_profile(answer))
            except OSError as error:
                old.unlink()
                raise CommandError(f"{path}: not written, it is as it was: {error.strerror}") from error
            print(f"{path}: written, the old one is {old}", file=say)


def _with_profile(answer: Result) -> dict[str, Any]:
    """Return the settings of an archive, with what a request takes by cores: for workers that lend cores."""
    chosen = archive_settings(answer.choice)
    cells = answer.profile.cells
    alone = {cell.threads: round(cell.seconds, 5) for cell in cells if (cell.batch, cell.instances) == (1, 1)}
    chosen["cpu"] |= {"profile": alone}
    return chosen
