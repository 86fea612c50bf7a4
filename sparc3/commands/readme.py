"""README's blocks of numbers: result tables, costs of the stages and of the large profiles."""

from pathlib import Path

from sparc3.base.artifacts import metrics_path
from sparc3.base.comparison import latest_metrics
from sparc3.base.errors import InputError
from sparc3.base.files import markdown, read_json, read_text, write_text
from sparc3.base.params import Params
from sparc3.commands import plan
from sparc3.reporting.tables import TABLE, confirm_table
from sparc3.stages.table import STAGES

LARGE = ("llama3-8b", "llama3-8b-sound")  # profiles whose costs README foretells

IN_README = {  # its blocks, and the tables that they show
    "results": TABLE,
    "full": Path("profiles/results/smollm2-135m-full/table.md"),  # of a run by that profile
}


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


def readme_with(readme: str, name: str, content: str) -> str:
    start, end = f"<!-- {name}: written by `make readme` -->", f"<!-- end of {name} -->"
    head, found, rest = readme.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise InputError(f"README.md: expected the lines {start!r} and {end!r}")
    return f"{head}{start}\n\n{content}\n{end}{tail}"


def run(params: Params) -> None:
    """Renew README's blocks."""
    costs = latest_metrics(("seconds", "peak_megabytes"))
    header, *rows = plan.costs([Path(f"profiles/{name}.yaml") for name in LARGE])
    blocks = {name: read_text(table) for name, table in IN_README.items()}
    record = metrics_path("confirm")
    blocks["confirm"] = confirm_table(params, read_json(record)) if record.is_file() else ""
    blocks |= {"costs": cost_table(list(STAGES), costs), "plan": markdown(header, rows)}
    path = Path("README.md")
    text = read_text(path)
    for name, content in blocks.items():
        text = readme_with(text, name, content)
    write_text(path, text)
