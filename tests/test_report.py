"""The report page: self-contained, escaped, and of use for half a run too."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adept_ds.errors import InputError
from adept_ds.report import write_report

UNITS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
UNITS += ["input_layernorm", "post_attention_layernorm"]
SELECTED = [12, 17, 20, 21]
COPIES = [{"source": source, "index": source + 1 + i} for i, source in enumerate(SELECTED)]
TITLES = {
    "evaluation": "Before and after",
    "layers": "Which layers matter least",
    "stack": "The expanded model",
    "training": "Training loss and learning rate",
    "evals": "Held-out loss during training",
    "units": "How fast each unit may learn",
    "movement": "What the multipliers did",
    "speed": "Throughput and gradient norm",
    "config": "Configuration",
}
FIGURES = ("layers", "stack", "training", "evals", "units", "movement", "speed")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_importance(run_dir: Path, layers: int = 30) -> None:
    noise = random.Random(0)
    delta = [0.02 + 0.05 * noise.random() for _ in range(layers)]
    delta[0], delta[1], delta[-1], delta[5] = 7.31, 1.24, 2.05, 0.0973
    for rank, i in enumerate(SELECTED):
        delta[i] = 0.004 * rank - 0.002
    rows = [{"index": i, "loss": 2.2 + d, "delta": d} for i, d in enumerate(delta)]
    result = {"method": "mask", "base_loss": 2.2, "tokens": 16384, "layers": rows, "selected": SELECTED}
    (run_dir / "layer_importance.json").write_text(json.dumps(result), encoding="utf-8")


def step_line(step: int, noise: random.Random) -> dict[str, Any]:
    lr = 2e-4 * min(1, step / 10) * (0.55 + 0.45 * math.cos(math.pi * step / 100))
    loss = 1.6 + 0.4 * math.exp(-step / 25) + noise.gauss(0, 0.06)
    speed = 3200 * (1 + noise.gauss(0, 0.03)) * (0.6 if step % 20 == 1 else 1)
    return {"step": step, "loss": loss, "lr": lr, "grad_norm": 0.8 + noise.random(), "tokens": 2048 * step,
            "tokens_per_second": speed, "seconds": 2048 / speed, "peak_memory_bytes": 3 << 30}  # fmt: skip


def eval_line(step: int) -> dict[str, Any]:
    domain, general = 1.61 + 0.31 * math.exp(-step / 30), 2.20 + 0.01 * step / 100
    sets = {"general": {"loss": general, "tokens": 8192}, "domain": {"loss": domain, "tokens": 8192}}
    return {"step": step, "eval": sets}


def metric_lines(steps: int = 100) -> list[dict[str, Any]]:
    noise, lines = random.Random(1), []
    for step in range(steps + 1):
        lines += [step_line(step, noise)] if step else []
        lines += [eval_line(step)] if step % 25 == 0 else []
        lines += [{"step": step, "refresh_seconds": 0.7}] if step % 20 == 0 else []
    return lines


def refresh_line(step: int, noise: random.Random) -> dict[str, Any]:
    units = []
    for copy in COPIES:
        for rank, name in enumerate(UNITS):
            importance = min(1.0, max(0.0, 0.7 * (rank % 7 == 2) + 0.15 * rank * noise.random() / 4))
            unit = f"layers.{copy['index']}.{name}"
            units.append({"unit": unit, "importance": importance, "multiplier": 2 * (1 - importance)})
    return {"step": step, "units": units}


def make_run(run_dir: Path, model: str = "models/SmolLM2-135M") -> Path:
    (run_dir / "expanded").mkdir(parents=True)
    write_importance(run_dir)
    config = f"model: {json.dumps(model)}\nexpand: {{k: 4}}\ntrain: {{steps: 100, lr: 2.0e-4}}\n"
    (run_dir / "config.yaml").write_text(config, encoding="utf-8")
    expansion = {"source_layers": 30, "copies": COPIES, "zeroed": ["layers.13.mlp.down_proj.weight"]}
    (run_dir / "expanded/expansion.json").write_text(json.dumps(expansion), encoding="utf-8")
    noise = random.Random(2)
    write_lines(run_dir / "unit_importance.jsonl", [refresh_line(step, noise) for step in range(0, 100, 20)])
    write_movement(run_dir)
    write_lines(run_dir / "metrics.jsonl", metric_lines())
    write_evaluation(run_dir, general=2.21)
    summary = {"trainable_parameters": 14_160_000, "total_parameters": 148_680_000, "world_size": 2, "seconds": 75.4,
               "tokens": 204_800, "tokens_per_second": 3187.2, "peak_memory_bytes": 3 << 30, "refresh_seconds": 3.5,
               "step_seconds": 0.64, "zero_stage": 3, "precision": "bf16"}  # fmt: skip
    (run_dir / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run_dir


def write_movement(run_dir: Path, refreshes: Path | None = None) -> None:
    """Every element moves by 1e-5 times its multiplier in each step, always in the same direction."""
    lines: list[dict[str, Any]] = []
    travelled: dict[str, float] = {}
    for refresh in map(json.loads, (refreshes or run_dir / "unit_importance.jsonl").read_text().splitlines()):
        units = []
        for unit in refresh["units"]:
            name, numel, step = unit["unit"], 576 if "norm" in unit["unit"] else 331_776, 1e-5 * unit["multiplier"] * 20
            travelled[name] = travelled.get(name, 0.0) + step
            units.append({"unit": name, "numel": numel, "multiplier": unit["multiplier"],
                          "moved": step * numel**0.5, "moved_since_start": travelled[name] * numel**0.5})  # fmt: skip
        lines.append({"step": refresh["step"] + 20, "since": refresh["step"], "units": units})
    write_lines(run_dir / "unit_movement.jsonl", lines)


def write_evaluation(run_dir: Path, general: float, domain: float = 1.61) -> None:
    base = {"general": {"loss": 2.20, "tokens": 8192}, "domain": {"loss": 1.92, "tokens": 8192}}
    adapted = {"general": {"loss": general, "tokens": 8192}, "domain": {"loss": domain, "tokens": 8192}}
    (run_dir / "evaluation.json").write_text(json.dumps({"base": base, "adapted": adapted}), encoding="utf-8")


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def words(page: str) -> str:
    """What a reader sees, on one line."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", "", page)).split())


