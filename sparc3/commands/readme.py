"""The generated blocks of README.md and docs/: results, costs, published numbers, the figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparc3.base.artifacts import METRICS, metrics_path
from sparc3.base.comparison import COST, latest_metrics
from sparc3.base.errors import InputError
from sparc3.base.files import markdown, read_json, read_jsonl, read_text, write_text
from sparc3.base.params import Params
from sparc3.commands import plan
from sparc3.measure.instruments import primary_of
from sparc3.measure.scorers import scorer
from sparc3.prompts.embedded import DATA
from sparc3.prompts.sources import SOURCES
from sparc3.reporting.calibration import calibration
from sparc3.reporting.leaderboard import Run, leaderboard
from sparc3.reporting.published import PAGE
from sparc3.reporting.summary import SUMMARY
from sparc3.reporting.tables import (
    FOLDER,
    TABLE,
    confirm_table,
    faithfulness_table,
    interval,
    unpruned,
)
from sparc3.stages.checks import PARAMS, load
from sparc3.stages.table import STAGES

LARGE = ("llama3-8b", "llama3-8b-sound")  # profiles whose costs are foretold
EFFECTS = Path("docs/faithfulness.svg")  # of the first behaviour whose effects are taken
ALT = "How much of each behaviour the first methods remove, with intervals, cost and verdict"

BLOCKS = {  # by the page that holds them
    Path("README.md"): ("answer",),
    Path("docs/results.md"): ("results", "confirm", "full", "gemma"),
    Path("docs/cost.md"): ("costs", "plan"),
    Path("docs/published.md"): ("published",),
    Path("docs/leaderboard.md"): ("leaderboard",),
    Path("docs/rivals.md"): ("rivals",),
    Path("docs/scorers.md"): ("scorers",),
    Path("docs/faithfulness.md"): ("faithfulness",),
}
RESULTS = Path("profiles/results")  # metrics of finished runs, in git
ANSWER = "smollm2-135m-full"  # the run that README shows, with the figure of its report
RUNS = {  # that the leaderboard compares, beside the default
    ANSWER: "SmolLM2 135M, full profile",
    "smollm2-135m-rivals": "SmolLM2 135M, rivals",
    "smollm2-135m-repetition": "SmolLM2 135M, repetition",
    "gemma3-270m": "Gemma 3 270M",
}
NEUTRAL = ("wikipedia", "news", "reviews", "questions")  # sources of texts that are not toxic
TABLES = {  # blocks that are the table of a run, and its file
    "results": TABLE,
    "published": RESULTS / ANSWER / PAGE.name,
    "full": RESULTS / ANSWER / TABLE.name,
    "gemma": RESULTS / "gemma3-270m" / TABLE.name,
    "rivals": RESULTS / "smollm2-135m-rivals" / TABLE.name,
}


def answer_table(run: Run, record: Mapping[str, Any]) -> str:
    """A line for each behaviour that has a verdict, by its own method, of a finished run; and what
    the sealed prompts gave, by the `record` of a release.
    """
    rows = []
    for row in read_json(run.folder / SUMMARY.name)["methods"]:
        if not row["own"] or row["reduction"] is None:
            continue
        measured = read_json(run.folder / "evaluate" / f"{row['behaviour']}.json")
        share = row["reduction"]
        primary = primary_of(run.params.behaviours[row["behaviour"]])
        assert primary is not None  # of a behaviour with a verdict
        value, circuits = primary[1], record["behaviours"][row["behaviour"]]["circuits"]
        sealed = circuits[row["method"]]["test"][value.name]
        rows.append(
            [
                row["behaviour"],
                unpruned(run.params, row["behaviour"], measured)[0],
                f"{row['neurons']} neurons of `{row['method']}`",
                f"{share['value']:.0f} % [{share['low']:.0f}, {share['high']:.0f}]",
                f"{interval(row['perplexity'])} on {row['text']}",
                row["verdict"],
                f"{interval(sealed, value.digits)} {value.title}",
            ]
        )
    header = ["behaviour", "unpruned", "without", "of it removed", "perplexity %", "verdict"]
    when = f"sealed prompts, {record['release']}: {record['commit'][:7]}, {record['date']}"
    return markdown([*header, when], rows)


def cost_table(stages: list[str], costs: dict[str, dict[str, float]]) -> str:
    """Wall time and memory of every stage, summed over its runs; `costs` by name (stage@axis)."""
    rows, total = [], 0.0
    for stage in stages:
        own = [cost for name, cost in costs.items() if name.partition("@")[0] == stage]
        seconds = sum(cost["seconds"] for cost in own)
        total += seconds
        peak = max((cost["peak_megabytes"] for cost in own), default=0.0)
        rows.append([stage, str(len(own)), f"{seconds:.0f}", f"{peak / 1000:.1f}"])
    rows.append(["all", str(sum(int(row[1]) for row in rows)), f"{total:.0f}", ""])
    return markdown(["stage", "runs", "seconds in all", "peak memory, GB"], rows)


def run_of(name: str) -> Run:
    """The finished run of a profile, whose metrics are in git."""
    return Run(RUNS[name], load(Path(f"profiles/{name}.yaml"), PARAMS), RESULTS / name)


def runs(params: Params) -> list[Run]:
    """The default run, and those of RUNS."""
    return [Run("SmolLM2 135M", params, METRICS), *map(run_of, RUNS)]


def scorers_text(params: Params) -> str:
    """How every scorer of params is calibrated, on raw data alone."""
    neutral = {name: [row.text for row in SOURCES[name].rows({})] for name in NEUTRAL}
    scorers = {name: scorer(row, params.model.device) for name, row in params.scorers.items()}
    return calibration(scorers, read_jsonl(DATA / "real-toxicity-prompts.jsonl"), neutral)


def page_with(page: Path, text: str, name: str, content: str) -> str:
    """The page's text with new content in its block `name`. InputError: it has no such block."""
    start, end = f"<!-- {name}: written by `make readme` -->", f"<!-- end of {name} -->"
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise InputError(f"{page}: expected the lines {start!r} and {end!r}")
    return f"{head}{start}\n\n{content}\n{end}{tail}"


def run(params: Params) -> None:
    """Renew all blocks, and the figure. InputError: there is no finished run to take them from."""
    tables = {name: read_text(path) for name, path in TABLES.items()}
    header, *rows = plan.costs([Path(f"profiles/{name}.yaml") for name in LARGE])
    measured = [name for name, spec in params.behaviours.items() if spec.faithfulness]
    costs, record = latest_metrics(COST), read_json(metrics_path("confirm"))
    answer = answer_table(run_of(ANSWER), record)
    blocks = tables | {
        "answer": f"![{ALT}]({RESULTS / ANSWER / 'answer.svg'})\n\n{answer}",
        "confirm": confirm_table(params, record),
        "costs": cost_table(list(STAGES), costs),
        "plan": markdown(header, rows),
        "leaderboard": leaderboard(runs(params)),
        "scorers": scorers_text(params),
        "faithfulness": "\n".join(
            f"**{name}**\n\n{markdown(*faithfulness_table(name))}" for name in measured
        ),
    }
    if measured:
        write_text(EFFECTS, read_text(FOLDER / f"faithfulness-{measured[0]}.svg"))
    for page, names in BLOCKS.items():
        text = read_text(page)
        for name in names:
            text = page_with(page, text, name, blocks[name])
        write_text(page, text)
