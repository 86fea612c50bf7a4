"""The generated blocks of README.md and docs/: results, costs, published numbers, the figure."""

from pathlib import Path
from typing import Any

from sparc3.base.artifacts import METRICS, metrics_path
from sparc3.base.comparison import COST, latest_metrics
from sparc3.base.errors import InputError
from sparc3.base.files import markdown, read_json, read_jsonl, read_text, write_text
from sparc3.base.params import Params
from sparc3.commands import plan
from sparc3.measure.scorers import scorer
from sparc3.prompts.embedded import DATA
from sparc3.prompts.sources import SOURCES
from sparc3.reporting.calibration import calibration
from sparc3.reporting.leaderboard import Run, leaderboard
from sparc3.reporting.published import CLAIMS, claim_rows
from sparc3.reporting.tables import (
    FOLDER,
    TABLE,
    cells,
    confirm_table,
    faithfulness_table,
    headline,
    interval,
    verdict,
)
from sparc3.stages.checks import PARAMS, load
from sparc3.stages.table import STAGES

LARGE = ("llama3-8b", "llama3-8b-sound")  # profiles whose costs are foretold
FIGURE = FOLDER / "answer.svg"  # the report's main one
SHOWN = Path("docs/answer.svg")  # its copy, in git
EFFECTS = Path("docs/faithfulness.svg")  # likewise of the first behaviour whose effects are taken
ALT = "How much of each behaviour every method removes, with intervals, cost and verdict"

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
RUNS = {  # that the leaderboard compares, beside the default
    "smollm2-135m-full": "SmolLM2 135M, full profile",
    "smollm2-135m-rivals": "SmolLM2 135M, rivals",
    "smollm2-135m-repetition": "SmolLM2 135M, repetition",
    "gemma3-270m": "Gemma 3 270M",
}
NEUTRAL = ("wikipedia", "news", "reviews", "questions")  # sources of texts that are not toxic
TABLES = {  # blocks that are the table of a run, and its file
    "results": TABLE,
    "full": RESULTS / "smollm2-135m-full/table.md",
    "gemma": RESULTS / "gemma3-270m/table.md",
    "rivals": RESULTS / "smollm2-135m-rivals/table.md",
}


def answer_table(params: Params, table: list[dict[str, Any]]) -> str:
    """A line for each behaviour that has a verdict, by its own method; `table`: the cells."""
    rows = []
    for row in table:
        spec = params.behaviours[row["behaviour"]]
        if row["method"] != spec.method or not row["change"]:
            continue
        share = row["share"]
        before = headline(params, row["behaviour"], row).partition(",")[0]
        rows.append(
            [
                row["behaviour"],
                before.removeprefix("unpruned "),
                f"{row['num_neurons']} neurons of `{row['method']}`",
                f"{share['value']:.0f} % [{share['low']:.0f}, {share['high']:.0f}]",
                f"{interval(row['differences']['ppl_worst'])} on {row['worst']}",
                verdict(params, row),
            ]
        )
    header = ["behaviour", "unpruned", "without", "of it removed", "perplexity %", "verdict"]
    return markdown(header, rows)


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


def runs(params: Params) -> list[Run]:
    """The default run, and those of RUNS by their profiles."""
    others = [
        Run(title, load(Path(f"profiles/{name}.yaml"), PARAMS), RESULTS / name)
        for name, title in RUNS.items()
    ]
    return [Run("SmolLM2 135M", params, METRICS), *others]


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
    figure, record = read_text(FIGURE), metrics_path("confirm")
    table = cells(params)
    header, *rows = plan.costs([Path(f"profiles/{name}.yaml") for name in LARGE])
    measured = [name for name, spec in params.behaviours.items() if spec.faithfulness]
    costs = latest_metrics(COST)
    blocks = {name: read_text(path) for name, path in TABLES.items()} | {
        "answer": f"![{ALT}]({SHOWN})\n\n{answer_table(params, table)}",
        "confirm": confirm_table(params, read_json(record)) if record.is_file() else "",
        "costs": cost_table(list(STAGES), costs),
        "plan": markdown(header, rows),
        "published": markdown(CLAIMS, claim_rows(params, table)),
        "leaderboard": leaderboard(runs(params)),
        "scorers": scorers_text(params),
        "faithfulness": "\n".join(
            f"**{name}**\n\n{markdown(*faithfulness_table(name))}" for name in measured
        ),
    }
    write_text(SHOWN, figure)
    if measured:
        write_text(EFFECTS, read_text(FOLDER / f"faithfulness-{measured[0]}.svg"))
    for page, names in BLOCKS.items():
        text = read_text(page)
        for name in names:
            text = page_with(page, text, name, blocks[name])
        write_text(page, text)
