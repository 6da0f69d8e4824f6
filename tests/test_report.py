"""The report page: self-contained, escaped, and of use for half a run too."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.errors import InputError
from adept_ds.report.page import write_report

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


def write_movement(run_dir: Path) -> None:
    """Every element moves by 1e-5 times its multiplier in each step, always in the same direction."""
    lines: list[dict[str, Any]] = []
    travelled: dict[str, float] = {}
    for refresh in map(json.loads, (run_dir / "unit_importance.jsonl").read_text().splitlines()):
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
    movement = {"step": 1, "since": 0, "units": [moved(unit["unit"], 0.0, 1.0, 1.0)]}  # named in a warning
    write_lines(tmp_path / "unit_movement.jsonl", [movement])
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


def moved(unit: str, multiplier: float, distance: float, total: float, numel: int = 4) -> dict[str, Any]:
    return {"unit": unit, "numel": numel, "multiplier": multiplier, "moved": distance, "moved_since_start": total}


def interval(since: int, step: int, *units: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "since": since, "units": list(units)}


def movement_of(run_dir: Path, *lines: dict[str, Any]) -> str:
    """The section of a run that has written nothing else."""
    write_lines(run_dir / "metrics.jsonl", [{"step": 1}])
    write_lines(run_dir / "unit_movement.jsonl", list(lines))
    return page_of(run_dir).split('<section id="movement"')[1].split("</section>")[0]


def test_units_that_move_as_their_multipliers_say_have_correlation_1(page: str) -> None:
    """Norms are 576 times smaller than matrices here, and move as far by element."""
    assert "within an interval between refreshes: 1.00 on average over 5 intervals (1.00 to 1.00)" in words(page)


def test_the_mean_multiplier_weighs_each_by_how_long_it_held(tmp_path: Path) -> None:
    matrix, norm = "layers.1.mlp.up_proj", "layers.1.norm"
    first = interval(0, 10, moved(matrix, 2.0, 1, 1), moved(norm, 1, 1, 1))
    then = interval(10, 40, moved(matrix, 0.4, 1, 3), moved(norm, 1, 1, 1))
    text = words(movement_of(tmp_path, first, then))
    assert f"{matrix} 0.800 1.5" in text  # (10 * 2 + 30 * 0.4) / 40; norm 3 over 4 elements
    assert f"{norm} 1.000 0.5" in text


def test_movement_is_compared_with_the_multiplier_that_held_meanwhile(tmp_path: Path) -> None:
    """The order turns round at the refresh, and the learning rate falls to a tenth: columns that are one line off
    correlate negatively, and ranks over both intervals together correlate less than perfectly."""
    first = [moved(f"layers.{layer}.a", layer, layer, layer) for layer in range(1, 5)]
    then = [moved(f"layers.{layer}.a", 5 - layer, 0.1 * (5 - layer), 1.0) for layer in range(1, 5)]
    text = words(movement_of(tmp_path, interval(0, 10, *first), interval(10, 20, *then)))
    assert "within an interval between refreshes: 1.00 on average over 2 intervals (1.00 to 1.00)" in text


def test_units_that_ignore_their_multipliers_have_no_high_correlation(tmp_path: Path) -> None:
    units = [moved(f"layers.{n}.a", n, distance, 1.0) for n, distance in enumerate((3, 1, 4, 2))]
    # Ranks (1 2 3 4) and (3 1 4 2): 1 - 6 * (4 + 1 + 1 + 4) / (4 * 15)
    assert "within an interval between refreshes: 0.00." in words(movement_of(tmp_path, interval(0, 10, *units)))


def test_a_unit_that_moved_although_it_was_stopped_is_named(tmp_path: Path) -> None:
    stopped, moving = moved("layers.1.a", 0.0, 0.0, 1.0), moved("layers.1.c", 1.0, 1, 1)
    section = movement_of(tmp_path, interval(0, 10, stopped, moved("layers.1.b", 0.0, 1e-9, 1.0), moving))
    assert '<div class="verdict warn"><strong>Units that moved although their multiplier was 0: 1 of 2' in section
    assert "layers.1.b by 1e-9 (L2 norm) from step 0 to 10." in words(section)
    assert "none of them moved" not in section


def test_stopped_units_are_counted_once_and_only_their_own_intervals_matter(tmp_path: Path) -> None:
    a, b = "layers.1.a", "layers.1.b"
    lines = [interval(0, 10, moved(a, 0.0, 0, 0), moved(b, 1.0, 1, 1))]
    lines += [interval(10, 20, moved(a, 0.0, 0, 0), moved(b, 0.0, 0, 1)), interval(20, 30, moved(a, 1, 1, 1))]
    section = movement_of(tmp_path, *lines)
    assert "2 units (8 elements) had multiplier 0 in an interval between refreshes; none of them moved" in section
    assert "verdict" not in section


def test_lines_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    lost = [interval(0, 10, moved("layers.1.a", 1.0, 9, 9)), interval(10, 20, moved("layers.1.a", 0.0, 9, 9))]
    lines = [*lost, interval(4, 10, moved("layers.1.a", 0.5, 1, 1)), interval(14, 16, moved("layers.1.a", 1.5, 1, 4))]
    section = movement_of(tmp_path, *lines)
    assert "layers.1.a 0.750 2" in words(section)  # (6 * 0.5 + 2 * 1.5) / 8
    assert "verdict" not in section


def test_the_units_that_moved_most_and_least_are_named(tmp_path: Path) -> None:
    units = [moved(f"layers.{n}.a", 0.1 * n, n, n) for n in range(1, 31)]
    table = words(movement_of(tmp_path, interval(0, 10, *units)).split("<table>")[1].split("</table>")[0])
    assert re.findall(r"layers\.(\d+)\.a", table) == ["30", "29", "28", "27", "26", "5", "4", "3", "2", "1"]
    assert "… 20 units between …" in table


def test_thousands_of_neurons_are_shown_by_their_layers_mean(tmp_path: Path) -> None:
    units = [moved(f"layers.{layer}.mlp.neuron.{n}", n % 3, n % 3, n % 3) for layer in (3, 7) for n in range(6000)]
    section = movement_of(tmp_path, interval(0, 10, *units))
    text = words(section)
    assert "Each dot is the mean of a layer's units" in text.replace("&#39;", "'")
    assert "layers.3.mlp.neuron.* 1.000 0.5" in text
    assert "layers.7.mlp.neuron.* 1.000 0.5" in text
    assert "within an interval between refreshes: 1.00." in text  # over neurons, not over the two means
    assert len(section) < 60_000


@pytest.mark.parametrize("name", ["layers.{}.self_attn.q_proj", "mine{}", "{}"])
def test_movement_of_units_of_any_name_stays_small(tmp_path: Path, name: str) -> None:
    words_of_numbers = ("".join("abcdefghij"[int(digit)] for digit in str(n)) for n in range(6000))
    numbers = words_of_numbers if name == "{}" else map(str, range(6000))
    units = [moved(name.format(number), 1 + n % 7, 1 + n % 7, 1 + n % 7) for n, number in enumerate(numbers)]
    section = movement_of(tmp_path, interval(0, 10, *units))
    assert "<svg" in section and len(section) < 150_000


FINE = interval(0, 10, moved("layers.1.a", 1, 1, 1), moved("layers.1.b", 2, 1, 1))


@pytest.mark.parametrize(
    "line",
    [
        {"step": 20},
        {"step": 20, "since": 10},
        {"step": 20, "since": None, "units": FINE["units"]},
        {"step": 20, "since": 20, "units": FINE["units"]},
        {"step": 20, "since": 10, "units": None},
        {"step": 20, "since": 10, "units": []},
        {"step": 20, "since": 10, "units": [{}, "layers.1.a", None, {"unit": "layers.1.a", "multiplier": 1.0}]},
        interval(10, 20, {**FINE["units"][0], "multiplier": None}),
        interval(10, 20, {**FINE["units"][0], "numel": 0}),
    ],
)
def test_a_line_that_cannot_be_used_is_skipped(tmp_path: Path, line: dict[str, Any]) -> None:
    assert "Left out: no unit_movement.jsonl" in movement_of(tmp_path, line)
    assert "layers.1.a 1.000 0.5" in words(movement_of(tmp_path, FINE, line))


def test_unknown_fields_of_movement_do_no_harm(tmp_path: Path) -> None:
    extended = {**FINE, "new": [], "units": [{**unit, "new": {}} for unit in FINE["units"]]}
    assert movement_of(tmp_path, extended) == movement_of(tmp_path, FINE)


def test_units_whose_weights_overflowed_are_counted_and_left_out(tmp_path: Path) -> None:
    units = [*FINE["units"], moved("layers.1.c", 1.0, math.nan, math.nan), moved("layers.1.d", 1.0, 1, math.inf)]
    text = words(movement_of(tmp_path, interval(0, 10, *units, moved("layers.1.e", 1.5, 3, 3))))
    assert "2 units have weights that are not finite numbers" in text
    assert "layers.1.c" not in text and "layers.1.d" not in text and "nan" not in text
    broken = movement_of(tmp_path, interval(0, 10, moved("layers.1.c", 1.0, math.nan, math.nan)))
    assert "Left out: no weight is a finite number any more." in broken


# --- how the layers were chosen --------------------------------------------------------------------------------------


def write_choice(run_dir: Path, **changes: Any) -> None:
    """What a probe with k: auto says beside the deltas."""
    path = run_dir / "layer_importance.json"
    record = json.loads(path.read_text())
    for layer in record["layers"]:
        layer["standard_error"] = 0.01
    record["selection"] = {"choose": "lowest", "k": 4, "rule": "knee", "reason": "k = 4: <why>",
                           "rules": {"knee": 4, "threshold": 9}, "within_noise": [21, 3]}  # fmt: skip
    halves = [[12, 17, 20, 21], [3, 12, 17, 20]]
    record["stability"] = {"against": "halves", "name": "", "selected": halves, "jaccard": 0.6, "kendall_tau": 0.875}
    record["selection"] |= changes
    path.write_text(json.dumps(record))


def write_methods(run_dir: Path) -> None:
    deltas = [layer["delta"] for layer in json.loads((run_dir / "layer_importance.json").read_text())["layers"]]
    methods = {name: {"deltas": [scale * d for d in deltas], "selected": SELECTED, "seconds": 7.5}
               for name, scale in (("mask", 1.0), ("fisher", 1e-7))}  # fmt: skip
    found = {"methods": methods, "spearman": {"fisher": 0.8125}}
    (run_dir / "layer_methods.json").write_text(json.dumps(found))


def test_the_page_says_how_many_layers_were_chosen_why_and_how_sure_that_is(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    write_choice(run_dir)
    page = page_of(run_dir)
    text = words(page)
    assert '<section id="choice"' in page
    assert "k = 4: &lt;why&gt;." in text
    assert "knee (in effect) 4" in text
    assert "threshold 9" in text
    assert "Within noise (\u00b1): layers 21, 3." in text
    assert "12, 17, 20, 21 and 3, 12, 17, 20 are chosen; Jaccard index 0.60, Kendall's tau of the deltas 0.88" in text
    write_choice(run_dir, rules={"knee": 9, "budget": 4})
    assert "budget (in effect) 4" in words(page_of(run_dir)), "the limit decided, not the rule"
    write_choice(run_dir, rule=None)
    assert "(in effect)" not in words(page_of(run_dir)), "k was given"


def test_the_page_gives_no_reason_that_does_not_hold_for_the_choice(tmp_path: Path) -> None:
    because = "a layer that matters little costs least"
    write_importance(tmp_path)
    write_choice(tmp_path)
    text = words(page_of(tmp_path))
    assert because in text and "Layers 12, 17, 20, 21 matter least" in text
    write_choice(tmp_path, choose="highest")
    text = words(page_of(tmp_path))
    assert because not in text and "Layers 12, 17, 20, 21 are chosen." in text
    write_choice(tmp_path, choose="lowest")
    (tmp_path / "expanded").mkdir()
    copies = {"source_layers": 30, "copies": [{"source": 3, "index": 4}], "zeroed": []}
    (tmp_path / "expanded/expansion.json").write_text(json.dumps(copies))
    text = words(page_of(tmp_path))
    assert because not in text and "The copies are other layers: 3. What stands here" in text


def test_the_page_compares_methods_of_probing(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    write_methods(run_dir)
    page = page_of(run_dir)
    assert "<svg" in page.split('<section id="methods"')[1].split("</section>")[0]
    assert "fisher 0.81 12, 17, 20, 21 7.5 s" in words(page)


def test_a_probe_without_choice_or_methods_has_no_such_sections(page: str) -> None:
    assert '<section id="choice"' not in page
    assert '<section id="methods"' not in page


@pytest.mark.parametrize(
    "selection", [{}, {"rules": None}, {"within_noise": None}, {"rules": {"elbow": 3}}, {"reason": None}]
)
def test_a_choice_that_lacks_something_costs_only_that(tmp_path: Path, selection: dict[str, Any]) -> None:
    run_dir = make_run(tmp_path / "run")
    record = json.loads((run_dir / "layer_importance.json").read_text()) | {"stability": {"against": "moon"}}
    record["selection"] = {"k": 4} | selection
    (run_dir / "layer_importance.json").write_text(json.dumps(record))
    (run_dir / "layer_methods.json").write_text(json.dumps({"methods": {"mask": {}, "taylor": {"deltas": [1.0]}}}))
    assert figures(page_of(run_dir))["layers"]


@pytest.mark.parametrize(("method", "unit"), [("mask", True), ("taylor", True), ("gradient", False)])
def test_scores_that_are_no_nats_have_no_loss_beside_them(tmp_path: Path, method: str, unit: bool) -> None:
    run_dir = make_run(tmp_path / "run")
    path = run_dir / "layer_importance.json"
    record = json.loads(path.read_text()) | {"method": method}
    for layer in record["layers"]:
        layer["loss"] = layer["loss"] if unit else None
    path.write_text(json.dumps(record))
    row = re.search(r"<td>0</td>\s*<td>(.*?)</td>", page_of(run_dir))
    assert row is not None
    assert (row[1] != "") == unit
