"""Every MoE family of the installed transformers, with its default numbers: counted here, and built there on meta."""

import importlib
import json
import re

import pytest
import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from synchromesh.compat.hf_config import read_hf_config
from synchromesh.compat.hf_families import FAMILIES, UNKNOWN

SAYS_EXPERTS = re.compile(r"expert|moe(?!d)", re.IGNORECASE)
EXPERTS = re.compile(r"\.experts\.(expert_\d+\.|mlp\.)?\w+")
NO_EXPERT = re.compile(r"shared|norm")
# Defaults that are no model: fields that every published model sets.
FILLED = {
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", *["sparse"] * 31]},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma_text": {"num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 704},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4, "num_hidden_layers": 8},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 768},
    "qwen4_exp_text": {
        "indexer_head_dim": 256, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}  # fmt: skip


def default(model_type):
    return CONFIG_MAPPING[model_type](**FILLED.get(model_type, {}))


def own_fields(config):
    return [name for name in vars(config) if not name.startswith("_")]


def with_experts():
    """Model types whose own fields, not those of a part, speak of experts."""
    found = []
    for model_type in sorted(CONFIG_MAPPING_NAMES):
        try:
            config = CONFIG_MAPPING[model_type]()
        except (
            ValueError,
            TypeError,
            KeyError,
            StrictDataclassError,
        ):  # transformers itself cannot make some without their parts
            continue
        if any(SAYS_EXPERTS.search(name) for name in own_fields(config)) or model_type == "dbrx":
            found.append(model_type)
    return found


@pytest.fixture(scope="module")
def families():
    hf.utils.logging.set_verbosity_error()
    return with_experts()


def read(config, folder, length=128):
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return read_hf_config(folder, length=length)


def test_every_family_with_experts_is_known_or_named_as_unknown(families):
    assert len(families) > 60
    assert {name for name in families if name not in FAMILIES} == {name for name in UNKNOWN if name in families}
    assert not set(FAMILIES) & set(UNKNOWN)


def test_every_known_family_is_read_with_its_default_numbers(families, tmp_path):
    for name in families:
        if name in FAMILIES:
            (kind,) = read(default(name), tmp_path).layers
            assert kind.count > 0, name
            assert kind.work.choices <= kind.work.experts, name


# Parts of models of several, which transformers' auto classes do not make: folder and class.
PARTS = {
    "deepseek_ocr2_text": ("deepseek_ocr2", "DeepseekOcr2TextModel"),
    "diffusion_gemma_text": ("diffusion_gemma", "DiffusionGemmaEncoderTextModel"),
    "qwen3_omni_moe_talker_text": ("qwen3_omni_moe", "Qwen3OmniMoeTalkerModel"),
    "qwen3_omni_moe_text": ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    "step3p5": ("step3p7", "Step3p7TextModel"),
    "unlimited_ocr_text": ("unlimited_ocr", "UnlimitedOcrTextModel"),
}


def meta_built(name, config):
    if name in PARTS:
        folder, model = PARTS[name]
        kind = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), model)
    else:
        kind = next(own[type(config)] for own in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING) if type(config) in own)
    with torch.device("meta"):
        return kind._from_config(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_experts_counted_are_those_of_the_model_that_transformers_builds(name, tmp_path):
    if name not in CONFIG_MAPPING_NAMES:
        pytest.skip("these transformers do not have it")  # older ones; CI has all
    config = default(name)
    shape, model = read(config, tmp_path), meta_built(name, config)
    built = sum(
        p.numel() for path, p in model.named_parameters() if EXPERTS.search(path) and not NO_EXPERT.search(path)
    )
    (kind,) = shape.layers
    assert kind.count * kind.work.experts * sum(kind.work.parts_per_expert) == built
    if name not in PARTS:
        whole = sum(p.numel() for p in model.parameters())
        assert shape.dense_parameters + built == pytest.approx(whole, rel=0.2)


def test_an_unknown_family_is_named_with_the_known_ones_and_a_way_to_go_on(tmp_path):
    for name, why in [*UNKNOWN.items(), ("brand_new_moe", "nobody has said")]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "num_experts": 8}))
        with pytest.raises(ValueError, match=f"family {name}, which is not known") as caught:
            read_hf_config(tmp_path, length=16)
        assert why in str(caught.value)
        assert all(known in str(caught.value) for known in ("mixtral", "dbrx", "qwen2_moe", "--layer"))


def test_a_dense_model_is_said_to_have_no_experts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf.LlamaConfig().to_dict(), default=str))
    with pytest.raises(ValueError, match=r"family llama.*it tells of no experts"):
        read_hf_config(tmp_path, length=16)


def test_a_family_whose_experts_are_off_has_none(tmp_path):
    config = default("gemma4_text").to_dict() | {"enable_moe_block": False}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ValueError, match="enable_moe_block is off"):
        read_hf_config(tmp_path, length=16)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({"first_k_dense_replace": 3, "moe_layer_freq": 1}, 5),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 0, 0, 0]}, 3),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 3),
        ({"num_dense_layers": 2}, 6),
        ({"expert_layer_period": 4, "expert_layer_offset": 1}, 2),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 5, "moe_layer_interval": 2}, 3),
        ({"interleave_moe_layer_step": 2}, 4),
        ({"moe_layers": [1, 3]}, 2),
        ({"mlp_layer_types": ["dense", *["sparse"] * 7]}, 7),
        ({"hybrid_override_pattern": "ME*EM-ME"}, 3),
        ({}, 8),
    ],
)
def test_layers_with_experts_are_counted_however_they_are_told(changes, sparse, mixtral, tmp_path):
    config = mixtral | {"num_hidden_layers": 8} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path, length=16).layers[0].count == sparse
