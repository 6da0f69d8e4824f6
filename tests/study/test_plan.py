"""From STUDY.yaml to cells: fair, known by content, and no more than are needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.inprocess import run_here
from harness.launching import ROOT
from harness.models import save_tiny_model
from harness.tiny_study import TinyStudy
from harness.workspace import Workspace, write_corpus

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.config.corpus_entries import corpus_sources
from adept_ds.config.loading import load_config
from adept_ds.config.presets import PRESETS
from adept_ds.ranks.stopping import StopRequest
from adept_ds.study.cells import Cell
from adept_ds.study.overlaps import overlaps_of
from adept_ds.study.plan import Plan, check_study
from adept_ds.study.running import StudyState, begin
from adept_ds.study.schema import load_study


@pytest.fixture
def study(tmp_path: Path, workspace: Workspace) -> TinyStudy:
    found = TinyStudy(tmp_path, workspace.model)
    found.write_texts()
    return found


def plan_of(study: TinyStudy, scale: float = 1.0, **changes: Any) -> Plan:
    path = study.write(**changes)
    return Plan(check_study(load_study(path), path, scale), Terminal(None), StopRequest())


def names(cells: list[Cell]) -> set[str]:
    return {cell.run.root.name for cell in cells}


def test_cells_are_methods_by_settings_by_rates_by_seeds(study: TinyStudy) -> None:
    settings = [{"label": f"k = {k}", "set": {"expand.k": k}, "methods": ["adept"]} for k in (1, 3)]
    plan = plan_of(study, settings=settings, seeds={"search": [0, 5], "confirm": [1]})
    cells = {(cell.variant.name, cell.lr, cell.seed) for cell in plan.search}
    arms = ("full", "adept (k = 1)", "adept (k = 3)")
    assert cells == {(arm, lr, seed) for arm in arms for lr in (1e-3, 2e-3) for seed in (0, 5)}
    assert [cell.config.expand.k for cell in plan.search if cell.variant.name == "adept (k = 3)"] == [3] * 4
    more = plan.confirmations({"full": [2e-3], "adept (k = 1)": []})
    assert [(cell.variant.name, cell.lr, cell.seed) for cell in more] == [("full", 2e-3, 1)]


def test_every_cell_has_the_same_texts_each_in_its_role(study: TinyStudy) -> None:
    """What is trained on, chosen by and reported is disjoint, and the same for all; who needs it replays or probes."""
    plan = plan_of(study, methods=["full", "replay", "adept", "llama_pro"])
    by_method = {cell.variant.label: cell.config for cell in plan.search}
    for config in by_method.values():
        assert config.data.domain == by_method["full"].data.domain
        assert config.data.general_eval == by_method["full"].data.general_eval
        eval_names = [source.title for source in corpus_sources([*config.data.general_eval, *config.data.domain_eval])]
        assert eval_names == [
            "validation/general_validation",
            "test/general_test",
            "validation/domain",
            "test/domain",
        ]
    replayed = {name for name, config in by_method.items() if config.data.replay}
    probed = {name for name, config in by_method.items() if config.probe.corpus}
    assert (replayed, probed) == ({"replay"}, {"adept"})
    texts = [set(source.files[0].read_text().splitlines()) for source in (*plan.texts.train, *plan.texts.domain_eval)]
    assert sum(map(len, texts)) == len(set().union(*texts))


def test_a_cell_is_a_complete_configuration(study: TinyStudy) -> None:
    plan = plan_of(study)
    cell = plan.search[0]
    begin(cell, StudyState(plan).shared)
    assert load_config(cell.run.config) == cell.config
    assert cell.is_begun
    assert not cell.is_finished


CHANGES: dict[str, dict[str, Any]] = {
    "budget": {"budget": {"tokens": 1024}},
    "evaluation": {"evaluation": {"sequences": 5}},
    "split": {"domain": {"test": 0.21}},
    "dial": {"dial": [0.25]},
    "base": {"base": {"train": {"global_batch_size": 8, "micro_batch_size": 2}}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_study_has_other_cells_and_leaves_the_old_ones_alone(name: str, study: TinyStudy) -> None:
    before = plan_of(study)
    for cell in before.search:
        begin(cell, StudyState(before).shared)
    tree = study.tree()
    for key, value in CHANGES[name].items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    after = plan_of(study, **tree)
    assert not names(before.search) & names(after.search)
    assert {path.name for path in after.strangers()} == names(before.search)


def test_cells_are_the_same_wherever_the_study_lies(study: TinyStudy, tmp_path: Path) -> None:
    """Contents count; places, times and how a run is done do not."""
    before = plan_of(study)
    moved = TinyStudy(tmp_path / "elsewhere", tmp_path / "elsewhere" / "model")
    moved.root.mkdir()
    shutil.copytree(study.model, moved.model)
    for file in study.root.glob("*.jsonl"):
        shutil.copyfile(file, moved.root / file.name)
    shutil.copytree(study.root / "tasks", moved.root / "tasks")
    tree = moved.tree()
    tree["base"]["train"] |= {"checkpoint_every": 77}
    tree["base"]["logging"] = {"prometheus": str(tmp_path / "adept.prom")}
    after = plan_of(moved, base=tree["base"], threads=3)
    assert names(before.search) == names(after.search)


def test_a_key_that_does_nothing_makes_no_other_cell(study: TinyStudy) -> None:
    """So that cells which ran before there was such a key are found again; with an effect they are others."""
    before = plan_of(study)
    for cell in before.search:
        assert not {"writer_lr_ratio", "copy_dropout"} & cell.inputs["train"].keys()
        assert "tie_break" not in cell.inputs.get("expand", {})
    adept = {"method": "adept", "set": {"train.copy_dropout": 0.5, "train.writer_lr_ratio": 4.0}}
    after = plan_of(study, methods=["full", adept])
    changed = {cell.inputs["train"].get("copy_dropout") for cell in after.search if cell.variant.label == "adept"}
    assert changed == {0.5}
    same = names(before.search) & names(after.search)
    assert {name.partition("_")[0] for name in same} == {"full"}


def test_a_preset_in_the_base_is_its_values_for_every_method(study: TinyStudy) -> None:
    """Written out or by its word: the same cells, also of methods that look at none of its sections."""
    base, paper = study.tree()["base"], PRESETS["paper"]
    written = {section: paper[section] | base.get(section, {}) for section in paper if section != "method"}
    by_word = plan_of(study, base=base | {"preset": "paper"})
    assert {cell.config.preset for cell in by_word.search} == {"paper"}
    assert names(by_word.search) == names(plan_of(study, base=base | written).search)


def test_a_probe_concerns_those_alone_that_probe(study: TinyStudy) -> None:
    before = plan_of(study)
    after = plan_of(study, base=study.tree()["base"] | {"probe": {"sequences": 5, "seq_len": 24}})
    changed = names(after.search) - names(before.search)
    assert changed == {name for name in names(after.search) if name.startswith("adept")}


def test_a_larger_machine_scales_what_is_counted(study: TinyStudy) -> None:
    plan = plan_of(study, scale=3.0)
    config = next(cell.config for cell in plan.search if cell.variant.label == "adept")
    assert (config.train.steps, config.data.eval_sequences) == (12, 18)
    assert (config.importance.every, config.train.checkpoint_every, config.train.eval_every) == (6, 3, 500)


ROLES = [
    ("general.train", "general.validation", "validation"),
    ("general.train", "general.test", "test"),
    ("general.validation", "general.test", "test"),
    ("domain.sources", "general.test", "test"),
    ("domain.sources", "general.train", "replay and probing"),
]


@pytest.mark.parametrize("how", ["same", "copied", "linked"])
@pytest.mark.parametrize(("first", "second", "role"), ROLES)
def test_a_text_with_two_roles_is_refused(how: str, first: str, second: str, role: str, study: TinyStudy) -> None:
    """The same file, another name of it, or another file with the same content."""
    tree = study.tree()
    section, key = first.split(".")
    file = Path(tree[section][key][0])
    other = study.root / "other.jsonl"
    if how == "copied":
        shutil.copyfile(file, other)
    elif how == "linked":
        other.symlink_to(file)
    section, key = second.split(".")
    tree[section][key] = [*tree[section][key], str(file if how == "same" else other)]
    with pytest.raises(InputError) as refusal:
        plan_of(study, **tree)
    for word in (first, second, role, "a text is either for"):
        assert word in str(refusal.value), refusal.value
    assert not (study.study_dir / "data").exists()


def test_what_a_setting_probes_has_a_role_too(study: TinyStudy) -> None:
    validated = study.tree()["general"]["validation"]
    setting = {"label": "wrong", "set": {"probe.corpus": validated}, "methods": ["adept"]}
    with pytest.raises(InputError, match=r"setting 'wrong': probe.corpus: .* is .* of general.validation"):
        plan_of(study, settings=[setting])


def test_held_out_documents_that_are_elsewhere_are_told(study: TinyStudy) -> None:
    """Files differ, documents do not: nothing is refused, and the page says it."""
    test = study.root / "general_test.jsonl"
    lines = (study.root / "general.jsonl").read_text().splitlines()[:3]
    test.write_text("\n".join([*test.read_text().splitlines(), *lines]) + "\n")
    plan = plan_of(study)
    for _ in range(2):  # the second time from what was kept
        found = overlaps_in(plan)
        assert found == ["3 of 23 documents of test/general_test are in general (replayed, probed) too, word for word."]


def overlaps_in(plan: Plan) -> list[str]:
    data = plan.example(plan.checked.variants[0]).data
    return overlaps_of(plan.texts, plan.other_texts, data, plan.directory.data, plan.identity, Terminal(None))


def test_held_out_documents_that_one_setting_alone_reads_are_told(study: TinyStudy) -> None:
    test, other = study.root / "general_test.jsonl", study.root / "other.jsonl"
    other.write_text("\n".join(test.read_text().splitlines()[:2]) + "\n")
    setting = {"label": "other", "set": {"probe.corpus": [str(other)]}, "methods": ["adept"]}
    known = "documents of test/general_test are in other (probe.corpus of adept (other)) too, word for word."
    assert overlaps_in(plan_of(study, settings=[setting])) == [f"2 of 20 {known}"]


def test_nothing_but_the_study_turns_a_model_or_chooses_its_checkpoint(study: TinyStudy) -> None:
    """Else documents that are reported would have chosen."""
    with pytest.raises(InputError, match=r"base: dial is decided by the study; remove it, and say it in 'dial'"):
        plan_of(study, base=study.tree()["base"] | {"dial": {"max_general_rise": 0.0}})
    base = study.tree()["base"] | {"preset": "recommended", "expand": {"k": 1}}
    plan = plan_of(study, base=base, methods=["adept"], reference="adept", dial=[])
    assert all(cell.config.dial is None and cell.config.anchor is not None for cell in plan.search)
    for guard in ({"action": "stop"}, {"action": "slow"}):
        with pytest.raises(InputError, match=rf"guard.action: {guard['action']} would choose rates or checkpoints"):
            plan_of(study, base=study.tree()["base"] | {"guard": guard})
    plan = plan_of(study, base=study.tree()["base"] | {"guard": {"action": "warn"}})
    assert plan.search[0].config.guard is not None


def test_a_dry_run_tells_what_would_be_run(study: TinyStudy) -> None:
    study.write()
    ended = run_here(["compare", str(study.file), "--dry-run", "--json"], ROOT)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [cell["state"] for cell in found["cells"]] == ["to run"] * 4
    assert [cell["tokens"] for cell in found["cells"]] == [512] * 4
    assert found["confirmed_later"] == 4
    ended = run_here(["compare", str(study.file), "seeds.confirm_for=[plain]", "--dry-run", "--json"], ROOT)
    assert json.loads(ended.out)["confirmed_later"] == 2, "one of the two rates of each method"
    assert not (study.study_dir / "cells").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "lora"], ["--only: 'lora'", "choose of full, adept"]),
        (["--report", "--submit"], ["--report goes with neither"]),
        (["--report"], ["no finished trial"]),
        (["--cell", "search"], ["--cell: 'search'", "search:INDEX"]),
        (["--scale", "0"], ["--scale"]),
        (["budget.token=1"], ["override 'budget.token=1'", "did you mean 'budget.tokens'?"]),
    ],
)
def test_mistakes_on_the_command_line_are_refused(arguments: list[str], words: list[str], study: TinyStudy) -> None:
    study.write()
    ended = run_here(["compare", str(study.file), *arguments], ROOT)
    assert ended.code == 2
    for word in words:
        assert word in ended.err, ended.err


def ready_studies() -> Iterator[Path]:
    yield from sorted((ROOT / "launch" / "studies").glob("*.yaml"))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As deep as the model that the studies are sized for."""
    return save_tiny_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=30)


