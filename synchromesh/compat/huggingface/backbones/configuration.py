"""Configurations of the library's backbones as transformers keeps them: a flat config.json, strings for choices.

Fields are those of the backbone's own settings, under their own names, and those that describe experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from synchromesh.compat.huggingface.backbones.dense import dense_fields
from synchromesh.compat.huggingface.swin.configuration import check_choices, default_blocks, experts_of
from synchromesh.models.features import BackboneConfig
from synchromesh.models.focalnet import FocalNetConfig
from synchromesh.models.pvt import PVTConfig
from synchromesh.models.spectrum import SpectrumNetConfig
from synchromesh.models.vit import ViTConfig

Config = TypeVar("Config", bound="SettingsConfig")
EXPERTS: dict[str, Any] = {
    "moe_blocks": None,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router": "linear",
    "router_noise": 0.0,
    "router_aux_loss": "load_balance",
    "router_aux_loss_coef": 0.01,
    "capacity_factor": None,
    "batch_prioritized": True,
    "expert_dropout": 0.0,
    "output_bias": True,
    "aux_loss_in_backward": True,
}
"""Fields that describe experts, with their defaults: as those of `SwinV2MoEConfig`."""


class SettingsConfig(BackboneConfigMixin, PreTrainedConfig):
    """What a backbone is made of: the fields of its settings, and of `EXPERTS`.

    `moe_blocks` lists for each stage the blocks with experts; None is every second one of the later half of the stages,
    and empty lists make a dense model. A subclass names its `__init__`, or else transformers would write another one.
    """

    settings_class: ClassVar[type[BackboneConfig]]
    dense_types: ClassVar[tuple[str, ...]] = ()  # of transformers' models that these are with experts
    attribute_map = {"num_channels": "in_channels"}  # noqa: RUF012

    def __init__(self, **fields: Any) -> None:
        own = {f.name: f.default for f in dataclasses.fields(self.settings_class) if f.name != "experts"}
        if "num_channels" in fields:
            fields["in_channels"] = fields.pop("num_channels")
        for name, default in (own | EXPERTS).items():
            setattr(self, name, _plain(fields.pop(name, default)))
        depths = _depths(self)
        if self.moe_blocks is None:  # pyright: ignore[reportAttributeAccessIssue]  # set above
            self.moe_blocks = default_blocks(depths)
        check_choices(self)
        settings = self.settings()
        self.hidden_size = _widths(settings)[-1]
        self.num_hidden_layers = sum(depths)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(depths) + 1))]
        chosen = {name: fields.pop(name, None) for name in ("out_indices", "out_features")}
        self.set_output_features_output_indices(**chosen)
        super().__init__(**fields)

    @classmethod
    def from_dense(cls: type[Config], dense: PreTrainedConfig, **experts: Any) -> Config:
        """Return the configuration of a dense model of transformers with experts; fields of both may be overridden.

        Raises:
            ValueError: a model of another kind, or a field that these do not have.
        """
        fields = dense_fields(dense, cls.dense_types)
        named = ("id2label", "label2id") if "num_labels" in experts else ()  # of as many classes as the dense one has
        return cls(**{name: value for name, value in fields.items() if name not in named} | experts)

    def settings(self) -> BackboneConfig:
        """Return this in the library's own words, experts included. Raises ValueError where they contradict."""
        given = {
            f.name: _typed(f.default, getattr(self, f.name))
            for f in dataclasses.fields(self.settings_class)
            if f.name != "experts"
        }
        experts = experts_of(self) if any(self.moe_blocks) else None  # pyright: ignore[reportAttributeAccessIssue]
        return self.settings_class(experts=experts, **given)


class ViTMoEConfig(SettingsConfig):
    """What a ViT with experts is made of: the fields of `ViTConfig`, and of `EXPERTS`."""

    model_type = "vit_moe"
    settings_class = ViTConfig
    dense_types = ("vit",)
    __init__ = SettingsConfig.__init__


class FocalNetMoEConfig(SettingsConfig):
    """What a FocalNet with experts is made of: the fields of `FocalNetConfig`, and of `EXPERTS`."""

    model_type = "focalnet_moe"
    settings_class = FocalNetConfig
    dense_types = ("focalnet",)
    __init__ = SettingsConfig.__init__


class PVTMoEConfig(SettingsConfig):
    """What a PVT with experts is made of: the fields of `PVTConfig`, and of `EXPERTS`."""

    model_type = "pvt_moe"
    settings_class = PVTConfig
    dense_types = ("pvt", "pvt_v2")
    __init__ = SettingsConfig.__init__


class SpectrumNetMoEConfig(SettingsConfig):
    """What a SpectrumNet with experts is made of: the fields of `SpectrumNetConfig`, and of `EXPERTS`."""

    model_type = "spectrum_moe"
    settings_class = SpectrumNetConfig
    __init__ = SettingsConfig.__init__


def _depths(config: Any) -> tuple[int, ...]:
    return tuple(config.depths) if hasattr(config, "depths") else (config.depth,)


def _widths(settings: Any) -> tuple[int, ...]:
    if isinstance(settings, ViTConfig):
        return (settings.width,)
    return tuple(settings.width(stage) for stage in range(len(settings.depths)))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _typed(default: Any, value: Any) -> Any:
    """Return a value of JSON as a field with this default wants it."""
    if isinstance(default, Enum):
        return type(default)(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(
            float(each) if isinstance(default, tuple) and isinstance(default[0], float) else each for each in value
        )
    return float(value) if isinstance(default, float) else value
