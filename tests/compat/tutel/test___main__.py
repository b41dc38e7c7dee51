"""A script that knows Tutel only runs as it is, alone and under torchrun."""

import subprocess
import sys

import pytest

from synchromesh.compat.tutel.__main__ import main
from synchromesh.testing.programs import run_job, run_program

# Laid out as Tutel's own first example is described: a gate, experts, a loss over the token axis, plain SGD.
SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from tutel import moe as tutel_moe
from tutel import net, system
import beside

env = system.init_data_model_parallel(backend="gloo")
layer = tutel_moe.moe_layer(
    gate_type={"type": "top", "k": 2, "capacity_factor": 1.0},
    model_dim=8,
    experts={"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 16, "activation_fn": F.relu},
    scan_expert_func=lambda name, param: setattr(param, "skip_allreduce", True),
    seeds=(1, env.global_rank + 1, 1),
)
shared = [p for _, p in layer.named_parameters() if not hasattr(p, "skip_allreduce")]
optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
torch.manual_seed(0)
x, y = torch.randn(2, 4, 8), torch.zeros(2, dtype=torch.int64)
losses = []
for _ in range(3):
    optimizer.zero_grad()
    out = layer(x)
    loss = F.nll_loss(F.log_softmax(out.sum(dim=2), dim=1), y)
    loss.backward()
    for p in shared:
        p.grad /= env.global_size
        p.grad = net.simple_all_reduce(p.grad)
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert layer.num_global_experts == 2 * env.global_size
env.dist_print(__name__, sys.argv[1:], beside.WORD)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'imported'")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_a_module_runs_on_ranks(script):
    ranks = run_job(2, "-m", "synchromesh.compat.tutel", "-m", "script", "5", cwd=script.parent)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    assert [rank.stdout for rank in ranks] == ["__main__ ['5'] imported\n", ""]


SPAWNING = """
import sys
import torch
from tutel import net
from beside import WORD

class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return i * i + net.get_world_rank()

if __name__ == "__main__":
    squares = torch.utils.data.DataLoader(Squares(), num_workers=1, multiprocessing_context="spawn")
    print(WORD, sys.argv[1:], [int(x) for x in squares])
"""


def test_a_script_runs_and_so_do_processes_that_it_spawns(script):
    script.write_text(SPAWNING)
    command = [sys.executable, "-m", "synchromesh.compat.tutel", script, "--top", "2"]
    done = subprocess.run(command, cwd=script.parents[1], capture_output=True, text=True, check=False)
    assert done.stdout == "imported ['--top', '2'] [0, 1, 4]\n", done.stderr


def test_tutels_own_programs_run():
    done = run_program("-m", "synchromesh.compat.tutel", "-m", "tutel.checkpoint.scatter", "--help")
    assert "--output_size" in done.stdout, done.stderr


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_is_no_error(capsys, asked):
    main([asked])
    assert capsys.readouterr().out.startswith("usage: python -m synchromesh.compat.tutel SCRIPT")


def test_without_a_script_nothing_runs():
    with pytest.raises(SystemExit, match=r"there is no file absent\.py\nusage:"):
        main(["absent.py"])
    with pytest.raises(SystemExit, match=r"^usage:"):
        main([])
