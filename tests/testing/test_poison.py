import torch

from synchromesh.testing.poison import poisoned_memory


def test_fresh_memory_is_poisoned_under_test():
    assert torch.empty(4).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()


def test_a_default_device_is_heeded_under_poison_and_after():
    torch.utils._device._device_constructors.cache_clear()  # as in a fresh process
    with poisoned_memory(), torch.device("meta"):
        assert torch.empty(2).is_meta
    with torch.device("meta"):
        assert torch.empty(2).is_meta
