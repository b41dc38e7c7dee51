"""The recipes by the names that the command line knows, and what the files of a run may hold."""

from __future__ import annotations

from types import MappingProxyType

from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.grouping import BalancedKMeans, Grouping, RandomGroups
from synchromesh.adapt.low_rank import LowRank
from synchromesh.adapt.mtlora import MTLoRA
from synchromesh.adapt.polyhistor import Polyhistor, PolyhistorLite
from synchromesh.adapt.sparse import StaticSparsity
from synchromesh.adapt.split import SplitFFN
from synchromesh.adapt.upcycle import Upcycle
from synchromesh.compat.huggingface import heads as hf
from synchromesh.models.features import BackboneConfig
from synchromesh.models.focalnet import FocalNetConfig
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.centre_panoptic import CentrePanoptic
from synchromesh.models.heads.dense_agreement import AgreementConfig, PixelContrast, Propagation
from synchromesh.models.heads.depth import DepthFPN, DepthHead
from synchromesh.models.heads.graded_ranking import GradedRanking
from synchromesh.models.heads.objects import ObjectHead
from synchromesh.models.heads.panoptic import PanopticHead
from synchromesh.models.heads.semantic import SemanticFPN, SemanticHead
from synchromesh.models.mixtures import CosineGate, Gate, LinearGate
from synchromesh.models.pvt import PVTConfig
from synchromesh.models.spectrum import SpectrumNetConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.vit import ViTConfig
from synchromesh.moe.capacity import (
    BatchPrioritized,
    Capacity,
    Dropless,
    FixedCapacity,
    FixedRows,
    NeededCapacity,
    Priority,
    TokenOrder,
)
from synchromesh.moe.losses import ImportanceLoad, LoadBalance, Loss, OverRanks, ZLoss
from synchromesh.recipes.cascade_coco_b import cascade_coco_b
from synchromesh.recipes.cascade_coco_s import cascade_coco_s
from synchromesh.recipes.cotap_demo import cotap_demo
from synchromesh.recipes.croco_demo import croco_demo
from synchromesh.recipes.demo import demo
from synchromesh.recipes.depth_demo import depth_demo
from synchromesh.recipes.detect_demo import detect_demo
from synchromesh.recipes.digits import digits, digits_dense
from synchromesh.recipes.disparity_demo import disparity_demo
from synchromesh.recipes.emoe_demo import emoe_demo
from synchromesh.recipes.few_shot import few_shot
from synchromesh.recipes.finetune_1k import finetune_1k
from synchromesh.recipes.from_pictures import of_data
from synchromesh.recipes.instance_demo import instance_demo
from synchromesh.recipes.mask2former_ade20k import mask2former_ade20k
from synchromesh.recipes.mixed_ae_demo import mixed_ae_demo
from synchromesh.recipes.mtlora_demo import mtlora_demo
from synchromesh.recipes.panoptic_demo import panoptic_demo
from synchromesh.recipes.pixpro_demo import pixpro_demo
from synchromesh.recipes.segment_demo import segment_demo
from synchromesh.recipes.simmim_demo import simmim_demo
from synchromesh.recipes.simmim_sizes import simmim_b, simmim_g, simmim_h, simmim_l
from synchromesh.recipes.spdf_demo import spdf_demo
from synchromesh.recipes.swinv2_moe_b_22k import swinv2_moe_b_22k
from synchromesh.recipes.swinv2_moe_s_22k import swinv2_moe_s_22k
from synchromesh.recipes.upcycle_demo import upcycle_demo
from synchromesh.tasks.classification import Classification
from synchromesh.tasks.croco import CroCo
from synchromesh.tasks.dense_twins import ViewTwins
from synchromesh.tasks.depth import Depth
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.disparity import Disparity
from synchromesh.tasks.mixed_ae import MixedAE
from synchromesh.tasks.multi_task import MultiTask
from synchromesh.tasks.panoptic import Panoptic
from synchromesh.tasks.segmentation import Segmentation
from synchromesh.tasks.simmim import SimMIM
from synchromesh.tasks.turned_images import TurnedImages
from synchromesh.tasks.upgrade import upgrade_recipe, upgrade_state
from synchromesh.training.catalog import Catalog
from synchromesh.training.rules import RULES, UpdateRule
from synchromesh.training.task import Task

RECIPES = MappingProxyType(
    {
        "demo": demo,
        "digits": digits,
        "digits_dense": digits_dense,
        "detect_demo": detect_demo,
        "instance_demo": instance_demo,
        "segment_demo": segment_demo,
        "panoptic_demo": panoptic_demo,
        "depth_demo": depth_demo,
        "simmim_demo": simmim_demo,
        "simmim_b": simmim_b,
        "simmim_l": simmim_l,
        "simmim_h": simmim_h,
        "simmim_g": simmim_g,
        "pixpro_demo": pixpro_demo,
        "cotap_demo": cotap_demo,
        "mtlora_demo": mtlora_demo,
        "emoe_demo": emoe_demo,
        "upcycle_demo": upcycle_demo,
        "spdf_demo": spdf_demo,
        "croco_demo": croco_demo,
        "disparity_demo": disparity_demo,
        "mixed_ae_demo": mixed_ae_demo,
        "swinv2_moe_s_22k": swinv2_moe_s_22k,
        "swinv2_moe_b_22k": swinv2_moe_b_22k,
        "finetune_1k": finetune_1k,
        "few_shot": few_shot,
        "cascade_coco_s": cascade_coco_s,
        "cascade_coco_b": cascade_coco_b,
        "mask2former_ade20k": mask2former_ade20k,
    }
)
CATALOG = Catalog(
    recipes=RECIPES,
    kinds=MappingProxyType(
        {
            Task: (
                Classification,
                Detection,
                Segmentation,
                Panoptic,
                Depth,
                MultiTask,
                SimMIM,
                ViewTwins,
                CroCo,
                Disparity,
                MixedAE,
                TurnedImages,
            ),
            BackboneConfig: (SwinV2Config, ViTConfig, FocalNetConfig, PVTConfig, SpectrumNetConfig),
            ObjectHead: (CentreBoxes, CascadeMaskRCNN, *hf.BOXES, *hf.MASKS),
            SemanticHead: (SemanticFPN, hf.UperNet, hf.SemanticMasks),
            DepthHead: (DepthFPN,),
            PanopticHead: (CentrePanoptic, hf.PanopticMasks),
            AgreementConfig: (Propagation, PixelContrast, GradedRanking),
            Gate: (LinearGate, CosineGate),
            Capacity: (Dropless, FixedCapacity, FixedRows, NeededCapacity),
            Priority: (TokenOrder, BatchPrioritized),
            UpdateRule: RULES,
            ModuleFactory: (SplitFFN, Upcycle, StaticSparsity, LowRank, MTLoRA, Polyhistor, PolyhistorLite),
            Grouping: (BalancedKMeans, RandomGroups),
            Loss: (LoadBalance, ImportanceLoad, ZLoss, OverRanks),
        }
    ),
    upgrade_recipe=upgrade_recipe,
    upgrade_state=upgrade_state,
    of_data=of_data,
)
