"""A whole training, from settings to weights, table and plot; at every point it can be killed and gone on with."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

import ahn
from ahn.attachment import attachment_of
from ahn.checkpoint import describe
from ahn.errors import ConfigError, one_line
from ahn.memories import split_names
from ahn.models import load_model, load_tokenizer
from ahn.models.loading import is_gguf
from ahn.models.text import evenly
from ahn.training.anchors.joint import load_score_weights
from ahn.training.batches import Pieces, PieceStream, collate
from ahn.training.calibration import calibrate, calibrated
from ahn.training.data import load_pieces, stream_pieces
from ahn.training.distiller import Distiller
from ahn.training.initialization import copy_common, set_initial_decay, set_initial_gate
from ahn.training.log import Lines, Say, read_history
from ahn.training.model_card import write_training_card
from ahn.training.precision import fastest_precision
from ahn.training.readout import solve_readout
from ahn.training.report import PLOT, TABLE, Report, evaluate, plot_losses, write_report
from ahn.training.saving import last_whole_checkpoint, load_adapter, save_adapter
from ahn.training.settings import FILE, START, TrainSettings, read_yaml, write_yaml
from ahn.training.sources import check_places
from ahn.training.teacher import TeacherCache
from ahn.training.trainer import AHNTrainer

_STATE = "trainer_state.json"
_MAY_CHANGE = {"log_every", "save_every", "keep", "report_tokens", "report_to", "teacher_cache", "precision", "licence"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        folder: Where the adapter, the settings, the report and the plot are.
        report: The closing table, or `None` if there was nothing to read.
        curves: By stage, the lines of its log.
    """

    folder: Path
    report: Report | None
    curves: dict[str, list[dict[str, float]]]


def train(settings: TrainSettings, resume: bool = False, say: Say | None = None, progress: bool = False) -> Outcome:
    """Trains memories, and writes them, the settings, a table of perplexities and a plot of the loss into a folder.

    Args:
        settings: The settings.
        resume: Whether to go on with what a killed run left in the folder; from the start if it left nothing.
        say: Is given a line of text now and then.
        progress: Whether to draw a progress bar.

    Raises:
        ConfigError: A setting cannot work, or differs from those of the run to go on with.
        DataError: The data cannot be found or read.
        ModelError: The base model cannot be found, loaded or distilled.
        CheckpointError: The folder cannot be written, or the adapter to start from does not fit.
    """
    say = say or (lambda text: None)
    arguments = {stage: training_arguments(settings, stage, progress) for stage in settings.stages if stage != START}
    folder = Path(settings.out).expanduser()
    if _first_process():
        check(settings, resume)
    tokenizer = load_tokenizer(settings.model)
    sequences, held_out = _data(settings, tokenizer, say)
    begun = any(_is_begun(Path(str(args.output_dir))) for args in arguments.values())
    model = _model(settings, sequences, say, begun)
    if settings.precision == "auto" and "distill" in settings.stages:
        settings = dataclasses.replace(settings, precision=_precision(model, say))
    _write_settings(settings, folder)  # only now, so that a training that is refused leaves no folder
    has_anchors = load_score_weights(model, settings, say)
    curves = {}
    for stage, args in arguments.items():
        curves[stage] = _run_stage(model, settings, stage, args, (sequences, held_out), say)
    saves = arguments[settings.stages[-1]].should_save if arguments else _first_process()
    save_adapter(model, folder, write=saves)
    report = None
    if saves:
        report = _close(model, settings, held_out, curves, folder, say)
        if has_anchors:
            ahn.save_anchors(model, folder)
        write_training_card(model, settings, report, folder)
    return Outcome(folder, report, curves)


def check(settings: TrainSettings, resume: bool = False) -> None:
    """Checks all that can be checked before anything is loaded.

    Raises:
        ConfigError: A setting cannot work, or the folder is in use.
        DataError: Data cannot be found.
        ModelError: There is no base model of this name.
        CheckpointError: There is no such adapter.
    """
    from ahn.models import resolve

    if not settings.data:
        raise ConfigError("there is no data to train on; name a file, a folder or a dataset")
    if not settings.out:
        raise ConfigError("there is no folder to write to; name one")
    split_names(settings.memory)
    check_places([*settings.data, *settings.valid])
    _check_folder(settings, resume)
    resolve(settings.model)
    if settings.adapter is not None:
        describe(settings.adapter)


