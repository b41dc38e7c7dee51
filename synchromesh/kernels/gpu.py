"""The kernels of a GPU. Imported where there is one: Triton comes with torch there."""

from __future__ import annotations

import dataclasses

from synchromesh.kernels import Kernels
from synchromesh.kernels.direct_mlp import triton as direct_mlp
from synchromesh.kernels.fused_mlp import gluon as gluon_mlp
from synchromesh.kernels.fused_mlp import triton as fused_mlp
from synchromesh.kernels.gate import tensor_cores as gate
from synchromesh.kernels.grouped_mm import gluon as gluon_mm
from synchromesh.kernels.grouped_mm import triton as grouped_mm
from synchromesh.kernels.mark import triton as mark
from synchromesh.kernels.permute import triton as permute
from synchromesh.kernels.positions import triton as positions
from synchromesh.kernels.quantized_mlp import triton as quantized_mlp
from synchromesh.kernels.row_map import triton as row_map
from synchromesh.kernels.scaled_mm import triton as scaled_mm
from synchromesh.kernels.segment_map import triton as segment_map
from synchromesh.kernels.select import triton as select

TRITON = Kernels(
    gate=gate.gate,
    select=select.select,
    positions=positions.positions,
    row_map=row_map.row_map,
    segment_map=segment_map.segment_map,
    gather=permute.gather,
    combine=permute.combine,
    grouped_mm=grouped_mm.grouped_mm,
    scaled_mm=scaled_mm.scaled_mm,
    fused_mlp=quantized_mlp.fused_mlp,
    fuses=fused_mlp.fuses,
    mark=mark.mark,
    marked_mlp=quantized_mlp.marked_mlp,
    direct_mlp=direct_mlp.direct_mlp,
    prefers_direct=direct_mlp.prefers_direct,
)
GLUON = dataclasses.replace(TRITON, grouped_mm=gluon_mm.grouped_mm, fused_mlp=gluon_mlp.fused_mlp, marked_mlp=None)
"""Those with warp-specialised products (sm_90, sm_100): for an A/B test, whatever the measured table says of them."""
