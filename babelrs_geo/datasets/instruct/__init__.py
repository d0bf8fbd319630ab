"""Instruction data: conversations about images, read, and made from labels.

`corpus` reads corpora in InternVL's form; `labelled` turns labels of frames and chips into boxes and concepts,
`questions` asks about them, one function a task, `writing` writes what was asked as a corpus, and `sheet` draws some
of it for a person to check.
"""

from babelrs_geo.datasets.instruct.corpus import Conversation, Corpus, Turn
from babelrs_geo.datasets.instruct.questions import TASKS, boxes_in
from babelrs_geo.datasets.instruct.writing import InstructOptions, Written, write_corpus

__all__ = [
    "TASKS",
    "Conversation",
    "Corpus",
    "InstructOptions",
    "Turn",
    "Written",
    "boxes_in",
    "write_corpus",
]
