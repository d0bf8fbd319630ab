"""When two boxes are one object."""

from __future__ import annotations

from dataclasses import dataclass

from babelrs_geo.errors import ParameterError


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """When two boxes of a class are one object. Raises `ParameterError` for a share outside [0, 1]."""

    iou: float = 0.5
    """Intersection over union above which the lower score goes."""
    containment: float = 0.5
    """Intersection over the smaller box above which the lower score goes; 1 switches it off."""
    edge: float = 4.0
    """Pixels: a box that comes this near to an edge of its tile is taken to be cut there."""
    seam: float = 0.5
    """IoU on the ground that two tiles share above which their cut boxes are pieces of one object."""
    join: bool = True
    """Whether pieces become one box; if not, each stays."""

    def __post_init__(self) -> None:
        for name in ("iou", "containment", "seam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ParameterError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if self.edge < 0:
            raise ParameterError(f"edge is {self.edge} px; it must be 0 or more")
