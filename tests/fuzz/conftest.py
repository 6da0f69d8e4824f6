"""What is mutated: small valid inputs of every kind, made once; and the table of what became of the mutations."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.fuzzing import Sandbox
from harness.workspace import Workspace


@pytest.fixture(scope="module")
def sandbox(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """With a model, corpora and the configuration of a run on them."""
    sandbox = Sandbox.make(tmp_path_factory.mktemp("sandbox"))
    shutil.copytree(workspace.root, sandbox.inputs, dirs_exist_ok=True)
    return sandbox
