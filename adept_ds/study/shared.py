"""What runs of a study need alike, made by whichever came first: tokens, what the probe found, losses of the base.

Every run makes these by its own stages and records, with content, what they were made of. What a run has made is
linked into `shared/`, and from there into the directories of cells that begin later, with the entries of its ledger;
so their stages find themselves unchanged, or, where anything is different after all, do their work again.

    shared/tokens/<name of the tokens>/     as cache/tokens of a run
    shared/<work>/<key>/                    files of a run, and those entries of stages.json that are about them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adept_ds.base.digests import json_digest
from adept_ds.base.errors import InputError
from adept_ds.base.files import link_file, new_directory, read_json, write_bytes, write_json
from adept_ds.base.run_dir import RunDirectory
from adept_ds.probing.places import PlaceScores
from adept_ds.probing.scores import LayerScores

_READ = ("format", "text_key", "question_template", "max_bad_records", "bos", "special_tokens_in_text", "packing")
"""Keys of `data` that decide which tokens texts become."""

Inputs = Mapping[str, Any]
"""Of a cell; see `cells.inputs_of`."""


@dataclass(frozen=True)
class _Work:
    """Something that a run makes and another may take over."""

    name: str
    stages: tuple[str, ...]
    """Entries of the ledger."""
    files: Callable[[RunDirectory], tuple[Path, ...]]
    """The first is always made, the others perhaps."""
    made_of: Callable[[Inputs], Any]
    """What can make a difference, or more than that: it only says where to look, the ledger decides."""
    needed: Callable[[Inputs], bool] = lambda inputs: True


def _tokenised(inputs: Inputs) -> list[Any]:
    return [inputs["model"], [inputs["data"][key] for key in _READ], inputs["train"]["precision"]]


def _tasks(inputs: Inputs) -> list[Any]:
    return [inputs["eval"][key] for key in ("tasks", "lm_eval")]


def _by_gain(inputs: Inputs) -> bool:
    return bool(inputs.get("expand", {}).get("choose") == "gain")


_PROBE = _Work(
    "probe",
    ("probe", "probe_corpus", "probe_model"),
    lambda run: (run.layer_scores(), run.layer_scores("corpus"), run.layer_scores("model")),
    lambda inputs: [*_tokenised(inputs), inputs["probe"]],
    needed=lambda inputs: "corpus" in inputs["probe"] and not _by_gain(inputs),
)
_PLACES = _Work(
    "places",
    ("places",),
    lambda run: (run.place_scores,),
    lambda inputs: [*_tokenised(inputs), inputs["probe"], inputs["data"]["domain"]],
    needed=_by_gain,
)
_BASE_LOSSES = _Work(
    "base",
    ("eval_base",),
    lambda run: (run.base_evaluation, run.base_document_losses),
    lambda inputs: [
        *_tokenised(inputs),
        [inputs["data"][key] for key in ("general_eval", "domain_eval", "eval_sequences", "seq_len")],
    ],
)
_BASE_SCORES = _Work(
    "base_tasks",
    ("tasks_base",),
    lambda run: (run.base_task_scores,),
    lambda inputs: [*_tokenised(inputs), _tasks(inputs)],
    needed=lambda inputs: any(_tasks(inputs)),
)
_WORKS = (_PROBE, _PLACES, _BASE_LOSSES, _BASE_SCORES)


@dataclass(frozen=True)
class SharedWork:
    """The directory `shared/` of a study."""

    root: Path

    def take_over(self, run: RunDirectory, inputs: Inputs) -> None:
        """Link into a fresh run directory what others have made."""
        _link_folders(self._tokens, run.tokens)
        if self._digests.is_file():
            write_bytes(run.digests, self._digests.read_bytes())
        entries = dict[str, Any]()
        for work in _WORKS:
            place = self._place(work, inputs)
            if place.is_dir():
                for file in work.files(run):
                    if (place / file.name).is_file():
                        link_file(place / file.name, file)
                entries |= read_json(place / run.ledger.name)
        if entries:
            write_json(run.ledger, entries)

    def keep(self, run: RunDirectory, inputs: Inputs) -> None:
        """Link what a run has made into `shared/`, unless it is there."""
        _link_folders(run.tokens, self._tokens)
        if run.digests.is_file():
            write_bytes(self._digests, run.digests.read_bytes())
        ledger = read_json(run.ledger) if run.ledger.is_file() else {}
        for work in _WORKS:
            place, files = self._place(work, inputs), work.files(run)
            entries = {name: ledger[name] for name in work.stages if name in ledger}
            if files[0].is_file() and work.stages[0] in entries:
                _make(place, partial(_fill, files=files, ledger=run.ledger.name, entries=entries))

    def has(self, inputs: Inputs) -> bool:
        """Whether nothing of what this cell shares is left to be made."""
        return all(self._place(work, inputs).is_dir() for work in _WORKS if work.needed(inputs))

    def key(self, inputs: Inputs) -> str:
        """The same for cells that share all of it."""
        return json_digest([work.made_of(inputs) for work in _WORKS])

    def _place(self, work: _Work, inputs: Inputs) -> Path:
        return self.root / work.name / json_digest(work.made_of(inputs))[:12]

    @property
    def _tokens(self) -> Path:
        return self.root / "tokens"

    @property
    def _digests(self) -> Path:
        return self.root / "digests.json"


def probe_seconds(run: RunDirectory) -> float:
    """That the passes took which chose this run's layers, whichever run made them; 0 without any."""
    if run.place_scores.is_file():
        return PlaceScores.load(run.place_scores).seconds
    scores = run.layer_scores()
    return LayerScores.load(scores).seconds if scores.is_file() else 0.0


def _make(place: Path, fill: Callable[[Path], None]) -> None:
    """A new folder; one that is there, or that another process was faster with, stays as it is."""
    if place.exists():
        return
    try:
        with new_directory(place) as fresh:
            fill(fresh)
    except InputError:
        if not place.is_dir():
            raise


def _link_folders(source: Path, target: Path) -> None:
    """Each folder of `source` that is not in `target` yet, file by file."""
    for folder in _whole_folders(source):
        _make(target / folder.name, partial(_fill, files=tuple(folder.iterdir())))


def _fill(folder: Path, files: Sequence[Path], ledger: str = "", entries: Mapping[str, Any] | None = None) -> None:
    for file in files:
        if file.is_file():
            link_file(file, folder / file.name)
    if entries is not None:
        write_json(folder / ledger, entries)


def _whole_folders(place: Path) -> Iterator[Path]:
    """Without those that are still being filled."""
    if place.is_dir():
        yield from (folder for folder in sorted(place.iterdir()) if folder.is_dir() and not folder.name.startswith("."))
