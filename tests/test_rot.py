"""Rot: a byte, a file or a whole product that is not what its stage wrote is never used."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
import yaml

from sparc3.__main__ import main
from sparc3.base.artifacts import model_digest
from sparc3.base.errors import InputError
from sparc3.base.files import digest, read_json, write_json
from sparc3.base.products import Ledger, Manifest, write_manifest
from sparc3.commands import verify
from sparc3.commands.stage import produce
from sparc3.stages.checks import load
from sparc3.stages.table import made

# A file of every kind that a stage reads, and a stage that reads it.
READ = [
    ("outputs/prompts/rude.jsonl", "attribute", {"prompt_set": "rude"}),
    ("outputs/scores/rude/lrp/00000.safetensors", "gate", {"behaviour": "rude"}),
    ("outputs/scores/bias/gradient/00000.safetensors", "differential", {"behaviour": "bias"}),
    ("outputs/differential/rude/lrp.safetensors", "sweep", {"behaviour": "rude"}),
    ("outputs/differential/rude/lrp.safetensors", "overlap", {}),
    ("outputs/sweep/rude.csv", "select", {"behaviour": "rude"}),
    ("outputs/circuits/rude/lrp.csv", "evaluate", {"behaviour": "rude"}),
    ("outputs/interventions/rude/act.safetensors", "evaluate", {"behaviour": "rude"}),
    ("outputs/circuits/bias/block-1/lrp.json", "evaluate", {"behaviour": "bias"}),
    ("outputs/circuits/bias/gradient-t.json", "transfer", {}),
    ("outputs/evaluation/rude/groups.csv", "report", {}),
    ("outputs/stability/bias/curves.csv", "report", {}),
    ("metrics/evaluate/bias.json", "report", {}),
    ("metrics/gate/rude.json", "report", {}),
    ("metrics/overlap.json", "report", {}),
    ("metrics/transfer.json", "report", {}),
]


@pytest.fixture(scope="module")
def whole_project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(finished, tmp_path_factory.mktemp("rot") / "project")


@pytest.fixture
def project(whole_project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project as the current directory; what a test does to it is undone."""
    kept = whole_project.with_name("kept")
    shutil.copytree(whole_project, kept, copy_function=shutil.copy2)
    monkeypatch.chdir(whole_project)
    yield whole_project
    shutil.rmtree(whole_project)
    kept.rename(whole_project)


def flip(path: Path) -> None:
    """One bit of the middle byte; size and date stay."""
    kept, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


def run(word: str, options: dict[str, str]) -> None:
    produce(load(), word, options, model_digest(Path("model")))


@pytest.mark.parametrize(("name", "word", "options"), READ, ids=lambda value: str(value))
def test_a_flipped_bit_is_refused_before_it_is_used(
    project: Path, name: str, word: str, options: dict[str, str]
) -> None:
    flip(Path(name))
    with pytest.raises(InputError, match=rf"^{name}: is not what \S+ wrote; remove it, and run:"):
        run(word, options)


def test_an_idle_stage_leaves_nothing_and_starts_without_torch(project: Path) -> None:
    tree = yaml.safe_load(Path("params.yaml").read_text())
    tree["steer"]["interventions"] = {}
    for row in tree["behaviours"].values():
        row["faithfulness"] = False
    Path("params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    for word, folder in (("steer", "interventions"), ("faithfulness", "faithfulness")):
        made, metrics = Path("outputs") / folder / "rude", Path(f"metrics/{word}/rude.json")
        assert list(made.iterdir())
        assert read_json(metrics)
        code = (
            "import sys; from sparc3.commands.stage import produce; "
            "from sparc3.stages.checks import load; "
            f"produce(load(), {word!r}, {{'behaviour': 'rude'}}, None); "
            "print('torch' in sys.modules)"
        )
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
        )
        assert done.stdout == "False\n", done.stderr
        assert [file.name for file in made.iterdir()] == ["nothing"]
        assert read_json(metrics) == {}


def test_verify_names_every_file_that_has_a_flipped_bit(project: Path) -> None:
    assert list(verify.products()) == []
    names = [name for manifest in Ledger().manifests for name in manifest.wrote]
    assert {Path(name).parts[1] for name in names if name.startswith("outputs")} == {
        *("prompts", "scores", "gate", "differential", "sweep", "circuits", "stability"),
        *("evaluation", "transfer", "overlap", "faithfulness", "report", "interventions"),
    }
    for name in names[::7]:
        before = Path(name).read_bytes()
        flip(Path(name))
        assert any(line.startswith(f"{name}: is not what ") for line in verify.products()), name
        Path(name).write_bytes(before)


