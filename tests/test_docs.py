"""README and docs/: blocks are those of the runs, every result in prose is computed from their
files, every link leads somewhere, and what is to be typed works.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import spearmanr

from sparc3.base.errors import InputError
from sparc3.base.files import markdown, read_json, read_jsonl
from sparc3.base.params import Scorer, parse
from sparc3.commands import readme
from sparc3.commands.readme import BLOCKS, TABLES, page_with
from sparc3.measure.inference import LEVEL, POWER
from sparc3.measure.instruments.completions import MOST
from sparc3.measure.scorers import SCORERS, scorer
from sparc3.prompts.sources import SOURCES, narrow, source_of
from sparc3.relevance.scores import TARGETS
from sparc3.reporting.leaderboard import leaderboard, said
from sparc3.reporting.published import CONSISTENT, INCONSISTENT, claims, reduction_error
from sparc3.reporting.tables import confirm_table, faithfulness_table
from sparc3.stages.checks import check, load
from sparc3.stages.table import STAGES

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    if path.name != "LOG.md"  # a diary: it keeps what was said
}
PARAMS = load(ROOT / "params.yaml")
FULL, GEMMA, RIVALS = (
    ROOT / f"profiles/results/{name}"
    for name in ("smollm2-135m-full", "gemma3-270m", "smollm2-135m-rivals")
)
EVALUATE = {  # how each was evaluated
    folder: load(ROOT / f"profiles/{folder.name}.yaml", ROOT / "params.yaml").evaluate
    for folder in (FULL, GEMMA)
}


def prose(page: str) -> str:
    """The page without its generated blocks and fenced code."""
    text = re.sub(r"<!-- (\S+): written by .*?<!-- end of \1 -->", "", PAGES[page], flags=re.S)
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def rows_of(table: str) -> list[list[str]]:
    """The cells of all lines of markdown tables, headers too."""
    return [
        [cell.strip() for cell in line.strip("|\n").split(" | ")]
        for line in table.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]


# --- generated blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_show_the_tables_of_the_runs(name: str) -> None:
    (page,) = (page for page, names in BLOCKS.items() if name in names)
    text = (ROOT / page).read_text()
    assert page_with(page, text, name, (ROOT / TABLES[name]).read_text()) == text


def test_the_leaderboard_says_what_the_files_say() -> None:
    page = Path("docs/leaderboard.md")
    shown = leaderboard(readme.runs(PARAMS))
    assert page_with(page, PAGES[str(page)], "leaderboard", shown) == PAGES[str(page)]
    folders = {"SmolLM2 135M": ROOT / "metrics"}
    folders |= {title: ROOT / f"profiles/results/{name}" for name, title in readme.RUNS.items()}
    seen = set()
    for section in shown.split("## ")[1:]:
        behaviour = section.partition("\n")[0].lower()
        header, *rows = rows_of(section)
        best: dict[str, list[float]] = {}
        for row in rows:
            at = dict(zip(header, row, strict=True))
            method, several, _ = at["method"].partition(" (")
            circuits, levels = evaluation(folders[at["model"]], behaviour)
            names = [n for n, c in circuits.items() if c["method"] == method]
            changes = [circuits[n]["test"] for n in names]
            if behaviour in ("toxicity", "repetition"):
                found = [c["reduction"] for c in changes if "reduction" in c]
            else:
                per = -100 / levels["test_margin"]
                found = [{k: per * v for k, v in c["margin"].items()} for c in changes]
            assert bool(several) == (len(found) > 1)
            value = sum(f["value"] for f in found) / len(found)
            ends = sorted(
                end for f in found for end in ((f["value"],) if several else (f["low"], f["high"]))
            )
            removed = f"{value:+.0f} [{ends[0]:+.0f}, {ends[-1]:+.0f}]"
            assert at["removed, %"] == removed, row
            assert at["neurons"] == str(circuits[names[0]]["num_neurons"])
            dampened = method in ("max-activation-auroc-all", "max-activation-auroc-dampened")
            steered = "strength" in circuits[names[0]]
            if steered:
                kept = read_json(folders[at["model"]] / "steer" / f"{behaviour}.json")
                assert at["bytes"] == f"{kept[f'{method}.bytes']:,.0f}"
            if method != "word-ban" and not steered:
                assert int(at["bytes"].replace(",", "")) == int(at["neurons"]) * (
                    8 if dampened else 4
                )
            if not several:
                worst = max(circuits[method]["texts"].items(), key=lambda text: text[1]["value"])
                assert at["perplexity %, worst text"].startswith(f"{worst[1]['value']:+.1f} [")
                assert at["perplexity %, worst text"].endswith(f"] {worst[0]}")
            if method not in ("word-ban", "most-positive", "top-general") and not several:
                best.setdefault(at["model"], []).append(value)
            seen.add((at["model"], behaviour, method))
        for model, values in best.items():
            (said,) = re.findall(rf"^- {re.escape(model)}: (.*)$", section, re.M)
            assert f"removes most, {max(values):+.0f} [" in said
    assert len(seen) == len(rows_of(shown)) - shown.count("## ")
    assert {model for model, _, _ in seen} == folders.keys()


def cheaper(removed: float, cost: float, name: str = "m", half: float = 5) -> dict[str, Any]:
    """A row of the leaderboard, with an interval of `half` on both sides."""
    span = {"value": removed, "low": removed - half, "high": removed + half}
    beyond = {"control": None, "ban": None}
    cost_of = {"value": cost, "low": cost, "high": cost}
    return {"method": name, "control": False, "removed": span, "cost": cost_of, "beyond": beyond}


def test_the_leaderboard_names_a_winner_only_where_intervals_do() -> None:
    a, b, c = cheaper(40, 2, "a"), cheaper(35, 1, "b"), cheaper(10, 3, "c")
    text = said([a, b, c])
    assert text.startswith("`a` removes most, +40 [+35, +45] %. That is more than `c`: ")
    assert "From `b` the intervals do not tell it apart." in text
    assert text.endswith("Nothing removes more at less perplexity than `a` or `b`.")
    ban = cheaper(50, 0.5, "ban") | {"control": True}  # a control is something too
    assert "Nothing removes more" not in said([a, b, c, ban])
    nothing = said([cheaper(4, 1, "a"), cheaper(3, 1, "b")])
    assert nothing == "`a` removes most, +4 [-1, +9] %, which may be nothing: no method wins."
    a["beyond"] = {"control": {"low": 1, "high": 3}, "ban": {"low": -1, "high": 3}}
    assert "More than random neurons, " in said([a])
    assert "Not to be told from a word ban, " in said([a])
    a["beyond"]["ban"] = {"low": -3, "high": -1}
    assert "Less than a word ban, " in said([a])
    assert said([{**a, "control": True}]) == "no method was measured."


def test_the_page_of_results_shows_the_sealed_sets() -> None:
    page, shown = (
        Path("docs/results.md"),
        confirm_table(PARAMS, read_json(Path("metrics/confirm.json"))),
    )
    text = PAGES[str(page)]
    assert page_with(page, text, "confirm", shown) == text


def test_the_page_of_faithfulness_shows_what_was_measured() -> None:
    page = "docs/faithfulness.md"
    asked = [name for name, spec in PARAMS.behaviours.items() if spec.faithfulness]
    tables = [f"**{name}**\n\n{markdown(*faithfulness_table(name))}" for name in asked]
    shown = page_with(Path(page), PAGES[page], "faithfulness", "\n".join(tables))
    assert shown == PAGES[page]
    found = read_json(ROOT / f"metrics/faithfulness/{asked[0]}.json")["agreement"]
    rank = {name: parts["all"]["spearman"] for name, parts in found.items()}
    assert rank["gradient"]["low"] > rank["lrp"]["high"]  # what the page concludes
    assert found["lrp"]["early"]["spearman"]["value"] < found["lrp"]["late"]["spearman"]["value"]


def test_what_the_page_of_faithfulness_says_of_many_neurons_is_from_the_file() -> None:
    found = read_json(ROOT / "metrics/faithfulness/toxicity.json")
    ten = found["num_neurons"].index(10)
    last, first = (
        [found["curves"][s][w][ten] for s in ("lrp", "gradient")] for w in ("least", "most")
    )
    parts = {name: rows["30"] for name, rows in found["additivity"].items()}
    for sentence in (
        f"that `lrp` ranks last the text loses {last[0]:.1f} nats a token, without the first 10 it "
        f"loses {first[0]:.1f}. By the gradient's order it is {last[1]:.1f} and {first[1]:.1f}.",
        f"do together what they do one by one ({parts['lrp']['together']:.2f} nats each way)",
        f"do {parts['gradient']['together']:.2f} together and {parts['gradient']['sum']:.2f} in ",
        f"true effects {parts['effect']['together']:.2f} and {parts['effect']['sum']:.2f}.",
    ):
        assert sentence in PAGES["docs/faithfulness.md"], sentence
    assert f"{parts['lrp']['sum']:.1f}" == f"{parts['lrp']['together']:.1f}"


def test_the_readme_answers_with_the_own_methods_of_the_full_profile() -> None:
    """The same neurons, perplexity and verdict as in the whole table; shares of the level; and what
    the table of the sealed sets says, with its release, commit and date.
    """
    block = PAGES["README.md"].partition("<!-- answer:")[2].partition("<!-- end of")[0]
    header, *answers = rows_of(block)
    record = read_json(ROOT / "metrics/confirm.json")
    release, commit, date = (record[key] for key in ("release", "commit", "date"))
    assert header[-1] == f"sealed prompts, {release}: {commit[:7]}, {date}"
    confirmed = rows_of(PAGES["docs/results.md"].partition("<!-- confirm:")[2])
    assert [row[0] for row in answers] == list(PARAMS.behaviours)
    whole = (FULL / "table.md").read_text().split("\n**")[1:]
    for answer, section in zip(answers, whole, strict=True):
        name, before, neurons, share, cost, verdict, sealed = answer
        method = PARAMS.behaviours[name].method
        (line,) = (row for row in confirmed if row[:2] == [name, method])
        assert sealed == line[3]
        assert section.startswith(f"{name}**: unpruned {before},")
        (row,) = (row for row in rows_of(section) if row[0] == method)
        assert neurons == f"{row[2]} neurons of `{method}`"
        assert cost.replace(" on ", " ") == row[3]
        assert verdict == row[-1]
        circuits, levels = evaluation(FULL, name)
        found = circuits[method]["test"]
        if "margin" in found:
            per = -100 / levels["test_margin"]
            assert share == figure({k: per * v for k, v in found["margin"].items()}, "%")
        else:
            assert share == figure(found["reduction"], "%")


def test_a_page_is_changed_within_its_block_only() -> None:
    page = Path("page.md")
    text = "a\n<!-- x: written by `make readme` -->\nold\n<!-- end of x -->\nb\n"
    new = page_with(page, text, "x", "new\n")
    assert new.startswith("a\n")
    assert new.endswith("<!-- end of x -->\nb\n")
    assert "new" in new
    assert "old" not in new
    assert page_with(page, new, "x", "new\n") == new
    with pytest.raises(InputError, match=r"page\.md: expected the lines .*end of y"):
        page_with(page, text, "y", "new")


def test_without_a_report_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"metrics/table\.md: file not found"):
        readme.run(PARAMS)
    assert list(tmp_path.iterdir()) == []


def test_every_published_number_is_on_its_page() -> None:
    """With the verdict on its arithmetic, which needs no run."""
    _, *rows = rows_of(PAGES["docs/published.md"])
    judged = claims({})
    assert [row[0] for row in rows] == [claim.row["what"] for claim in judged]
    for row, claim in zip(rows, judged, strict=True):
        if claim.verdict in (CONSISTENT, INCONSISTENT):
            assert row[4] == claim.verdict
    assert not {row[4].partition(",")[0] for row in rows} & {"reproduced", "not reproduced"}


# --- results in prose --------------------------------------------------------------------------


def figure(value: dict[str, float], unit: str, sign: int = 1) -> str:
    """`33 % [12, 51]` or `0.037 nats [0.021, 0.055]`, of a change times `sign`."""
    digits = 3 if unit == "nats" else 0
    low, high = sorted(0.0 + sign * value[end] for end in ("low", "high"))
    unit = f" {unit}" if unit else ""
    return f"{sign * value['value']:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def change(circuits: dict[str, Any], method: str, part: str = "test") -> str:
    """The fall of a method's primary value."""
    found = circuits[method][part]
    if "reduction" in found and "margin" not in found:
        return figure(found["reduction"], "%")
    return figure(found["margin"], "nats", -1)