def training_arguments(settings: TrainSettings, stage: str, progress: bool = False) -> TrainingArguments:
    """The settings in the words of transformers.

    Raises:
        ConfigError: transformers refuses a value, or an argument is unknown, or follows from another setting.
    """
    transfer = stage == "transfer"
    values: dict[str, Any] = {
        "output_dir": str(Path(settings.out).expanduser() / stage),
        "max_steps": settings.transfer_steps if transfer else settings.steps,
        "learning_rate": settings.transfer_lr if transfer else settings.lr,
        "per_device_train_batch_size": settings.batch,
        "per_device_eval_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "all",
        "save_steps": settings.save_every,
        "save_total_limit": settings.keep,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": settings.report_to,
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"dispatch_batches": False},
    }
    if taken := sorted(set(values) & set(settings.arguments)):
        raise ConfigError(f"arguments must not name {taken[0]}, which other settings decide; change those instead")
    try:
        arguments = TrainingArguments(**{**values, **_on_cpus(), **settings.arguments})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"transformers refuses the arguments: {one_line(error)}") from None
    _check_processes(arguments)
    known = get_available_reporting_integrations()
    if unknown := [name for name in arguments.report_to or [] if name not in known]:
        there = ", ".join([*known, "none"])
        raise ConfigError(f"report_to names {unknown[0]}, which is unknown or not installed; there are {there}")
    return arguments


def _check_processes(arguments: TrainingArguments) -> None:
    """Checks that processes that were started together train together."""
    if arguments.world_size == 1 < _started_processes():
        raise ConfigError(
            f"torchrun started {_started_processes()} processes that do not find each other, so that each would train "
            "alone; start one process, or set arguments: {use_cpu: true, ddp_backend: gloo}"
        )


