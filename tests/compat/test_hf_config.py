import json

import pytest
import torch
import transformers as hf

from synchromesh.compat.hf_config import auto_class, read_hf_config

DEEPSEEK = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "vocab_size": 102400,
}


def written(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def parameters(shape):
    (kind,) = shape.layers
    return shape.dense_parameters + kind.count * kind.work.experts * sum(kind.work.parts_per_expert)


def test_mixtral_has_47_thousand_million_parameters(mixtral, tmp_path):
    shape = read_hf_config(written(tmp_path, mixtral), length=4096)
    (kind,) = shape.layers
    assert (kind.count, kind.tokens, kind.work.experts, kind.work.choices) == (32, 4096, 8, 2)
    assert kind.work.dtype == torch.bfloat16
    assert parameters(shape) == pytest.approx(46.7e9, rel=0.005)


def test_deepseek_v2_lite_has_16_thousand_million_parameters(tmp_path):
    shape = read_hf_config(written(tmp_path, DEEPSEEK) / "config.json", length=4096)
    (kind,) = shape.layers
    assert (kind.count, kind.work.hidden) == (26, 1408)  # the first layer is dense
    assert parameters(shape) == pytest.approx(15.7e9, rel=0.02)


def test_a_text_config_inside_another_is_found(mixtral, tmp_path):
    shape = read_hf_config(written(tmp_path, {"text_config": mixtral}), length=16)
    assert shape.name == "mixtral"


@pytest.mark.parametrize("missing", ["num_local_experts", "hidden_size", "num_experts_per_tok"])
def test_a_model_without_experts_is_refused_by_the_name_of_what_is_missing(mixtral, tmp_path, missing):
    config = {name: value for name, value in mixtral.items() if name != missing}
    with pytest.raises(ValueError, match=missing):
        read_hf_config(written(tmp_path, config), length=16)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="cannot read"):
        read_hf_config(tmp_path, length=16)
    with pytest.raises(ValueError, match="cannot read"):
        read_hf_config(tmp_path / "none.json", length=16)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (hf.MixtralConfig(), hf.AutoModelForCausalLM),
        (hf.SwitchTransformersConfig(), hf.AutoModelForSeq2SeqLM),
        (hf.NllbMoeConfig(), hf.AutoModelForSeq2SeqLM),
        (hf.Qwen3VLMoeConfig(), hf.AutoModelForImageTextToText),
        (hf.OpenAIPrivacyFilterConfig(architectures=["XForTokenClassification"]), hf.AutoModelForTokenClassification),
        (hf.Llama4Config(architectures=["Llama4ForConditionalGeneration"]), hf.AutoModelForImageTextToText),
    ],
    ids=lambda one: getattr(one, "__name__", type(one).__name__),
)
def test_the_class_that_loads_a_model_knows_its_configuration(config, wanted, tmp_path):
    config.save_pretrained(tmp_path)
    found = getattr(hf, auto_class(tmp_path))
    assert found is wanted
    assert type(config) in found._model_mapping


def test_a_folder_without_a_configuration_is_taken_for_a_language_model(tmp_path):
    assert auto_class(tmp_path) == "AutoModelForCausalLM"
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no configuration"):
        auto_class(tmp_path)
