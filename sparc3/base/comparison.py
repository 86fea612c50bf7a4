"""The comparison of results in MLflow: a parent run for a state of the pipeline, a row per method.

Its tags: `sparc3.state` (digest of the pipeline's state), `sparc3.row`, `stage.NAME`, the id of the
run of each stage that made the numbers, and what the runs table shows as columns.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3.base.runs import PARENT, Dataset, Run, closing, create, given, source
from sparc3.base.store import alone, answering, connect, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run as Record

COST = ("seconds", "peak_megabytes")  # metrics of every stage's run
GROUP = "pipeline"  # the tag by which the runs table groups: the parent's name


@dataclass(frozen=True)
class Entry:
    """What a run of the comparison shows: the whole, or a row, a behaviour under a method.

    `tags` are the columns of the runs table and what it is filtered by, `note` its description in
    Markdown, under which `figure` is shown, the name of a file of the parent's; `stages` names the
    stage runs (`evaluate@toxicity`) that made its numbers, `datasets` the prompts, `table` what an
    artifact of its name shows: columns and rows.
    """

    name: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    note: str = ""
    figure: str | None = None
    artifacts: Sequence[Path] = ()
    stages: Sequence[str] = ()
    datasets: Sequence[Dataset] = ()
    table: tuple[str, Sequence[str], Sequence[Sequence[Any]]] | None = None


def pipeline_run(
    report: Run,
    state: str,
    params: Mapping[str, Any],
    whole: Entry,
    rows: Mapping[str, Entry],
    products: Mapping[str, str],
    page: Callable[[Sequence[Sequence[str]]], tuple[str, str]] | None = None,
) -> str:
    """One run for a state of the pipeline and, nested in it, one per row; returns the parent's id.

    A stage that DVC finds unchanged does not run and logs nothing, so the comparison is logged from
    the results. Called again for the same state, it updates the runs that are there. Under `main`,
    main's own run is the parent.

    Args:
        report: the open run of the stage that calls.
        state: digest of all that decides the rows: equal state, equal `params`.
        params: nested or flat, of the whole pipeline; logged on the parent and on every row.
        whole: the parent; it is named by the DVC experiment, else by its name and when it began.
        rows: by what finds them again, `behaviour/method`; in the order of the table.
        page: from every stage run's (name, commit, seconds, MB), name and text of an artifact.
        products: digest of what each stage wrote, by the stage run's name (`evaluate@toxicity`),
            as given to `set_product`. The latest finished run with that name and digest made it: it
            is linked by the tag `stage.NAME`, and nested under the parent unless it has one.
            A product without a run here (it came from a DVC remote) is not linked.
    """
    client, main = report.client, given(report.client, PARENT)
    with alone(tracking_uri()):
        makers = {name: _maker(report, name, digest) for name, digest in products.items()}
        made = {name: maker for name, maker in makers.items() if maker}
        parent = _existing(report, state, "all") or main or create(client, report.experiment, None)
        record = client.get_run(parent.id)
        began, name = record.info.start_time, os.environ.get("DVC_EXP_NAME")
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(began / 1000))
        title = name or record.data.tags.get(GROUP) or f"{whole.name}, {date}"

        def show(run: Run, key: str, entry: Entry, makers: Iterable["Record"]) -> None:
            run.set_tags({**_identity(state, key, makers), GROUP: title})
            run.log_params(params)
            _show(run, entry, parent)

        # Main's own run is ended by `mlflow run`, when all of main has ended.
        with closing(parent) if parent != main else nullcontext():
            parent.set_tags({"mlflow.runName": title})
            show(parent, "all", whole, made.values())
            if page:
                parent.log_text(*page([_cost(record) for record in made.values()]))
            for place, (key, entry) in enumerate(rows.items(), 1):
                # The table has the latest on top.
                run = _existing(report, state, key) or create(
                    client, parent.experiment, parent, began - place
                )
                with closing(run):
                    run.set_tags({"mlflow.runName": entry.name, "mlflow.parentRunId": parent.id})
                    show(run, key, entry, [made[name] for name in entry.stages if name in made])
            for record in (*made.values(), client.get_run(report.id)):
                if "mlflow.parentRunId" not in record.data.tags:
                    client.set_tag(record.info.run_id, "mlflow.parentRunId", parent.id)
    return parent.id


def _cost(record: "Record") -> list[str]:
    tags, metrics = record.data.tags, record.data.metrics
    used = (f"{metrics[key]:.0f}" if key in metrics else "-" for key in COST)
    return [tags["sparc3.name"], tags.get("mlflow.source.git.commit", "-"), *used]


def _show(run: Run, entry: Entry, parent: Run) -> None:
    note = entry.note
    if entry.figure:
        note += f"\n\n![](get-artifact?path={entry.figure}&run_uuid={parent.id})"
    run.set_tags({"mlflow.note.content": note, **entry.tags})
    run.log_metrics(entry.metrics)
    run.log_datasets(entry.datasets)
    for path in entry.artifacts:
        run.log_artifact(path)
    if entry.table:
        run.log_table(*entry.table)


def _identity(state: str, row: str, makers: Iterable["Record"]) -> dict[str, str]:
    """The tags by which a run of the comparison is found again, and what made it."""
    links = {
        f"stage.{maker.data.tags['sparc3.name'].replace('@', '.')}": maker.info.run_id
        for maker in makers
    }
    return {"sparc3.state": state, "sparc3.row": row, **source(), **links}


def _search(report: Run, tags: Mapping[str, str]) -> list["Record"]:
    """Runs of the experiment with these tags, latest first; values hold no quotation marks."""
    conditions = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(
        report.client.search_runs([report.experiment], conditions, order_by=["start_time DESC"])
    )


def _existing(report: Run, state: str, row: str) -> Run | None:
    """The run of the comparison that an earlier report left for this state."""
    records = _search(report, {"sparc3.state": state, "sparc3.row": row})
    return Run(report.client, report.experiment, records[0].info.run_id) if records else None


def _maker(report: Run, name: str, digest: str) -> "Record | None":
    """The stage run that made a product: the latest finished one of that name and digest."""
    records = _search(report, {"sparc3.name": name, "sparc3.product": digest})
    return next((r for r in records if r.info.status == "FINISHED"), None)


@answering()
def latest_metrics(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name of a stage run -> these metrics of its latest finished run that has them all."""
    client, experiment = connect()
    latest: dict[str, dict[str, float]] = {}
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for record in page:
            name, metrics = record.data.tags.get("sparc3.name"), record.data.metrics
            if name and name not in latest and all(key in metrics for key in names):
                latest[name] = {key: metrics[key] for key in names}
        token = page.token
        if not token:
            return latest