def test_a_command_refuses_what_a_stage_would(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", "--behaviour", "rude", "--method", "lrp", "--folder", "out"]
    flip(Path("metrics/evaluate/rude.json"))
    assert main(export) == 2
    assert "metrics/evaluate/rude.json: is not what evaluate@rude wrote" in capsys.readouterr().err
    flip(Path("metrics/evaluate/rude.json"))
    flip(Path("model/model.safetensors"))
    assert main(export) == 2
    assert "ran before the model was what it is now" in capsys.readouterr().err
    assert not Path("out").exists()
    flip(Path("model/model.safetensors"))
    assert main(export) == 0


def test_a_missing_shard_is_no_smaller_sample(project: Path) -> None:
    shards = sorted(Path("outputs/scores/rude/lrp").iterdir())
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(InputError, match=f"^{shards[-1]}: file not found, though attribute@rude"):
        run("differential", {"behaviour": "rude"})
    assert any(line.startswith(f"{shards[-1]}: file not found") for line in verify.products())


def test_a_foreign_shard_and_a_swapped_circuit_are_refused(project: Path) -> None:
    scores, circuits = Path("outputs/scores/rude/lrp"), Path("outputs/circuits/rude")
    shutil.copy(scores / "00000.safetensors", scores / "99999.safetensors")
    with pytest.raises(InputError, match=r"99999.safetensors: no stage wrote it; remove it"):
        run("gate", {"behaviour": "rude"})
    shutil.copy(circuits / "aura.csv", circuits / "lrp.csv")
    with pytest.raises(InputError, match=r"lrp.csv: is not what select@rude wrote"):
        run("evaluate", {"behaviour": "rude"})
    assert len(list(verify.products())) == 2


def test_a_leak_check_that_was_switched_off_is_seen(project: Path) -> None:
    path = Path("outputs/circuits/rude/lrp.json")
    about = read_json(path)
    write_json(path, {**about, "chosen_on": [], "groups": []})
    with pytest.raises(InputError, match=r"lrp.json: is not what select@rude wrote"):
        run("evaluate", {"behaviour": "rude"})


def test_products_of_other_prompts_are_refused_by_every_later_stage(project: Path) -> None:
    """`prepare` and `attribute` again, by hand, and nothing between them and the stage."""
    path = Path("outputs/prompts/rude.jsonl")
    path.write_text(path.read_text().replace(" the ", " old "))
    write_manifest("prepare", None, made("prepare", None), {})
    stale = rf"^attribute@rude ran before {path} was what it is now; run attribute@rude again"
    with pytest.raises(InputError, match=stale):
        run("differential", {"behaviour": "rude"})
    run("attribute", {"prompt_set": "rude"})
    with pytest.raises(InputError, match=r"^differential@rude ran before outputs/"):
        run("sweep", {"behaviour": "rude"})
    assert any(line.startswith("differential@rude ran before") for line in verify.products())


def test_another_model_in_the_same_place_is_seen(project: Path) -> None:
    flip(Path("model/model.safetensors"))
    with pytest.raises(InputError, match=r"^attribute@\S+ ran before the model was what it is now"):
        run("evaluate", {"behaviour": "rude"})


def test_a_manifest_of_another_version_is_refused(project: Path) -> None:
    path = Path("outputs/manifests/gate/rude.json")
    write_json(path, {**read_json(path), "version": 0})
    with pytest.raises(InputError, match=rf"^{path}: of another version of sparc3; run: dvc repro"):
        Ledger()


def test_an_object_of_the_cache_that_has_rotted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").write_text("kept as it was")
    md5 = digest(tmp_path / "good", "md5")
    kept = verify.CACHE / md5[:2] / md5[2:]
    kept.parent.mkdir(parents=True)
    (tmp_path / "good").rename(kept)
    assert list(verify.cache()) == []
    flip(kept)
    kept.chmod(0o444)
    assert [line.partition(":")[0] for line in verify.cache()] == [str(kept)]


def test_a_manifest_says_what_was_read(project: Path) -> None:
    by_name: dict[str, Manifest] = {each.name: each for each in Ledger().manifests}
    read = by_name["evaluate@bias"].read
    assert {"outputs/circuits/bias/lrp.csv", "outputs/prompts/bias.jsonl", "model"} <= {*read}
    assert (
        read["outputs/prompts/bias.jsonl"] == by_name["prepare"].wrote["outputs/prompts/bias.jsonl"]
    )
    assert not any("outputs/circuits/rude" in name for name in read)


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["dvc", *arguments]
    return subprocess.run(
        command, cwd=folder, env=faults.environment(), capture_output=True, text=True, check=False
    )


def test_rot_in_a_repository_is_refused_named_and_healed(tmp_path: Path) -> None:
    """DVC trusts a file whose size and date are as they were, and a read-only object of its cache
    in any case.
    """
    faults.write_project(tmp_path)
    assert dvc(tmp_path, "repro", "gate@rude").returncode == 0
    before, name = faults.files(tmp_path), "outputs/scores/rude/lrp/00000.safetensors"
    md5 = digest(tmp_path / name, "md5")
    kept = tmp_path / verify.CACHE / md5[:2] / md5[2:]
    flip(tmp_path / name)
    kept.chmod(0o644)
    flip(kept)
    kept.chmod(0o444)
    done = dvc(tmp_path, "repro", "attribute@general", "differential@rude")
    assert done.returncode != 0
    assert f"{name}: is not what attribute@rude wrote" in done.stderr
    said = subprocess.run(
        [sys.executable, "-m", "sparc3", "verify"],
        cwd=tmp_path,
        env=faults.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 2
    assert {line.partition(":")[0] for line in said.stdout.splitlines()} == {
        name,
        str(kept.relative_to(tmp_path)),
    }
    (tmp_path / name).unlink()
    kept.unlink()
    done = dvc(tmp_path, "repro", "differential@rude")
    assert done.returncode == 0, done.stderr
    after = faults.files(tmp_path)
    assert {name: after[name] for name in before} == before