def figures(page: str) -> dict[str, bool]:
    parts = {part.split('"', 1)[0]: "<svg" in part for part in page.split('<section id="')[1:]}
    return {name: parts[name] for name in FIGURES}


class Tags(HTMLParser):
    """Every start tag with its attributes, as a browser's parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a complete run, drawn once: drawing is what takes the time."""
    run_dir = make_run(tmp_path_factory.mktemp("complete") / "run")
    text = page_of(run_dir)
    assert not list(run_dir.glob(".report*"))
    return text


def test_page_is_self_contained_and_small(page: str) -> None:
    for tag, attributes in Tags(page).seen:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(page.encode()) < 1_500_000


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'xlink:href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_every_section_and_number_appears(page: str) -> None:
    assert all(f'<section id="{name}">' in page and title in page for name, title in TITLES.items())
    assert all(figures(page).values())
    text = words(page)
    assert "Left out" not in text
    assert "Domain loss 1.92 → 1.61 (\u22120.31 nats), general loss 2.20 → 2.21 (+0.01)." in text
    for shown in ("9.52%", "14.2 M of 149 M parameters", "base layers 12, 17, 20, 21", "205 k", "3,187", "75.4 s"):
        assert shown in text
    for shown in ("3 GiB", "2 ranks", "ZeRO stage 3, bf16", "+0.0100", "layers.13.self_attn.v_proj"):
        assert shown in text


@pytest.mark.parametrize(
    ("general", "domain", "headline"),
    [
        (2.21, 1.61, "Better on the domain; general text is practically unchanged."),
        (2.24, 1.61, "Better on the domain; general text is slightly worse."),
        (2.32, 1.61, "General text got worse; the domain improved."),
        (2.32, 1.92, "General text got worse; the domain did not improve."),
        (2.20, 1.99, "The domain got worse; general text is practically unchanged."),
        (2.20, 1.92, "No change on the domain; general text is practically unchanged."),
    ],
)
def test_verdict_follows_the_numbers(tmp_path: Path, general: float, domain: float, headline: str) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    write_evaluation(tmp_path, general, domain)
    assert headline in words(page_of(tmp_path))


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    config = "model: x<script>alert(1)<script>&\nnote: '</pre><img src=https://example.invalid/x onerror=alert(2)>'\n"
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "metrics.jsonl").touch()
    unit = {"unit": "layers.13.$x_{<b>", "importance": 0.5, "multiplier": 1.0}
    write_lines(tmp_path / "unit_importance.jsonl", [{"step": 0, "units": [unit]}])
    page = page_of(tmp_path)
    assert not {"script", "img", "b"} & {tag for tag, _ in Tags(page).seen}
    assert "ADEPT run: x&lt;script&gt;alert(1)" in page
    assert "layers.13.$x_{&lt;b&gt;" in page


def test_only_the_probe_has_run(tmp_path: Path) -> None:
    write_importance(tmp_path)
    page = page_of(tmp_path)
    assert figures(page) == {name: name == "layers" for name in FIGURES}
    assert "Layers probed; no training yet. Layers 12, 17, 20, 21 matter least for general text." in words(page)
    assert page.count("Left out") == 8


def test_only_metrics(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3}])
    page = page_of(tmp_path)
    assert figures(page) == {name: name == "training" for name in FIGURES}
    assert "1 training step has a loss that is not a finite number" in words(page)


def test_evaluations_during_training_stand_in_for_the_final_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [eval_line(step) for step in (0, 50, 100)])
    text = words(page_of(tmp_path))
    assert "Domain loss 1.92 → 1.62 (\u22120.30 nats), general loss 2.20 → 2.21 (+0.01)." in text
    assert "First against last evaluation during training." in text


