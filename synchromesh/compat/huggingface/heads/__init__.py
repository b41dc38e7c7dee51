"""transformers' heads on backbones of ours, as values: `from synchromesh.compat.huggingface import heads as hf`."""

from synchromesh.compat.huggingface.heads.boxes import DeformableDetr as DeformableDetr
from synchromesh.compat.huggingface.heads.boxes import Detr as Detr
from synchromesh.compat.huggingface.heads.boxes import DFine as DFine
from synchromesh.compat.huggingface.heads.boxes import RTDetrV2 as RTDetrV2
from synchromesh.compat.huggingface.heads.fields import Levels as Levels
from synchromesh.compat.huggingface.heads.fields import levels_of as levels_of
from synchromesh.compat.huggingface.heads.fields import pyramid_fields as pyramid_fields
from synchromesh.compat.huggingface.heads.masks import Mask2Former as Mask2Former
from synchromesh.compat.huggingface.heads.masks import MaskFormer as MaskFormer
from synchromesh.compat.huggingface.heads.masks import PanopticMasks as PanopticMasks
from synchromesh.compat.huggingface.heads.masks import SemanticMasks as SemanticMasks
from synchromesh.compat.huggingface.heads.upernet import Norms as Norms
from synchromesh.compat.huggingface.heads.upernet import UperNet as UperNet

BOXES = (Detr, DeformableDetr, RTDetrV2, DFine)
MASKS = (Mask2Former, MaskFormer)
