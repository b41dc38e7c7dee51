"""Seconds of one layer under a plan, predicted from a cluster's profile. Pure Python, thousands of plans a second.

Collectives queue on the links, products on the device, in the order in which `parallel.pipeline` issues them; what the
device waits for is the exposed communication. Skewed routing counts through the rank that gets most rows: pooling the
weights of more experts evens its load out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from synchromesh.planning.cluster import ClusterProfile, Link
from synchromesh.planning.lattice import Ranks, row_copies
from synchromesh.planning.traffic import Collective, Group, Traffic, traffic
from synchromesh.types import Plan, Workload

BACKWARD_PRODUCTS = 2  # for each product of forward: the gradients of rows and of weights


@dataclass(frozen=True)
class Seconds:
    """Where the time of one pass goes, on the slowest rank.

    Attributes:
        route: scores, positions, and what does not depend on the size.
        permute: moving rows to and from their buffers, and the activation.
        matmul: matrix products of the experts.
        exchange: all-to-all of rows and of split sizes, as if alone on the links.
        gather: all-gather of weights and reduce-scatter of their gradients, as if alone on the links.
        exposed: how long the device waits for communication.
    """

    route: float
    permute: float
    matmul: float
    exchange: float
    gather: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the pass: communication counts only where it is exposed."""
        return self.route + self.permute + self.matmul + self.exposed

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.route + other.route,
            self.permute + other.permute,
            self.matmul + other.matmul,
            self.exchange + other.exchange,
            self.gather + other.gather,
            self.exposed + other.exposed,
        )

    def times(self, count: int) -> Seconds:
        """Return the seconds of so many passes."""
        return Seconds(
            count * self.route,
            count * self.permute,
            count * self.matmul,
            count * self.exchange,
            count * self.gather,
            count * self.exposed,
        )