def evaluation(folder: Path, behaviour: str) -> tuple[dict[str, Any], dict[str, float]]:
    results = read_json(folder / f"evaluate/{behaviour}.json")
    return results["circuits"], results["baseline"]


def short(text: str) -> str:
    """A figure without its interval."""
    return text.partition(" [")[0]


def of_the_default_run() -> list[str]:
    metrics = ROOT / "metrics"
    toxicity, _ = evaluation(metrics, "toxicity")
    race, before = evaluation(metrics, "race")
    gender, even = evaluation(metrics, "gender")
    own = toxicity["lrp"]
    beyond = figure(own["against_ban"]["reduction"], "%")
    seconds = int(rows_of(PAGES["docs/cost.md"])[len(STAGES) + 1][2])
    return [
        f"in some {seconds / 60:.0f} minutes",
        f"Without {own['num_neurons']} neurons, profanity falls by "
        f"{change(toxicity, 'lrp')}, at a KL of {own['kl']['mean']['value']:.3f} nats; that is "
        f"beyond 19 random draws, {PARAMS.evaluate.drawn} of them by completions, and {beyond} "
        f"more than a word ban, which takes {change(toxicity, 'word-ban')}",
        f"Without {race['gradient-t']['num_neurons']} neurons, the margin falls by "
        f"{change(race, 'gradient-t')} of {before['test_margin']:.3f}",
        f"{change(gender, 'gradient-t')} of {even['test_margin']:.3f}",
    ]


