"""How programs are started: one process, several, several nodes; and what is refused."""

import pytest

from runtime import launch as processes
from runtime.launch import is_first_node, launch_plan
from runtime.messages import UserError


def test_one_process_joins_nobody():
    assert launch_plan({}, gpus=1, cores=8) == [{}]
    (variables,) = launch_plan({}, gpus=0, cores=8)
    assert variables == {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "8"}
    assert launch_plan({"OMP_NUM_THREADS": "3"}, gpus=0, cores=8)[0]["OMP_NUM_THREADS"] == "3"      # the user's own stays


def test_all_gpus_by_default_and_cpu_processes_without_one():
    ranks = launch_plan({}, gpus=8, cores=64)
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [(str(i), str(i), "8") for i in range(8)]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"} and len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert len(launch_plan({"NUM_GPUS": "2"}, gpus=8, cores=64)) == 2
    ranks = launch_plan({"NUM_GPUS": "2"}, gpus=0, cores=3)
    assert [rank["OMP_NUM_THREADS"] for rank in ranks] == ["1", "1"] and ranks[0]["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize("environment", [
    {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"},
    {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_STEP_NUM_TASKS": "2",
     "SLURM_STEP_NUM_NODES": "2"}])
def test_several_nodes_from_either_set_of_variables(environment, monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node0\\nnode1\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ranks = launch_plan(environment, gpus=4, cores=64)
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("4", "0"), ("5", "1"), ("6", "2"), ("7", "3")]
    assert all((rank["MASTER_ADDR"], rank["MASTER_PORT"], rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) == ("node0", "29500", "8", "4")
               for rank in ranks)


def test_the_first_node_is_one():
    assert is_first_node({}) and is_first_node({"NODE_RANK": "1"})                # a rank without several nodes means nothing
    for nodes, rank in (("NNODES", "NODE_RANK"), ("SLURM_NNODES", "SLURM_NODEID")):
        assert [is_first_node({nodes: "2", rank: place}) for place in "01"] == [True, False]


@pytest.mark.parametrize(("environment", "sentence"), [
    ({"NUM_GPUS": "5"}, "NUM_GPUS is 5, but this machine has 4"),
    ({"NUM_GPUS": "0"}, "NUM_GPUS is '0'"),
    ({"NUM_GPUS": "two"}, "NUM_GPUS is 'two'"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
    ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK or"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK is '2', but NNODES is 2"),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, "one task per node"),
])
def test_what_cannot_be_launched(environment, sentence):
    with pytest.raises(UserError, match=sentence):
        launch_plan(environment, gpus=4, cores=64)


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    processes.require_joined(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.require_joined(2)
    with pytest.raises(UserError, match="started 2 processes, but accelerate sees 1"):
        processes.require_joined(1)
