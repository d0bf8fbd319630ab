"""Everything babelrs-geo raises on purpose.

    BabelError
    ├── SceneError       (OSError)     a raster cannot be opened, read or understood
    ├── SensorError      (ValueError)  the sensor is unknown, unclear, or does not fit the bands
    ├── GeorefError      (ValueError)  a place on the ground was asked of pixels that have none
    ├── LabelError       (ValueError)  vectors, labels or an area of interest cannot be used
    ├── ParameterError   (ValueError)  an option is out of range or contradicts another
    │   └── BatchError                 the memory does not suffice for a batch of tiles
    ├── SchedulerError   (ConnectionError)  a Dask scheduler that the work was given to no longer answers
    ├── WeightsError     (ValueError)  a checkpoint is missing, damaged, or lacks what was asked of it
    ├── TrainingError    (ArithmeticError)  training cannot go on: no number for a loss, or lost workers
    └── OutputError      (OSError)     a result cannot be written where it was asked for

Each leaf also inherits the standard exception a caller would expect, so `except OSError` and `except ValueError`
work without importing this module. A message is one line: what was given, what was expected, what to do next.
"""


class BabelError(Exception):
    """Root of the tree: catching it catches all that the library raises on purpose."""


class SceneError(BabelError, OSError):
    """A raster cannot be opened, read or understood."""


class SensorError(BabelError, ValueError):
    """The sensor is unknown, cannot be told from the metadata, or does not fit the bands."""


class GeorefError(BabelError, ValueError):
    """A place on the ground was asked of pixels that have none, or a georeference is degenerate."""


class LabelError(BabelError, ValueError):
    """Vectors, labels or an area of interest cannot be used."""


class ParameterError(BabelError, ValueError):
    """An option is out of range or contradicts another one."""


class BatchError(ParameterError):
    """The memory does not suffice for a batch of tiles."""


class SchedulerError(BabelError, ConnectionError):
    """A Dask scheduler that the work was given to no longer answers."""


class WeightsError(BabelError, ValueError):
    """A checkpoint is missing, damaged, or lacks the sensor or class asked of it."""


class TrainingError(BabelError, ArithmeticError):
    """Training cannot go on: a loss or a gradient is no number, or a process that reads data was lost."""


class OutputError(BabelError, OSError):
    """A result cannot be written where it was asked for."""
