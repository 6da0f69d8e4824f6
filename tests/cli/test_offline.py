"""After installation nothing touches the network, although nobody forbids it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.workspace import Workspace

GUARD = """
import os, sys
NAMES = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}
NAMES |= {"socket.getaddrinfo": 0, "socket.gethostbyname": 0}
open(os.environ["GUARD_RECORD"] + f".{os.getpid()}.guarded", "w").close()

def guard(event, arguments):
    if event not in NAMES:
        return
    address = arguments[NAMES[event]]
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode() if isinstance(host, bytes) else host
    if host in ("", "::1", "localhost") or not isinstance(host, str) or host.startswith("127."):
        return
    if host[0] in "/\\0":  # a socket in the file system, or one of this host that has a name there
        return
    with open(os.environ["GUARD_RECORD"], "a") as file:
        file.write(f"{event} {host}\\n")
    raise OSError(f"the network is forbidden: {event} {host}")

sys.addaudithook(guard)
"""
"""`sitecustomize`: every Python below has it, children of children too. What is forbidden is recorded as well, since
libraries go on without a network, and must not even try."""

DECIDES = re.compile("OFFLINE|^HF_|_proxy$", re.IGNORECASE)
"""Variables by which a user forbids the network, or sends what goes there to an address of this host."""


def guarded(program: list[str], tmp_path: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], str]:
    """`python PROGRAM ARGUMENTS` in a process that may use the network as far as its environment says; and what it
    tried there."""
    site, record = tmp_path / "site", tmp_path / "record"
    site.mkdir()
    (site / "sitecustomize.py").write_text(GUARD)
    environment = {key: value for key, value in os.environ.items() if not DECIDES.search(key)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH")]))
    environment |= {"GUARD_RECORD": str(record), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert list(tmp_path.glob("record.*.guarded")), "nothing was watched"
    return result, record.read_text() if record.exists() else ""


def test_a_whole_run_does_not_touch_the_network(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(tmp_path / "run", train={"steps": 2}, probe={"method": "taylor"})
    result, tried = guarded(["-m", "adept_ds"], tmp_path, "run", config)
    assert (result.returncode, tried) == (0, ""), result.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_probe_of_a_model_does_not_touch_the_network(workspace: Workspace, tmp_path: Path) -> None:
    arguments = ["probe", workspace.model, "--corpus", workspace.root / "general.jsonl", "--sequences", "4"]
    result, tried = guarded(["-m", "adept_ds"], tmp_path, *arguments, "--seq-len", "24", "--json")
    assert (result.returncode, tried) == (0, ""), result.stderr


@pytest.mark.parametrize(
    ("attempt", "seen"),
    [
        ("import urllib.request as u; u.urlopen('http://a.invalid', timeout=1)", "getaddrinfo a.invalid"),
        ("import socket; socket.socket().connect(('192.0.2.1', 80))", "socket.connect 192.0.2.1"),
        ("import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))", "sendto 192.0.2.1"),
        ("import huggingface_hub as hub; hub.HfApi().model_info('gpt2')", "getaddrinfo huggingface.co"),
        ("import subprocess as s, sys; s.run([sys.executable, '-c', {!r}])", "socket.connect 192.0.2.1"),
    ],
)
def test_these_tests_would_see_it(attempt: str, seen: str, tmp_path: Path) -> None:
    """Also where the error is swallowed, and in a child."""
    attempt = attempt.format("import socket; socket.socket().connect(('192.0.2.1', 80))")
    program = f"try:\n    {attempt}\nexcept Exception as error:\n    print(error)\n"
    result, tried = guarded(["-c", program], tmp_path)
    assert result.returncode == 0, result.stderr
    assert seen in tried


def test_these_tests_let_a_process_talk_to_its_own_host(tmp_path: Path) -> None:
    program = """
import socket
with socket.socket() as server, socket.socket() as client:
    server.bind(("localhost", 0))
    server.listen()
    client.connect(("127.0.0.1", server.getsockname()[1]))
"""
    result, tried = guarded(["-c", program], tmp_path)
    assert (result.returncode, tried) == (0, ""), result.stderr
