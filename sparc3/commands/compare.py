"""Compare: one prompt completed by the model and without a circuit, side by side, in seconds.

The same random numbers draw both. A few completions show what a circuit does; they measure nothing.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from sparc3.base.artifacts import circuit_path
from sparc3.base.errors import InputError
from sparc3.base.files import digest_text
from sparc3.base.params import Params
from sparc3.circuits.circuit import INTACT, read_circuit
from sparc3.measure.instrument import How, Reading
from sparc3.measure.instruments import completions as instrument
from sparc3.measure.scorers import scorer
from sparc3.model import loading
from sparc3.stages.table import check_axis, check_circuit

GAP = " | "
MOST = 1000  # completions, as evaluate.completions may be


def run(params: Params, behaviour: str, method: str | None, prompt: str, completions: int) -> None:
    """Print `completions` of the prompt by both, each with its score by the behaviour's first
    scorer, if it has one. `method` names a circuit of the behaviour, by default its own.

    InputError: no such behaviour or circuit, one that is not of this model, an empty prompt.
    """
    check_axis(params, "evaluate", {"behaviour": behaviour})
    if not 1 <= completions <= MOST:
        raise InputError(f"--completions {completions}: expected 1 to {MOST}")
    if re.search("[\ud800-\udfff]", prompt):
        raise InputError("--prompt is no UTF-8 text; write it anew")
    spec = params.behaviours[behaviour]
    name = spec.method if method is None else method
    check_circuit(params, name)
    circuit = read_circuit(circuit_path(behaviour, name))
    scorers = {each: scorer(params.scorers[each], params.model.device) for each in spec.scorers[:1]}
    tokenizer = loading.tokenizer(params.model)
    asked = replace(params.evaluate, completions=completions)
    # Named as prepare names it: of a test prompt these are the completions that evaluate drew.
    row = {"id": digest_text(prompt)[:16], "group": "", "text": prompt}
    sample = instrument.instrument(spec).encode([row], tokenizer)
    how = How(asked, asked.batch_tokens, tokenizer, scorers)
    both = instrument.read(loading.load(params.model), [INTACT, circuit], sample, how)
    titles = "the model", f"without {len(circuit)} neurons of {name}"
    print("\n".join(beside(titles, both, next(iter(scorers), None))))


def beside(titles: tuple[str, str], both: list[Reading], score: str | None) -> Iterator[str]:
    """Lines of two columns, as wide as the terminal."""
    width = (shutil.get_terminal_size((100, 24)).columns - len(GAP)) // 2

    def block(texts: tuple[str, ...]) -> Iterator[str]:
        wrapped = [wrap(" ".join(text.split()), width) or [""] for text in texts]
        for left, right in zip_longest(*wrapped, fillvalue=""):
            yield f"{left:<{width}}{GAP}{right}".rstrip()

    def shown(row: dict[str, Any]) -> str:
        return f"{row[score]:.2f} {row['text']}" if score else f"- {row['text']}"

    yield from block(titles)
    for rows in zip(*(reading.written for reading in both), strict=True):
        yield from block(tuple(shown(row) for row in rows))
    if score:
        means = (float(reading.columns[f"{score}_mean"][0]) for reading in both)
        yield from block(tuple(f"{mean:.2f} mean {score}" for mean in means))
