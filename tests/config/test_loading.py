"""How a configuration is read: overrides, defaults, and what `adept show` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.launching import ROOT, adept
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed import check_deepspeed_file, read_deepspeed_config
from adept_ds.config.loading import dump_config, load_config, parse_config
from adept_ds.config.resolved import resolve
from adept_ds.config.schema import Config, LrPolicySection

MINIMAL = "model: m\nrun_dir: r\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + "train:\n  steps: 10\n  betas: [0.8, 0.99]\n", encoding="utf-8")
    return path


def test_two_keys_are_enough_and_the_rest_are_the_papers_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    config = load_config(path)
    assert (config.model, config.run_dir, config.deepspeed) == ("m", Path("r"), None)
    assert config.importance.every == 500
    assert config.importance.initial == "source"
    assert (config.lr_policy.map, config.lr_policy.scope) == ("linear", "norms_apart")
    assert config.expand.num_copies == 4
    assert (config.train.lr, config.train.schedule, config.train.precision) == (2e-4, "cosine", "auto")


def test_the_designs_example_is_accepted(tmp_path: Path) -> None:
    tree = yaml.safe_load(
        """
        model: path/to/hf_model
        run_dir: runs/math
        deepspeed: ds_configs/zero3.json
        data: {seq_len: 256, domain: [domain.jsonl], general_eval: [g.jsonl], domain_eval: [d.jsonl]}
        probe: {corpus: [general.jsonl], method: mask, sequences: 32, seq_len: 256}
        expand: {k: 4}
        importance: {every: 500, sequences: 32, batch_sequences: 8, granularity: matrix, initial: source}
        lr_policy: {map: linear, scope: norms_apart}
        train: {steps: 100, lr: 2.0e-4, global_batch_size: 8, micro_batch_size: 2, warmup_ratio: 0.1, schedule: cosine,
                weight_decay: 0.1, betas: [0.9, 0.95], clip_grad_norm: 1.0, seed: 0, checkpoint_every: 50,
                eval_every: 50, precision: auto}
        """
    )
    config = parse_config(tree)
    dumped = config.model_dump(mode="json")
    for section, values in tree.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert dumped[section][key] == value


def test_an_override_replaces_one_key_and_leaves_its_neighbours(config_file: Path) -> None:
    config = load_config(config_file, ["train.steps=20", "expand.layers=[1,3]", "run_dir=elsewhere"])
    assert (config.train.steps, config.train.betas) == (20, (0.8, 0.99))
    assert (config.expand.layers, config.expand.num_copies) == ([1, 3], 2)
    assert config.run_dir == Path("elsewhere")


def test_the_last_override_of_a_key_wins(config_file: Path) -> None:
    assert load_config(config_file, ["train.steps=20", "train.steps=30"]).train.steps == 30


def test_an_override_may_contain_equals_signs_and_be_empty(config_file: Path) -> None:
    assert load_config(config_file, ["model=a=b"]).model == "a=b"
    assert load_config(config_file, ["deepspeed=x.json", "deepspeed="]).deepspeed is None


def test_a_section_left_empty_in_the_file_has_its_defaults_and_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + "train:\n")
    assert load_config(path).train == Config(model="m", run_dir=Path("r")).train
    assert load_config(path, ["train.steps=3"]).train.steps == 3


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "0.0002", "2E-4", "2e-04"])
def test_yaml_floats_without_a_point_are_numbers(config_file: Path, text: str) -> None:
    """YAML 1.1 reads 2e-4 as a string; the user means a number, in the file as in an override."""
    assert load_config(config_file, [f"train.lr={text}"]).train.lr == 2e-4
    config_file.write_text(MINIMAL + f"train: {{lr: {text}}}\n")
    assert load_config(config_file).train.lr == 2e-4


def test_a_dumped_configuration_is_read_back_the_same(config_file: Path, tmp_path: Path) -> None:
    overrides = ["train.lr=3.3e-5", "train.eps=1e-12", "expand.layers=[0]", "data.domain=[a.jsonl, b c.jsonl]"]
    config = load_config(config_file, [*overrides, "deepspeed=ds.json", "train.activation_checkpointing=true"])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"preset": "official"},
        {"map": "constant"},
        {"map": "power", "power": 3},
        {"map": "exponential", "scope": "per_kind"},
        {"map": "step", "threshold": 0.3, "low": 0.1},
        {"map": "rank", "preserve_mean": True, "max_multiplier": 4, "smoothing": 0.9},
    ],
    ids=lambda policy: policy.get("preset") or policy.get("map", "default"),
)
def test_a_dumped_lr_policy_has_what_takes_effect_and_is_read_back_the_same(policy: dict[str, Any]) -> None:
    initial = "ones" if policy.get("preset") == "official" else "source"
    config = parse_config({"model": "m", "run_dir": "r", "lr_policy": policy, "importance": {"initial": initial}})
    tree = yaml.safe_load(dump_config(config))
    assert policy.items() <= tree["lr_policy"].items()
    again = parse_config(tree)
    assert (again, dump_config(again)) == (config, dump_config(config))


@pytest.mark.parametrize("data", [{}, {"replay": ["g.jsonl"]}, {"replay": ["g.jsonl"], "replay_share": 0.5}])
def test_a_dumped_data_section_has_what_takes_effect_and_is_read_back_the_same(data: dict[str, Any]) -> None:
    config = parse_config({"model": "m", "run_dir": "r", "data": data})
    tree = yaml.safe_load(dump_config(config))
    assert ("replay_share" in tree["data"]) == bool(data)
    assert parse_config(tree) == config


def test_a_dumped_lr_policy_has_its_own_parameters_only() -> None:
    def dumped(**policy: str) -> set[str]:
        return set(LrPolicySection.model_validate(policy).model_dump())

    common = dumped(map="linear")
    assert common >= {"map", "scope", "preserve_mean", "min_multiplier", "max_multiplier", "smoothing"}
    assert dumped(map="power") - common == {"power"}
    assert dumped(map="exponential") - common == {"temperature"}
    assert dumped(map="step") - common == {"threshold", "low", "high"}
    assert dumped(map="rank") == dumped(map="constant") == common
    assert dumped(preset="official") == {"preset"}


def test_every_key_of_the_lr_policy_is_described() -> None:
    assert all(field.description for field in LrPolicySection.model_fields.values())


def test_the_examples_of_the_lr_policy_page_are_accepted() -> None:
    page = (ROOT / "docs" / "lr_policy.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert examples
    for example in examples:
        parse_config(yaml.safe_load(MINIMAL + example))


def test_what_show_prints_is_a_configuration(workspace: Workspace, tmp_path: Path) -> None:
    path = workspace.config(tmp_path / "run")
    result = adept(1, "show", path, "train.lr=1e-4")
    assert result.returncode == 0, result.stderr
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.stdout)
    assert load_config(shown) == load_config(path, ["train.lr=1e-4"])
    assert not (tmp_path / "run").exists(), "show writes nothing"


def test_show_as_json_has_the_configuration_and_the_plan(workspace: Workspace, tmp_path: Path) -> None:
    path = workspace.config(tmp_path / "run")
    result = adept(1, "show", path, "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert parse_config(record["config"]) == load_config(path)
    assert len(record["plan"]) == 4


def test_relative_paths_are_relative_to_the_working_directory(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file itself lies elsewhere; the corpora are found from where the command was started."""
    tree = workspace.tree(
        Path("run"),
        data={"domain": ["domain.jsonl"], "general_eval": [], "domain_eval": []},
        probe={"corpus": ["general.jsonl"]},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree | {"model": "model"}))
    monkeypatch.chdir(workspace.root)
    assert resolve(load_config(path), "run").model.path.resolve() == workspace.model.resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="model: 'model' does not exist"):
        resolve(load_config(path), "run")