@pytest.mark.parametrize("path", ready_studies(), ids=lambda path: path.stem)
def test_every_ready_study_can_begin(
    path: Path, study: TinyStudy, monkeypatch: pytest.MonkeyPatch, deep_model: Path
) -> None:
    """With a tiny model in place of the real one, and texts in place of the prepared ones."""
    tree = yaml.safe_load(path.read_text())
    (study.root / "study_data").mkdir()
    (study.root / "study_data" / "model").symlink_to(deep_model)
    (study.root / "ds_configs").symlink_to(ROOT / "ds_configs")
    for seed, name in enumerate(sorted(set(_files(tree)))):
        write_corpus(study.root / name, seed, 40)
    tree["base"] |= {"data": {"seq_len": 32}}
    tree["base"]["probe"] = tree["base"].get("probe", {}) | {"seq_len": 32}
    (study.root / "study.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(study.root)
    checked = check_study(load_study(Path("study.yaml")), path)
    plan = Plan(checked, Terminal(None), StopRequest())
    assert len(plan.search) == sum(len(variant.rates) for variant in checked.variants)
    header = path.read_text().partition("study_dir:")[0]
    assert f"adept compare launch/studies/{path.name}" in header
    assert f"{len(plan.search)} cell{'' if len(plan.search) == 1 else 's'} " in header


def _files(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (file for inner in value.values() for file in _files(inner))
    elif isinstance(value, list):
        yield from (file for inner in value for file in _files(inner))
    elif isinstance(value, str) and value.endswith(".jsonl"):
        yield value
