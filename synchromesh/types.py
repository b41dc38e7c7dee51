"""The values that pass between the parts of a Mixture-of-Experts layer.

Legend of the shape letters, here and everywhere: T tokens on this rank, K choices per token, E experts, L experts held
by this rank, R rows of the expert-sorted buffer, C capacity, D width, F hidden width, W ranks, S = max(1, W/E) shards
of one expert, G ranks per node, g gather degree, r row copies, P expert parameters in all.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.export import register_dataclass


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with which weight.

    Attributes:
        expert_ids: int64; -1 is an absent pair.
        weights: the combine weight of each pair; not read where the pair is absent.
        scores: the router's probability of every expert, as used for the selection.
        logits: before scoring, without noise.
        noisy_logits: with noise; None when there was none.
        noise_std: standard deviation of that noise; None when there was none.
        max_pairs: static bound on the number of present pairs; None means T * K.
        mean_choices: choices per token that a capacity is computed from, where the columns are not choices in order of
            preference; None means K, and that they are.
        score_sums: [E], the sums that `with_sums` was given, else None; read them through `scores_per_expert`. They
            are taken over the tensors above, which therefore must not be written to.
        choice_counts: [2, E], the counts that `with_sums` was given, else None; read them through `tokens_per_expert`.
    """

    expert_ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]
    noisy_logits: Float[Tensor, "T E"] | None = None
    noise_std: float | None = None
    max_pairs: int | None = None
    mean_choices: int | None = None
    # Not arguments of __init__, so that dataclasses.replace drops them: its result may hold other pairs or scores.
    score_sums: Float[Tensor, " E"] | None = field(default=None, init=False)
    choice_counts: Int[Tensor, "2 E"] | None = field(default=None, init=False)

    def with_sums(self, score_sums: Float[Tensor, " E"] | None, choice_counts: Int[Tensor, "2 E"] | None) -> Routing:
        """Return this routing with sums over its tokens that a kernel has computed already.

        Args:
            score_sums: sum of each expert's scores, through which gradients flow; None is computed when asked for.
            choice_counts: for each expert, the tokens of which it is the first choice, and those of which it is any
                choice; None is counted when asked for.
        """
        known = dataclasses.replace(self)  # a frozen copy: what __init__ does not take has to be set past it
        object.__setattr__(known, "score_sums", score_sums)
        object.__setattr__(known, "choice_counts", choice_counts)
        return known

    @property
    def num_experts(self) -> int:
        return self.scores.shape[1]

    @property
    def choices(self) -> int:
        """Choices per token, on average."""
        return self.expert_ids.shape[1] if self.mean_choices is None else self.mean_choices

    def tokens_per_expert(self, choices: int | None = None) -> Int[Tensor, " E"]:
        """Count the present pairs of each expert, in the first `choices` columns or in all.

        The result may be a view of this routing: do not write to it.
        """
        if self.choice_counts is not None and (choices is None or choices >= self.expert_ids.shape[1]):
            return self.choice_counts[1]
        if self.choice_counts is not None and choices == 1:
            return self.choice_counts[0]
        slots = self.expert_ids[:, :choices].flatten() + 1  # slot 0 takes the absent pairs
        counts = slots.new_zeros(self.num_experts + 1)
        return counts.scatter_add(0, slots, torch.ones_like(slots))[1:]

    def scores_per_expert(self) -> Float[Tensor, " E"]:
        """Return the sum of the scores of each expert over the tokens."""
        return self.scores.sum(dim=0) if self.score_sums is None else self.score_sums


@dataclass(frozen=True)
class RowMap:
    """Where each kept (token, choice) pair lies in a buffer of rows sorted by expert, without gaps.

    Rows ends[e-1] .. ends[e] belong to expert e. Rows from ends[-1] on are the tail: never written, never read.

    Attributes:
        rows: int64, row of each pair; -1 where absent or dropped.
        pairs: int64, the pair t * K + k in each row; -1 in the tail. Its length R is static.
        ends: int32, running sum of the kept rows.
        capacity: most rows of an expert: an int fixed beforehand, a 0-d tensor if measured, None if unlimited.
        tokens: int32, what `with_tokens` was given, else None; read it through `token_of_rows`.
    """

    rows: Int[Tensor, "T K"]
    pairs: Int[Tensor, " R"]
    ends: Int[Tensor, " E"]
    capacity: int | Int[Tensor, ""] | None
    # Not an argument of __init__, so that dataclasses.replace drops it: its result may hold other pairs.
    tokens: Int[Tensor, " R"] | None = field(default=None, init=False)

    def with_tokens(self, tokens: Int[Tensor, " R"]) -> RowMap:
        """Return this map with the token of each row, int32, which a kernel has written already."""
        known = dataclasses.replace(self)  # a frozen copy: what __init__ does not take has to be set past it
        object.__setattr__(known, "tokens", tokens)
        return known

    def token_of_rows(self) -> Int[Tensor, " R"]:
        """Return the token of each row, int32; -1 in the tail.

        >>> RowMap(torch.tensor([[1, 0]]), torch.tensor([1, 0, -1]), torch.tensor([2]), None).token_of_rows()
        tensor([ 0,  0, -1], dtype=torch.int32)
        """
        if self.tokens is not None:
            return self.tokens
        return self.pairs.div(max(1, self.rows.shape[1]), rounding_mode="floor").to(torch.int32)

    @staticmethod
    def of_rows(num_rows: int, ends: Int[Tensor, " E"]) -> RowMap:
        """Return the map of rows that are sorted already: each is a token with one choice, and stays where it is.

        >>> RowMap.of_rows(4, torch.tensor([2, 3])).pairs
        tensor([ 0,  1,  2, -1])
        """
        number = torch.arange(num_rows, device=ends.device)
        kept = torch.where(number < ends[-1], number, -1)
        return RowMap(kept[:, None], kept, ends, None).with_tokens(kept.to(torch.int32))