def of_the_sealed_sets() -> list[str]:
    found = read_json(ROOT / "metrics/confirm.json")["behaviours"]
    toxicity, race = found["toxicity"]["circuits"], found["race"]["circuits"]
    pushed, values = race["gradient-t"]["test"], race["gradient-t"]["test"]["values"]
    margin, ss = (values[key] - pushed[key]["value"] for key in ("margin", "ss"))
    against = figure(toxicity["lrp"]["against_ban"]["reduction"], "%")
    n = toxicity["lrp"]["test"]["reduction"]["n"]
    return [
        f"On {n} prompts `lrp` takes {change(toxicity, 'lrp')} of the profanity, at a KL of "
        f"{found['toxicity']['kl']['mean']:.3f} nats; {against} more than the word ban. "
        f"`gradient` takes {change(toxicity, 'gradient')}",
        f"margin {margin:.3f} nats, SS {ss:.1f}.",
        f"pushes it {change(race, 'gradient-t')} past even",
        f"has {found['gender']['circuits']['lrp']['test']['margin']['n']} terms there",
    ]


def of_the_full_profile() -> list[str]:
    toxicity, _ = evaluation(FULL, "toxicity")
    race, before = evaluation(FULL, "race")
    gender, even = evaluation(FULL, "gender")
    gap = {b: read_json(FULL / f"gate/{b}.json")["gap"]["value"] for b in PARAMS.behaviours}
    own, ban = toxicity["lrp"], toxicity["word-ban"]["test"]
    ss = figure(race["gradient-t"]["test"]["ss"], "points", -1)
    beyond = figure(own["against_ban"]["reduction"], "%")
    return [
        f"Without {own['num_neurons']} neurons, profanity falls by {change(toxicity, 'lrp')}. That "
        f"is beyond 19 random draws, {EVALUATE[FULL].drawn} of them by completions, and {beyond} "
        f"more than a word ban, which takes {change(toxicity, 'word-ban')}; the KL from the "
        "unpruned model is "
        f"{own['kl']['mean']['value']:.3f} nats a token",
        f"it falls by {figure(own['test']['reduction_hatesonar'], '%')}, where the ban takes "
        f"{figure(ban['reduction_hatesonar'], '%')}",
        f"falls by {change(race, 'gradient-t')} of {before['test_margin']:.3f}, and SS by {ss}, on "
        f"{race['gradient-t']['test']['margin']['n']} terms",
        f"falls by {change(gender, 'gradient-t')} of {even['test_margin']:.3f}, and SS stays",
        f"`gradient` takes {change(toxicity, 'gradient')} of the profanity and "
        f"{change(race, 'gradient')} of race's margin; `lrp` takes "
        f"{short(change(toxicity, 'lrp'))} and {change(race, 'lrp')}",
        f"asks for a relevance gap of {PARAMS.gate.threshold:g} %. Toxicity has "
        f"{gap['toxicity']:.1f} % and works; gender has {gap['gender']:.1f} % and hardly moves; "
        f"race, which works, has {gap['race']:.1f} %",
        f"The budget of {PARAMS.select.budget.perplexity:g} %",
    ]


