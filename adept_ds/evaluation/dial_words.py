"""What the dial's figures say, in a sentence each: why a position was chosen, and what may be said of general text."""

from __future__ import annotations

from adept_ds.base.dial_record import DialPosition, DialRecord, label_of


def reason_of(record: DialRecord) -> str:
    """By validation documents."""
    keeping = [position for position in record.positions if position.keeps]
    promise = f"every general source within {_nats(record)} of the base, at {_percent(record)} confidence"
    if set(record.chosen) == {0.0}:
        others = len(keeping) - 1
        if not others:
            return f"nothing but 0 keeps {promise}: this is the base's own function ({len(record.positions)} tried)"
        return f"of {others} other positions that keep {promise}, none has a lower domain loss than the base"
    change = record.position.validation.domain
    reason = (
        f"lowest domain loss ({change.loss:.4f}, {change.rise:+.4f} against the base) of {len(keeping)} positions, of "
        f"{len(record.positions)} tried, that keep {promise}"
    )
    return reason + _beside_common(record, keeping)


def _beside_common(record: DialRecord, keeping: list[DialPosition]) -> str:
    """What turning copies by themselves was good for, where that was tried."""
    common = min((at for at in keeping if at.tried_as == "common"), key=lambda at: at.validation.domain.loss)
    if all(at.tried_as == "common" for at in record.positions):
        return ""
    if record.position.tried_as == "common":
        return "; none with copies turned by themselves was better"
    gain = common.validation.domain.loss - record.position.validation.domain.loss
    return f"; {gain:.4f} lower than with all copies at {label_of(common.alphas)}"


def promise_of(record: DialRecord) -> str:
    """Of the chosen position, by test documents: of several sources, that with the highest limit, or where the promise
    is broken, that with the highest rise."""
    if set(record.chosen) == {0.0}:
        return "general text: the base's own function, since no position above 0 was chosen"
    test = record.position.test
    worst = test.worst
    few = "no worse than the base" if record.max_general_rise == 0 else f"at most {_nats(record)} worse than the base"
    if test.keeps(record.max_general_rise):
        kept = few
    elif all(source.rise <= record.max_general_rise for source in test.general.values()):
        kept = f"not shown to be {few} on test documents"
    else:
        kept = "worse than promised on test documents"
        worst = max(test.general, key=lambda source: test.general[source].rise)
    found = test.general[worst]
    figures = f"rise {found.rise:+.3f}, {_percent(record)} limit {found.limit:+.3f}"
    source = f" of {len(test.general)} sources, in '{worst}' most" if len(test.general) > 1 else ""
    return f"general text: {kept} ({figures}{source})"


def _nats(record: DialRecord) -> str:
    return f"{record.max_general_rise:g} nats"


def _percent(record: DialRecord) -> str:
    return f"{100 * record.confidence:g}%"