@dataclass(frozen=True)
class Workload:
    """What a plan is chosen for; hashable, and equal on all ranks.

    Attributes:
        rows: T, tokens per rank.
        choices: K, experts per token.
        width: D, the width of a token.
        hidden: F, the hidden width of an expert.
        experts: E, on all ranks together.
        dtype: of the rows that travel and of the pooled weights.
        training: whether a backward follows the forward.
        skew: how uneven the routing is: log2, rounded, of the largest over the mean rows of an expert.
        capacity: C, the most rows of an expert from one rank, where all ranks know it beforehand; else None.
        matrices: of an expert, [hidden, width] each: 2, 3 where it is gated, 0 where experts move whole.
        vectors: the length of each bias of an expert.
    """

    rows: int
    choices: int
    width: int
    hidden: int
    experts: int
    dtype: torch.dtype
    training: bool
    skew: int = 0
    capacity: int | None = None
    matrices: int = 2
    vectors: tuple[int, ...] = ()

    @property
    def parts_per_expert(self) -> list[int]:
        """Numbers in each parameter tensor of one expert."""
        return [self.width * self.hidden] * self.matrices + list(self.vectors)


@dataclass(frozen=True)
class Plan:
    """How the ranks share the work of one layer for one step.

    The W ranks form W/g groups of g ranks that all-gather (pool) expert weights, and g groups of W/g ranks that
    exchange rows by all-to-all. W/g is the expert-parallel degree, times the tensor-parallel degree r where experts
    are cut into shards (E < W); g = 1 is expert parallelism alone, g = W data parallelism.

    Attributes:
        gather: g, the number of ranks that all-gather their parts of the expert weights for this step, and
            reduce-scatter the gradients: the FSDP shard degree of the experts.
        near: True pools between neighbours in rank order (inside a node, where g fits into one) and exchanges rows
            between every g-th rank; False pools between every (W/g)-th rank and exchanges between neighbours.
        chunks: the overlap (pipelining) degree: number of pieces in which rows travel, each piece's all-to-all during
            the compute of another.
        two_level: hierarchical (2DH) all-to-all: inside the nodes first, then between them in fewer, larger messages.
        ragged: True sends real rows only, with split sizes exchanged first (dropless, or a capacity that is measured);
            False pads each part to the capacity, so that all splits are equal and known on the host.
        regather: FSDP's reshard_after_forward: all-gather the weights again in backward instead of keeping them.
        deduplicate: one row of a token for each rank that holds some of its experts, and one weighted sum of them back,
            instead of a row for each choice; on two levels one row for each node, copied inside it. Chunks are then of
            tokens.
    """

    gather: int = 1
    near: bool = True
    chunks: int = 1
    two_level: bool = False
    ragged: bool = True
    regather: bool = False
    deduplicate: bool = False

    def __post_init__(self) -> None:
        for name in ("gather", "chunks"):
            got = getattr(self, name)
            if got < 1:
                raise ValueError(f"Plan.{name} is {got}, wanted an integer >= 1")

    def __str__(self) -> str:
        """Say what differs from the plainest plan.

        >>> str(Plan(gather=2, near=False, chunks=4)), str(Plan(ragged=False))
        ('g=2 far, 4 chunks', 'g=1, even wire')
        """
        said = [f"g={self.gather}" + ("" if self.near else " far")]
        said += [f"{self.chunks} chunks"] if self.chunks > 1 else []
        said += ["two-level"] if self.two_level else []
        said += [] if self.ragged else ["even wire"]
        said += ["regather"] if self.regather else []
        said += ["deduplicated"] if self.deduplicate else []
        return ", ".join(said)

    def to_json(self) -> str:
        """Return the plan as one JSON object.

        >>> Plan.from_json(Plan(gather=2).to_json()) == Plan(gather=2)
        True
        """
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote, now or in earlier versions. Raises ValueError on unknown or missing fields."""
        fields = json.loads(text)
        wanted = {f.name for f in dataclasses.fields(Plan)}
        later = {"deduplicate"}  # which earlier versions did not write
        if not isinstance(fields, dict) or set(fields) | later != wanted:
            raise ValueError(f"a plan holds the fields {sorted(wanted)}, got {text!r}")
        return Plan(**fields)


@dataclass(frozen=True)
class LoadStats:
    """What the experts of one layer were given.

    Attributes:
        tokens_per_expert: int64, pairs routed to each expert, before dropping.
        dropped: int64, pairs dropped for lack of capacity.
        plan: the plan of the last forward.
        exposed_communication: seconds that this rank's compute waited for the network, in these forwards and in the
            backwards before them; 0 on GPUs, whose streams wait instead.
    """

    tokens_per_expert: Int[Tensor, " E"]
    dropped: Int[Tensor, ""]
    plan: Plan
    exposed_communication: float = 0.0

    @property
    def drop_rate(self) -> float:
        """Dropped over routed pairs; 0 when nothing was routed."""
        return int(self.dropped) / max(1, int(self.tokens_per_expert.sum()))


for _value in (Routing, RowMap, Plan, LoadStats):
    register_dataclass(_value)