def of_gemma() -> list[str]:
    toxicity, _ = evaluation(GEMMA, "toxicity")
    race, before = evaluation(GEMMA, "race")
    gender, even = evaluation(GEMMA, "gender")
    ss = figure(race["gradient-t"]["test"]["ss"], "points", -1)
    kl = [toxicity[name]["kl"]["mean"]["value"] for name in ("lrp", "word-ban")]
    return [
        f"falls by {change(race, 'gradient-t')} of {before['test_margin']:.3f}, and SS by {ss}",
        f"`lrp` takes {change(toxicity, 'lrp')} of the profanity, beyond 19 random draws, "
        f"{EVALUATE[GEMMA].drawn} of them by completions, at a KL "
        f"of {kl[0]:.3f} nats; a word ban takes {change(toxicity, 'word-ban')} at {kl[1]:.3f}.",
        f"Nothing: {change(gender, 'gradient-t')} of {even['test_margin']:.3f}.",
    ]


def of_readme() -> list[str]:
    sealed = read_json(ROOT / "metrics/confirm.json")["behaviours"]["toxicity"]["circuits"]
    toxicity, _ = evaluation(FULL, "toxicity")
    signs = read_json(ROOT / "metrics/overlap.json")["quadrants"]["gender.toxicity"]
    seconds = int(rows_of(PAGES["docs/cost.md"])[len(STAGES) + 1][2])
    rivals, _ = evaluation(RIVALS, "toxicity")
    cost = [rivals[n]["texts"]["questions"]["value"] for n in ("directional-ablation", "lrp")]
    return [
        f"at {cost[0]:.0f} % of perplexity on questions where pruning costs {cost[1]:.0f} %",
        f"{sum(signs.values()):,} neurons",
        f"{EVALUATE[FULL].completions} completions a prompt",
        f"some {seconds / 60:.0f} minutes on two cores",
        f"{change(toxicity, 'lrp')} of it is gone, and a mere ban of "
        f"{len(toxicity['word-ban']['tokens'])} bad words takes {change(toxicity, 'word-ban')}. By "
        "a second scorer none of it is beyond the ban. On sealed prompts, read once with the first "
        f"release's {sealed['lrp']['num_neurons']} neurons, it is {change(sealed, 'lrp')}.",
        f"{change(toxicity, 'gradient')}, on the sealed prompts {change(sealed, 'gradient')}.",
        f"a budget of {PARAMS.select.budget.perplexity:g} %",
    ]


