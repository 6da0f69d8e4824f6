"""What the launch scripts promise: arguments, environment, signals and exit codes of local, pdsh and Slurm runs.

What they do on a cluster is tested in `tests/cluster`, on a real one.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.launching import ROOT
from harness.shell_scripts import complaints
from harness.waiting import until

SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.is_file())


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def clean_environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Fake programs first on PATH, and nothing that a launcher or a user of this machine has set."""
    python = write_program(tmp_path / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return {
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "VIRTUAL_ENV": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        **variables,
    }


def run_script(name: str, *arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / name), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def wait_until_exists(path: Path) -> None:
    until(path.exists)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_shellcheck_has_nothing_to_say() -> None:
    assert not complaints(*SCRIPTS)


@pytest.mark.parametrize("name", [script.name for script in SCRIPTS if script.name != "common.sh"])
def test_help_shows_usage_and_an_example(name: str, tmp_path: Path) -> None:
    done = run_script(name, "--help", env=clean_environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(rf"^  .*launch/{re.escape(name)} ", done.stdout, flags=re.MULTILINE)
    assert "config.yaml" in done.stdout
    assert not any(line.startswith(("#", "set ")) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("local.sh", [], "usage"),
        ("local.sh", ["config.yaml", "run"], "NUM_RANKS='config.yaml'"),
        ("local.sh", ["0", "run"], "NUM_RANKS='0'"),
        ("multinode.sh", [], "usage"),
        ("multinode.sh", ["missing", "run"], "hostfile 'missing' does not exist"),
        ("slurm_seeds.sbatch", ["runs/math"], "usage"),
        ("slurm_seeds.sbatch", ["runs/math", "config.yaml"], "no task of an array"),
        ("slurm_stages.sh", ["launch/slurm.sbatch"], "usage"),
        ("slurm_stages.sh", ["--time", "30", "launch/slurm.sbatch", "config.yaml"], "option '--time' has no value"),
        ("slurm_stages.sh", ["missing.sbatch", "config.yaml"], "TEMPLATE 'missing.sbatch' does not exist"),
        ("common.sh", [], "start one of these"),
    ],
)
def test_bad_arguments_are_one_clear_line_and_exit_code_2(
    name: str, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    done = run_script(name, *arguments, env=clean_environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


FAKE_DEEPSPEED = f"""#!{sys.executable}
import json, os, pathlib, sys
record = {{"arguments": sys.argv[1:], "env": dict(os.environ)}}
pathlib.Path(os.environ["RECORD"]).write_text(json.dumps(record))
sys.exit(int(os.environ.get("FAKE_CODE", "0")))
"""


def launch_with_fake_deepspeed(
    name: str, *arguments: str, tmp_path: Path, **variables: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    write_program(tmp_path / "bin" / "deepspeed", FAKE_DEEPSPEED)
    record = tmp_path / "record.json"
    env = clean_environment(tmp_path, RECORD=str(record), **variables)
    done = run_script(name, *arguments, env=env, cwd=tmp_path)
    return done, json.loads(record.read_text()) if record.exists() else {}


def test_local_starts_the_module_on_this_host_only_with_arguments_untouched(tmp_path: Path) -> None:
    done, record = launch_with_fake_deepspeed(
        "local.sh",
        "2",
        "run",
        "my config.yaml",
        "data.domain=[a,b]",
        "x=$HOME*",
        tmp_path=tmp_path,
        MASTER_PORT="12345",
    )
    assert done.returncode == 0, done.stderr
    options, module, arguments = record["arguments"][:-5], record["arguments"][-5], record["arguments"][-4:]
    assert options == [
        *("--hostfile", "/dev/null", "--num_gpus", "2", "--master_port", "12345"),
        *("--log_level", "critical", "--no_local_rank", "--module"),
    ]
    assert module == "adept_ds"
    assert arguments == ["run", "my config.yaml", "data.domain=[a,b]", "x=$HOME*"]


def test_local_hides_a_surrounding_launcher(tmp_path: Path) -> None:
    _, record = launch_with_fake_deepspeed("local.sh", "1000", "run", "c.yaml", tmp_path=tmp_path, RANK="7")
    assert "RANK" not in record["env"]
    assert 1024 <= int(record["arguments"][record["arguments"].index("--master_port") + 1]) <= 65535


def test_local_keeps_what_the_user_has_set(tmp_path: Path) -> None:
    chosen = {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext")}
    _, record = launch_with_fake_deepspeed("local.sh", "2", "run", "c.yaml", tmp_path=tmp_path, **chosen)
    assert {key: record["env"][key] for key in chosen} == chosen


def test_local_uses_the_devices_that_the_user_offers(tmp_path: Path) -> None:
    offered = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "2,5,7"}
    _, record = launch_with_fake_deepspeed("local.sh", "2", "run", "c.yaml", tmp_path=tmp_path, **offered)
    assert record["arguments"][2:4] == ["--include", "localhost:2,5"]
    done, _ = launch_with_fake_deepspeed("local.sh", "4", "run", "c.yaml", tmp_path=tmp_path, **offered)
    assert done.returncode == 2
    assert "CUDA_VISIBLE_DEVICES='2,5,7'" in done.stderr


def test_devices_that_are_hidden_are_not_taken(tmp_path: Path) -> None:
    hidden = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    done, record = launch_with_fake_deepspeed("local.sh", "2", "run", "c.yaml", tmp_path=tmp_path, **hidden)
    assert (done.returncode, record) == (2, {})
    assert done.stderr.splitlines() == [
        "local.sh: CUDA_VISIBLE_DEVICES='' hides all devices; unset it, or set DS_ACCELERATOR=cpu"
    ]
    cpu = hidden | {"DS_ACCELERATOR": "cpu"}
    done, record = launch_with_fake_deepspeed("local.sh", "2", "run", "c.yaml", tmp_path=tmp_path, **cpu)
    assert done.returncode == 0
    assert record["arguments"][2:4] == ["--num_gpus", "2"]


def test_multinode_uses_the_devices_that_the_user_offers(tmp_path: Path) -> None:
    env = multinode_environment(tmp_path, DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="4,5,6")
    done = run_script("multinode.sh", "hosts", "run", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    world = json.loads((tmp_path / "host0.json").read_text())["arguments"][3].removeprefix("--world_info=")
    assert json.loads(base64.urlsafe_b64decode(world)) == {"node1": [4, 5], "node2": [4]}
    few = run_script("multinode.sh", "hosts", "run", env=env | {"CUDA_VISIBLE_DEVICES": "4"}, cwd=tmp_path)
    assert few.returncode == 2
    assert few.stderr.splitlines() == ["multinode.sh: hosts:2: slots=2 is more than CUDA_VISIBLE_DEVICES='4' offers"]


@pytest.mark.parametrize("code", [2, 3, 137])
def test_local_passes_the_exit_code_on(code: int, tmp_path: Path) -> None:
    done, _ = launch_with_fake_deepspeed("local.sh", "2", "run", "c.yaml", tmp_path=tmp_path, FAKE_CODE=str(code))
    assert done.returncode == code


# Like deepspeed: a launcher that has two ranks as children, and passes no signal on.
FAKE_LAUNCHER = """#!/usr/bin/env bash
rank='trap "exit 3" USR1 TERM; touch ready$RANK; while :; do sleep 0.05; done'
RANK=0 bash -c "$rank" & first=$!
RANK=1 bash -c "$rank" & second=$!
code=0
wait $first || code=$?
wait $second || code=$?
exit $code
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_local_reaches_the_ranks_and_their_code_comes_back(number: signal.Signals, tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "deepspeed", FAKE_LAUNCHER)
    command = ["bash", str(ROOT / "launch/local.sh"), "2", "run", "c.yaml"]
    with subprocess.Popen(command, env=clean_environment(tmp_path), cwd=tmp_path, stderr=subprocess.PIPE) as process:
        wait_until_exists(tmp_path / "ready0")
        wait_until_exists(tmp_path / "ready1")
        process.send_signal(number)
        assert process.wait(20) == 3


# A rank below two processes of deepspeed's, which watches as a rank does.
FAKE_DEEPSPEED_AND_RANK = f"""#!{sys.executable}
import subprocess, sys
rank = '''
import os, pathlib, signal, sys, time
from adept_ds.base.lifeline import end_with
from adept_ds.ranks.launchers import launcher_processes
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("stopped").touch(), sys.exit(3)))
end_with(launcher_processes(os.environ))
pathlib.Path("ready").touch()
time.sleep(60)
'''
if sys.argv[-1] == "helper":
    sys.exit(subprocess.call([sys.executable, "-c", rank]))
sys.exit(subprocess.call([sys.executable, __file__, "helper"]))
"""


def test_ranks_stop_when_local_is_killed_and_nobody_else_is(tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "deepspeed", FAKE_DEEPSPEED_AND_RANK)
    command = ["bash", str(ROOT / "launch/local.sh"), "2", "run", "c.yaml"]
    with subprocess.Popen(command, env=clean_environment(tmp_path), cwd=tmp_path) as process:
        wait_until_exists(tmp_path / "ready")
        process.send_signal(signal.SIGKILL)
    wait_until_exists(tmp_path / "stopped")


# Like pdsh with ssh: the command goes to a shell of each host, here always this one, with %n replaced.
FAKE_PDSH = f"""#!{sys.executable}
import os, pathlib, subprocess, sys
options = dict(zip(sys.argv[2:-1:2], sys.argv[3:-1:2]))
with open("calls", "a") as calls:
    calls.write(f"{{options['-w']}} {{sys.argv[-1]}}\\n---\\n")
highest = 0
for number, host in enumerate(options["-w"].split(",")):
    if host == os.environ.get("DEAD_HOST"):
        print(f"{{host}}: ssh: connect to host {{host}} port 22: No route to host", file=sys.stderr)
        highest = 255
        continue
    command = sys.argv[-1].replace("%%", chr(0)).replace("%n", str(number)).replace(chr(0), "%")
    plain = {{name: os.environ[name] for name in ("PATH", "HOME", "PWD")}}
    done = subprocess.run(["/bin/sh", "-c", command], env=plain, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        print(f"{{host}}: {{line}}")
    for line in done.stderr.splitlines():
        print(f"{{host}}: {{line}}", file=sys.stderr)
    if done.returncode:
        print(f"pdsh@here: {{host}}: ssh exited with exit code {{done.returncode}}", file=sys.stderr)
    highest = max(highest, done.returncode)
sys.exit(highest)
"""

# The Python of the hosts: notes how deepspeed's launcher would be started there.
FAKE_HOST_PYTHON = f"""#!{sys.executable}
import json, os, pathlib, sys, time
if "deepspeed.launcher.launch" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
number = next(argument.partition("=")[2] for argument in sys.argv if argument.startswith("--node_rank="))
record = {{"arguments": sys.argv[1:], "env": dict(os.environ), "directory": os.getcwd()}}
pathlib.Path(f"host{{number}}.json").write_text(json.dumps(record))
print("adept: train.lr: too high", file=sys.stderr)
print(f"adept: on host {{number}} only", file=sys.stderr)
time.sleep(float(os.environ.get("TORCH_SLEEPS", "0")))
sys.exit(int(os.environ.get("DS_CODE", "0")))
"""


def multinode_environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    env = clean_environment(tmp_path, **variables)
    write_program(tmp_path / "bin" / "pdsh", FAKE_PDSH)
    write_program(tmp_path / "bin" / "deepspeed", "#!/bin/sh\n")
    write_program(tmp_path / "bin" / "python", FAKE_HOST_PYTHON)
    (tmp_path / "hosts").write_text("# two hosts\nnode1 slots=2\n\nnode2 slots=1 # the second\n")
    return env


def test_all_hosts_are_told_when_multinode_is_killed(tmp_path: Path) -> None:
    """Also where no rank is on its own host."""
    env = multinode_environment(tmp_path, TORCH_SLEEPS="5")
    command = ["bash", str(ROOT / "launch/multinode.sh"), "hosts", "run", "c.yaml"]
    with subprocess.Popen(command, env=env, cwd=tmp_path) as process:
        wait_until_exists(tmp_path / "host0.json")
        process.send_signal(signal.SIGKILL)
    until(lambda: "signal_ranks" in (tmp_path / "calls").read_text())
    call = (tmp_path / "calls").read_text().split("---\n")[-2]
    assert call.startswith("node1,node2 ")
    assert "TERM" in call


def test_multinode_starts_the_deepspeed_launcher_on_every_host_with_what_ranks_need(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("# the cluster's\n\nNCCL_DEBUG=WARN\nMY_OWN=1\n")
    odd = ["a=[1,2]", "b=x $y", "c=it's 100%n\n`id`"]
    env = multinode_environment(
        tmp_path,
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="29511",
        GLOO_SOCKET_IFNAME="eth0",
        HF_TOKEN="secret",
        EXTRA="it's",
        ADEPT_EXPORT="EXTRA",
    )
    done = run_script("multinode.sh", "hosts", "run", "c.yaml", *odd, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        record = json.loads((tmp_path / f"host{number}.json").read_text())
        launcher, world, options = record["arguments"][:3], record["arguments"][3], record["arguments"][4:]
        assert launcher == ["-u", "-m", "deepspeed.launcher.launch"]
        hosts = json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))
        assert hosts == {"node1": [0, 1], "node2": [0]}
        assert options == [
            *(f"--node_rank={number}", "--master_addr=10.0.0.1", "--master_port=29511"),
            *("--log_level", "critical", "--no_local_rank", "--module", "adept_ds", "run", "c.yaml", *odd),
        ]
        assert record["directory"] == str(tmp_path)
        expected = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN", "MY_OWN": "1", "EXTRA": "it's"}
        assert {name: record["env"].get(name) for name in expected} == expected
        assert {"ADEPT_LAUNCH_ID", "ADEPT_LAUNCHER", "PYTHONPATH"} <= record["env"].keys()
        assert "HF_TOKEN" not in record["env"]


def test_multinode_finds_an_address_and_a_free_port_on_the_first_host(tmp_path: Path) -> None:
    done = run_script("multinode.sh", "hosts", "run", env=multinode_environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    places = set()
    for number in (0, 1):
        arguments = json.loads((tmp_path / f"host{number}.json").read_text())["arguments"]
        places.add(tuple(argument for argument in arguments if argument.startswith("--master_")))
    ((address, port),) = places
    assert re.fullmatch(r"--master_addr=\d+\.\d+\.\d+\.\d+", address)
    assert 1024 <= int(port.removeprefix("--master_port=")) <= 65535


def test_multinode_says_once_what_every_host_says_and_nothing_of_exit_codes(tmp_path: Path) -> None:
    env = multinode_environment(tmp_path, DS_CODE="2")
    done = run_script("multinode.sh", "hosts", "run", "c.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "node1: adept: train.lr: too high",
        "node1: adept: on host 0 only",
        "node2: adept: on host 1 only",
    ]


def test_hosts_that_cannot_be_reached_or_lack_something_are_named_before_anything_starts(tmp_path: Path) -> None:
    env = multinode_environment(tmp_path, DEAD_HOST="node2")
    done = run_script("multinode.sh", "hosts", "run", "c.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "multinode.sh: node2: ssh: connect to host node2 port 22: No route to host",
        "multinode.sh: nothing was started, because of the hosts above; mend them, or remove them from 'hosts'",
    ]
    done = run_script("multinode.sh", "hosts", "run", env=env | {"ADEPT_PYTHON": "/no/python"}, cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no Python at '/no/python'; install" in done.stderr
    assert not list(tmp_path.glob("host?.json"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1\n", "hosts:1: 'node1' is not"),
        ("node1 slots=2\nnode2 slots=0\n", "hosts:2: 'node2 slots=0'"),
        ("node1 slots=2\nnode1 slots=2\n", "twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_named_by_line(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    done = run_script("multinode.sh", "hosts", "run", env=clean_environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr


# --- Slurm ---------------------------------------------------------------------------------------------------------

TEMPLATES = [script.name for script in SCRIPTS if script.suffix == ".sbatch"]

# Stands for the Python of the environment, and says how it was called.
FAKE_PYTHON = """#!/bin/sh
printf '%s\\n' "$@" >called_with
env >environment
trap '' TERM
kill -s USR1 $$ && touch lives_on
"""


def in_spool(name: str, tmp_path: Path) -> Path:
    """Slurm starts a copy of the script from its spool directory, in the directory of submission."""
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_text((ROOT / "launch" / name).read_text())
    return copy


def called(name: str, *arguments: str, tmp_path: Path, python: Path, **env: str) -> list[str]:
    write_program(python, FAKE_PYTHON)
    command = ["bash", str(in_spool(name, tmp_path)), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **env}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=60)
    return (tmp_path / "called_with").read_text().splitlines()


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"slurm_seeds.sbatch"}))
def test_a_template_hands_its_arguments_to_adept_job(name: str, tmp_path: Path) -> None:
    """With the .venv of the directory of submission, and as one process with it, which Slurm signals."""
    python = tmp_path / ".venv" / "bin" / "python3"
    words = called(name, "--stage", "train", "my config.yaml", "a=$HOME*", tmp_path=tmp_path, python=python)
    assert words == ["-m", "adept_ds", "job", "--stage", "train", "my config.yaml", "a=$HOME*"]


def test_the_active_environment_wins_over_one_that_lies_there(tmp_path: Path) -> None:
    write_program(tmp_path / ".venv" / "bin" / "python3", "#!/bin/sh\nexit 9\n")
    active = tmp_path / "active"
    env = {"VIRTUAL_ENV": str(active)}
    assert called("slurm.sbatch", "c.yaml", tmp_path=tmp_path, python=active / "bin" / "python3", **env)
    named = tmp_path / "named"
    shutil.rmtree(tmp_path / "spool")
    env |= {"ADEPT_PYTHON": str(named)}
    write_program(active / "bin" / "python3", "#!/bin/sh\nexit 9\n")
    assert called("slurm.sbatch", "c.yaml", tmp_path=tmp_path, python=named, **env)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_warning_before_adept_listens_does_not_end_a_job(name: str, tmp_path: Path) -> None:
    """It reaches the process that adept is about to become."""
    array = {"SLURM_ARRAY_TASK_ID": "0"}
    called(name, "c.yaml", "d.yaml", tmp_path=tmp_path, python=tmp_path / ".venv" / "bin" / "python3", **array)
    assert (tmp_path / "lives_on").exists()


def test_a_task_of_an_array_has_its_seed_and_its_run_directory(tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python3"
    words = called(
        *("slurm_seeds.sbatch", "runs/math", "c.yaml", "train.lr=1e-4"),
        tmp_path=tmp_path,
        python=python,
        SLURM_ARRAY_TASK_ID="3",
    )
    assert words[2:] == ["job", "c.yaml", "train.lr=1e-4", "train.seed=3", "run_dir=runs/math/seed_3"]


def test_without_gpus_the_ranks_are_told_so(tmp_path: Path) -> None:
    called("slurm_cpu.sbatch", "c.yaml", tmp_path=tmp_path, python=tmp_path / ".venv" / "bin" / "python3")
    assert "DS_ACCELERATOR=cpu" in (tmp_path / "environment").read_text().splitlines()
    assert "--gpus" not in (ROOT / "launch" / "slurm_cpu.sbatch").read_text()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_warned_goes_back_and_continues_its_output(name: str) -> None:
    lines = (ROOT / "launch" / name).read_text().splitlines()
    assert {"#SBATCH --signal=B:USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)


FAKE_SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>calls
printf '%s;cluster\\n' "$((100 + $(wc -l <calls)))"
"""


def test_stages_are_submitted_in_their_order_each_behind_the_one_before(tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "sbatch", FAKE_SBATCH)
    template = write_program(tmp_path / "my.sbatch", "")
    data = "{domain: [d], general_eval: [e], domain_eval: [f]}"
    (tmp_path / "c.yaml").write_text(f"{{model: m, run_dir: r, data: {data}, probe: {{corpus: [g]}}, dial: {{}}}}")
    env = clean_environment(tmp_path, ADEPT_OPTIONS_train="--nodes=4 --time=8:00:00")
    arguments = ("--partition=gpu", str(template), "c.yaml", "train.lr=1e-4")
    done = run_script("slurm_stages.sh", *arguments, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable --job-name=adept-{stage} --partition=gpu {options}{after}{template} --stage {stage} "
        "c.yaml train.lr=1e-4"
        for stage, options, after in (
            ("probe", "", ""),
            ("expand", "--nodes=1 --ntasks-per-node=1 ", "--dependency=afterok:101 --kill-on-invalid-dep=yes "),
            ("train", "--nodes=4 --time=8:00:00 ", "--dependency=afterok:102 --kill-on-invalid-dep=yes "),
            ("dial", "", "--dependency=afterok:103 --kill-on-invalid-dep=yes "),
            ("eval", "", "--dependency=afterok:104 --kill-on-invalid-dep=yes "),
            ("report", "--nodes=1 --ntasks-per-node=1 ", "--dependency=afterok:105 --kill-on-invalid-dep=yes "),
        )
    ]
    assert "eval     job 105, after 104\n" in done.stdout


def test_where_slurm_is_not_stages_are_not_submitted(tmp_path: Path) -> None:
    for program in ("bash", "basename", "dirname"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    env = {"PATH": str(tmp_path)}
    done = run_script("slurm_stages.sh", str(ROOT / "launch" / "slurm.sbatch"), "c.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert "sbatch is not installed" in done.stderr


def test_a_mistake_in_the_configuration_is_said_before_any_stage_is_submitted(tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "sbatch", FAKE_SBATCH)
    template = write_program(tmp_path / "my.sbatch", "")
    (tmp_path / "c.yaml").write_text("{model: m, run_dir: r, trian: {}}")
    env = clean_environment(tmp_path)
    done = run_script("slurm_stages.sh", str(template), "c.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown key 'trian'" in done.stderr
    assert not (tmp_path / "calls").exists()