def _started_processes() -> int:
    """Processes that torchrun started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _on_cpus() -> dict[str, Any]:
    """What several processes need where there are no accelerators; transformers would leave each of them alone."""
    if _started_processes() == 1 or torch.accelerator.is_available():
        return {}
    return {"use_cpu": True, "ddp_backend": "gloo"}


def _write_settings(settings: TrainSettings, folder: Path) -> None:
    """Puts the settings into the folder, which makes it the folder of a training."""
    if not _first_process():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(settings, folder / FILE)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); name another folder") from None


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _check_folder(settings: TrainSettings, resume: bool) -> None:
    folder = Path(settings.out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder to write")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not resume:
        raise ConfigError(f"{folder} is not empty; name another folder, or go on with what is there by --resume")
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder} holds no {FILE}, so it is no training to go on with; name another folder")
    before, now = TrainSettings.from_dict(read_yaml(folder / FILE)).to_dict(), settings.to_dict()
    changed = [name for name in now if name not in {*_MAY_CHANGE, "out"} and before[name] != now[name]]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{folder} was begun with {name} = {before[name]}, not {now[name]}; go on with the same settings, or "
            "begin in another folder"
        )


def _data(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, say: Say) -> tuple[Pieces | PieceStream, Pieces]:
    """Sequences to train on and held-out ones."""
    chunking = dataclasses.replace(settings.chunking, held_out=0.0) if settings.valid else settings.chunking
    say(f"reading {', '.join(settings.data)}")
    sequences: Pieces | PieceStream
    if settings.streaming:
        sequences, held_out = stream_pieces(settings.data, tokenizer, chunking, settings.query)
    else:
        sequences, held_out = load_pieces(settings.data, tokenizer, chunking, settings.query)
        say(f"{len(sequences):,} sequences, {sequences.tokens:,} tokens; held out: {held_out.tokens:,} tokens")
    if settings.valid:
        held_out, _ = load_pieces(settings.valid, tokenizer, chunking, settings.query)
    return sequences, held_out


def _is_begun(folder: Path) -> bool:
    """Whether a stage has left weights to go on from."""
    return (folder / "ahn_config.json").is_file() or last_whole_checkpoint(folder) is not None


def _model(settings: TrainSettings, sequences: Pieces | PieceStream, say: Say, begun: bool) -> Any:
    """The base model with the memory as it is before the first step; any memory if its weights come later."""
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = ("bfloat16" if half else "float32") if settings.dtype == "auto" else settings.dtype
    if settings.quantize is not None or is_gguf(settings.model):
        dtype = "float32"
    model = load_model(settings.model, dtype, quantize=settings.quantize)
    torch.manual_seed(settings.seed)
    ahn.attach(model, settings.memory_config())
    if begun:
        return model
    if settings.adapter is not None and describe(settings.adapter).memory == settings.memory:
        ahn.load(model, settings.adapter)
        return model
    _begin(model, settings, sequences, say)
    return model


def _begin(model: Any, settings: TrainSettings, sequences: Pieces | PieceStream, say: Say) -> None:
    """Initial weights of the memories: from another adapter, and a closed form for those that it does not have."""
    if settings.initial_decay is not None:
        set_initial_decay(model, *settings.initial_decay, seed=settings.seed)
    fresh = attachment_of(model).memories
    if settings.adapter is not None:
        copied = copy_common(model, settings.adapter)
        fresh = [memory for memory in fresh if memory not in copied.memories]
        say(f"from {settings.adapter}: {', '.join(copied.parameters)}")
    solved = [] if settings.initial_readout is None else calibrated(fresh)
    gated = [memory for memory in fresh if memory not in solved]
    if gated and settings.initial_gate is not None:
        set_initial_gate(model, settings.initial_gate, [item["input_ids"] for item in _first(sequences, 4)], gated)
    if fresh and settings.initial_readout is not None:
        layers = "every layer" if settings.adapter is None else "the other layers"
        say(f"solving the read-out of {layers} on a few texts")
        batches = [collate([item]) for item in _first(sequences, settings.initial_texts)]
        calibrate(model, batches, settings.span_draw, fresh)
        solve_readout(model, batches, settings.span_draw, settings.initial_readout, settings.upper_readout, fresh)


def _first(sequences: Pieces | PieceStream, count: int) -> list[Any]:
    """A few sequences; those in memory are taken from all over the data."""
    if isinstance(sequences, Pieces):
        return [sequences[index] for index in evenly(range(len(sequences)), count)]
    return list(itertools.islice(sequences, count))


def _run_stage(
    model: Any,
    settings: TrainSettings,
    stage: str,
    args: TrainingArguments,
    data: tuple[Pieces | PieceStream, Pieces],
    say: Say,
) -> list[dict[str, float]]:
    """Trains, or goes on, or takes what is done already; the lines of the log."""
    folder = Path(str(args.output_dir))
    if (folder / "ahn_config.json").is_file():
        say(f"{stage}: done before")
        load_adapter(model, folder)
        return read_history(folder / _STATE)
    checkpoint = last_whole_checkpoint(folder, say)
    if settings.eval_every and len(data[1]):
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, settings.eval_every
        args.eval_on_start = checkpoint is None
    trainer = AHNTrainer(
        _distiller(model, settings, stage),
        args,
        draw=settings.span_draw,
        evaluation_span=settings.span,
        loss_share=settings.loss_share,
        scale_lr=settings.scale_lr if stage == "distill" else 0.0,
        relative=settings.transfer_relative and stage == "transfer",
        anchors=settings.anchor_draw if stage == "distill" else None,
        average=settings.average if stage == "distill" else 0.0,
        train_dataset=data[0],
        eval_dataset=data[1].spread(settings.eval_tokens) if len(data[1]) else None,
        callbacks=[Lines(stage, say)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    if trainer.average is not None:
        trainer.average.settle()
    trainer.save_model()  # marks the stage as done
    trainer.accelerator.wait_for_everyone()
    return read_history(folder / _STATE)


def _distiller(model: Any, settings: TrainSettings, stage: str) -> Distiller:
    """Teacher and student of a stage."""
    distill = stage == "distill"
    distiller = Distiller(
        model,
        settings.losses,
        "distill" if distill else "transfer",
        settings.slice_tokens,
        settings.recomputed != "none",
        teacher=TeacherCache(settings.teacher_cache, model) if distill and settings.teacher_cache is not None else None,
        precision=torch.bfloat16 if distill and settings.precision == "bfloat16" else None,
        trained=settings.trained_memories,
    )
    if distill and settings.recomputed == "layers":
        distiller.activation_checkpointing_enable()
    return distiller


def _precision(model: Any, say: Say) -> str:
    """What the base multiplies in: the faster one on a CPU with one process, its own elsewhere."""
    weight = model.get_input_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.distributed.is_initialized():
        return "float32"
    precision = str(fastest_precision(model)).removeprefix("torch.")
    say(f"the base multiplies in {precision}, which is the faster here")
    return precision


def _close(
    model: Any, settings: TrainSettings, held_out: Pieces, curves: Mapping[str, Any], folder: Path, say: Say
) -> Report | None:
    """Table and plot."""
    try:
        if curves:
            plot_losses(curves, folder / PLOT)
    except ImportError:
        say("no plot: matplotlib is not installed (pip install 'ahn[train]')")
    distiller = Distiller(model, stage="transfer")
    if not settings.report_tokens:
        return None
    if distiller.is_sharded():
        say("no closing table: the weights are spread over several processes")
        return None
    if not len(held_out):
        say("no closing table: " + ("no held-out text is long enough" if settings.held_out else "no text is held out"))
        return None
    say("reading held-out text in the modes full, window and ahn" + (", with anchors" if any(settings.anchors) else ""))
    distiller.finish()
    chosen = held_out.spread(settings.report_tokens)
    sequences = [chosen[number]["input_ids"] for number in range(len(chosen))]
    report = evaluate(model, sequences, settings.span, settings.report_tokens, settings.reported_anchors)
    if report is None:
        say("no closing table: no held-out text is longer than sinks and window")
    else:
        seen = max((line.get("num_input_tokens_seen", 0) for lines in curves.values() for line in lines), default=0)
        write_report(report, folder / TABLE, {"base": settings.model, "memory": settings.memory, "tokens_seen": seen})
    return report
