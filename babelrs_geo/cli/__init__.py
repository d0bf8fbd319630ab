"""The command line: one thin verb each. Heavy imports happen inside the verb, so that `--help` answers at
once.

Exit codes: 0 done; 1 an error, told in one line on stderr; 2 wrong usage; 3 done, but some tiles could not be
read (they are in the result's coverage as failed); 130 interrupted. Whatever the code but 0 and 3, nothing
was written.
"""

from __future__ import annotations

import click

from babelrs_geo import __version__
from babelrs_geo.cli.archive import archive_group
from babelrs_geo.cli.detect import detect_verb, info_verb
from babelrs_geo.cli.evaluate import evaluate_verb
from babelrs_geo.cli.instruct import instruct_verb
from babelrs_geo.cli.pretrain import pretrain_verb
from babelrs_geo.cli.program import PROGRAM, Program
from babelrs_geo.cli.tile import tile_verb
from babelrs_geo.cli.train import train_verb
from babelrs_geo.cli.weights import weights_group


@click.group(PROGRAM, cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def main() -> None:
    """Find objects in large SAR, infrared and RGB scenes and write them as vectors for QGIS."""


for _verb in (
    detect_verb,
    info_verb,
    archive_group,
    tile_verb,
    instruct_verb,
    pretrain_verb,
    train_verb,
    evaluate_verb,
    weights_group,
):
    main.add_command(_verb)

__all__ = ["main"]
