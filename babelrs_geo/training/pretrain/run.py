"""A run of pretraining on Lightning: what it begins from, and what it leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from babelrs_geo.drafts import draft
from babelrs_geo.errors import ParameterError, WeightsError
from babelrs_geo.models import importing, language, zoo
from babelrs_geo.models.adapter import AdapterConfig
from babelrs_geo.models.annealing import taps_of
from babelrs_geo.models.conversation import add_tokens
from babelrs_geo.models.detector import COMPACT, DetectorConfig
from babelrs_geo.models.imagenet import load_efficientnet_lite0
from babelrs_geo.models.official import INTERNVIT
from babelrs_geo.models.pivot import PivotConfig, PivotModel, image_token_of
from babelrs_geo.models.pivot_weights import Origin as PivotOrigin
from babelrs_geo.models.pivot_weights import load_pivot, save_pivot
from babelrs_geo.models.plain import from_plain, merged, to_plain
from babelrs_geo.models.vit import ViTConfig
from babelrs_geo.training.keeping import LAST, Keeper
from babelrs_geo.training.measured import Measured
from babelrs_geo.training.origin import Origin, weights_before
from babelrs_geo.training.pretrain.answers import Answered, Asker, figures, judge, questions
from babelrs_geo.training.pretrain.corpora import CorpusData, corpora, joined
from babelrs_geo.training.pretrain.module import PivotTraining
from babelrs_geo.training.pretrain.recipe import EncoderPart, LanguagePart, PivotPart, PretrainRecipe
from babelrs_geo.training.schedules import freeze_prior
from babelrs_geo.training.settings import write
from babelrs_geo.training.trainer import RECIPE, Course, Place, begin, train

PIVOT, ENCODER, ANSWERS = "pivot.safetensors", "encoder.safetensors", "answers.jsonl"
"""All that was trained; what a detector starts from; what was asked and answered last."""


@dataclass(frozen=True)
class Pretrained:
    """How a run ended."""

    folder: Path
    step: int
    stopped: bool
    """True where it was told to stop before its last step."""
    figures: Mapping[str, float]
    """Of the last judgement: `answers.figures`, or nothing where nothing was judged on."""


def encoder_of(part: EncoderPart) -> ViTConfig | AdapterConfig:
    """The encoder that a recipe asks for. ParameterError for numbers that there are not."""
    base = {"internvit": INTERNVIT, "compact": COMPACT.backbone, "full": AdapterConfig()}[part.base]
    plain = merged(to_plain(base), part.architecture, "model.encoder.architecture")
    kind: type[Any] = type(base)
    made: ViTConfig | AdapterConfig = from_plain(kind, plain, "model.encoder.architecture")
    return made


def _language(part: LanguagePart) -> tuple[torch.nn.Module, Any]:
    """The language model, and its tokenizer, which has all that conversations need."""
    if part.source is None:
        if part.tokenizer is None:
            raise ParameterError(
                "a language model made from model.language.architecture has no tokenizer; name a folder that holds "
                "one: --set model.language.tokenizer=FOLDER"
            )
        tokenizer = language.load_tokenizer(part.tokenizer)
        add_tokens(tokenizer)
        # as many tokens as the tokenizer has, unless the architecture has room for more
        sizes = {**part.architecture}
        sizes["vocab_size"] = max(len(tokenizer), int(sizes.get("vocab_size", 0)))
        model = language.build(sizes)
    else:
        model, tokenizer = language.load(part.source)
        if part.tokenizer is not None:
            tokenizer = language.load_tokenizer(part.tokenizer)
        add_tokens(tokenizer)
        language.fit_table(model, tokenizer)
    if part.truncate is not None:
        language.truncate(model, part.truncate)
    return model, tokenizer


def build(recipe: PretrainRecipe) -> tuple[PivotModel, Any]:
    """The model as the run begins, and its tokenizer. Raises WeightsError where there are no such weights."""
    part = recipe.model
    torch.manual_seed(recipe.seed)
    model, tokenizer = _begun(part) if part.start else _new(part)
    if part.language.lora is not None:
        model.add_lora(part.language.lora)
    model.freeze(part.freeze)
    if part.encoder.freeze_stem:
        freeze_prior(model.vision_model, part.encoder.freeze_stem)
    model.checkpoint_gradients(part.checkpoint_gradients)
    return model.train(), tokenizer


def _begun(part: PivotPart) -> tuple[PivotModel, Any]:
    """All of it from a file."""
    if part.language.tokenizer is None:
        raise ParameterError(
            "weights hold no tokenizer; name the folder of the one they were made with: "
            "--set model.language.tokenizer=FOLDER"
        )
    tokenizer = language.load_tokenizer(part.language.tokenizer)
    add_tokens(tokenizer)
    path = zoo.find(str(part.start))
    model, _ = load_pivot(path, tau=part.tau)
    taps = taps_of(model.config.encoder, part.taps)
    if taps != model.config.taps:
        model, _ = load_pivot(path, taps, part.tau)
    language.fit_table(model.language_model, tokenizer)
    model.config = replace(model.config, language=language.config_of(model.language_model))
    return model, tokenizer


def _new(part: PivotPart) -> tuple[PivotModel, Any]:
    """Put together."""
    lm, tokenizer = _language(part.language)
    encoder = encoder_of(part.encoder)
    theirs = COMPACT if part.encoder.base == "compact" else DetectorConfig()
    config = PivotConfig(
        encoder=encoder,
        taps=taps_of(encoder, part.taps),
        tau=part.tau,
        mean=theirs.mean,  # as the detector that the encoder is for
        std=theirs.std,
    )
    model = PivotModel(config, lm)
    if part.encoder.start == "imagenet":
        if not isinstance(encoder, AdapterConfig) or encoder.prior != "efficientnet_lite0":
            raise WeightsError(
                "model.encoder.start is imagenet, whose trunk this encoder has not; take base compact, or null"
            )
        load_efficientnet_lite0(model.vision_model.get_submodule("spm.trunk"))
    return model, tokenizer


class PivotKeeper(Keeper):
    """Judges a pivot by its answers, and writes it and its encoder."""

    figures: Mapping[str, float]

    def __init__(
        self, folder: Path, recipe: PretrainRecipe, data: CorpusData, asker: Asker, held_out: Sequence[Path]
    ) -> None:
        super().__init__(folder, recipe.steps, recipe.run, data)
        self.recipe, self.data, self.asker = recipe, data, asker
        self.asked = questions(joined(corpora(held_out)), recipe.ask) if held_out and recipe.run.judge else []
        self.figures = {}
        self._before = weights_before(recipe.model.start)

    def judge(self, trainer: Trainer, module: Measured, step: int) -> None:
        """Ask, tell, and write."""
        assert isinstance(module, PivotTraining)
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        rank, world = trainer.global_rank, trainer.world_size
        self.figures = {}
        if self.asked:
            told = judge(module.model, self.asker, self.asked, shared=not sharded, rank=rank, world=world)
            self.figures = figures(told)
            self.tell(trainer, {f"val_{name}": value for name, value in self.figures.items()}, step)
            if trainer.is_global_zero:
                _write(self.folder / ANSWERS, told)
        model = _whole(module.model) if sharded else module.model
        if trainer.is_global_zero:
            pivot, encoder = self.folder / PIVOT, self.folder / ENCODER
            save_pivot(pivot, model, self.origin(step))
            importing.export(pivot, encoder, "vit", overwrite=True)

    def origin(self, step: int) -> PivotOrigin:
        """What the weights come of."""
        recipe, part = self.recipe, self.recipe.model
        name = part.start or part.language.source or "at random"
        training = {
            "data": recipe.header.data or "; ".join(str(each.meta) for each in self.data.corpora),
            "conversations": len(self.data.conversations),
            "language_model": name,
            "start": part.start or part.encoder.start or "at random",
            "config": write(recipe),
            "steps": step,
            "answers": dict(self.figures),
            **Origin(self.data.fingerprint, self.spent, self._before).to_dict(),
        }
        return PivotOrigin(recipe.name, recipe.header.licence, training)


def _whole(model: PivotModel) -> PivotModel:
    """A model whose parameters are shared among processes, put together. All processes call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        whole = PivotModel(model.config)
    if state:  # the first process has it
        whole.load_state_dict(state, assign=True)
    return whole


