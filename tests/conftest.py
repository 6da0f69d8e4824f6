"""Fixtures that tests of several packages share."""

from __future__ import annotations

import signal

import pytest
from harness.models import save_tiny_model
from harness.workspace import Workspace, write_corpus

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that has started the tests in the background has them ignore Ctrl-C, and with them whatever they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("workspace")
    save_tiny_model(root / "model")
    for seed, name in enumerate(("general", "general_heldout", "domain", "domain_heldout")):
        write_corpus(root / f"{name}.jsonl", seed)
    return Workspace(root)
