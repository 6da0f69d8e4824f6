"""The stages of a run. A stage reads files and writes files; it is not run again while its inputs are the same.

probe -> layer_importance.json -> expand -> expanded/ -> train -> checkpoints/ -> export -> export/
-> eval -> evaluation.json -> report -> report.html
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adept_ds import __version__
from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, read_json_lines, stamp_files, write_json, write_text
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.terminal import Terminal
from adept_ds.config.deepspeed import check_deepspeed_config
from adept_ds.config.loading import dump_config
from adept_ds.config.schema import Config, CorpusSource, Stability, corpus_sources
from adept_ds.data.blocks import Blocks, TrainingData
from adept_ds.data.mixture import Mixture
from adept_ds.data.packing import build_blocks
from adept_ds.models.device import peak_memory_bytes, resolve_precision
from adept_ds.models.directory import layer_count, resolve_model_dir
from adept_ds.models.families import Family
from adept_ds.models.flops import count_step_flops, measure_matmul_rate
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.probing.estimators import METHODS, Probe, score_layers
from adept_ds.probing.result import Beside, LayerImportance, check_halves, judge, select
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.selection import layers_without_probe
from adept_ds.probing.stability import Agreement, rank_correlations
from adept_ds.probing.sweep import PassProgress
from adept_ds.ranks.collectives import gather_objects, on_main_rank, world_size
from adept_ds.ranks.stopping import StopRequest
from adept_ds.training.checkpoint import Manifest, check_resumable, checkpoint_steps, expected_manifest, tag_of
from adept_ds.training.evaluation import EvalSet, evaluate
from adept_ds.training.movement import UnitMovement
from adept_ds.training.trainer import Trainer
from adept_ds.units.importance import OnlineImportance, estimate_importance
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import ProbeBatches
from adept_ds.weights.expansion import Expansion, expand_checkpoint
from adept_ds.weights.export import export_checkpoint
from adept_ds.weights.hf_directory import weight_files
from adept_ds.zero.build import build_forward_engine, build_training_engine
from adept_ds.zero.engine import count_parameters, release

_NOT_PART_OF_TRAINING = {
    "micro_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "activation_checkpointing",
    "keep_gathered_gib",
}
"""Keys of the train section that change how a run is done, but not what comes out."""


@dataclass(frozen=True)
class Run:
    """A configuration, its resolved inputs and the terminal: what every stage needs."""

    config: Config
    model_dir: Path
    family: Family
    terminal: Terminal
    stop: StopRequest

    @property
    def directory(self) -> Path:
        return self.config.run_dir

    @property
    def expanded_dir(self) -> Path:
        return self.directory / "expanded"

    @property
    def checkpoints_dir(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def export_dir(self) -> Path:
        return self.directory / "export"

    @cached_property
    def domain_blocks(self) -> Blocks:
        needed = self.config.train.global_batch_size - self.config.replayed
        return self._training_blocks("data.domain", self.config.data.domain, needed)

    @cached_property
    def replay_blocks(self) -> Blocks | None:
        files = self.config.data.replay
        return self._training_blocks("data.replay", files, self.config.replayed) if files else None

    @property
    def training_data(self) -> TrainingData:
        return TrainingData(self.domain_blocks, self.replay_blocks, self.config.replayed)

    @property
    def importance_corpus(self) -> Mixture:
        """General text that importances are estimated on in passes of their own."""
        online = self.config.importance.source == "online"
        return Mixture.of([self.replay_blocks]) if online and self.replay_blocks else self.probe_corpus

    @cached_property
    def probe_corpus(self) -> Mixture:
        return self.mixture("probe.corpus", self.config.probe.corpus)

    @cached_property
    def eval_sets(self) -> list[EvalSet]:
        data = self.config.data
        corpora = {"general": data.general_eval, "domain": data.domain_eval}
        return [
            EvalSet(name, self._blocks(f"data.{name}_eval", files, data.seq_len, keep_tail=True), data.eval_blocks)
            for name, files in corpora.items()
            if files
        ]

    def mixture(self, key: str, entries: Sequence[Path | CorpusSource]) -> Mixture:
        """A corpus in blocks for probing."""
        sources = corpus_sources(entries)
        parts = [self._blocks(key, source.files, self.config.probe.seq_len, keep_tail=True) for source in sources]
        return Mixture.of(parts, [source.weight for source in sources], [source.title for source in sources])

    @contextmanager
    def progress(self, doing: str, *, together: bool = True) -> Iterator[ProgressCallback]:
        """A bar for a stage that can be stopped between its steps (see `StopRequest.checked`)."""
        with self.terminal.progress(doing) as bar:
            yield self.stop.checked(doing, bar, together=together)

    def is_current(self, stage: str, key: Any, output: Path) -> bool:
        """Whether `output` was made by `stage` from these very inputs. Rank 0 decides for all."""

        def decide() -> bool:
            record = self._stages_file()
            stages = read_json(record) if record.is_file() else {}
            return output.exists() and stages.get(stage) == _plain(key)

        return on_main_rank(decide)

    def mark_done(self, stage: str, key: Any) -> None:
        def write() -> None:
            record = self._stages_file()
            stages = read_json(record) if record.is_file() else {}
            write_json(record, stages | {stage: _plain(key)})

        on_main_rank(write)

    def _stages_file(self) -> Path:
        return self.directory / "stages.json"

    def _training_blocks(self, key: str, files: Sequence[Path], needed: int) -> Blocks:
        blocks = self._blocks(key, files, self.config.data.seq_len, keep_tail=False)
        if len(blocks) < needed:
            raise InputError(
                f"{key}: {len(blocks)} blocks of {self.config.data.seq_len} tokens cannot feed batches of "
                f"train.global_batch_size {self.config.train.global_batch_size}, {needed} of them from here; "
                "add text, or lower train.global_batch_size or data.seq_len"
            )
        return blocks

    def _blocks(self, key: str, files: Sequence[Path], seq_len: int, *, keep_tail: bool) -> Blocks:
        cache = self.directory / "cache" / "blocks"
        with self.progress(f"packing {key}", together=False) as bar:
            return build_blocks(
                key,
                files,
                self.model_dir,
                seq_len,
                cache,
                keep_tail=keep_tail,
                question_template=self.config.data.question_template,
                progress=bar,
            )


def run_all(run: Run) -> None:
    """probe -> expand -> train -> export -> eval -> report; inputs are packed first, where most mistakes show."""
    resolve_precision(run.config)  # refuses what the device cannot, before anything takes time
    on_main_rank(lambda: write_text(run.directory / "config.yaml", dump_config(run.config)))
    prepare_data(run)
    if run.config.expand.needs_probe:
        probe_stage(run)
    expand_stage(run)
    train_stage(run)
    export_stage(run)
    eval_stage(run)
    report_stage(run)


def prepare_data(run: Run) -> None:
    """Tokenise and pack every corpus of the run."""
    corpora = {"domain": len(run.domain_blocks)} | ({"replay": len(run.replay_blocks)} if run.replay_blocks else {})
    corpora |= {s.name + " held out": len(s.indices) for s in run.eval_sets}
    if run.config.probe.corpus:
        corpora["general probe"] = len(run.probe_corpus.blocks)
    run.terminal.stage("data", ", ".join(f"{name} {count}" for name, count in corpora.items()) + " blocks")


def probe_stage(run: Run) -> LayerImportance:
    """Estimate the importance of every layer, and choose which are copied."""
    section = run.config.probe
    probe = _probe(run)
    if section.stability == "halves":
        check_halves(probe)
    scores = _layer_scores(run, "probe", probe, section.corpus)
    beside = _scores_beside(run, probe) if isinstance(section.stability, Stability) else None
    result = on_main_rank(lambda: judge(probe, scores, beside))
    on_main_rank(lambda: write_json(run.directory / "layer_importance.json", result.to_json()))
    selection = result.selection or {}
    what = "least important" if selection["choose"] == "lowest" else "chosen"
    run.terminal.stage("probe", f"base loss {result.base_loss:.4f}, {what} layers {list(result.selected)}")
    if selection["rule"] is not None:
        run.terminal.stage("probe", selection["reason"])
    if result.stability is not None:
        run.terminal.stage("probe", Agreement(**result.stability).sentence())
    return result


def compare_methods(run: Run, result: LayerImportance) -> dict[str, Any]:
    """All methods on the text of the probe (layer_methods.json), beside `result`, what `probe_stage` has just found."""
    probe, methods = _probe(run), {}
    for method in METHODS:
        if method == result.method:
            scores = on_main_rank(lambda: LayerScores.load(run.directory / "layer_scores.safetensors"))
        else:
            scores = _pass(run, probe, method)
        methods[method] = {"deltas": scores.deltas, "selected": select(probe, scores.deltas), "seconds": scores.seconds}
    found = {"methods": methods, "spearman": rank_correlations(methods)}
    on_main_rank(lambda: write_json(run.directory / "layer_methods.json", found))
    return found


def _probe(run: Run) -> Probe:
    sample = run.probe_corpus.sample(run.config.probe.sequences, run.config.train.seed)
    return Probe(run.config, run.model_dir, run.family, sample)


def _scores_beside(run: Run, probe: Probe) -> Beside:
    """Those of another corpus or model."""
    section = run.config.probe
    assert isinstance(section.stability, Stability)
    if section.stability.corpus is not None:
        corpus = run.mixture("probe.stability.corpus", section.stability.corpus)
        sample = corpus.sample(section.sequences, run.config.train.seed)
        scores = _layer_scores(run, "probe_corpus", replace(probe, sample=sample), section.stability.corpus)
        return Beside("corpus", ", ".join(sample.names), scores)
    model = str(section.stability.model)
    other = replace(probe, model_dir=resolve_model_dir("probe.stability.model", model))
    return Beside("model", model, _layer_scores(run, "probe_model", other, section.corpus))


def _layer_scores(run: Run, stage: str, probe: Probe, corpus: Sequence[Path | CorpusSource]) -> LayerScores:
    """From the file, if it was made from these very inputs; another k then needs no second probe."""
    config, section = run.config, run.config.probe
    output = run.directory / f"{stage.replace('probe', 'layer_scores')}.safetensors"
    keys = {"method", "sequences", "seq_len"}
    if section.method in ("gradient", "fisher"):
        keys.add("gradient_batch_sequences")
    key = {
        "models": [_model_key(run.model_dir), _model_key(probe.model_dir)],  # tokenised for one, probed by the other
        "probe": section.model_dump(mode="json", include=keys),
        "corpus": _mixture_key(corpus),
        "template": config.data.question_template,
        "seed": config.train.seed,
        "precision": config.train.precision,
    }
    if run.is_current(stage, key, output):
        run.terminal.stage("probe", "[dim]unchanged, not run again[/]")
        return on_main_rank(lambda: LayerScores.load(output))
    scores = _pass(run, probe, section.method)
    on_main_rank(lambda: scores.save(output))
    run.mark_done(stage, key)
    return scores


def _pass(run: Run, probe: Probe, method: str) -> LayerScores:
    with run.terminal.progress(f"probing, {method}") as bar:
        progress = PassProgress(probe.num_layers, run.stop.checked("probing", bar, together=True), bar)
        return score_layers(probe, method, progress)


def expand_stage(run: Run) -> Expansion:
    """Insert the identity copies."""
    selected = on_main_rank(lambda: _selected_layers(run))
    key = _expansion_key(run, selected)
    if run.is_current("expand", key, run.expanded_dir):
        run.terminal.stage("expand", "[dim]unchanged, not run again[/]")
        return on_main_rank(lambda: Expansion.load(run.expanded_dir))
    if on_main_rank(lambda: checkpoint_steps(run.checkpoints_dir)):
        raise InputError(
            f"'{run.checkpoints_dir}' was trained from another expansion; choose another run_dir or delete it"
        )
    with run.progress("expanding", together=False) as bar:
        expansion = on_main_rank(lambda: expand_checkpoint(run.model_dir, run.expanded_dir, selected, bar))
    run.mark_done("expand", key)
    run.terminal.stage("expand", f"{expansion.source_layers} + {len(expansion.copies)} layers in {run.expanded_dir}")
    return expansion


def _expansion_key(run: Run, selected: Sequence[int]) -> dict[str, Any]:
    return {"model": _model_key(run.model_dir), "layers": sorted(selected)}


def _selected_layers(run: Run) -> list[int]:
    config = run.config
    if not config.expand.needs_probe:
        return layers_without_probe(config.expand, layer_count(run.model_dir), config.train.seed)
    path = run.directory / "layer_importance.json"
    if not path.is_file():
        raise InputError(f"expand: '{path}' does not exist; run `adept probe CONFIG` first, or set expand.layers")
    return list(LayerImportance.load(path).selected)


def training_settings(config: Config) -> dict[str, Any]:
    """Everything that determines the course of training, by dotted key: a resumed run must have the same."""
    sections = {
        "train": config.train.model_dump(mode="json", exclude=_NOT_PART_OF_TRAINING),
        "importance": config.importance.model_dump(mode="json", exclude={"prefix_cache_mib"}),
        "lr_policy": config.lr_policy.model_dump(mode="json"),
    }
    settings = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    settings["data.seq_len"] = config.data.seq_len
    settings["data.domain"] = _corpus_key(config.data.domain)
    settings["data.replay"] = _corpus_key(config.data.replay)
    settings["data.replay_share"] = config.data.replay_share if config.data.replay else None
    settings["data.question_template"] = config.data.question_template
    settings["probe.corpus"] = _mixture_key(config.probe.corpus)
    return _plain(settings)


def train_stage(run: Run) -> None:
    """Train the copies, from the newest checkpoint if there is one."""
    config, expansion = run.config, on_main_rank(lambda: Expansion.load(run.expanded_dir))
    selected = on_main_rank(lambda: _selected_layers(run))
    if not run.is_current("expand", _expansion_key(run, selected), run.expanded_dir):
        raise InputError(f"'{run.expanded_dir}' was made from another model or other layers; run `adept expand` first")
    stage = int(check_deepspeed_config(config)["zero_optimization"]["stage"])
    settings = training_settings(config)

    def manifest_at(step: int) -> Manifest:
        return expected_manifest(step, stage, expansion.fingerprint, settings)

    def newest_checkpoint() -> int:
        newest = max(checkpoint_steps(run.checkpoints_dir), default=0)
        if newest:
            check_resumable(run.checkpoints_dir, manifest_at(newest))
        return newest

    first_step = on_main_rank(newest_checkpoint)
    if first_step == config.train.steps:
        on_main_rank(lambda: _complete_summary(run.directory))
        run.terminal.stage("train", "[dim]finished before, not run again[/]")
        return
    if first_step:
        run.terminal.stage("train", f"resuming after step {first_step}")
    importance = _initial_importance(run, expansion) if first_step == 0 else None
    _train(run, expansion, manifest_at, first_step, importance)


def _probe_batches(run: Run) -> ProbeBatches:
    section, corpus = run.config.importance, run.importance_corpus
    return ProbeBatches(
        corpus.blocks,
        corpus.sample(section.sequences, run.config.train.seed).indices,
        section.batch_sequences,
        run.config.train.micro_batch_size,
    )


def _frozen_prefix(run: Run, engine: Any, probe: ProbeBatches, lowest: int) -> FrozenPrefix:
    bytes_per_token = engine.module.config.hidden_size * resolve_precision(run.config).itemsize
    room = run.config.importance.prefix_cache_mib << 20
    return FrozenPrefix(run.family.layer_modules(engine.module), lowest, probe.batches_within(room, bytes_per_token))


def _initial_importance(run: Run, expansion: Expansion) -> list[float] | None:
    """Importance of each copy's *source* layer: in a fresh copy the zeroed projections hide everything behind them.

    The source model computes the same function as the expanded one, so the same estimate runs on it, with the
    source layers unfrozen and nothing trained.
    """
    if run.config.lr_policy.map == "constant" or run.config.importance.initial == "ones":
        return None
    run.terminal.stage("train", "importance of the source layers' units")
    engine, _, registry = build_training_engine(
        run.config, run.model_dir, run.family, expansion.source_indices, plain_sgd=True
    )
    with run.progress("estimating importance") as bar:
        importance = estimate_importance(engine, registry, _probe_batches(run), bar)
    release(engine)
    return importance


def _train(
    run: Run,
    expansion: Expansion,
    manifest_at: Callable[[int], Manifest],
    first_step: int,
    importance: list[float] | None,
) -> None:
    config = run.config
    engine, optimizer, registry = build_training_engine(config, run.expanded_dir, run.family, expansion.copy_indices)
    trainable, total = count_parameters(engine.module)
    run.terminal.stage("train", f"{trainable / 1e6:.1f} M of {total / 1e6:.1f} M parameters, {len(registry)} units")
    refreshed, online = config.lr_policy.map != "constant", config.importance.source == "online"
    probe = _probe_batches(run) if refreshed and not online else None
    trainer = Trainer(
        config=config,
        engine=engine,
        optimizer=optimizer,
        unit_lr=UnitLR(engine, registry, config.lr_policy),
        data=run.training_data,
        probe=probe,
        prefix=_frozen_prefix(run, engine, probe, min(expansion.copy_indices)) if probe else None,
        online=OnlineImportance(engine, registry) if refreshed and online else None,
        movement=UnitMovement(engine, registry, run.expanded_dir, resolve_precision(config)),
        eval_sets=run.eval_sets,
        manifest_at=manifest_at,
        flops=count_step_flops(engine.module, run.family, config.data.seq_len),
        matmul_rate=measure_matmul_rate(engine.device, resolve_precision(config)),
        terminal=run.terminal,
        stop=run.stop,
    )
    facts = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "units": len(registry),
        "world_size": world_size(),
        "zero_stage": manifest_at(0).zero_stage,
        "precision": str(resolve_precision(config)).removeprefix("torch."),
        "adept_ds": __version__,
    }
    on_main_rank(lambda: write_json(run.directory / "summary.json", facts))
    trainer.run(first_step, importance, dump_config(config))
    peaks = gather_objects(peak_memory_bytes())
    on_main_rank(lambda: _complete_summary(run.directory, peak_memory_bytes=peaks))
    release(engine)


def _complete_summary(run_dir: Path, **facts: Any) -> None:
    """Add what is known only at the end to what was written at the start of training."""
    path = run_dir / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    write_json(path, summary | facts | _totals(run_dir))


def _totals(run_dir: Path) -> dict[str, Any]:
    """Sums over the whole run, interruptions included, from what it wrote about itself."""
    records = read_json_lines(run_dir / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    refreshes = [record["refresh_seconds"] for record in records if record.get("refresh_seconds")]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "seconds": sum(record["seconds"] for record in steps),
        "step_seconds": statistics.median(record["seconds"] for record in steps),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steps),
        "mfu": statistics.median(record["mfu"] for record in steps),
        "refreshes": len(refreshes),
        "refresh_seconds": statistics.median(refreshes) if refreshes else None,
    }


def export_stage(run: Run, step: int | None = None) -> None:
    """Write the adapted model as a Hugging Face directory, from the newest checkpoint or from `step`."""
    steps = checkpoint_steps(run.checkpoints_dir)
    if not steps or (step is not None and step not in steps):
        wanted = "any" if step is None else f"step {step}"
        raise InputError(f"'{run.checkpoints_dir}' has not {wanted} checkpoint ({steps}); run `adept train` first")
    step = steps[-1] if step is None else step
    checkpoint = run.checkpoints_dir / tag_of(step)
    key = {"checkpoint": stamp_files([checkpoint / "manifest.json"]), "dtype": run.config.export.dtype}
    if run.is_current("export", key, run.export_dir):
        run.terminal.stage("export", "[dim]unchanged, not run again[/]")
        return
    dtype = run.config.export.dtype
    with run.progress("exporting", together=False) as bar:
        trained = on_main_rank(lambda: export_checkpoint(run.expanded_dir, checkpoint, run.export_dir, dtype, bar))
    run.mark_done("export", key)
    run.terminal.stage("export", f"{trained} trained tensors of step {step} in {run.export_dir}")


def eval_stage(run: Run) -> dict[str, Any]:
    """Held-out losses of the base model and of the exported one, each loaded from disk as a user would."""
    output = run.directory / "evaluation.json"
    if not run.eval_sets:
        run.terminal.stage("eval", "[dim]no held-out corpora (data.general_eval, data.domain_eval)[/]")
        return {}
    if not run.export_dir.is_dir():
        raise InputError(f"eval: '{run.export_dir}' does not exist; run `adept export CONFIG` first")
    models = {"base": run.model_dir, "adapted": run.export_dir}
    data = run.config.data
    corpora = [_corpus_key(files) for files in (data.general_eval, data.domain_eval)]
    key = {
        "models": [_model_key(path) for path in models.values()],
        "corpora": corpora,
        "data": [data.seq_len, data.eval_blocks, data.question_template, run.config.train.precision],
    }
    if run.is_current("eval", key, output):
        run.terminal.stage("eval", "[dim]unchanged, not run again[/]")
        return dict(read_json(output))
    results = {name: evaluate_model(run, path, f"evaluating {name}") for name, path in models.items()}
    on_main_rank(lambda: write_json(output, results))
    run.mark_done("eval", key)
    return results


def evaluate_model(run: Run, model_dir: Path, title: str) -> dict[str, Any]:
    model, device = build_forward_engine(run.config, model_dir)
    with run.progress(title) as bar:
        results = evaluate(
            model, run.eval_sets, batch_size=run.config.train.micro_batch_size, device=device, progress=bar
        )
    release(model)
    return results


def report_stage(run: Run) -> Path:
    from adept_ds.report.page import write_report

    path = on_main_rank(lambda: write_report(run.directory))
    run.terminal.stage("report", str(path))
    return path


def _model_key(model_dir: Path) -> list[Any]:
    return [str(model_dir.resolve()), stamp_files([*weight_files(model_dir), model_dir / "config.json"])]


def _corpus_key(files: Sequence[Path]) -> list[Any]:
    return [stamp_files([file])[0] for file in files]  # in the given order: packing follows it


def _mixture_key(entries: Sequence[Path | CorpusSource]) -> list[Any]:
    return [[source.weight, *_corpus_key(source.files)] for source in corpus_sources(entries)]


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file, so that both can be compared."""
    return json.loads(json.dumps(value))