def test_deepspeed_files_may_have_comments(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{\n  // the stage\n  "zero_optimization": {"stage": 2, # two\n  /* no more */ "overlap_comm": false}\n}'
    )
    expected = {"zero_optimization": {"stage": 2, "overlap_comm": False}}
    assert read_deepspeed_config(path) == expected
    assert check_deepspeed_file(path) == expected


def test_without_a_deepspeed_file_it_is_plain_zero3() -> None:
    assert read_deepspeed_config(None) == {"zero_optimization": {"stage": 3}}


def test_a_checked_configuration_cannot_be_changed(config_file: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        pytest.param("train.stpes=1", ["train.stpes", "did you mean 'train.steps'"], id="nearest in its section"),
        pytest.param("learning.lr=1", ["learning", "valid keys here", "train"], id="unknown section"),
        pytest.param("seq_len=9", ["seq_len", "did you mean '", ".seq_len'"], id="in the wrong section"),
        pytest.param("data.steps=1", ["data.steps", "did you mean 'train.steps'"], id="another section's key"),
        pytest.param("train.steps=many", ["train.steps", "many", "integer"], id="wrong type"),
        pytest.param("train.steps=0", ["train.steps", "0", "greater than or equal to 1"], id="out of range"),
        pytest.param("train.steps=1.5", ["train.steps", "1.5", "integer"], id="fraction"),
        pytest.param("train.schedule=cos", ["train.schedule", "cos", "'cosine'"], id="unknown choice"),
        pytest.param("train.betas=[0.9]", ["train.betas", "0.9"], id="too few betas"),
        pytest.param("train.betas=[2,5]", ["train.betas", "2"], id="betas outside [0, 1)"),
        pytest.param("train.lr=.inf", ["train.lr", "inf"], id="infinite learning rate"),
        pytest.param("train.lr=.nan", ["train.lr", "nan"], id="learning rate that is no number"),
        pytest.param("train=3", ["train", "3"], id="a number for a section"),
        pytest.param("data.domain=d.jsonl", ["data.domain", "d.jsonl", "list"], id="a file for a list"),
        pytest.param("expand={k: 2, layers: [1]}", ["expand", "k and layers", "remove one"], id="k and layers"),
        pytest.param("expand.layers=[2,2]", ["expand", "twice"], id="a layer twice"),
        pytest.param("expand.layers=[]", ["expand.layers", "[]"], id="no layer"),
        pytest.param("lr_policy.map=cubic", ["lr_policy.map", "cubic", "'linear'"], id="unknown map"),
        pytest.param("lr_policy.power=0", ["lr_policy.power", "0", "greater than 0"], id="power that is not positive"),
        pytest.param("lr_policy.temperature=-1", ["lr_policy.temperature", "-1"], id="negative temperature"),
        pytest.param("lr_policy.threshold=1.1", ["lr_policy.threshold", "1.1"], id="threshold above 1"),
        pytest.param("lr_policy.smoothing=1", ["lr_policy.smoothing", "1", "less than 1"], id="nothing new is learnt"),
        pytest.param(
            "lr_policy.power=3",
            ["lr_policy: power: 3.0", "map is linear", "remove power"],
            id="another map's parameter",
        ),
        pytest.param(
            "lr_policy={map: power, low: 0.5}", ["low: 0.5", "map: step", "map is power", "remove low"], id="step's low"
        ),
        pytest.param(
            "lr_policy={map: step, low: 3}", ["low: 3.0", "high: 2.0", "lower low or raise high"], id="low above high"
        ),
        pytest.param(
            "lr_policy={min_multiplier: 2, max_multiplier: 1}",
            ["min_multiplier: 2.0", "max_multiplier: 1.0", "lower min_multiplier"],
            id="limits in the wrong order",
        ),
        pytest.param(
            "lr_policy={map: constant, smoothing: 0.5}",
            ["smoothing: 0.5", "map: constant", "remove smoothing"],
            id="smoothing of nothing",
        ),
        pytest.param(
            "lr_policy={map: constant, preserve_mean: true}",
            ["preserve_mean: True", "map: constant", "remove preserve_mean"],
            id="a constant's mean",
        ),
        pytest.param(
            "lr_policy={map: constant, max_multiplier: 1}",
            ["max_multiplier: 1.0", "map: constant", "remove max_multiplier"],
            id="limits of a constant",
        ),
        pytest.param(
            "lr_policy={preset: official, map: linear, smoothing: 0}",
            ["preset: official", "map: linear", "smoothing: 0.0", "remove one or the other"],
            id="preset and more",
        ),
        pytest.param(
            "data.replay_share=0.5",
            ["data.replay_share: 0.5", "list files in data.replay", "remove data.replay_share"],
            id="a share of no replay",
        ),
        pytest.param(
            "importance.source=online",
            ["importance.source: online", "list files in data.replay"],
            id="online of nothing",
        ),
        pytest.param("data.replay_share=1", ["data.replay_share", "less than 1"], id="replay alone"),
        pytest.param(
            "lr_policy.preset=official", ["lr_policy.preset: official", "importance.initial to ones"], id="preset alone"
        ),
        pytest.param("lr_policy.preset=paper", ["lr_policy.preset", "paper", "'official'"], id="unknown preset"),
    ],
)
def test_a_mistake_is_one_line_naming_key_value_and_remedy(config_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(config_file, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert " is missing; add it" not in message, "the key is there"
    assert "Section" not in message, "names of classes mean nothing to a user"


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: m\n")
    with pytest.raises(InputError, match="'run_dir' is missing; add it"):
        load_config(path)


def test_a_misspelt_required_key_is_shown_as_it_stands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("modle: m\nrun_dir: r\n")
    with pytest.raises(InputError, match="unknown key 'modle'; did you mean 'model'"):
        load_config(path)
