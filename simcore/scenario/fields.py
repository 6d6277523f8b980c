"""Kinds of values that a scenario's keys take, and the base of its tables."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from simcore.scenario.words import shown_as, wrong_choice
from simcore.schedules import SCHEDULES

MAX_FILE_BYTES = 10_000_000
StorageDtype = Literal["bf16", "fp16", "fp32", "fp8", "int8", "int4", "nvfp4", "mxfp4"]
AnyDtype = Literal[StorageDtype, "fp64", "tf32", "int32", "int64"]
OpDtype = Literal[AnyDtype, "fp8_block", "int4_wo", "int8_wo"]
TrainMetric = Literal[
    "step_s",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "mfu",
    "hfu",
    "peak_memory_bytes",
    "bubble_fraction",
    "exposed_communication_fraction",
]
GenerateMetric = Literal["seconds", "tokens_per_s", "tpot_s", "peak_memory_bytes"]
Metric = Literal[TrainMetric, GenerateMetric]


def schedule_names() -> tuple[str, ...]:
    """Return the names of the pipeline schedules that this version knows."""
    return tuple(SCHEDULES)


def refusal(text: str, key: str = "") -> PydanticCustomError:
    """Return the error that continues a sentence opened by the place of ``key``."""
    return PydanticCustomError("scenario", "{text}", {"text": text, "key": key})


def _known_schedule(name: str) -> str:
    names = schedule_names()
    if name in names or (name.endswith(".csv") and name.isprintable()):
        return name
    raise refusal(wrong_choice(("parallel", "schedule"), name, names))


def _plain_text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise refusal(f"{shown_as(text)} is not a name: give printable text.")
    return text


Degree = Annotated[int, Strict(), Field(ge=1, le=10**6)]
Layers = Annotated[int, Strict(), Field(ge=1, le=10**4)]
Width = Annotated[int, Strict(), Field(ge=1, le=10**7)]
OptionalWidth = Annotated[int, Strict(), Field(ge=0, le=10**7)]
OptionalLayers = Annotated[int, Strict(), Field(ge=0, le=10**4)]
Library = Annotated[str, Strict(), Field(min_length=1, max_length=40)]
WindowLength = Annotated[int, Strict(), Field(ge=0, le=10**9)]
Tokens = Annotated[int, Strict(), Field(ge=1, le=10**9)]
RunTokens = Annotated[int, Strict(), Field(ge=1, le=10**17)]
Bytes = Annotated[float, Strict(), Field(gt=0, le=1e18, allow_inf_nan=False)]
Seconds = Annotated[float, Strict(), Field(gt=0, le=1e6, allow_inf_nan=False)]
Size = Annotated[float, Strict(), Field(gt=0, le=1e12, allow_inf_nan=False)]
Capacity = Annotated[float, Strict(), Field(gt=0, le=1e6, allow_inf_nan=False)]
Exponent = Annotated[float, Strict(), Field(gt=0, le=100, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(max_length=500), AfterValidator(_plain_text)]
Schedule = Annotated[str, Strict(), AfterValidator(_known_schedule)]
StageLayers = Annotated[tuple[Layers, ...], Field(max_length=10**4)]
RepeatedLayers = Annotated[
    tuple[OptionalLayers, ...],
    BeforeValidator(lambda value: (value,) if type(value) is int else value),
    Field(max_length=10**4),
]
Documents = Annotated[tuple[Tokens, ...], Field(max_length=10**6)]
Module = Literal["attention", "norms", "activation", "gathers"]
CodecName = Literal["none", "int8", "fp8", "dynamic8"]
Mixer = Literal["mha", "gqa", "mqa", "mla", "sliding", "space", "time", "linear", "ssm"]


def key_of(meaning: str, default: Any = ..., *, unit: str = "") -> Any:
    """Return a field whose meaning and unit are published in the schema."""
    extra: dict[str, Any] = {"unit": unit} if unit else {}
    return Field(default, description=meaning, json_schema_extra=extra)


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def library_name(name: str) -> str:
    return "" if name == "default" else name