def of_rivals() -> list[str]:
    found, _ = evaluation(RIVALS, "toxicity")
    cost = {
        name: (found[name]["texts"]["questions"]["value"], found[name]["kl"]["mean"]["value"])
        for name in ("directional-ablation", "lrp")
    }
    low = [found[n]["test"]["reduction"]["low"] for n in ("lrp", "cp-lrp", "directional-ablation")]
    assert min(low) > 0
    default, _ = evaluation(ROOT / "metrics", "toxicity")
    words = len(found["word-ban"]["tokens"]), len(default["word-ban"]["tokens"])
    (one, kl), (other, other_kl) = cost.values()
    return [
        f"`directional-ablation` at {found['directional-ablation']['strength']:g} of its strength",
        f"+{one:.1f} % of perplexity on questions and a KL of {kl:.3f} nats, against +{other:.1f} "
        f"% and {other_kl:.3f} for `lrp`",
        f"with {words[0]} words; by the default's larger sample of texts {words[0]} are too many, "
        f"and {words[1]} take {short(change(default, 'word-ban'))}",
    ]


def of_published() -> list[str]:
    judged = claims({})
    count = {v: sum(c.verdict == v for c in judged) for v in (CONSISTENT, INCONSISTENT)}
    (row,) = (c.row for c in judged if c.row["id"] == "reduction-toxicity")
    _, before, sd, after, sd_after, n = row["error"]
    low, high = reduction_error(before, sd, after, sd_after, n)
    return [
        f"Of {sum(count.values())} pieces of arithmetic, {count[CONSISTENT]} follow and "
        f"{count[INCONSISTENT]} do not",
        f"toxicity, {row['value']} %, is from its own standard deviations and {n} prompts "
        f"{row['value']} % [{low:.1f}, {high:.1f}]",
    ]


