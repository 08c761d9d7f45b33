# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/scale.md for clusters, run here by programs that stand for the clusters'.

Each starts two processes as its cluster would, with the environment by which they find each other,
and small settings. What it cannot show is a cluster's own part: machines, queues and networks.
"""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import SMALL, SMALL_DECODER
from tiny_runs import free_port

from vivit_jax.train.log import read_metrics

PAGE = Path(__file__).parents[2] / "docs/scale.md"
COMMANDS = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
STEPS = 6

# Takes the place of the installed program: the same command with a small model.
VIVIT_JAX = """
import os, sys
args = sys.argv[1:]
place = args.index("--mesh") + 1
devices = 1
for part in args[place].split(","):
    devices *= int(part.split("=")[1])
assert devices in (32, 256), args[place]
args[place] = "data=2"
os.execv(sys.executable, [sys.executable, "-m", "vivit_jax.cli", *args, "--set", *SETTINGS])
"""

# Starts a command of the shell twice, with what `member` says of the environment of each.
TOGETHER = """
import os, subprocess, sys
def together(command, member):
    each = [
        subprocess.Popen(["bash", "-c", command], env=os.environ | member(n)) for n in range(2)
    ]
    return max(process.wait() for process in each)
"""

GCLOUD = """
*command, what = sys.argv[1:4]
where = sys.argv[4:]
assert command == ["compute", "tpus"] and what in ("queued-resources", "tpu-vm")
print("gcloud", what, where[0], flush=True)
if what == "queued-resources":
    assert where[0] == "create" and "--accelerator-type" in where and "--node-id" in where
    sys.exit()
assert where[0] == "ssh" and "--worker=all" in where
# As a TPU machine's metadata, where jax looks unless the environment has it.
member = lambda n: dict(
    JAX_FORCE_TPU_INIT="1",
    TPU_WORKER_HOSTNAMES="localhost,localhost",
    TPU_WORKER_ID=str(n),
    MEGASCALE_COORDINATOR_ADDRESS="",
    MEGASCALE_NUM_SLICES="",
    MEGASCALE_SLICE_ID="",
    JAX_COORDINATOR_PORT=os.environ["PORT"],
)
sys.exit(together(where[where.index("--command") + 1], member))
"""

SBATCH = """
text = open(sys.argv[1]).read()
wanted = dict(re.findall(r"--([a-z-]+)=(\\S+)", "".join(re.findall("#SBATCH.*\\n", text))))
assert int(wanted["nodes"]) * int(wanted["ntasks-per-node"]) == 32
environment = os.environ | dict(SLURM_JOB_ID="17")
queued = "queued"
open(queued, "w").close()
runs = 0
while os.path.exists(queued):
    os.remove(queued)
    runs += 1
    status = subprocess.run(["bash", sys.argv[1]], env=environment).returncode
print("sbatch ran it", runs, "times", flush=True)
sys.exit(status)
"""

SRUN = """
member = lambda n: dict(
    SLURM_STEP_NODELIST="localhost",
    SLURM_NTASKS="2",
    SLURM_PROCID=str(n),
    SLURM_LOCALID="0",
    JAX_COORDINATOR_PORT=os.environ["PORT"],
)
if not os.path.exists("ended"):  # the time is over while the first run is under way
    open("ended", "w").close()
    each = [subprocess.Popen(sys.argv[1:], env=os.environ | member(n)) for n in range(2)]
    log = os.path.join(os.environ["RUN"], "metrics.jsonl")
    while not os.path.exists(log) or open(log).read().count('"train"') < 2:
        time.sleep(0.05)
        assert each[0].poll() is None
    for process in each:
        process.terminate()
    sys.exit(128 - min(process.wait() for process in each))
sys.exit(together(shlex.join(sys.argv[1:]), member))
"""

SCONTROL = """
assert sys.argv[1:] == ["requeue", "17"]
open("queued", "w").close()
"""

KUBECTL = """
import yaml
assert sys.argv[1:] == ["apply", "-f", "-"]
service, job = yaml.safe_load_all(sys.stdin)
spec, pod = job["spec"], job["spec"]["template"]["spec"]
assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
assert pod["subdomain"] == service["metadata"]["name"]
assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 4
(container,) = pod["containers"]
assert container["command"] == ["sh", "-c"]
(command,) = container["args"]
first = f"{job['metadata']['name']}-0.{pod['subdomain']}:8476"
for there, here in ((first, f"localhost:{os.environ['PORT']}"), ("--processes 4", "--processes 2")):
    assert there in command
    command = command.replace(there, here)
sys.exit(together(command, lambda n: {"JOB_COMPLETION_INDEX": str(n)}))
"""

PROGRAMS = dict(gcloud=GCLOUD, sbatch=SBATCH, srun=SRUN, scontrol=SCONTROL, kubectl=KUBECTL)


@pytest.fixture
def cluster(tmp_path):
    """The environment of the page's commands: the programs, clips and a place to write."""
    programs, data = tmp_path / "bin", tmp_path / "clips"
    programs.mkdir()
    settings = dict(
        **{f"model.config.{name}": value for name, value in (SMALL | SMALL_DECODER).items()},
        **{"model.config.patch_size": 8, "model.config.dtype": "float32"},
        **{"data.stride": 1, "mask.ratio": 0.75, "evaluation.resize": 16},
        **{"train.batch_size": 4, "train.epochs": STEPS, "optim.warmup_epochs": 1},
    )
    given = [f"{name}={value}" for name, value in settings.items()]
    texts = {name: TOGETHER + f"import re, shlex, time\n{code}" for name, code in PROGRAMS.items()}
    for name, code in (texts | {"vivit-jax": f"SETTINGS = {given}\n{VIVIT_JAX}"}).items():
        path = programs / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    data.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        np.save(data / f"{number}.npy", rng.integers(0, 256, (6, 18, 20, 3), np.uint8))
    return os.environ | dict(
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=os.pathsep.join(sys.path),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        PORT=str(free_port()),
        DATA=str(data),
        RUN=str(tmp_path / "run"),
    )


def test_each_cluster_has_its_commands():
    firsts = [command.split()[0] for command in COMMANDS]
    assert firsts == ["gcloud", "cat", "kubectl"]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=["tpu", "slurm", "kubernetes"])
def test_a_run_on_a_cluster(command, cluster, tmp_path):
    done = subprocess.run(
        ["bash", "-c", command],
        env=cluster,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mesh data=2;" in done.stdout and f"step {STEPS} done" in done.stdout
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [*range(1, STEPS + 1)]
    if "sbatch" in command:
        assert "stopped by SIGTERM after step" in done.stdout and "ran it 2 times" in done.stdout
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["name"] == "videomae-v1-base-kinetics400-pretrain"
