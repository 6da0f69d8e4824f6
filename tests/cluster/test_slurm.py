"""Slurm as sites have it: the templates of `launch/`, submitted with sbatch to real daemons, and all that ends a job.

Whatever disturbs a run, it has to come to what the same run comes to without Slurm on as many ranks, to the last bit.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from harness.faults import Run, assert_same
from harness.launching import ROOT, adept
from harness.slurm_cluster import PROGRAMS, ClusterJob, SlurmCluster
from harness.system_packages import need
from harness.tiny_study import TinyStudy
from harness.waiting import until
from harness.workspace import Workspace

LAUNCH = ROOT / "launch"

SECTIONS: dict[str, Any] = {
    "train": {"steps": 100, "checkpoint_every": 10, "eval_every": 50},
    "importance": {"every": 25},
}
"""Long enough that somebody can come between, short enough to be run a dozen times."""

CPU = LAUNCH / "slurm_cpu.sbatch"
SMALL = ("--cpus-per-task=1", "--time=30")


@pytest.fixture(scope="session")
def slurm(request: pytest.FixtureRequest) -> Iterator[SlurmCluster]:
    need(request.config, PROGRAMS)
    with SlurmCluster().running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def expected(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What the run comes to on so many ranks, without Slurm."""
    known = dict[int, dict[str, Any]]()

    def find(ranks: int) -> dict[str, Any]:
        if ranks not in known:
            run = Run(workspace, tmp_path_factory.mktemp(f"alone{ranks}") / "run", ranks)
            result = adept(ranks, "run", run.config(**SECTIONS))
            assert result.returncode == 0, result.stderr
            known[ranks] = run.results()
        return known[ranks]

    return find


@dataclass(frozen=True)
class Scenario:
    """A run that is submitted, and what it has to come to."""

    slurm: SlurmCluster
    run: Run
    folder: Path
    expected: Callable[[int], dict[str, Any]]
    record: Callable[[str, object], None]

    def of(self, ranks: int) -> Scenario:
        self.record("ranks", ranks)
        return replace(self, run=replace(self.run, ranks=ranks))

    def submit(self, *arguments: str, template: Path = CPU, options: tuple[str, ...] = ()) -> ClusterJob:
        config = self.run.config(**SECTIONS)
        return self.slurm.submit(template, *arguments, config, options=(*SMALL, *options), directory=self.folder)

    def trains(self, step: int = 11) -> None:
        """Until so many steps are done: there is a checkpoint."""
        until(lambda: self.run.steps_done >= step, 300)

    def is_as_expected(self, result: str) -> None:
        assert_same(self.run.results(), self.expected(self.run.ranks))
        self.record("result", f"{result}; to the last bit as without Slurm")


@pytest.fixture
def scenario(
    slurm: SlurmCluster,
    workspace: Workspace,
    tmp_path: Path,
    expected: Callable[[int], dict[str, Any]],
    record_property: Callable[[str, object], None],
) -> Scenario:
    return Scenario(slurm, Run(workspace, tmp_path / "run", 2), tmp_path, expected, record_property).of(2)


def finished(job: ClusterJob) -> None:
    assert job.ends() == ("COMPLETED", "0:0"), job.said


# --- the templates ---------------------------------------------------------------------------------------------------


def test_one_node_without_gpus(scenario: Scenario) -> None:
    job = scenario.submit()
    finished(job)
    scenario.is_as_expected("completed")


def test_several_nodes_without_gpus(scenario: Scenario) -> None:
    """Rank 0 is found by the name that `scontrol show hostnames` has for its node."""
    job = scenario.submit(options=("--nodes=2", "--ntasks-per-node=1"))
    finished(job)
    assert job.says("NodeList") == "n[1-2]"
    scenario.is_as_expected("completed on n1, n2")


def test_gpus_are_refused_where_there_are_none_and_the_other_template_is_taken(scenario: Scenario) -> None:
    config = str(scenario.run.config(**SECTIONS))
    options = ("--partition=lab", "--test-only")
    assert "not available" in scenario.slurm.refuses("sbatch", *options, str(LAUNCH / "slurm.sbatch"), config)
    scenario.slurm.command("sbatch", *options, *SMALL, str(CPU), config)
    scenario.record("result", "refused, and taken")


@pytest.mark.parametrize(
    ("template", "options"),
    [
        ("slurm.sbatch", ("--gpus-per-node=2", "--ntasks-per-node=2")),
        ("slurm_nodes.sbatch", ("--gpus-per-node=1", "--ntasks-per-node=1")),
    ],
    ids=["slurm.sbatch", "slurm_nodes.sbatch"],
)
def test_nodes_with_gpus(template: str, options: tuple[str, ...], scenario: Scenario) -> None:
    """That they have them is what Slurm says; ranks compute on the CPU."""
    job = scenario.submit(template=LAUNCH / template, options=("--partition=gpu", *options))
    finished(job)
    assert job.says("TresPerNode").startswith("gres:gpu")
    scenario.is_as_expected(f"completed on {job.says('NodeList')}")


