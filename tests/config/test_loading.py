"""How a configuration is read: overrides, defaults, and what `adept show` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from harness.launching import adept
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import dump_config, load_config, parse_config
from adept_ds.config.resolved import resolve
from adept_ds.config.schema import Config

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


# --- who is to blame -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        pytest.param(["train.lr=abc"], 0, id="a wrong value"),
        pytest.param(["train.stpes=1"], 0, id="an unknown key"),
        pytest.param(["train.steps=1", "train.lr=abc", "run_dir=x"], 1, id="one of several"),
        pytest.param(["train.lr=1", "train.lr=abc", "train.lr=xyz"], 1, id="the first of several mistakes"),
        pytest.param(["data.domain=[a, 5]"], 0, id="an item of a list"),
        pytest.param(["expand.k=2", "expand.layers=[1]"], 1, id="the one with which both are there"),
        pytest.param(["lr_policy.preset=official"], 0, id="what another section does not allow"),
        pytest.param(["train=5"], 0, id="a value for a section"),
        pytest.param(["train.betas.x=1"], 0, id="below a list"),
        pytest.param(["train.steps.x=1"], 0, id="below a value"),
        pytest.param(["train.lr=[1"], 0, id="no YAML"),
        pytest.param(["train.lr=!!bool 7"], 0, id="a tag"),
        pytest.param(["train={lr: 1, lr: 2}"], 0, id="a key twice"),
        pytest.param(["a..b=1"], 0, id="a section without a name"),
        pytest.param(["=1"], 0, id="no name"),
        pytest.param([".=1"], 0, id="a dot"),
        pytest.param(["train.=1"], 0, id="no last name"),
        pytest.param(["train.lr"], 0, id="no value"),
    ],
)
def test_the_mistake_of_an_override_is_blamed_on_it(config_file: Path, overrides: list[str], blamed: int) -> None:
    with pytest.raises(InputError) as refusal:
        load_config(config_file, overrides)
    assert str(refusal.value).startswith(f"override '{overrides[blamed]}'"), refusal.value


@pytest.mark.parametrize(
    ("mistake", "override"),
    [
        pytest.param("  lr: abc\n", "train.steps=5", id="a wrong value"),
        pytest.param("  stpes: 5\n", "train.stpes=6", id="an unknown key that both have"),
        pytest.param("  lr: abc\n", "train.lr=xyz", id="a wrong value for another"),
        pytest.param("expand: {k: 2, layers: [1]}\n", "expand.k=3", id="keys against each other"),
        pytest.param("expand: 5\n", "expand.k=3", id="a value for a section"),
    ],
)
def test_what_the_file_has_wrong_too_is_blamed_on_the_file(config_file: Path, mistake: str, override: str) -> None:
    config_file.write_text(config_file.read_text() + mistake)
    with pytest.raises(InputError) as refusal:
        load_config(config_file, [override])
    assert str(refusal.value).startswith(f"{config_file}: ")
    assert "xyz" not in str(refusal.value), "the file's own value"


def test_an_override_mends_the_file(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "  lr: abc\n")
    assert load_config(config_file, ["train.lr=1e-3"]).train.lr == 1e-3


def test_texts_that_look_like_something_else_are_read_back_the_same(config_file: Path, tmp_path: Path) -> None:
    files = ["1e-4", "no", "010", "2020-01-31", "~/x", "a: b", "[x]", "é", "null"]
    config = parse_config({"model": "5", "run_dir": "yes", "data": {"domain": files}})
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


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


def test_a_checked_configuration_cannot_be_changed(config_file: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]