def of_the_protocol() -> list[str]:
    prepared = read_json(FULL / "prepare.json")
    race, gender = (sum(p["groups"] for p in prepared[s].values()) for s in ("race", "gender"))
    return [
        f"the worst of {MOST} completions",
        f"{race} for race and {gender} for gender",
        f"beyond {PARAMS.methods[PARAMS.evaluate.control].draws} random draws",
        f"with {100 * POWER:.0f} % power",
        f"Intervals are {100 * LEVEL:.0f} %",
    ]


SENTENCES = {
    "README.md": of_readme,
    "docs/rivals.md": of_rivals,
    "docs/results.md": lambda: [
        *of_the_default_run(),
        *of_the_sealed_sets(),
        *of_the_full_profile(),
        *of_gemma(),
    ],
    "docs/published.md": of_published,
    "docs/protocol.md": of_the_protocol,
}
RESULT = re.compile(r"[\d.]+ (?:%|nats|points)|\[-?[\d.]+, -?[\d.]+\]")
PLAIN = {  # of a page: what is no result of a run, but a setting, a definition or a test's bound
    "README.md": ["95 % interval"],
    "docs/results.md": ["brackets are 95 % intervals"],
    "docs/protocol.md": [
        "at a nominal 5 %",
        "in 4 to 6.5 % of experiments, five plain folds in more than 8 %",
    ],
}


@pytest.mark.parametrize("page", SENTENCES)
def test_every_result_in_prose_is_computed_from_the_files(page: str) -> None:
    text = prose(page)
    for sentence in (*SENTENCES[page](), *PLAIN.get(page, [])):
        assert sentence in text, sentence
        text = text.replace(sentence, "")
    assert RESULT.findall(text) == []


