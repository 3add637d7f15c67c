"""What a run trains, from its settings: models, text encoders, and the DeepSpeed engine."""

from dataclasses import dataclass, replace

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from gentron_fast.config import GenTronConfig
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_fast.index import INDEX_NAME
from gentron_fast.model import GenTron
from gentron_fast.text import TextEncoder
from gentron_train.data.loader import DataSettings, Loader, make_loader
from gentron_train.data.options import DTYPES
from gentron_train.flops import parameter_count
from gentron_train.memory import WHOLE_MODEL, model_config
from gentron_train.objective import Objective
from gentron_train.process import say
from gentron_train.settings import Settings, stored_config
from gentron_train.sharding import (
    TEMPORAL,
    Source,
    fresh_weights,
    restore_masters,
    sharded_model,
    stored_weights,
)
from gentron_train.small_world.renderer import ensure_shards, vocabulary
from gentron_train.teacher import (
    StoredTeacher,
    Teacher,
    check_teacher,
    make_teacher,
    shares_line,
)


@dataclass(frozen=True)
class Parts:
    """What a run trains: the transformer, its weights once more, and the text encoder.

    source: of a transformer that is ZeRO-3's already, its fp32 weights once more. train_text: the
    encoder trains too, else it is frozen and stays out of the engine; None where the data holds its
    output.
    """

    transformer: GenTron
    source: Source | None
    text_encoder: TextEncoder | None
    train_text: bool
    teacher: Teacher | StoredTeacher | None = None  # of a distillation


def check_start(settings: Settings, stage: str) -> None:
    """ValueError or FileNotFoundError where a stage has no model to start from; a line where there
    is no more than a transformer, or what a distillation is given does not fit."""
    if (stage == "distill") != (settings.teacher is not None):
        wanted = "a distillation needs --teacher PIPELINE"
        raise ValueError(
            wanted if stage == "distill" else f"--teacher is for distillation, not {stage}"
        )
    if stage == "distill":
        check_teacher(settings)
    if settings.init is not None:
        stored = stored_config(settings.init / "transformer")
        if stored.guidance_embedding and stage != "distill":
            raise ValueError(
                f"{settings.init} is distilled, its guidance an input: train its teacher on, and "
                "distil that (train/distill.py)"
            )
        if not (settings.init / INDEX_NAME).is_file():
            say(
                f"{settings.init} is no whole pipeline, it has no {INDEX_NAME}: the parts that are "
                "there are taken"
            )
    elif stage == "t2v":
        raise ValueError("T2V starts from a T2I pipeline: --init T2I_FOLDER")


def make_missing(settings: Settings, stage: str) -> None:
    """Autoencoder and text encoders of the small model, where there are none and the data holds no
    output of theirs, and shards that are not rendered on demand: hours of work, for one rank."""
    if settings.preset != "small":
        return
    by_name = settings.images is not None or settings.clips is not None
    if not by_name and settings.rendered_samples() is None:
        ensure_shards(settings.data, settings.make_images, settings.make_clips)
    data = settings.data_settings(stage)
    if not (data.precomputed or (settings.vae / "config.json").exists()):
        from gentron_train.small_world.autoencoder import command as train_vae

        train_vae(["--data", str(settings.data), "--out", str(settings.vae), "--resume"])
    text = settings.text
    if not (data.has_text or text is None or (text / "t5").is_dir()):
        from gentron_train.small_world.text_encoders import command as train_text_encoders

        train_text_encoders(["--out", str(text), "--resume"])


def build_parts(settings: Settings, stage: str, data: DataSettings, device: torch.device) -> Parts:
    """The model of a stage, fresh or from --init, and its text encoder."""
    folder = None if settings.init is None else settings.init / "transformer"
    config = model_config(settings, stage)
    torch.manual_seed(settings.seed)
    if (parameters := parameter_count(config)) > WHOLE_MODEL:
        source = fresh_weights(config, settings.seed)
        if folder is not None:
            source = stored_weights(folder, config, settings.seed, settings.fresh_temporal)
        zero = deepspeed_config(settings, parameters, device)
        dtype = DTYPES[settings.parameters]
        transformer = sharded_model(config, source, zero, dtype, device)
    else:
        if folder is None:
            transformer = GenTron(config)
        else:
            transformer = GenTron.from_pretrained(folder, torch.float32)
            if transformer.config.temporal and settings.fresh_temporal:
                transformer = _image_model(transformer)
            if config.temporal and not transformer.config.temporal:
                transformer = GenTron.from_t2i(transformer)
            if config.guidance_embedding and not transformer.config.guidance_embedding:
                transformer = GenTron.from_teacher(transformer)
        source = None
    pretrained = settings.clip is not None or settings.t5 is not None
    train_text = stage == "t2i" and settings.preset == "small" and settings.train_text
    train_text = train_text and not pretrained and not data.precomputed
    text_encoder = None
    if train_text and settings.init is settings.text is None:
        from gentron_train.small_world.architecture import small_text_encoder

        text_encoder = small_text_encoder(vocabulary())
    elif not data.has_text:
        dtype = torch.float32 if train_text else DTYPES[settings.parameters]
        text_encoder = load_text_encoder(settings, config, dtype)
    teacher, stored = None, data.trajectories
    if stage == "distill":
        say(shares_line(settings, stored))
        teacher = make_teacher(settings, stored, device)
    elif stored and stored.get("p_null"):
        raise ValueError(
            f"the shards hold trajectories, for which {stored['p_null']:.0%} of their captions "
            "were dropped: train on those that they were made of"
        )
    return Parts(transformer, source, text_encoder, train_text, teacher)


