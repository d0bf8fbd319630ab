"""Chips: scenes and their labels cut into files for training, with an index and splits that share no ground.

`plan` parts the ground and lays the grids without a pixel read, `shown` says what a chip shows of the objects, `cut`
does one task of the plan, `run` does all of them and joins what they leave, `tables` reads and writes the folder's
tables, `geotiff` writes a chip.
"""

from babelrs_geo.chips.options import COMPRESSIONS, SPLITS, ChipOptions
from babelrs_geo.chips.run import Cut, cut_chips
from babelrs_geo.chips.tables import open_chip, read_index, read_labels
from babelrs_geo.cluster import Workers

__all__ = [
    "COMPRESSIONS",
    "SPLITS",
    "ChipOptions",
    "Cut",
    "Workers",
    "cut_chips",
    "open_chip",
    "read_index",
    "read_labels",
]
