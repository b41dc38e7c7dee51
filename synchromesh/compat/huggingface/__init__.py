"""Transformers' MoE models on this library: an experts backend, and expert parallelism by any plan."""

from synchromesh.compat.huggingface.backend import register as register
from synchromesh.compat.huggingface.parallel import full_state_dict as full_state_dict
from synchromesh.compat.huggingface.parallel import parallelize_experts as parallelize_experts
