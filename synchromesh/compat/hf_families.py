"""How each MoE family of transformers writes its sizes into config.json: which names, which layers, which matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What is special about one or several model types; the defaults hold for most.

    Attributes:
        matrices: of an expert: 3 where it is gated.
        biased: whether experts have biases, of hidden (twice where gated) and width.
        choices: per token, where the configuration does not tell: the family has one number.
        inner: field with the width that tokens are projected to before they reach experts.
        shared: field with the hidden width of an expert that every token passes, one in each layer with experts.
        dense: field with the hidden width of feed-forwards without experts.
        needs: a switch that must be on for there to be experts.
    """

    matrices: int = 3
    biased: bool = False
    choices: int | None = None
    inner: str | None = None
    shared: str | None = None
    dense: str = "intermediate_size"
    needs: str | None = None


USUAL = Family()
WITH_SHARED = Family(shared="shared_expert_intermediate_size")
GRANITE = Family(shared="shared_intermediate_size")
BIASED = Family(biased=True)

# Whose fields say all there is to say.
PLAIN = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "dbrx", "deepseek_ocr2_text", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa", "granitemoe", "granitemoe_swa",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "hy_v4_vl_text", "inkling2_text", "inkling_text", "jamba", "kimi_linear",
    "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mistral4", "mistral_large4_text", "mixtral",
    "olmoe", "phimoe", "qwen3_moe", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
    "sarvam_mla", "sarvam_moe", "solar_open", "unlimited_ocr_text", "zaya",
)  # fmt: skip
SHARED = (
    "flint", "kolibri1", "laguna", "lara_mini", "qwen2_moe", "qwen3_5_moe_text", "qwen3_next",
    "qwen3_omni_moe_talker_text", "qwen4_exp_text",
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType(
    dict.fromkeys(PLAIN, USUAL)
    | dict.fromkeys(SHARED, WITH_SHARED)
    | dict.fromkeys(("granitemoehybrid", "granitemoeshared"), GRANITE)
    | dict.fromkeys(("gpt_oss", "openai_privacy_filter"), BIASED)
    | {
        "cohere2_moe": Family(dense="prefix_dense_intermediate_size"),
        "dots3_note_text": Family(shared="shared_experts_intermediate_size"),
        "diffusion_gemma_text": Family(shared="intermediate_size"),
        "gemma4_text": Family(shared="intermediate_size", needs="enable_moe_block"),
        "llama4_text": Family(shared="intermediate_size", dense="intermediate_size_mlp"),
        "minimax_m3_vl_text": Family(shared="shared_intermediate_size", dense="dense_intermediate_size"),
        "muse_spark_text": Family(inner="moe_hidden_size"),
        "nemotron_h": Family(matrices=2, inner="moe_latent_size", shared="moe_shared_expert_intermediate_size"),
        "nllb-moe": Family(matrices=2, biased=True, choices=2, dense="encoder_ffn_dim"),
        "step3p5": Family(shared="share_expert_dim"),
        "switch_transformers": Family(matrices=2, choices=1, dense="d_ff"),
    }
)

UNKNOWN: Mapping[str, str] = MappingProxyType(
    {
        "doge": "its experts are single rows, not feed-forwards",
        "dots3_note_vision_encoder": "its layers differ in their number of experts",
        "ernie4_5_vl_moe_text": "it has experts of two sizes, for text and for pictures",
        "inkling2_loop_text": "it runs some of its layers several times",
        "jetmoe": "its attention has experts too",
        "longcat_flash": "some of its experts compute nothing, and their load is not known",
        "vitpose_backbone": "its experts are chosen by the data set, not routed",
    }
)


def sparse_layers(config: Config, layers: int) -> int:
    """Return how many layers have experts, by whatever the configuration says of them."""
    for said in (_by_name, _by_list, _by_step, _by_range):
        found = said(config, layers)
        if found is not None:
            return found
    return layers


def _by_name(config: Config, layers: int) -> int | None:
    """Read a list of the kind of each layer's feed-forward, or a string with a letter for each layer."""
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, Sequence):
        return sum(kind != "dense" for kind in kinds)  # there are several that are not
    blocks = config.get("layers_block_type")
    if isinstance(blocks, Sequence):
        return sum(block == "moe" for block in blocks)
    pattern = config.get("hybrid_override_pattern")
    return pattern.count("E") if isinstance(pattern, str) else None


def _by_list(config: Config, layers: int) -> int | None:
    """Read a list of layers, or of a 1 for each layer with experts."""
    moe_layers = config.get("moe_layers")
    if isinstance(moe_layers, Sequence):
        return len(moe_layers)
    frequent = config.get("moe_layer_freq")
    return sum(map(bool, frequent)) if isinstance(frequent, Sequence) else None


def _by_step(config: Config, layers: int) -> int | None:
    """Count the layers at regular distances; encoder and decoder have their own."""
    if "encoder_sparse_step" in config:
        encoder = config.get("encoder_layers") or config.get("num_layers") or 0
        decoder = config.get("decoder_layers") or config.get("num_decoder_layers") or encoder
        steps = config["encoder_sparse_step"], config.get("decoder_sparse_step", 0)
        return sum(count // step if step else 0 for count, step in zip((encoder, decoder), steps, strict=True))
    if "expert_layer_period" in config:
        offset = config.get("expert_layer_offset", 0)
        return sum(layer % config["expert_layer_period"] == offset for layer in range(layers))
    step = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step")
    if step is None:
        return None
    dense = set(config.get("mlp_only_layers") or ())
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _by_range(config: Config, layers: int) -> int | None:
    """Count the layers after the first ones, up to a last one, or every so many."""
    names = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
    first = next((config[name] for name in names if isinstance(config.get(name), int)), 0)
    last, step = config.get("moe_layer_end_index", -1), config.get("moe_layer_freq")
    last = layers - 1 if last in (None, -1) else last
    interval = config.get("moe_layer_interval")
    if interval:
        return sum(first <= layer <= last and (layer + 1) % interval == 0 for layer in range(layers))
    return sum(layer >= first and layer % (step or 1) == 0 for layer in range(layers))
