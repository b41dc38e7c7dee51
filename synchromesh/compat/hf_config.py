"""The shape of a Hugging Face MoE model, from its config.json alone: nothing is downloaded, nothing is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synchromesh.errors import parsed_json
from synchromesh.planning.planner import LayerKind, ModelShape
from synchromesh.types import Workload

# By field, the names that model families give it, the first found counts.
NAMES = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "choices": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    "hidden": ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size"),
    "width": ("hidden_size", "d_model"),
    "layers": ("num_hidden_layers", "n_layers"),
}
MOST_LAYERS = 100_000  # a number beyond it is a mistake, or meant to keep a planner busy
DENSE_SHARE = (0.5, 0.4)
CALIBRATION = "assumed: half of the peak in forward, 0.4 in training, as large transformers reach"


def read_hf_config(path: Path, *, length: int, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    """Read a config.json, or the folder it lies in.

    Args:
        length: tokens of a sequence.

    Raises:
        ValueError: it is not the configuration of a MoE model; the message names the field that is missing.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = parsed_json(file.read_bytes(), file)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no configuration")
    try:
        return _shape(found.get("text_config", found), file, length, dtype)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} holds a field that is no number, or one that cannot be: {error}") from error


def _shape(config: dict[str, Any], file: Path, length: int, dtype: torch.dtype) -> ModelShape:
    experts, choices, hidden, width, layers = (_number(config, name, file) for name in NAMES)
    if layers > MOST_LAYERS:
        raise ValueError(f"{file} has {layers:,} layers, wanted at most {MOST_LAYERS:,}")
    sparse = _sparse_layers(config, layers)
    gpt_oss = config.get("model_type") == "gpt_oss"
    vectors = (2 * hidden, width) if gpt_oss else ()
    work = Workload(0, choices, width, hidden, experts, dtype, True, matrices=3, vectors=vectors)
    heads = int(config.get("num_attention_heads", max(1, width // 128)))
    head = int(config.get("head_dim") or width // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    attention = width * head * (2 * heads + 2 * kv_heads)
    dense_hidden = int(config.get("intermediate_size", hidden))
    shared = int(config.get("n_shared_experts") or 0) * hidden + int(config.get("shared_expert_intermediate_size") or 0)
    blocks = layers * attention + (layers - sparse) * 3 * width * dense_hidden + sparse * 3 * width * shared
    vocabulary = int(config.get("vocab_size", 0)) * width
    routers = sparse * experts * width
    return ModelShape(
        name=str(config.get("model_type", file.stem)),
        unit="sequence",
        layers=(LayerKind("experts", sparse, length, work),),
        dense_products=float(length) * (blocks + routers + vocabulary + layers * heads * head * length),
        dense_parameters=float(blocks + routers + vocabulary * (1 if config.get("tie_word_embeddings") else 2)),
        dense_saved=float(length) * layers * (8 * width + 3 * (dense_hidden if sparse < layers else shared)),
        dense_share=DENSE_SHARE,
        calibrated_by=CALIBRATION,
    )


def _sparse_layers(config: dict[str, Any], layers: int) -> int:
    """Return how many layers have experts."""
    if config.get("interleave_moe_layer_step", 1) not in (None, 1):
        raise ValueError("models that interleave dense layers by interleave_moe_layer_step are not known here")
    first = int(config.get("first_k_dense_replace") or 0)
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    return sum(layer >= first and (layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _number(config: dict[str, Any], field: str, file: Path) -> int:
    for name in NAMES[field]:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    wanted = " or ".join(NAMES[field])
    raise ValueError(f"{file} is not of a MoE model that is known here: it has no {wanted}")
