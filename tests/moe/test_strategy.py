import torch

from synchromesh import Dropless, Local, MLPExperts, MoE, Plan, TopKRouter
from synchromesh.kernels import REFERENCE, autocast
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


def test_under_autocast_a_fused_pass_keeps_no_narrow_copy_of_the_experts(monkeypatch):
    layer, x = MoE(TopKRouter(8, 4, k=2), MLPExperts(4, 8, hidden=16)), torch.randn(20, 8)
    kept, ys, gradients = [], [], []
    for from_bytes in (2**40, 1):
        monkeypatch.setattr(autocast, "HUGE_FROM", from_bytes)
        kept.append(set())

        def keep(tensor):
            kept[-1].add((tensor.dtype, tensor.shape[1:]))
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            ys.append(layer(x))
        gradients.append(torch.autograd.grad(ys[-1].float().square().sum(), list(layer.experts.parameters())))
    narrow = (torch.bfloat16, (16, 8))
    assert [narrow in tensors for tensors in kept] == [True, False]
    assert torch.equal(*ys)
    for whole, each in zip(*gradients, strict=True):
        assert torch.equal(whole, each)
