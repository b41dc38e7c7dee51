import torch

from synchromesh import Dropless, Local, MLPExperts, MoE, Plan, TopKRouter
from synchromesh.kernels import REFERENCE
from synchromesh.moe.strategy import compute_dtype
from synchromesh.testing.compare import assert_close
from synchromesh.types import Workload


def test_local_has_one_plan_and_takes_it():
    workload = Workload(8, 1, 4, 8, 2, torch.float32, training=True)
    assert Local().legal_plans(workload, Dropless()) == {Plan(): None}
    assert Local().choose(workload, Dropless()) == Plan()


def test_other_kernels_give_the_same_result():
    fast = MoE(TopKRouter(8, 4, k=2), MLPExperts(4, 8, hidden=16))
    reference = MoE(fast.router, fast.experts, strategy=Local(kernels=REFERENCE))
    x = torch.randn(20, 8)
    assert_close("y", fast(x), reference(x))


def test_autocast_decides_the_dtype_but_not_for_double():
    x = torch.ones(1)
    assert compute_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
        assert compute_dtype(x.double()) == torch.float64


def test_alone_a_rank_agrees_with_itself():
    value = torch.tensor(3)
    assert Local().agree_max(value) is value
    assert Local().agree_sum(value) is value
