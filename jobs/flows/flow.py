"""`tvq flow`: prepare, train, judge, report, as one thing that can break anywhere and goes on."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.flows.flow_file import Flow, load_flow
from jobs.flows.flow_folder import FlowFolder, unfinished_tick
from jobs.flows.stages import Candidate, Champion, Corpus, Stages, Verdict
from jobs.schedules.ticks import Cron, tick_id
from jobs.tracking.parent_run import ParentRun
from pipeline.storage import Location

_RENEW_SECONDS = 5.0
_WAIT_SECONDS = 5.0
Output = TypeVar("Output", Corpus, Candidate, Verdict)


class TickBusyError(UserError):
    """Another process runs the flow at this tick."""


class FlowResult(NamedTuple):
    """What a flow left behind."""

    tick: str
    corpus: Corpus
    candidate: Candidate
    verdict: Verdict
    champion: str | None
    """Path or URL of the run that is champion afterwards."""
    seconds: dict[str, float]
    """Of each stage; 0 of one that was done before."""


def run_command(
    location: str, tick: str | None, root: Location, *, console: Console, as_json: bool
) -> None:
    """Runs a flow at a tick and says what came of it."""
    flow = load_flow(location)
    tick = tick or unfinished_tick(root, flow.name) or tick_id(datetime.now(UTC), by_hand=True)
    result = run_flow(flow, tick, root, console)
    if as_json:
        console.json(_as_json(result))


def run_newest_command(
    location: str, cron: str, timezone: str, root: Location, *, console: Console, as_json: bool
) -> None:
    """Runs a flow at the newest tick of a cron expression, or waits until somebody has.

    A cluster's cron may fire late or twice, and a daemon may serve the same flow: the tick follows
    from the expression, and its claim is that of every `run_flow`. It is waited for, since a
    process that is gone, on another machine, holds it until its lease expires.
    """
    flow = load_flow(location)
    tick = tick_id(Cron.parse(cron, timezone).latest(datetime.now(UTC)))
    waits = False
    while True:
        try:
            result = run_flow(flow, tick, root, console)
        except TickBusyError as error:
            if not waits:
                console.line(str(error))
            waits = True
            time.sleep(_WAIT_SECONDS)
        else:
            break
    if as_json:
        console.json(_as_json(result))


def show_command(location: str, root: Location, *, console: Console, as_json: bool) -> None:
    """What the flow is, and what it did."""
    from pipeline.storage import open_store

    flow = load_flow(location)
    store = open_store(root).child(f"flows/{flow.name}")
    names = {entry.name.split("/")[0] for entry in store.list() if "/" in entry.name}
    ticks = [(tick, FlowFolder(root, flow.name, tick)) for tick in sorted(names, reverse=True)]
    champion = Stages(flow, root, console).champion()
    if as_json:
        console.json(
            {
                "name": flow.name,
                "champion": champion and champion._asdict(),
                "ticks": {tick: folder.read("result.json") for tick, folder in ticks},
            }
        )
        return
    console.line(f"flow      {flow.name}: prepare {' '.join(flow.prepare)}")
    console.line(f"          train {' '.join(flow.train)}, beginning from {flow.begin_from}")
    where = "none yet"
    if champion:
        where = f"version {champion.version}, {champion.run} at update {champion.update}"
    console.line(f"champion  {where}")
    if ticks:
        console.table(
            ["tick", "increments", "candidate", "bits per byte", "champion's", "outcome"],
            [_row(tick, folder) for tick, folder in ticks],
        )


def run_flow(flow: Flow, tick: str, root: Location, console: Console) -> FlowResult:
    """Runs what of the flow is not done yet at this tick.

    Raises:
        TickBusyError: another process runs this flow at this tick.
        UserError: a stage failed, saying which. The same command goes on where it was.
    """
    folder = FlowFolder(root, flow.name, tick)
    claim = folder.claim()
    if holder := claim.take():
        raise TickBusyError(
            f"flow {flow.name}: tick {tick} is being run by process {holder.pid} on {holder.host};"
            " wait for it",
            ExitCode.BUSY,
        )
    with claim.kept(_RENEW_SECONDS, f"flow {flow.name}, tick {tick}"):
        return _run(flow, folder, root, console)


def _run(flow: Flow, folder: FlowFolder, root: Location, console: Console) -> FlowResult:
    if done := folder.read("result.json"):
        console.line(f"flow {flow.name}: tick {folder.tick} is done already")
        return _from_json(done)
    stages = Stages(flow, root, console)
    parent = ParentRun.of(flow.recipe(), root, f"{flow.name}-{folder.tick}", console.warning)
    seconds: dict[str, float] = {}
    status = "FAILED"
    try:
        # Once: the stages of this tick must not see the champion that it makes itself.
        now = stages.champion()
        pinned = folder.pin("pinned.json", {"champion": now and now._asdict()})["champion"]
        champion = Champion(**pinned) if pinned else None

        def stage(
            name: str, key: str | None, kind: type[Output], work: Callable[[], Output]
        ) -> Output:
            """The output of a stage: as noted under the same key, or made now."""
            noted = folder.read(f"{name}.json")
            if noted and key is not None and noted["key"] == key:
                console.line(f"{name}: done already")
                seconds[name] = 0.0
                return kind(**noted["output"])
            console.heading(name)
            begun = time.monotonic()
            output = work()
            seconds[name] = time.monotonic() - begun
            folder.write(f"{name}.json", {"key": key, "output": output._asdict()})
            return output

        # Without a key: whether anything is new is for `tvq prepare` to find out.
        corpus = stage("prepare", None, Corpus, stages.prepare)
        parent.stage("prepare", _figures(corpus, "documents", "tokens", "increments"))
        key = stages.train_key(corpus, champion)
        candidate = stage("train", key, Candidate, lambda: stages.train(key, corpus, champion))
        parent.adopt(candidate.mlflow_run_id)
        verdict = stage(
            "judge",
            stages.judge_key(corpus, candidate, champion),
            Verdict,
            lambda: stages.judge(candidate, champion),
        )
        parent.stage(
            "judge",
            _figures(verdict, "bits_per_byte", "champion_bits_per_byte", "difference"),
            {"outcome": verdict.outcome, "why": verdict.why},
        )
        after = stages.champion()
        result = FlowResult(
            folder.tick, corpus, candidate, verdict, after.run if after else None, seconds
        )
        report = _report(flow, result)
        console.heading("report")
        for line in report:
            console.line(line)
        parent.report("\n".join(report) + "\n", {"outcome": verdict.outcome, "tick": folder.tick})
        status = "FINISHED"
    except (KeyboardInterrupt, UserError) as error:
        if getattr(error, "code", ExitCode.INTERRUPTED) is ExitCode.INTERRUPTED:
            status = "KILLED"
        raise
    finally:
        parent.finish(status)
    folder.write("result.json", _as_json(result))
    return result


def _report(flow: Flow, result: FlowResult) -> list[str]:
    corpus, candidate, verdict = result.corpus, result.candidate, result.verdict
    news = "nothing new" if corpus.reused else f"increment {corpus.increments}"
    theirs = verdict.champion_bits_per_byte
    return [
        f"flow      {flow.name}, tick {result.tick}",
        f"corpus    {corpus.tokens:,} tokens of {corpus.documents:,} documents, {news}",
        f"candidate {candidate.run} at update {candidate.update}:"
        f" {verdict.bits_per_byte:.4f} bits per byte on validation"
        + (f", the champion {theirs:.4f}" if theirs is not None else ""),
        f"outcome   {verdict.outcome}: {verdict.why}",
        f"champion  {result.champion or 'none'}",
    ]


def _row(tick: str, folder: FlowFolder) -> tuple[object, ...]:
    fields = folder.read("result.json")
    if fields is None:
        stages = [name for name in ("prepare", "train", "judge") if folder.read(f"{name}.json")]
        return (tick, "-", "-", "-", "-", f"not done; done: {', '.join(stages) or 'nothing'}")
    result = _from_json(fields)
    theirs = result.verdict.champion_bits_per_byte
    return (
        tick,
        result.corpus.increments,
        result.candidate.run.rpartition("/")[2],
        f"{result.verdict.bits_per_byte:.4f}",
        f"{theirs:.4f}" if theirs is not None else "-",
        result.verdict.outcome,
    )


def _figures(output: NamedTuple, *names: str) -> dict[str, float]:
    values = {name: getattr(output, name) for name in names}
    return {name: float(value) for name, value in values.items() if value is not None}


def _as_json(result: FlowResult) -> dict[str, Any]:
    parts = ("corpus", "candidate", "verdict")
    return result._asdict() | {name: getattr(result, name)._asdict() for name in parts}


def _from_json(fields: dict[str, Any]) -> FlowResult:
    return FlowResult(
        **fields
        | {
            "corpus": Corpus(**fields["corpus"]),
            "candidate": Candidate(**fields["candidate"]),
            "verdict": Verdict(**fields["verdict"]),
        }
    )