def _image_model(model: GenTron) -> GenTron:
    """The shared layers of a T2V model."""
    image_model = GenTron(replace(model.config, temporal=False))
    shared = {key: tensor for key, tensor in model.state_dict().items() if TEMPORAL not in key}
    image_model.load_state_dict(shared)
    return image_model


def build_loader(
    settings: Settings, data: DataSettings, parts: Parts, device: torch.device
) -> Loader:
    """This rank's micro-batches, of shards or of the small world rendered on demand."""
    tokenize = None if parts.text_encoder is None else parts.text_encoder.tokenize
    place = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "device": device}
    if counts := settings.rendered_samples():
        from gentron_train.small_world.on_demand import rendering_loader

        return rendering_loader(data, counts, settings.vae, tokenize, **place)
    patch = parts.transformer.config.patch_size
    return make_loader(data, settings.vae, tokenize, patch=patch, **place)


def load_text_encoder(settings: Settings, config: GenTronConfig, dtype: torch.dtype) -> TextEncoder:
    """The text encoders that a model reads; ValueError where the settings do not name one, or one
    that does not fit."""
    sources = settings.text_sources(config.encoders)
    if missing := [name for name in config.encoders if name not in sources]:
        raise ValueError(
            f"the model needs its text encoders, no {' and no '.join(missing)} found: "
            "--clip, --t5, --text or a whole pipeline as --init"
        )
    encoder = TextEncoder.from_pretrained(**sources, dtype=dtype)
    encoder.check_widths(config)
    return encoder


def objective_engine(
    parts: Parts, settings: Settings, device: torch.device, resharded: bool
) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine of what a run trains; its fp32 masters are not rounded, whatever the
    parameters are exchanged in."""
    objective = Objective(
        parts.transformer,
        parts.text_encoder if parts.train_text else None,
        NoiseSchedule.from_config(SCHEDULER_CONFIG).to(device),
        DTYPES[settings.dtype],
        *(settings.max_loss_weight, settings.min_snr_gamma),
    ).train()
    weights = {}
    if rounded := settings.parameters == "bf16":
        weights = {
            name: parameter.detach().clone()
            for name, parameter in objective.named_parameters()
            if not hasattr(parameter, "ds_id")  # not ZeRO-3's yet
        }
    objective.to(device, DTYPES[settings.parameters])
    engine = zero_engine(objective, settings, device, resharded)
    if rounded:
        restore_masters(objective, [("", weights)])
        if parts.source is not None:
            restore_masters(objective.transformer, parts.source())
    return engine


def zero_engine(
    objective: Objective, settings: Settings, device: torch.device, resharded: bool = False
) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine of an objective on `device`, with AdamW; `gather_persistent` comes
    before every forward pass."""
    parameters = parameter_count(objective.config)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=torch.optim.AdamW(
            objective.parameters(), lr=settings.lr, weight_decay=0.0, fused=True
        ),
        config=deepspeed_config(settings, parameters, device, resharded),
    )
    if parameters <= WHOLE_MODEL:
        # What is never shared out between steps needs no hook that fetches and releases it.
        engine.optimizer.parameter_offload._remove_module_hooks()
    return engine


def deepspeed_config(
    settings: Settings, parameters: int, device: torch.device, resharded: bool = False
) -> dict:
    """DeepSpeed's configuration: ZeRO stage 3; small models stay gathered between uses.

    resharded: the checkpoint that will be loaded was written by another number of ranks.
    """
    zero = {"stage": 3}
    if device.type == "cpu":
        zero |= {"reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 1_000_000}
        zero["stage3_param_persistence_threshold"] = 10_000
    else:
        zero["overlap_comm"] = True
    if parameters <= WHOLE_MODEL:
        zero["stage3_param_persistence_threshold"] = WHOLE_MODEL
        zero["memory_efficient_linear"] = False
    config = {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
    if settings.parameters == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if resharded:
        config["checkpoint"] = {"load_universal": True}
    return config


def gather_persistent(engine: deepspeed.DeepSpeedEngine) -> None:
    """Gather what stays whole between steps, where a load or a skipped step took it apart."""
    parameters = engine.optimizer.persistent_parameters
    if parameters and parameters[0].ds_status == ZeroParamStatus.NOT_AVAILABLE:
        parameters[0].all_gather(parameters)
