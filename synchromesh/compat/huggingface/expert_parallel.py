"""An implementation of transformers' own expert parallelism: `DistributedConfig(ep_implementation="synchromesh")`.

Imported only where transformers has that registry (5.2x).
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from synchromesh.compat.huggingface.parallel import attached
from synchromesh.compat.huggingface.sharded import TransformersExperts
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded


def register_expert_parallelism(name: str, strategy: Callable[[Grid], Sharded]) -> None:
    """Make a name that transformers knows of what runs each experts module by a strategy over its ranks."""

    class Implementation(EPImplementation):
        """Experts of transformers, spread by transformers, run by a strategy of this library."""

        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            own = TransformersExperts(experts, ranks=ep_mesh.size())
            self._run = attached(experts, own, strategy(Grid.from_mesh(ep_mesh)))

        def __call__(
            self,
            hidden_states: Float[Tensor, "T D"],
            top_k_index: Int[Tensor, "T K"],
            top_k_weights: Float[Tensor, "T K"],
        ) -> Float[Tensor, "T D"]:
            if self.tp_mesh.size() == 1:
                return self._run(hidden_states, top_k_index, top_k_weights).clone()  # FSDP2 hooks onto it: no view
            # These ranks hold the same tokens: each computes its slice of them, and all get the whole.
            slices = (_own_slice(tensor, self.tp_mesh) for tensor in (hidden_states, top_k_index, top_k_weights))
            y = self._run(*slices).contiguous()
            shape, stride = hidden_states.shape, hidden_states.contiguous().stride()
            return DTensor.from_local(y, self.tp_mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()

    EPImplementationInterface.register(name, Implementation)


def _own_slice(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(0)]).to_local()
