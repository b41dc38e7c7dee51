"""moe_layer: Tutel's layer, its arguments, its arithmetic and its checkpoints, run by this library's plans."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from synchromesh.compat.tutel import parallel
from synchromesh.compat.tutel.arguments import number, whole_number
from synchromesh.compat.tutel.environment import read_switches
from synchromesh.compat.tutel.experts.build import build_experts
from synchromesh.compat.tutel.experts.custom import CustomExperts
from synchromesh.compat.tutel.experts.share import Share, TutelExperts
from synchromesh.compat.tutel.gates import build_gates
from synchromesh.compat.tutel.routing import agree_max, route, weights_at_the_entry
from synchromesh.compat.tutel.state import adapt_state, refusal
from synchromesh.moe.capacity import Capacity, Dropless, FixedRows, batch_prioritized, token_order
from synchromesh.moe.experts import WHOLE, Cut
from synchromesh.moe.forward import chosen, note, workload_of
from synchromesh.moe.recompute import Decisions
from synchromesh.moe.record import Record
from synchromesh.moe.strategy import Local, Strategy, compute_dtype
from synchromesh.parallel.adaptive import Adaptive
from synchromesh.parallel.sharded import Sharded
from synchromesh.types import Plan, Routing, RowMap


class MOELayer(nn.Module):
    """Tutel's moe_layer: input [..., D] to output of the same shape, with the auxiliary loss in its `l_aux`.

    Args:
        gate_type: {'type': 'top', 'k', 'fp32_gate', 'capacity_factor', 'gate_noise'}; 'cosine_top' takes 'proj_dim' and
            'init_t' besides, 'custom' a 'module'; or a list of these, chosen by `gate_index`.
        model_dim: D, even.
        experts: {'type': 'ffn' | 'llama_ffn' | 'custom', 'num_experts_per_device' or 'count_per_node', ...}.
        scan_expert_func: called with the name and the parameter of each expert parameter.
        result_func: called with the output; what it returns is the layer's result.
        group: the ranks; None is all of the job.
        seeds: (gates, experts, afterwards); None leaves the generator alone.
        a2a_ffn_overlap_degree: pieces of the exchange; 1, 2, 4 and 8 run, others as the next lower of these.
        is_postscore: weights are applied after the experts; else before them.
        batch_prioritized_routing: a capacity serves tokens by their best score.
        normalize_gate: weights of a token sum to 1, where it has several.
        is_gshard_loss: `gshard_loss`, else `load_importance_loss`.
        parallel_type: 'adaptive:r', 'data' (r = 1), 'model' (r = all), or 'auto': the plan that is fastest.
        use_2dh: exchange in two levels, where the ranks lie on several nodes.

    Raises:
        ValueError: an argument or setting is unknown or makes no sense; the message says what is wanted.
    """

    _num_global_experts: Tensor

    def __init__(
        self,
        gate_type: str | dict[str, Any] | Sequence[dict[str, Any]],
        model_dim: int,
        experts: dict[str, Any] | None = None,
        scan_expert_func: Callable[[str, nn.Parameter], Any] | None = None,
        result_func: Callable[[Tensor], Any] | None = None,
        group: ProcessGroup | None = None,
        seeds: Sequence[int | None] | None = None,
        a2a_ffn_overlap_degree: int = 1,
        is_postscore: bool = True,
        batch_prioritized_routing: bool = False,
        normalize_gate: bool = True,
        is_gshard_loss: bool = True,
        parallel_type: str = "adaptive:1",
        use_2dh: bool = False,
        **deprecated: Any,
    ) -> None:
        super().__init__()
        _check_arguments(model_dim, deprecated)
        switches, settings = read_switches(), _checked_experts(experts)
        share = self._place(settings, model_dim, group)
        self.model_dim, self.skip_moe, self.result_func = model_dim, switches.skip_moe, result_func
        self.adaptive_degree = parallel.degree_of(parallel_type, self.sharded_count)
        self.a2a_ffn_overlap_degree, self.use_2dh = _checked_overlap(a2a_ffn_overlap_degree), use_2dh
        self.is_postscore, self.normalize_gate, self.is_gshard_loss = is_postscore, normalize_gate, is_gshard_loss
        self.batch_prioritized_routing = batch_prioritized_routing or switches.prioritized
        seed_gates, seed_experts, seed_after = (*(seeds or ()), None, None, None)[:3]
        _seed(seed_experts)
        self.experts = build_experts(settings, share, skip=switches.skip_expert)
        self._mark(scan_expert_func)
        if not isinstance(self.experts, TutelExperts):
            output_dim = getattr(self.experts, "output_dim", None)
            self._custom = CustomExperts(share, output_dim)
        self.gates = build_gates(
            gate_type,
            model_dim=model_dim,
            num_experts=self.num_global_experts,
            seed=seed_gates,
            capacity_factor=switches.capacity_factor,
        )
        _seed(seed_after)
        self.l_aux: Tensor | None = None
        self.dispatch_count: Tensor | None = None
        self.megablocks_size = 0
        self._strategy = self._strategy_of(parallel_type)
        self._strategy.adopt(self._runner)
        self.record, self._decisions = Record(), Decisions()

    @staticmethod
    def global_expert_count(num_local_experts: int | float, group: ProcessGroup | None = None) -> int:
        """Return the experts of all ranks of a group, given those of one."""
        return parallel.global_expert_count(num_local_experts, parallel.grid_of(group).size)

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks; None is this process alone."""
        return self._grid.group

    def get_parameter_iterator(self, param_type: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Return names and parameters of the 'gate' or of the 'local_experts'."""
        if param_type not in ("gate", "local_experts"):
            raise ValueError(f"param_type is {param_type!r}, wanted 'gate' or 'local_experts'")
        return (self.gates if param_type == "gate" else self.experts).named_parameters()

    def forward(
        self,
        input: Tensor,  # noqa: A002
        gate_index: int = 0,
        capacity_factor: int | float | None = None,
        top_k: int | None = None,
        a2a_ffn_overlap_degree: int | None = None,
        reserve_dims: int = 1,
        inequivalent_tokens: bool = False,
        adaptive_r: int | None = None,
        megablocks_size: int = 0,
    ) -> Any:
        """Run the layer.

        Args:
            input: [..., D].
            gate_index: which gate routes.
            capacity_factor: f > 0: k * int(f * ceil(T/E)) rows of an expert; 0: all; f < 0: as -f, never padded; None
                leaves it to the gate.
            top_k: choices; 0 is none; None leaves it to the gate.
            a2a_ffn_overlap_degree, adaptive_r: from this call on.
            reserve_dims: last dims of the input that make up D.
            inequivalent_tokens: a capacity is computed from the largest T of all ranks.
            megablocks_size: a capacity without gradients is a multiple of it.
        """
        if self.skip_moe:
            input.l_aux = None  # pyright: ignore[reportAttributeAccessIssue]
            return input if self.result_func is None else self.result_func(input)
        if a2a_ffn_overlap_degree is not None:
            self.a2a_ffn_overlap_degree = _checked_overlap(a2a_ffn_overlap_degree)
        if adaptive_r is not None:
            self._settle(adaptive_r)
        single = self.num_local_experts <= 1 or torch.is_grad_enabled() or self.world_size > 1
        self.megablocks_size = megablocks_size = 0 if single else megablocks_size
        x, gate = self._tokens(input, reserve_dims), self._gate(gate_index)
        runner, ends = self._runner_of(input.shape[input.dim() - reserve_dims :])
        routing, l_aux = route(
            gate,
            x,
            gate.top_k if top_k is None else whole_number("top_k", top_k),
            noisy=self.training,
            normalize=self.normalize_gate,
            gshard=self.is_gshard_loss,
        )
        factor = gate.capacity_factor if capacity_factor is None else number("capacity_factor", capacity_factor)
        capacity = self._capacity(factor, routing, inequivalent_tokens, megablocks_size)
        y = self._run(x, routing, capacity, runner)[:, : runner.output_dim]
        y = y.reshape(*input.shape[: input.dim() - reserve_dims], *ends()).to(input.dtype)
        self.l_aux = y.l_aux = l_aux  # pyright: ignore[reportAttributeAccessIssue]
        return y if self.result_func is None else self.result_func(y)

    def extra_repr(self) -> str:
        gates = ", ".join(f"k={gate.top_k} noise={gate.gate_noise}" for gate in self.gates)
        return f"gates: {gates}; {self.num_global_experts} experts on {self.world_size} ranks"

    @property
    def _runner(self) -> TutelExperts:
        """What the strategy runs: the experts, or what stands for the user's."""
        return self.experts if isinstance(self.experts, TutelExperts) else self._custom

    def _place(self, settings: dict[str, Any], model_dim: int, group: ProcessGroup | None) -> Share:
        """Count experts and ranks, and return what this rank holds; takes the number out of the settings."""
        self._grid = parallel.grid_of(group)
        self.world_size = self._grid.size
        count = settings.pop("count_per_node", 1)
        count = settings.pop("num_experts_per_device", count)
        self.num_global_experts = parallel.global_expert_count(count, self.world_size)
        self.register_buffer("_num_global_experts", torch.tensor(self.num_global_experts))
        cut = Cut(self._grid.rank, self.world_size) if self.world_size > 1 else WHOLE
        share = Share(model_dim, self.num_global_experts, cut)
        self.num_local_experts, self.sharded_count = share.local_experts, share.sharded_count
        self.valid_rs = parallel.valid_degrees(self.sharded_count)
        return share

    def _mark(self, scan: Callable[[str, nn.Parameter], Any] | None) -> None:
        for name, parameter in self.experts.named_parameters():
            if scan is not None:
                scan(name, parameter)
            parameter._tutel_expert = True  # pyright: ignore[reportAttributeAccessIssue]

    def _strategy_of(self, parallel_type: str) -> Strategy:
        if self.world_size == 1:
            return Local()
        whole = not self._runner.splits and self.sharded_count > 1
        if parallel_type == "auto" and not whole and isinstance(self.experts, TutelExperts):
            return Adaptive(self._grid)
        return Sharded(self._grid)

    def _settle(self, degree: int) -> None:
        """Run r = degree from now on, also where the plan was found by itself."""
        self.adaptive_degree = parallel.check_degree(degree, self.sharded_count)
        if isinstance(self._strategy, Adaptive):
            self._strategy = Sharded(self._grid)

    def _gate(self, index: int) -> Any:
        gates = len(self.gates)
        if whole_number("gate_index", index) not in range(-gates, gates):
            raise ValueError(f"gate_index is {index}, wanted 0 to {gates - 1}: the layer has {gates} in its gate_type")
        return self.gates[index]

    def _tokens(self, input: Tensor, reserve_dims: int) -> Tensor:  # noqa: A002
        """Return the tokens [T, D], in what the experts compute in."""
        if input.dim() < 2 or not 1 <= reserve_dims < input.dim():
            raise ValueError(
                f"moe_layer got an input of {input.dim()} dims and reserve_dims={reserve_dims}, wanted at least one "
                "dim of tokens before the reserved ones"
            )
        if math.prod(input.shape[input.dim() - reserve_dims :]) != self.model_dim:
            raise ValueError(
                f"moe_layer got an input of shape {tuple(input.shape)}, wanted last dims of {self.model_dim}"
            )
        x = input.reshape(-1, self.model_dim)
        weight = next(self.experts.parameters(), None)
        return x.to(compute_dtype(x) if weight is None or torch.is_autocast_enabled(x.device.type) else weight.dtype)

    def _runner_of(self, reserved: torch.Size) -> tuple[TutelExperts, Callable[[], tuple[int, ...]]]:
        """Return what the strategy runs in this call, and what tells the last dims of the result afterwards."""
        runner = self._runner
        usual = tuple(reserved) if runner.output_dim == self.model_dim else (runner.output_dim,)
        if not isinstance(runner, CustomExperts):
            return runner, lambda: usual
        returned = [usual]  # of this call: other threads may be in theirs

        def call(rows: Tensor) -> Tensor:
            """Call the user's experts on padded rows [L, C, D], with the layer as their ctx."""
            out = self.experts(rows.reshape(*rows.shape[:2], *reserved), self)
            returned[0] = tuple(out.shape[2:])
            return out.reshape(*out.shape[:2], -1)

        return runner.calling(call), lambda: returned[0]

    def _capacity(
        self, factor: int | float, routing: Routing, inequivalent_tokens: bool, megablocks_size: int
    ) -> Capacity:
        """Return which pairs are kept; a negative factor drops what -f does, so that nobody needs to be asked."""
        if factor == 0:
            return Dropless()
        tokens, choices = routing.expert_ids.shape
        if inequivalent_tokens:
            tokens = agree_max(tokens, self.group, routing.scores.device)
        alignment = parallel.alignment_of(self.sharded_count, self.a2a_ffn_overlap_degree, megablocks_size)
        experts = self.num_global_experts
        rows = parallel.rows_per_expert(factor, tokens=tokens, choices=choices, experts=experts, alignment=alignment)
        return FixedRows(rows, batch_prioritized if self.batch_prioritized_routing else token_order)

    def _run(self, x: Tensor, routing: Routing, capacity: Capacity, experts: TutelExperts) -> Tensor:
        rowmap = capacity(routing, self._strategy.agree_max)
        plan = self._plan(x, routing, capacity)
        self._note(routing, rowmap, plan)
        x = nn.functional.pad(x, (0, experts.row_dim - self.model_dim))
        if self.is_postscore:
            return self._strategy.run(x, routing, rowmap, experts, plan)
        pairs, routing = weights_at_the_entry(x, routing)
        choices = rowmap.rows.shape[1]
        flat = dataclasses.replace(rowmap, rows=rowmap.rows.reshape(-1, 1))
        return self._strategy.run(pairs, routing, flat, experts, plan).unflatten(0, (-1, choices)).sum(1)

    def _plan(self, x: Tensor, routing: Routing, capacity: Capacity) -> Plan:
        experts, strategy = self._runner, self._strategy
        if isinstance(strategy, Local):
            return Plan()
        workload = workload_of(
            experts,
            rows=len(x),
            choices=routing.choices,
            dtype=compute_dtype(x),
            training=self.training,
            capacity=capacity,
        )
        if isinstance(strategy, Adaptive):
            return self._decisions.once(lambda: chosen(strategy, workload, capacity))
        degree = self.adaptive_degree if experts.splits else min(1, self.adaptive_degree)
        shards, overlap = self.sharded_count, self.a2a_ffn_overlap_degree
        plan = parallel.plan_of(degree, shards, self.world_size, overlap=overlap, two_level=self.use_2dh)
        if plan.two_level and strategy.refusal(plan, workload, capacity) is not None:
            return dataclasses.replace(plan, two_level=False)  # the ranks lie on one node
        return plan

    def _note(self, routing: Routing, rowmap: RowMap, plan: Plan) -> None:
        self.dispatch_count = routing.tokens_per_expert()
        training = self.training and torch.is_grad_enabled()
        if training or self.record.observing:
            note(self.record, routing, rowmap, plan, self._strategy, loss=None, training=training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any) -> None:
        refused = refusal(state_dict, prefix, self.num_global_experts)
        if refused is None:
            adapt_state(state_dict, prefix, self.experts, self.num_global_experts)
        else:  # load_state_dict raises at its end; until then it is given what the layer has, so that this stays
            [*arguments, *options.values()][-1].append(refused)  # error_msgs
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "l_aux": None}  # it belongs to a graph, which a copy has no part in


def _checked_experts(experts: dict[str, Any] | None) -> dict[str, Any]:
    """Return a copy that may be changed."""
    if experts is None:
        raise ValueError("experts are None, wanted a dict such as {'type': 'ffn', 'hidden_size_per_expert': 4096}")
    return dict(experts)


def _check_arguments(model_dim: int, deprecated: dict[str, Any]) -> None:
    if whole_number("model_dim", model_dim, "an even number") % 2:
        raise ValueError(f"model_dim is {model_dim}, wanted an even number")
    if "pad_samples" in deprecated:
        warnings.warn("pad_samples has no meaning any more: samples are never padded", stacklevel=3)
    unknown = sorted(set(deprecated) - {"pad_samples"})
    if unknown:
        raise ValueError(f"moe_layer got the unknown arguments {unknown}: see MOELayer for those it knows")


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


def _checked_overlap(degree: int) -> int:
    if degree < 1:
        raise ValueError(f"a2a_ffn_overlap_degree is {degree}, wanted at least 1")
    return degree