@pytest.mark.parametrize(
    ("launcher", "nodes"),
    [
        ("srun", 2),
        ("srun --mpi=pmi2", 2),
        ("srun --mpi=pmix", 1),  # there is one server of PMIx on a host, where nodes are really several
        ("deepspeed --launcher slurm --no_ssh_check --hostfile hostfile --master_addr n1", 2),
    ],
    ids=["srun", "srun with pmi2", "srun with pmix", "deepspeed"],
)
def test_ranks_of_a_job_of_ones_own(launcher: str, nodes: int, scenario: Scenario) -> None:
    """A batch script without `adept job`: what starts the ranks announces them, each in its own way."""
    (scenario.folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    program = [str(Path(sys.executable).with_name("adept")), "run", str(scenario.run.config(**SECTIONS))]
    python = [] if launcher.startswith("deepspeed") else [sys.executable, "-u"]
    script = scenario.folder / "own.sbatch"
    script.write_text("#!/bin/bash\nexport DS_ACCELERATOR=cpu\n" + " ".join([launcher, *python, *program]) + "\n")
    options = (*SMALL, f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}")
    finished(scenario.slurm.submit(script, options=options, directory=scenario.folder))
    scenario.is_as_expected("completed")


def test_seeds_as_an_array(scenario: Scenario) -> None:
    """Both at once on one node. The last one, whose number is that of the array, is warned: it alone goes back."""
    scenario = scenario.of(1)
    config = scenario.run.config(**SECTIONS)
    first = scenario.slurm.submit(
        *(LAUNCH / "slurm_seeds.sbatch", scenario.run.root, config),
        options=(*SMALL, "--array=0-1", "--nodelist=n1"),
        directory=scenario.folder,
    )
    tasks = [scenario.slurm.job(f"{first.name}_{seed}", scenario.folder) for seed in (0, 1)]
    runs = [replace(scenario.run, root=scenario.run.root / f"seed_{seed}") for seed in (0, 1)]
    until(lambda: runs[1].steps_done >= 11, 300)
    assert [task.state for task in tasks] == ["RUNNING", "RUNNING"]
    scenario.slurm.command("scancel", "--batch", "--signal=USR1", tasks[1].name)
    for task in tasks:
        finished(task)
    assert [task.restarts for task in tasks] == [0, 1]
    assert runs[0].results()["steps"] != runs[1].results()["steps"]
    scenario = replace(scenario, run=runs[0])
    scenario.is_as_expected("two at once on a node, one of them requeued")


def stages(scenario: Scenario, **env: str) -> dict[str, ClusterJob]:
    """Submit them; the job of each."""
    command = ["bash", str(LAUNCH / "slurm_stages.sh"), *SMALL, str(CPU), str(scenario.run.config(**SECTIONS))]
    done = scenario.slurm.run(*command, directory=scenario.folder, env=env)
    assert done.returncode == 0, done.stderr
    words = [line.replace(",", "").split() for line in done.stdout.splitlines()]
    return {stage: scenario.slurm.job(number, scenario.folder) for stage, _, number, *_ in words}


def test_a_job_for_each_stage(scenario: Scenario) -> None:
    """The job that trains is warned and goes back: those behind it wait for its end, and not for its first exit."""
    jobs = stages(scenario, ADEPT_OPTIONS_train="--nodes=2 --ntasks-per-node=1")
    assert list(jobs) == ["probe", "expand", "train", "dial", "eval", "report"]
    scenario.trains()
    assert [jobs[name].state for name in ("train", "dial")] == ["RUNNING", "PENDING"]
    scenario.slurm.command("scancel", "--batch", "--signal=USR1", jobs["train"].name)
    for job in jobs.values():
        finished(job)
    assert jobs["train"].restarts == 1
    scenario.is_as_expected("six jobs, the third requeued once")


def test_stages_behind_one_that_failed_do_not_wait_for_ever(scenario: Scenario) -> None:
    """Here the expansion, since there is no probe."""
    jobs = stages(scenario, ADEPT_STAGES="expand train")
    assert jobs["expand"].ends() == ("FAILED", "2:0")
    assert jobs["train"].ends()[0] == "CANCELLED"
    scenario.record("result", "failed with 2; the next one cancelled")


def test_a_study_as_arrays(slurm: SlurmCluster, workspace: Workspace, tmp_path: Path, record_property: Any) -> None:
    study = TinyStudy(tmp_path, workspace.model)
    study.write_texts()
    study.write(
        methods=["adept"], slurm={"options": ["--ntasks-per-node=1", "--cpus-per-task=1", "--time=30"], "at_once": 2}
    )
    done = slurm.run(
        *(
            str(Path(sys.executable).parent / "python"),
            "-m",
            "adept_ds",
            "compare",
            str(study.file),
            "--submit",
            "--json",
        ),
        directory=tmp_path,
        env={},
    )
    assert done.returncode == 0, done.stderr
    page = slurm.job(json.loads(done.stdout)["ids"]["report"], tmp_path)
    finished(page)
    assert (study.study_dir / "compare.html").is_file()
    record_property("ranks", 1)
    record_property("result", "two rates, one further seed, the page")


# --- what ends a job -------------------------------------------------------------------------------------------------


def preempt(scenario: Scenario) -> None:
    """By a job that needs the whole node n1, for a moment."""
    options = ["--partition=hi", "--nodelist=n1", "--exclusive", "--time=1", "--output=/dev/null"]
    scenario.slurm.command("sbatch", *options, "--wrap=sleep 1")


def test_preempted_when_only_the_step_is_told(scenario: Scenario) -> None:
    """Slurm's default."""
    job = scenario.submit(options=("--nodelist=n1",))
    scenario.trains()
    preempt(scenario)
    finished(job)
    assert job.restarts == 1
    assert "resuming after step" in job.said
    scenario.is_as_expected("requeued once")


def test_preempted_where_the_batch_script_is_warned(scenario: Scenario) -> None:
    """SlurmctldParameters=preempt_send_user_signal"""
    with scenario.slurm.user_signals_at_preemption():
        job = scenario.submit(options=("--nodelist=n1",))
        scenario.trains()
        preempt(scenario)
        until(lambda: job.restarts == 1)
    finished(job)
    assert job.restarts == 1
    scenario.is_as_expected("requeued once")


def test_warned_before_the_time_is_over(scenario: Scenario) -> None:
    job = scenario.submit()
    scenario.trains()
    with job.held_until("signal 10 to"):
        limit(job, 2)
    until(lambda: job.restarts == 1)
    limit(job, 30)
    finished(job)
    assert job.restarts == 1
    scenario.is_as_expected("requeued once")


def test_its_time_is_over_without_a_warning(scenario: Scenario) -> None:
    """As with a script that asks for none; KillWait is enough for a checkpoint here."""
    script = scenario.folder / "no_warning.sbatch"
    script.write_text(re.sub(r"#SBATCH --signal=.*\n", "", CPU.read_text()))
    job = scenario.submit(template=script)
    scenario.trains()
    with job.held_until("Time limit exhausted for"):
        limit(job, 1)
    until(lambda: job.restarts == 1)
    limit(job, 30)
    finished(job)
    assert job.restarts == 1
    scenario.is_as_expected("requeued once")


def limit(job: ClusterJob, minutes: int) -> None:
    job.cluster.command("scontrol", "update", f"job={job.name}", f"TimeLimit={minutes}")


def test_cancelled(scenario: Scenario) -> None:
    """For good; the same command, submitted again, goes on."""
    job = scenario.submit()
    scenario.trains()
    scenario.slurm.command("scancel", job.name)
    assert job.ends()[0] == "CANCELLED"
    again = scenario.submit()
    finished(again)
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert "resuming after step" in again.said
    scenario.is_as_expected("stays cancelled; submitted again, goes on")


def test_its_batch_script_is_told_to_end(scenario: Scenario) -> None:
    job = scenario.submit()
    scenario.trains()
    done = scenario.run.steps_done
    scenario.slurm.command("scancel", "--batch", "--signal=TERM", job.name)
    assert job.ends() == ("FAILED", "3:0")
    assert job.restarts == 0
    assert "told to end: not requeued" in job.said
    again = scenario.submit()
    finished(again)
    (resumed,) = re.findall(r"resuming after step (\d+)", again.said)
    assert int(resumed) >= done
    scenario.is_as_expected("exit code 3, no step lost; submitted again, goes on")


def test_its_node_fails(scenario: Scenario) -> None:
    """It goes on on the other one."""
    job = scenario.submit()
    scenario.trains()
    failed = job.says("NodeList")
    with scenario.slurm.failed(failed):
        finished(job)
    assert job.restarts == 1
    assert {failed, job.says("NodeList")} == {"n1", "n2"}
    assert "resuming after step" in job.said
    scenario.is_as_expected("requeued by Slurm")


def test_a_rank_is_killed(scenario: Scenario) -> None:
    job = scenario.submit()
    scenario.trains()
    job.ranks()[-1].send_signal(signal.SIGKILL)
    state, code = job.ends()
    assert state == "FAILED"
    assert job.restarts == 0
    scenario.record("result", f"not requeued, exit code {code.partition(':')[0]}")


def test_a_rank_is_killed_of_a_job_that_shall_go_back_then(scenario: Scenario) -> None:
    job = scenario.submit("--requeue-faults")
    scenario.trains()
    job.ranks()[-1].send_signal(signal.SIGKILL)
    finished(job)
    assert job.restarts == 1
    scenario.is_as_expected("requeued once")


def wait_for_ranks(job: ClusterJob, restarts: int) -> None:
    until(lambda: job.restarts == restarts and len(job.ranks()) == 2, 120)


def test_a_job_that_never_keeps_anything_is_given_up(scenario: Scenario) -> None:
    """Every start is told to stop as soon as it has ranks."""
    job = scenario.submit()
    for start in range(3):
        wait_for_ranks(job, start)
        scenario.slurm.command("scancel", "--signal=USR1", job.name)
    state, _ = job.ends()
    assert (state, job.restarts) == ("FAILED", 2)
    assert "not requeued: 3 starts in a row have kept nothing new" in job.said
    scenario.record("result", "requeued twice, then given up")