def _write(path: Path, told: Sequence[Answered]) -> None:
    with draft(path) as hidden:
        hidden.write_text(
            "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in told), encoding="utf-8"
        )


def fit(
    recipe: PretrainRecipe, data: Sequence[Path], place: Place, held_out: Sequence[Path] = ()
) -> Pretrained:
    """Pretrain as a recipe says; checkpoints, log and weights go to `place.folder`.

    `held_out` are corpora of images that are not learnt from, which are asked about. Raises ParameterError where the
    folder holds another run, or one that was not asked to go on; OutputError where it cannot be written; LabelError,
    WeightsError, SceneError for what the run is made of; TrainingError where a loss is no number, or a process that
    reads data is lost.
    """
    begun = time.monotonic()
    course = Course(
        settings=recipe,
        strategy=recipe.strategy,
    )
    state = begin(course, place)
    model, tokenizer = build(recipe)
    sources = CorpusData(recipe, model.config, tokenizer, data)
    module = PivotTraining(model, recipe, image_token_of(tokenizer))

    def context() -> Any:
        return module.trainer.precision_plugin.forward_context()

    asker = Asker(tokenizer, recipe.view, recipe.ask, context)
    keeper = PivotKeeper(place.folder, recipe, sources, asker, held_out)
    step = train(course, place, keeper, module, sources, state, begun)
    return Pretrained(place.folder, step, step < recipe.steps, keeper.figures)


__all__ = ["ANSWERS", "ENCODER", "LAST", "PIVOT", "RECIPE", "Place", "Pretrained", "build", "fit"]