def test_what_is_said_of_each_behaviour_holds() -> None:
    """The words that the figures are put into: which interval holds 0, and which does not."""
    found = read_json(ROOT / "metrics/confirm.json")["behaviours"]

    def margin(circuits: dict[str, Any]) -> dict[str, float]:
        return circuits["gradient-t"]["test"]["margin"]

    for name in ("lrp", "gradient"):
        assert found["toxicity"]["circuits"][name]["test"]["reduction"]["low"] > 0
    assert margin(found["race"]["circuits"])["high"] < 0  # past even, further than any draw
    rank = found["race"]["circuits"]["gradient-t"]["among_controls"]["margin"]
    assert rank["least"] > 0 or rank["most"] < abs(margin(found["race"]["circuits"])["value"])
    for circuits in (evaluation(ROOT / "metrics", "gender")[0], found["gender"]["circuits"]):
        assert margin(circuits)["low"] < 0 < margin(circuits)["high"]
    race = evaluation(ROOT / "metrics", "race")[0]["gradient-t"]
    assert race["test"]["margin"]["high"] < 0
    assert race["among_controls"]["margin"]["p"] <= 0.05
    gates = {b: read_json(FULL / f"gate/{b}.json") for b in PARAMS.behaviours}
    assert (gates["toxicity"]["passed"], gates["gender"]["passed"]) == (0, 1)
    for gate in gates.values():  # wider than the threshold
        assert gate["gap"]["high"] - gate["gap"]["low"] > PARAMS.gate.threshold
    for behaviour in ("gender", "race"):  # less than half of a circuit comes back
        assert read_json(ROOT / f"metrics/select/{behaviour}.json")["gradient-t.stability"] < 0.5
    toxicity = evaluation(FULL, "toxicity")[0]["lrp"]["against_ban"]
    assert toxicity["reduction"]["low"] > 0 > toxicity["reduction_hatesonar"]["low"]
    full = evaluation(FULL, "gender")[0]["gradient-t"]["test"]
    assert full["margin"]["high"] < 0
    assert full["ss"]["low"] < 0 < full["ss"]["high"]
    gemma = {b: evaluation(GEMMA, b)[0] for b in ("race", "toxicity")}
    assert margin(gemma["race"])["high"] < 0
    assert gemma["toxicity"]["lrp"]["against_ban"]["reduction"]["high"] < 0
    assert gemma["toxicity"]["lrp"]["test"]["reduction_hatesonar"]["low"] < 0
    default = evaluation(ROOT / "metrics", "toxicity")[0]["lrp"]["against_ban"]
    assert default["reduction"]["low"] > 0 > default["reduction_hatesonar"]["low"]
    for folder in (FULL, GEMMA):  # CrowS-Pairs shows nothing of race
        second = evaluation(folder, "race")[0]["gradient-t"]["second"]["margin"]
        assert second["low"] < 0 < second["high"]
    over = {}
    for behaviour, spec in PARAMS.behaviours.items():
        own = evaluation(FULL, behaviour)[0][spec.method]
        assert own["texts"]["general"]["value"] <= 1
        over[behaviour] = {text for text, change in own["texts"].items() if change["value"] > 1}
    assert not over["race"]
    assert over["toxicity"] & {"news", "questions"}
    assert over["gender"] & {"news", "questions"}


def test_the_simulated_errors_are_those_that_a_test_holds() -> None:
    assert PLAIN["docs/protocol.md"][1] in PAGES["docs/protocol.md"]
    tested = (ROOT / "tests/test_sequential.py").read_text()
    assert "assert 0.04 <= rejected(4000, 0, SEQUENTIAL) <= 0.065" in tested
    assert "assert rejected(2000, 0, folds(5)) > 0.08" in tested


def test_the_page_of_scorers_is_what_they_give(fetched: Path, monkeypatch: Any) -> None:
    """Their rank correlations and floors, computed here from raw texts; the floor of params too."""
    monkeypatch.chdir(fetched)
    text = PAGES["docs/scorers.md"]
    ranks, curve, floors = text.partition("<!-- scorers")[2].split("\n\n|")[1:4]
    prompts = read_jsonl(Path("data/real-toxicity-prompts.jsonl"))
    words = [len(row["text"].split()) for row in prompts]
    passages = [row["passage"].partition(" -- ")[2] for row in read_jsonl(Path("data/boolq.jsonl"))]
    distinct = list(dict.fromkeys(" ".join(p.split()) for p in passages))
    for at, (name, row) in enumerate(PARAMS.scorers.items(), 1):
        score = scorer(row)
        found = score([prompt["text"] for prompt in prompts])
        for kind in ("toxicity", "profanity", "insult", "threat"):
            (shown,) = (line[at] for line in rows_of(f"|{ranks}") if line[0] == kind)
            rank = spearmanr(found, [prompt[kind] for prompt in prompts])[0]
            assert shown.startswith(f"{rank:+.2f} [")
        high = [p["toxicity"] for p, s in zip(prompts, found, strict=True) if s >= 0.8]
        assert rows_of(f"|{curve}")[-1][at] == f"{sum(high) / len(high):.2f} ({len(high)})"
        (shown,) = (line[at] for line in rows_of(f"|{floors}") if line[0].startswith("wikipedia"))
        cut = [" ".join(p.split()[:n]) for p, n in zip(distinct, words, strict=False)]
        assert float(shown) == pytest.approx(score(cut).mean(), abs=0.01)
        if name == "hatesonar":
            assert row.floor == round(float(shown), 2)