def test_nothing_to_report_is_an_input_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"adept run CONFIG") as caught:
            write_report(place)
        assert str(place) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_broken_json_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "layer_importance.json").write_text('{"layers": [', encoding="utf-8")
    with pytest.raises(InputError, match=r"layer_importance\.json.*adept run CONFIG"):
        write_report(tmp_path)


def test_line_cut_by_a_crash_and_continued_is_skipped(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 9.0}', '{"step": 2, "lo{"step": 2, "loss": 5.0}', '{"step": 3, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert "Training loss 9.00 → 1.00 over 2 steps." in words(page_of(tmp_path))


def test_half_written_last_line_is_skipped(tmp_path: Path) -> None:
    lines = {
        "metrics.jsonl": step_line(1, random.Random(0)),
        "unit_importance.jsonl": refresh_line(0, random.Random(0)),
    }
    for name, line in lines.items():
        (tmp_path / name).write_bytes(json.dumps(line).encode() + b"\n" + '{"step": 101, "loss": 1.5, "é'.encode()[:-1])
    page = page_of(tmp_path)
    assert [name for name, drawn in figures(page).items() if drawn] == ["training", "units", "speed"]


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 9.0} for step in (1, 2, 3, 4)] + [{"step": step, "loss": 1.0} for step in (2, 3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert "Training loss 9.00 → 1.00 over 3 steps." in words(page_of(tmp_path))


def test_long_runs_and_fine_units_stay_small(tmp_path: Path) -> None:
    noise = random.Random(3)
    write_lines(tmp_path / "metrics.jsonl", [step_line(step, noise) for step in range(1, 10_001)])
    units = [{"unit": f"layers.3.mlp.neuron.{i}", "importance": 0.5, "multiplier": 1.0} for i in range(500)]
    write_lines(tmp_path / "unit_importance.jsonl", [{"step": step, "units": units} for step in range(0, 9000, 100)])
    page = page_of(tmp_path)
    assert figures(page)["units"] and "The first 400 of 500 units" in page
    assert len(page.encode()) < 1_500_000


def test_same_input_gives_the_same_page(tmp_path: Path) -> None:
    write_importance(tmp_path, layers=24)
    assert page_of(tmp_path) == page_of(tmp_path)


def movement_of(run_dir: Path, *lines: dict[str, Any]) -> str:
    write_lines(run_dir / "unit_movement.jsonl", list(lines))
    return words(page_of(run_dir).split('<section id="movement"')[1].split("</section>")[0])


def moved(unit: str, multiplier: float, distance: float, total: float, numel: int = 4) -> dict[str, Any]:
    return {"unit": unit, "numel": numel, "multiplier": multiplier, "moved": distance, "moved_since_start": total}


def test_a_unit_that_moves_as_its_multiplier_says_lies_on_the_line(page: str) -> None:
    """Norms are 576 times smaller than matrices here, and move as far by element."""
    assert "Rank correlation (Spearman) of multiplier and change: 1.00" in words(page)


def test_the_mean_multiplier_weighs_each_by_how_long_it_held(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    first = {
        "step": 10,
        "since": 0,
        "units": [moved("layers.1.mlp.up_proj", 2.0, 1, 1), moved("layers.1.norm", 1, 1, 1)],
    }
    then = {
        "step": 40,
        "since": 10,
        "units": [moved("layers.1.mlp.up_proj", 0.4, 1, 3), moved("layers.1.norm", 1, 1, 1)],
    }
    text = movement_of(run_dir, first, then)
    assert "layers.1.mlp.up_proj 0.800 1.5" in text  # (10 * 2 + 30 * 0.4) / 40; norm 3 over 4 elements
    assert "layers.1.norm 1.000 0.5" in text


def test_a_unit_that_moved_although_it_was_stopped_is_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    units = [moved("layers.1.a", 0.0, 0.0, 1.0), moved("layers.1.b", 0.0, 1e-9, 1.0), moved("layers.1.c", 1.0, 1, 1)]
    text = movement_of(run_dir, {"step": 10, "since": 0, "units": units})
    assert "Units that moved although their multiplier was 0 (1): layers.1.b" in text
    text = movement_of(run_dir, {"step": 10, "since": 0, "units": [units[0], units[2]]})
    assert "multiplier 0 from one refresh to the next: 1. None of them moved" in text


def test_thousands_of_neurons_are_shown_by_their_layers_mean(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    units = [moved(f"layers.{layer}.mlp.neuron.{n}", n % 3, n % 3, n % 3) for layer in (3, 7) for n in range(6000)]
    text = movement_of(run_dir, {"step": 10, "since": 0, "units": units})
    assert "layers.3.mlp.neuron.* 1.000 0.5" in text
    assert "layers.7.mlp.neuron.* 1.000 0.5" in text
    assert (run_dir / "report.html").stat().st_size < 1_500_000
