"""The names of `tutel.moe`."""

from synchromesh.compat.tutel.dispatch import fast_cumsum_sub_one, fast_decode, fast_dispatcher, fast_encode
from synchromesh.compat.tutel.layer import MOELayer
from synchromesh.compat.tutel.routing import extract_critical

__all__ = [
    "extract_critical",
    "fast_cumsum_sub_one",
    "fast_decode",
    "fast_dispatcher",
    "fast_encode",
    "moe_layer",
    "top_k_routing",
]

moe_layer = MOELayer
top_k_routing = extract_critical