def test_the_scorer_measures_profanity(fetched: Path) -> None:
    """Its rank correlation with Perspective's scores of the same texts."""
    rows = read_jsonl(fetched / "data/real-toxicity-prompts.jsonl")
    scores = scorer(Scorer(kind="profanity"))([row["text"] for row in rows])
    kinds = ("profanity", "insult", "threat", "identity_attack")
    found = [spearmanr(scores, [row[kind] for row in rows])[0] for kind in kinds]
    shown = [f"{value:.2f}" for value in found]
    text = PAGES["docs/responsible.md"]
    sentence = "{} for profanity, {} for insult, {} for threat and {} for identity attack"
    assert f"Over {len(rows)} prompts" in text
    assert sentence.format(*shown) in text


# --- links, names, and what is to be typed -----------------------------------------------------


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)", text, re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\((docs/[\w.]+\.md)", PAGES["README.md"]))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 90


def fenced(page: str, kind: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.S | re.M)
    return [text for found, text in blocks if found == kind]


def merged(tree: Any, changes: Any) -> Any:
    if not isinstance(changes, dict) or not isinstance(tree, dict):
        return changes
    return {**tree, **{key: merged(tree.get(key, {}), changes[key]) for key in changes}}


@pytest.mark.parametrize("page", ["docs/change.md", "docs/cluster.md"])
def test_what_is_to_be_put_into_params_is_accepted(page: str) -> None:
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    fragments = fenced(page, "yaml")
    assert fragments
    for fragment in fragments:
        check(parse(merged(given, yaml.safe_load(fragment))))


def test_a_run_without_lrp_is_accepted() -> None:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    (fragment,) = fenced("docs/lxt.md", "yaml")
    tree = merged(tree, yaml.safe_load(fragment))
    tree["methods"] = {n: m for n, m in tree["methods"].items() if "lrp" not in m["score"]}
    tree["evaluate"] |= {"completed": ["gradient", "random-layer-matched"]}
    tree["evaluate"] |= {"in_sample": ["gradient"]}
    for section in ("overlap", "report"):
        tree[section]["method"] = "gradient"
    check(parse(tree))
    assert "lrp" not in json.dumps(tree)


def test_the_page_lists_every_source_and_scorer() -> None:
    sources, scorers = PAGES["docs/own.md"].split("## Sources")[1].split("## Scorers")
    listed = {row[0].strip("`"): re.findall("`(.+?)`", row[1]) for row in rows_of(sources)[1:]}
    assert listed.pop("a file of your own") == ["label", "first"]
    assert listed == {name: list(source.where) for name, source in SOURCES.items()}
    assert {row[0].strip("`") for row in rows_of(scorers)[1:]} == set(SCORERS)
    assert all(f"`{target}`" in sources for target in TARGETS)


def test_own_prompts_are_read_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, pairs = fenced("docs/own.md", "yaml")
    monkeypatch.chdir(tmp_path)
    Path("prompts/service").mkdir(parents=True)
    Path("prompts/service/all.jsonl").write_text(
        "".join(
            json.dumps({**row, "kind": name}) + "\n"
            for name in ("rude", "polite")
            for row in read_jsonl(ROOT / f"examples/customer-service/{name}.jsonl")
        )
    )
    Path("prompts/cooks.csv").write_text("stereotype,other,job\nHe cooks.,She cooks.,cook\n")
    found = {}
    for fragment in (texts, pairs):
        tree = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), yaml.safe_load(fragment))
        params = parse(tree)
        check(params)
        for name in yaml.safe_load(fragment)["prompt_sets"]:
            spec = params.prompt_sets[name]
            found[name] = narrow(name, list(source_of(spec).rows(spec.where)), spec.where)
    assert [len(rows) for rows in found.values()] == [60, 60, 1]
    assert len({row.group for rows in (found["rude"], found["polite"]) for row in rows}) == 20
    assert found["cooks"][0].pair == ("He cooks.", "She cooks.")


def test_the_citation_and_the_changes_are_of_this_release() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version
    assert f"\n## {version}, {cited['date-released']}\n" in PAGES["CHANGELOG.md"]
