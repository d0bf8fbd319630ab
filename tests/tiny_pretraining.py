"""A recipe of pretraining of a few steps with a tiny encoder and language model, and what it learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from test_datasets import write_soi
from tiny_model import TINY
from tiny_pivot import QWEN, byte_tokenizer

from babelrs_geo.datasets.instruct import InstructOptions, write_corpus
from babelrs_geo.models.plain import to_plain


def write_data(root: Path) -> Path:
    """Frames of three sensors (`soi`), questions about them (`corpus.meta.json`), a tokenizer (`tokenizer`)."""
    write_soi(root / "soi", images=4)
    byte_tokenizer().save_pretrained(root / "tokenizer")
    return write_corpus([root / "soi"], root / "corpus.jsonl", InstructOptions(per_image=7)).meta


def tiny_pretraining(root: Path, steps: int = 5, **changes: Any) -> dict[str, Any]:
    """Plain values of a recipe on what `write_data` wrote."""
    return {
        "name": "tiny",
        "steps": steps,
        "micro": 2,
        "accumulate": 2,
        "lr": 2e-3,
        "rates": {"projector": 5e-3},
        "precision": "32",
        "model": {
            "encoder": {"base": "compact", "architecture": to_plain(TINY.backbone)},
            "language": {"architecture": QWEN, "tokenizer": str(root / "tokenizer")},
            "tau": 4,
        },
        "view": {"tile": 64, "most_tiles": 1, "longest": 400, "system": None},
        "ask": {"most": 2, "longest": 4, "batch": 3},
        "run": {"checkpoint_minutes": 0, "log_every": 1, "gradients_every": 2, "tensorboard": False},
        **changes,
    }


def write_pretraining(path: Path, **given: Any) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(tiny_pretraining(**given)))
    return path
