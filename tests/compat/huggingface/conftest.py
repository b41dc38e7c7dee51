"""Small models with random weights, one of each family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}
FINE = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8}


def mixtral(**more: Any) -> hf.PreTrainedModel:
    config = {"intermediate_size": 48, "num_local_experts": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**(TEXT | config | more)))


def qwen2_moe(**more: Any) -> hf.PreTrainedModel:
    shared = {"shared_expert_intermediate_size": 24}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**(TEXT | FINE | shared | more)))


def qwen3_moe(**more: Any) -> hf.PreTrainedModel:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**(TEXT | FINE | {"norm_topk_prob": True} | more)))


def deepseek_v3(**more: Any) -> hf.PreTrainedModel:
    lora = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_key_value_heads": 4}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**(TEXT | sizes | lora | experts | more)))


def glm4_moe(**more: Any) -> hf.PreTrainedModel:
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8}
    return hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**(TEXT | sizes | experts | more)))


def granitemoe(**more: Any) -> hf.PreTrainedModel:
    config = {"intermediate_size": 24, "num_local_experts": 4}
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**(TEXT | config | more)))


def olmoe(**more: Any) -> hf.PreTrainedModel:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**(TEXT | {"intermediate_size": 24, "num_experts": 4} | more)))


def gpt_oss(**more: Any) -> hf.PreTrainedModel:
    config = {"intermediate_size": 48, "num_local_experts": 4, "head_dim": 8, "sliding_window": 8}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**(TEXT | config | more)))


def qwen3_vl_moe() -> hf.PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    text = TEXT | FINE | {"rope_parameters": rope, "rope_scaling": rope}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **special, tie_word_embeddings=False)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


MODELS: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "qwen3_vl_moe": qwen3_vl_moe,
}


# Beside these, families whose gates are of interest.
GATES = {"qwen2_moe": qwen2_moe, "glm4_moe": glm4_moe, "granitemoe": granitemoe}


def built(kind: str, **more: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return (MODELS | GATES)[kind](**more).eval()


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build() -> Callable[..., hf.PreTrainedModel]:
    """Build a model by the name of its family: the same weights at every call."""
    return built


@pytest.fixture
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Make a batch for a model; the second prompt is padded on the left."""

    def make(model: hf.PreTrainedModel, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 60, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :2], ids[1, :2] = 0, 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if model.config.model_type == "qwen3_vl_moe":  # an image of 4 x 4 patches is 4 tokens
            ids[:, 3:7] = 60
            pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator).to(model.dtype)
            grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
            batch |= {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 60).long()}
        return batch

    return make


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a model by the name of its family, and return the folder, for ranks to load it from."""

    def save(kind: str, **more: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        built(kind, **more).save_pretrained(folder)
        return folder

    return save
