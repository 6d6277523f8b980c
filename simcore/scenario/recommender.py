"""A table [model] of kind "recommender", and which class reads a raw table [model]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from simcore.recommendation import Recommender
from simcore.scenario.fields import Table, Text, Width, key_of
from simcore.scenario.model import ModelTable

Widths = Annotated[tuple[Width, ...], Field(max_length=100)]


class RecommenderTable(Table):
    """A recommendation model: embedding tables, a dense network below and one above."""

    kind: Literal["recommender"] = key_of("A recommendation model, not a transformer.")
    name: Text | None = key_of("A label.", None)
    tables: Width = key_of("Embedding tables; every sample reads one row of each.", unit="tables")
    rows: Width = key_of("Rows of a table.", unit="rows")
    dim: Width = key_of("Width of a row.", unit="elements")
    features: Width = key_of("Dense features of a sample.", unit="elements")
    below: Widths = key_of(
        "Widths of the hidden layers that the dense features pass; one of width dim follows.",
        (),
        unit="elements",
    )
    above: Widths = key_of(
        "Widths of the hidden layers after the dot products; one of width 2 follows.",
        (),
        unit="elements",
    )

    def recommender(self) -> Recommender:
        """Return the network's numbers."""
        values = {key: getattr(self, key) for key in type(self).model_fields if key != "kind"}
        return Recommender(**{**values, "name": self.name or "recommender"})


MODEL_TABLES: dict[str, type[Table]] = {"network": ModelTable, "recommender": RecommenderTable}


def model_tag(raw: Any) -> str:
    """Return which of `MODEL_TABLES` a raw or made table [model] is of: kind marks the other."""
    if isinstance(raw, BaseModel):
        return "recommender" if isinstance(raw, RecommenderTable) else "network"
    return "recommender" if isinstance(raw, Mapping) and "kind" in raw else "network"
