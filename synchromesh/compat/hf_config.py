"""The shape of a Hugging Face MoE model, from its config.json alone: nothing is downloaded, nothing is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synchromesh.compat.hf_families import FAMILIES, UNKNOWN, Config, Family, sparse_layers
from synchromesh.errors import parsed_json
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.types import Workload

# By field, the names that model families give it, the first found counts.
NAMES = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "choices": (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
    ),
    "hidden": (
        "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size", "d_ff",
        "encoder_ffn_dim",
    ),
    "width": ("hidden_size", "d_model"),
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "encoder_layers"),
    "heads": ("num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads"),
}  # fmt: skip
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")  # each of an expert's size
PARTS = ("text_config", "thinker_config", "language_config", "llm_config")  # where a model of several keeps its text
MOST_LAYERS = 100_000  # a number beyond it is a mistake, or meant to keep a planner busy
DENSE_SHARE = (0.5, 0.4)
CALIBRATION = "assumed: half of the peak in forward, 0.4 in training, as large transformers reach"


def read_hf_config(path: Path, *, length: int, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    """Read a config.json, or the folder it lies in.

    Args:
        length: tokens of a sequence.

    Raises:
        ValueError: it is not the configuration of a MoE model that is known here; the message names the families
            that are, or the field that is missing.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = parsed_json(file.read_bytes(), file)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no configuration")
    try:
        return _shape(_text_of(found), file, length, dtype)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} holds a field that is no number, or one that cannot be: {error}") from error


def auto_class(path: Path) -> str:
    """Return which of transformers' Auto classes loads a model, by the config.json in its folder.

    Raises:
        ValueError: that is no configuration.
    """
    file = path / "config.json"
    found = parsed_json(file.read_bytes(), file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no configuration")
    if found.get("is_encoder_decoder") is True:
        return "AutoModelForSeq2SeqLM"
    names = found.get("architectures")
    said = str(names[0]) if isinstance(names, list) and names else ""
    if said.endswith("ForTokenClassification"):
        return "AutoModelForTokenClassification"
    pictures = said.endswith("ForConditionalGeneration") or (not said and "vision_config" in found)
    return "AutoModelForImageTextToText" if pictures else "AutoModelForCausalLM"


def _text_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return the part that has the experts, with what Dbrx keeps in parts of its own."""
    for name in PARTS:
        if isinstance(found.get(name), dict) and found.get("model_type") not in FAMILIES:
            return _text_of({"model_type": found.get("model_type"), **found[name]})
    parts = [found[name] for name in ("ffn_config", "attn_config") if isinstance(found.get(name), dict)]
    own = {name: value for part in parts for name, value in part.items() if name not in ("model_type", "hidden_size")}
    return {**own, **found}


def _family(config: Config, file: Path) -> Family:
    name = str(config.get("model_type"))
    if name in FAMILIES:
        return FAMILIES[name]
    usual = UNKNOWN.get(name, "nobody has said how it writes its experts")
    why = usual if any(config.get(own) for own in NAMES["experts"]) or name in UNKNOWN else "it tells of no experts"
    raise ValueError(
        f"{file} is of the family {name}, which is not known here: {why}. Known are {', '.join(sorted(FAMILIES))}. "
        "One layer by its numbers: synchromesh plan --layer T D F E K"
    )


def _shape(config: Config, file: Path, length: int, dtype: torch.dtype) -> ModelShape:
    family = _family(config, file)
    experts, hidden, width, layers = (_number(config, name, file) for name in ("experts", "hidden", "width", "layers"))
    if layers > MOST_LAYERS:
        raise ValueError(f"{file} has {layers:,} layers, wanted at most {MOST_LAYERS:,}")
    choices = family.choices or _number(config, "choices", file)
    if family.needs is not None and not config.get(family.needs):
        raise ValueError(f"{file} has no experts: its {family.needs} is off")
    sparse = sparse_layers(config, layers)
    layers = _both(config, layers)
    inner = _of(config, family.inner) or width
    vectors = ((family.matrices - 1) * hidden, inner) if family.biased else ()
    work = Workload(0, choices, inner, hidden, experts, dtype, True, matrices=family.matrices, vectors=vectors)
    shared = sum(_of(config, name) for name in SHARED_EXPERTS if not family.shared) * hidden
    shared += _of(config, family.shared)
    dense_hidden = _of(config, family.dense) or _of(config, "intermediate_size") or hidden
    feed_forward = family.matrices * width * ((layers - sparse) * dense_hidden + sparse * shared)
    attention, scores = _attention(config, width, layers, length)
    projections = sparse * 2 * width * inner if inner != width else 0
    blocks = attention + feed_forward + projections
    vocabulary, routers = _of(config, "vocab_size") * width, sparse * experts * width
    return ModelShape(
        name=str(config.get("model_type", file.stem)),
        unit="sequence",
        layers=(LayerKind("experts", sparse, length, work),),
        dense_products=float(length) * (blocks + routers + vocabulary + scores),
        dense_parameters=float(blocks + routers + vocabulary * (1 if config.get("tie_word_embeddings") else 2)),
        dense_saved=float(length) * layers * (8 * width + 3 * (dense_hidden if sparse < layers else shared)),
        dense_share=DENSE_SHARE,
        calibrated_by=CALIBRATION,
        blocks=layers,
        block_inputs=float(length) * layers * width,
    )


def _both(config: Config, layers: int) -> int:
    """Return the layers of encoder and decoder together, or those of a model that has one stack."""
    if "encoder_sparse_step" not in config:
        return len(config["layers_block_type"]) if isinstance(config.get("layers_block_type"), list) else layers
    return layers + (_of(config, "decoder_layers") or _of(config, "num_decoder_layers") or layers)


def _attention(config: Config, width: int, layers: int, length: int) -> tuple[int, int]:
    """Return the parameters of attention, as if every layer had the plain one, and multiply-adds of scores a token."""
    found = [config.get(name) for name in NAMES["heads"]]
    heads = next((int(value) for value in found if value), max(1, width // 128))
    head = int(config.get("head_dim") or config.get("d_kv") or width // heads)
    kv_heads = int(config.get("num_key_value_heads") or config.get("kv_n_heads") or heads)
    return layers * width * head * (2 * heads + 2 * kv_heads), layers * heads * head * length


def _of(config: Config, name: str | None) -> int:
    return 0 if name is None else int(config.get(name) or 0)


def _number(config: Config, field: str, file: Path) -> int:
    for name in NAMES[field]:
        value = config.get(name)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]  # one number for each layer
        if isinstance(value, int) and value > 0:
            return value
    blocks = config.get("layers_block_type")
    if field == "layers" and isinstance(blocks, list) and blocks:
        return len(blocks)
    wanted = " or ".join(NAMES[field])
    raise ValueError(f"{file} is not of a MoE model that is known here: it has no {wanted}")
