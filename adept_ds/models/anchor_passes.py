"""Forward passes of a model with copies that hold its outputs against those of its base.

The base is the same model with its copies bypassed. Both passes are made by giving modules another `forward` for a
while: a module whose forward passes its input on does nothing, and under ZeRO-3 its weights are not gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from adept_ds.models.bypass import pass_through, replaced_forwards
from adept_ds.models.families import Family
from adept_ds.models.head_divergence import row_divergences
from adept_ds.models.head_loss import IGNORED_LABEL
from adept_ds.models.hidden_states import final_hidden

Kind = Literal["kl", "neutral"]


class AnchorPasses:
    """Within `of_base` and `anchored`, `model(input_ids, labels, positions)` returns something else than losses.

    Args:
        model: made by `load_causal_lm`.
        copies: its layers that are copies, ascending. Everything else is frozen.
        kind: kl, or neutral: how far it is from its base (see `anchored`).
    """

    def __init__(self, model: torch.nn.Module, family: Family, copies: Sequence[int], kind: Kind) -> None:
        layers = family.layer_modules(model)
        self._model: Any = model
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._logit_transform = family.logit_transform(model.config)
        self._kind = kind
        self._copies = [layers[copy] for copy in copies]
        self._below, self._above_lowest = layers[: copies[0]], layers[copies[0] + 1 :]
        self._above_highest = layers[copies[-1] + 1 :]

    @property
    def num_states(self) -> int:
        """How many hidden states of the base `anchored` has to know at each token."""
        return 2 if self._kind == "kl" else 1

    @contextmanager
    def of_base(self) -> Iterator[None]:
        """The model returns what `anchored` has to know: [rows, states, tokens, dim].

        The first state is what enters the lowest copy, the second what enters the head where all copies are bypassed.
        """
        entering: list[torch.Tensor] = []

        def enter(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            entering.append(hidden)
            return hidden

        def forward(
            input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None
        ) -> torch.Tensor:
            final = final_hidden(self._model, input_ids, positions)
            return torch.stack([entering.pop(), final] if self._kind == "kl" else [entering.pop()], dim=1)

        bypassed = self._copies if self._kind == "kl" else self._above_lowest
        replaced: dict[torch.nn.Module, Any] = dict.fromkeys(bypassed, pass_through) | {
            self._copies[0]: enter,
            self._model: forward,
        }
        with replaced_forwards(replaced):
            yield

    @contextmanager
    def anchored(self, known: torch.Tensor) -> Iterator[None]:
        """The model returns the anchor of each row, summed over its predicted tokens: [rows] float32.

        kl: D(base || model), the divergence of the next-token distribution from the base's (see `head_divergence`).
        neutral: the mean over copies of |w|^2 / |h|^2, w = h_out - h being what a copy writes to the stream h; h is a
        constant in the denominator, so that nothing is gained by a longer stream. The first token of a text is left
        out (it is no predicted one): models use it as a place to put attention, and its stream means nothing.

        Args:
            known: of the same rows, as the model returns it within `of_base`.
        """
        entering, *final = known.unbind(1)
        lowest = self._copies[0]
        written: list[torch.Tensor] = []

        def divergences(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            weight, bias = self._head.weight, self._head.bias
            return row_divergences(hidden, final[0], labels, weight, bias, *self._logit_transform)

        def of_copy(copy: torch.nn.Module, counted: torch.Tensor) -> Any:
            compute = copy.forward

            def forward_of_copy(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                hidden = entering if copy is lowest else hidden
                out: torch.Tensor = compute(hidden, *args, **kwargs)
                if self._kind == "neutral":
                    written.append(_share_of_stream(hidden, out, counted))
                return out

            return forward_of_copy

        def forward(
            input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None = None
        ) -> torch.Tensor:
            counted = labels != IGNORED_LABEL
            counted[:, 0] = False
            copies = {copy: of_copy(copy, counted) for copy in self._copies}
            with replaced_forwards(copies | {self._head: divergences}):
                hidden = final_hidden(self._model, input_ids, positions)
                if self._kind == "neutral":
                    return torch.stack(written).mean(0)
                return self._head(hidden, labels)

        idle = [*self._below, *(self._above_highest if self._kind == "neutral" else [])]
        with replaced_forwards(dict.fromkeys(idle, pass_through) | {self._model: forward}):
            yield


def _share_of_stream(before: torch.Tensor, after: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Of each row, the sum over counted tokens of |after - before|^2 / |before|^2; in float32.

    before, after [rows, tokens, dim], counted [rows, tokens] -> [rows]
    """
    before, counted = before.float(), counted.unsqueeze(-1)
    # What does not count becomes 0 beforehand: padding may hold anything.
    write = torch.where(counted, after.float() - before, 0.0)
    stream = torch.where(counted, before.detach(), 1.0).square().sum(-1)
    return (write.square().sum(-1) / stream.clamp_min(torch.finfo(torch.float32).tiny)).sum(-1)
