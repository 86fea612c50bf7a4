"""Any input: whatever a file holds, a reader or a loader gives what was meant or one clear line."""

import copy
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparc3.base.errors import InputError
from sparc3.base.files import (
    read_csv,
    read_json,
    read_jsonl,
    read_tensors,
    write_csv,
    write_jsonl,
    write_tensors,
)
from sparc3.base.params import SPLITS, parse, read
from sparc3.circuits.circuit import Circuit, read_circuit, write_circuit
from sparc3.measure import inference
from sparc3.prompts.sampling import split_of_groups
from sparc3.stages.checks import check

TREE = yaml.safe_load(Path("params.yaml").read_text())
SENSELESS: dict[str, Any] = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 10**30,
    "below": -1,
    "fraction": 0.123,
    "text": "word",
    "empty": "",
    "number in text": "15",
    "null": None,
    "truth": True,
    "list": [],
    "nested": [[1]],
    "mapping": {"a": 1},
    "date": yaml.safe_load("2026-01-01"),
}
MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples everywhere: what is green stays so
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


def refusal(tree: Any) -> str | None:
    """What loading says; any other exception than InputError goes through."""
    try:
        check(parse(tree))
    except InputError as error:
        return str(error)
    return None


def refused_by(reader: Callable[[Path], object], path: Path) -> str | None:
    try:
        reader(path)
    except InputError as error:
        return str(error)
    return None


LEAVES = list(leaves(TREE))


@pytest.mark.parametrize("kind", SENSELESS)
def test_no_value_of_any_key_makes_a_traceback(kind: str) -> None:
    """Of the 14 kinds of values, those that are never right are refused at every key."""
    value, refused = SENSELESS[kind], 0
    for path in LEAVES:
        said = refusal(changed(path, value))
        if said is not None:
            refused += 1
            assert "\n" not in said, path
            assert said.startswith("params: "), path
    never = kind in ("nan", "infinite", "nested", "date", "empty")
    assert refused >= (len(LEAVES) if never else len(LEAVES) // 2), (refused, len(LEAVES))


def test_every_misspelt_key_is_named() -> None:
    for path in LEAVES:
        tree, place = copy.deepcopy(TREE), None
        place = tree
        for key in path[:-1]:
            place = place[key]
        place[f"{path[-1]}x"] = place.pop(path[-1])
        said = refusal(tree)
        table = path[0] in ("prepare", "scorers") or "where" in path
        assert said is not None or table, path
        if said is not None and not table:
            assert str(path[-1]) in said, (path, said)


@MANY
@given(
    path=st.sampled_from(LEAVES),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_is_taken_or_refused_in_one_line(path: tuple[Any, ...], value: Any) -> None:
    said = refusal(changed(path, value))
    assert said is None or (said.startswith("params: ") and "\n" not in said)


@MANY
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for reader in (read, read_json, read_jsonl, read_csv, read_tensors, read_circuit):
        said = refused_by(reader, path)
        assert said is None or (said.startswith(str(path)) and "\n" not in said), (reader, said)


@MANY
@given(rows=st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), max_size=5))
def test_texts_come_back_as_they_were(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    write_csv(tmp_path / "rows.csv", rows, ["a", "b"])
    assert read_csv(tmp_path / "rows.csv") == rows
    with (tmp_path / "rows.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream)) == rows


def test_lines_of_others_are_read_as_the_standard_library_does(tmp_path: Path) -> None:
    rows = [{"text": 'a "quoted"\r\nline\u2028and\x0cfeed'}, {"text": "b,c"}]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["text"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "rows.csv").write_bytes(buffer.getvalue().encode())
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_csv(tmp_path / "rows.csv") == read_jsonl(tmp_path / "rows.jsonl") == rows


@MANY
@given(
    values=st.lists(st.floats(width=32), max_size=6),
    name=st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=5),
)
def test_tensors_come_back_or_are_refused(tmp_path: Path, values: list[float], name: str) -> None:
    path, tensor = tmp_path / "t.safetensors", np.array(values, np.float32)
    if np.isfinite(tensor).all():
        write_tensors(path, {name: tensor}, {"ids": "[]"})
        found, about = read_tensors(path)
        assert np.array_equal(found[name], tensor)
        assert about == {"ids": "[]"}
    else:
        with pytest.raises(InputError, match="non-finite"):
            write_tensors(path, {name: tensor})


@MANY
@given(
    shares=st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any),
    groups=st.lists(texts, min_size=3, max_size=40, unique=True),
)
def test_a_group_is_in_one_split_which_has_a_share(shares: list[int], groups: list[str]) -> None:
    by_name = {name: share / sum(shares) for name, share in zip(SPLITS, shares, strict=True)}
    found = split_of_groups(groups, by_name)
    assert {*found} == {*groups}
    assert all(by_name[split] > 0 for split in found.values())
    assert found == split_of_groups(reversed(groups), by_name)


@MANY
@given(
    neurons=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 3000)), min_size=1, max_size=20, unique=True
    ),
    scale=st.floats(0, 0.99),
)
def test_a_circuit_comes_back_as_it_was(
    tmp_path: Path, neurons: list[tuple[int, int]], scale: float
) -> None:
    layers, units = np.array(neurons, np.int64).T
    scores = np.linspace(-1, 1, len(neurons), dtype=np.float32)
    circuit = Circuit(layers, units, scores, np.full(len(neurons), scale, np.float32))
    write_circuit(tmp_path / "c.csv", circuit)
    found = read_circuit(tmp_path / "c.csv")
    assert sorted(found.rows()) == sorted(circuit.rows())


finite = st.floats(-100, 100, width=32)


@MANY
@given(
    pairs=st.lists(st.tuples(finite, finite), min_size=6, max_size=14),
    shift=st.integers(-64, 64),
)
def test_a_paired_difference_knows_no_order_of_groups_and_no_common_shift(
    pairs: list[tuple[float, float]], shift: int
) -> None:
    before, after = np.array(pairs, np.float64).T
    there = inference.paired_difference(before, after, resamples=200)
    back = inference.paired_difference(after, before, resamples=200)
    assert there.value == pytest.approx(-back.value, abs=1e-9)
    assert there.p == pytest.approx(back.p)
    assert 0 < there.p <= 1
    assert there.low <= there.value + 1e-9
    assert there.value <= there.high + 1e-9
    moved = inference.paired_difference(before + shift, after + shift, resamples=200)
    assert moved.value == pytest.approx(there.value, abs=1e-6)


@MANY
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_nothing_is_left_in_a_model_that_was_pruned_for_a_while(neurons: list[int]) -> None:
    import tiny

    from sparc3.circuits.ablate import pruned

    model = tiny.model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = np.array(sorted(set(neurons)), np.int64)
    zeros = np.zeros(len(units), np.float32)
    with pruned(model, Circuit(np.zeros(len(units), np.int64), units, zeros, zeros)):
        pass
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