NO_SECONDS = Seconds(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def forward_and_backward(
    work: Workload, plan: Plan, ranks: Ranks, profile: ClusterProfile, sent: Traffic | None = None
) -> tuple[Seconds, Seconds]:
    """Predict both passes of a legal plan; the backward of inference is 0. `sent` is its traffic, if that is known."""
    model = _Model(work, plan, ranks, profile, sent or traffic(work, plan, ranks))
    return model.forward(), model.backward() if work.training else NO_SECONDS


def step_seconds(work: Workload, plan: Plan, ranks: Ranks, profile: ClusterProfile) -> float:
    """Predict the seconds of a layer's forward and, in training, its backward."""
    forward, backward = forward_and_backward(work, plan, ranks, profile)
    return forward.total + backward.total


def load_of_busiest(work: Workload, plan: Plan, ranks: Ranks) -> float:
    """Return the rows of the rank that gets most over the mean, where one expert gets 2**skew times the mean."""
    # One hot expert, the others equal: the worst rank holds the hot one and held - 1 others, in units of the mean.
    hot, experts = min(2.0**work.skew, work.experts), work.experts
    held = max(1.0, experts * row_copies(ranks.size, experts, plan) / (ranks.size // plan.gather))
    if experts == 1 or held >= experts:
        return 1.0
    others = (experts - hot) / (experts - 1)
    return max(1.0, (hot + (held - 1) * others) / held)


class _Model:
    """One layer, one plan."""

    def __init__(self, work: Workload, plan: Plan, ranks: Ranks, profile: ClusterProfile, sent: Traffic) -> None:
        self.work, self.plan, self.ranks, self.profile, self.sent = work, plan, ranks, profile, sent
        self.load = load_of_busiest(work, plan, ranks) if plan.ragged else 1.0
        self.speed = profile.rate_of(str(work.dtype).removeprefix("torch."))
        # Ranks go through a step side by side: where they are more than cores, all wait for one in the same phase.
        self.waits = profile.waits
        self.gather = self._together(self.sent.gather)
        self.scatter = self._together(self.sent.scatter)
        self.exchange = self._together(self.sent.there) * self.load
        self.permute = self._permute() * self.waits
        self.matmul = self._matmul() * self.waits / self.sent.chunks  # exchange and matmul are of one chunk

    def forward(self) -> Seconds:
        ahead = (*self.sent.counts, *self.sent.tags)  # of the rows
        counts = self._together(ahead)
        cores = self._busy(ahead) + self._busy(self.sent.gather) + self._busy_exchange()
        exposed = self._exposed(first=self.gather, last=0.0, compute=self.matmul)
        exchange = 2 * self.exchange * self.sent.chunks
        route = (self._route() + self._fixed(0)) * self.waits
        return self._on_cores(
            Seconds(
                route, self.permute, self.matmul * self.sent.chunks, exchange + counts, self.gather, exposed + counts
            ),
            cores,
        )

    def backward(self) -> Seconds:
        again = self.gather if self.plan.regather else 0.0
        weights = self._together(self.sent.weights_back)
        cores = self._busy(self.sent.gather) * self.plan.regather + self._busy(self.sent.scatter)
        cores += self._busy(self.sent.weights_back) + self._busy_exchange()
        compute = BACKWARD_PRODUCTS * self.matmul
        exposed = self._exposed(first=again, last=self.scatter, compute=compute)
        exchange = 2 * self.exchange * self.sent.chunks + weights
        route = (BACKWARD_PRODUCTS * self._route() + self._fixed(1)) * self.waits
        return self._on_cores(
            Seconds(route, self.permute, compute * self.sent.chunks, exchange, again + self.scatter, exposed + weights),
            cores,
        )

    def _on_cores(self, own: Seconds, busy: float) -> Seconds:
        """Let no work of exchanges hide behind products that need the same cores, where ranks wait for one."""
        return own if self.waits == 1 else dataclasses.replace(own, exposed=max(own.exposed, busy))

    def _busy_exchange(self) -> float:
        return 2 * self.sent.chunks * self.load * self._busy(self.sent.there)

    def _busy(self, several: tuple[Collective, ...]) -> float:
        """Return for how long collectives keep the cores of a rank, waiting for its turn included."""
        if self.waits == 1:
            return 0.0
        links = [self.profile.across if one.group.far > 0 else self.profile.node for one in several]
        shares = [min(1.0, link.busy * self.waits) for link in links]
        worked = (share * collective_seconds(one, self.profile) for one, share in zip(several, shares, strict=True))
        return sum(worked, 0.0)

    def _exposed(self, *, first: float, last: float, compute: float) -> float:
        """Return how long the device waits for communication in a pass.

        Args:
            first: seconds of the all-gather that must end before the first product.
            last: seconds of the reduce-scatter that can begin after the last product.
            compute: seconds of the products of one chunk.
        """
        # Two queues, as `parallel.pipeline` fills them. The links carry the weights, all chunks to the experts, then
        # each chunk back when its products are done; the device takes a chunk when it has arrived. `device` and `back`
        # are the moments at which the device and the links are free.
        chunks = self.sent.chunks
        overlapping = chunks > 1 and self.exchange > 0
        slow_compute, slow_wire = self.profile.slowed if overlapping else (1.0, 1.0)
        piece, work = self.exchange * slow_wire, compute * slow_compute
        leaves = 0.0 if self._separate_links() else first  # when the first chunk can leave
        device, back = first, leaves + piece * chunks  # a chunk goes back only after all have been sent there
        for chunk in range(chunks):
            device = max(device, leaves + piece * (chunk + 1)) + work
            back = max(back, device) + piece
        end = max(device, back)
        end = max(end, device + last) if self._separate_links() else end + last
        return max(0.0, end - compute * chunks)

    def _separate_links(self) -> bool:
        """Whether weights and rows travel on different links."""
        if not self.sent.gather or not self.sent.there:
            return False
        return (self.sent.gather[0].group.far > 0) != any(one.group.far > 0 for one in self.sent.there)

    def _fixed(self, backward: int) -> float:
        return self.profile.step[backward] + self.profile.chunk[backward] * (self.sent.chunks - 1)

    def _route(self) -> float:
        work = self.work
        scores = self.speed.seconds(work.rows, work.experts, work.width)
        # Scores are float32 and are read or written about four times.
        return scores + 4 * work.rows * work.experts * 4 / self.profile.memory_rate

    def _permute(self) -> float:
        """Return the time to move rows: once on each side of each exchange, by the combine, by the activation."""
        work = self.work
        # How often a row is read or written: each level of an exchange sends and receives rows in both directions, two
        # align them in between; of one that deduplicates, experts read and write pairs.
        passes = (10 if self.plan.two_level else 4) if self.sent.there else 2
        rows = passes * self.sent.computed
        if self.plan.deduplicate:
            rows = 4 * (self.sent.rows + self.sent.relayed) + 2 * self.sent.computed
        copies = row_copies(self.ranks.size, work.experts, self.plan) if self.sent.there else 1
        activated = 2 * self.sent.computed * self.load * work.hidden / copies * (work.matrices - 1)
        numbers = 2 * work.rows * work.width + rows * self.load * work.width + activated
        return numbers * work.dtype.itemsize / self.profile.memory_rate

    def _matmul(self) -> float:
        """Products of all pieces of a forward, at least as long as memory takes to give what they read and write."""
        work, ranks = self.work, self.ranks
        copies, members = row_copies(ranks.size, work.experts, self.plan), ranks.size // self.plan.gather
        experts = work.experts * copies / members  # on this rank, whole or in shards
        hidden = work.hidden / copies
        rows = self.sent.computed * self.load
        each, chunks = rows / experts, self.sent.chunks
        # Chunks make products smaller, hence slower, and read the weights once a chunk.
        one = self.speed.seconds(each / chunks, hidden, work.width)
        products = work.matrices * experts * chunks * (one + self.profile.kernel)
        weights = experts * work.matrices * hidden * work.width * chunks
        moved = weights + rows * (2 * work.width + work.matrices * hidden)
        return max(products, moved * work.dtype.itemsize / self.profile.memory_rate)

    def _together(self, several: tuple[Collective, ...]) -> float:
        return sum((collective_seconds(one, self.profile) for one in several), 0.0)


def collective_seconds(one: Collective, profile: ClusterProfile) -> float:
    """Return the time of a collective alone on its links."""
    group, node, across, others = one.group, profile.node, profile.across, one.group.far
    link = across if others > 0 else node
    start = link.start * _turns(link, profile)
    if one.kind == "all_to_all" or (one.kind == "reduce_scatter" and profile.backend == "gloo"):
        # Messages inside the node and across run at the same time; a rank sends those of one kind in turn. The link
        # of the node, shared by its ranks, may be the limit.
        near = group.near and group.near * node.message.at(one.size) * _turns(node, profile)
        if others == 0:
            return start + max(near, _shared(across, one.size * group.crossing))
        crowded = 1 + across.crowding * others if group.near else 1.0
        far = others * across.message.at(one.size * crowded) * _turns(across, profile)
        return start + max(near, far, _shared(across, one.size * group.crossing))
    return start + _ring_seconds(one.size, group, profile)


def all_reduce_seconds(size: float, group: Group, profile: ClusterProfile) -> float:
    """Return the time to sum `size` bytes over a group: parts go round a ring twice, summed, then whole."""
    if group.size == 1:
        return 0.0
    start = (profile.across if group.far > 0 else profile.node).start
    return start + 2 * _ring_seconds(size / group.size, group, profile)


def _ring_seconds(size: float, group: Group, profile: ClusterProfile) -> float:
    """Return the time until every part of `size` bytes has been at every rank of a ring."""
    steps = group.size - 1  # in each of which every rank sends one part to the next
    near = steps * profile.node.message.at(size) * _turns(profile.node, profile)
    if group.far == 0:
        return near
    rails = group.near + 1 if profile.backend == "nccl" else 1  # NCCL lays a ring over every link of a node
    far = steps * profile.across.message.at(size / rails) * _turns(profile.across, profile)
    return max(near, far, _shared(profile.across, size * steps * group.ring))


def _turns(link: Link, profile: ClusterProfile) -> float:
    """Return how much longer a message takes where all ranks send at once and take turns at the cores."""
    return 1.0 if profile.cores is None else max(1.0, link.busy * profile.waits)


def _shared(link: Link, size: float) -> float:
    return 0.0 if link.node_rate is None else size / link.node_rate
