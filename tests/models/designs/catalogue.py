"""Every design of this folder."""

from __future__ import annotations

from tests.models.designs.depth import DEPTH_DESIGNS
from tests.models.designs.design import Design
from tests.models.designs.images import IMAGE_DESIGNS
from tests.models.designs.kinds import KIND_DESIGNS
from tests.models.designs.layouts import LAYOUT_DESIGNS
from tests.models.designs.plain_blocks import BLOCK_DESIGNS
from tests.models.designs.plain_loops import LOOP_DESIGNS
from tests.models.designs.scaled import SCALED_DESIGNS
from tests.models.designs.steps import STEP_DESIGNS
from tests.models.designs.stream_kinds import STREAM_KIND_DESIGNS
from tests.models.designs.stream_models import STREAM_DESIGNS
from tests.models.designs.styles import STYLE_DESIGNS
from tests.models.designs.traps import TRAP_DESIGNS

DESIGNS: tuple[Design, ...] = (
    *BLOCK_DESIGNS,
    *LOOP_DESIGNS,
    *SCALED_DESIGNS,
    *IMAGE_DESIGNS,
    *TRAP_DESIGNS,
    *STREAM_DESIGNS,
    *STREAM_KIND_DESIGNS,
    *DEPTH_DESIGNS,
    *STEP_DESIGNS,
    *STYLE_DESIGNS,
    *LAYOUT_DESIGNS,
    *KIND_DESIGNS,
)
