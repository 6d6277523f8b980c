"""The table [faults]: what goes wrong in a long training run, and how its state is saved."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from simcore.faults import HOUR_S, Cause, Faults, failure_records, part_rates, system_rate_per_s
from simcore.scenario.fields import Seconds, Table, key_of, refusal
from simcore.scenario.words import wrong_choice
from simcore.stragglers import Slow

Share = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
Factor = Annotated[float, Strict(), Field(ge=1, le=1e6, allow_inf_nan=False)]
Hours = Annotated[float, Strict(), Field(gt=0, le=1e12, allow_inf_nan=False)]
Wait = Annotated[float, Strict(), Field(ge=0, le=1e6, allow_inf_nan=False)]
Often = Annotated[float, Strict(), Field(ge=0, le=1e6, allow_inf_nan=False)]


def _known_record(name: str) -> str:
    records = failure_records()
    if name in records:
        return name
    raise refusal(wrong_choice(("faults", "rates"), name, records))


Record = Annotated[str, Strict(), AfterValidator(_known_record)]


class FaultsTable(Table):
    """What goes wrong in a training run of so many tokens or steps, and how its state is saved."""

    mtbf_hours: Hours | None = key_of(
        "Mean time between failures of one device, whatever the cause; or rates.",
        None,
        unit="hours",
    )
    rates: Record | None = key_of(
        "A published failure record in place of mtbf_hours: llama-3.1-405b, rsc-1 or rsc-2.", None
    )
    detect_s: Wait = key_of("From a failure until it is noticed.", 0.0, unit="seconds")
    restart_s: Wait = key_of(
        "From there until the state is loaded and work goes on.", unit="seconds"
    )
    checkpoint_s: Wait = key_of("To write the state where a failure spares it.", unit="seconds")
    checkpoint_stall_s: Wait | None = key_of(
        "Of these, the seconds in which the run stands still; by default all of them.",
        None,
        unit="seconds",
    )
    checkpoint_interval_s: Literal["optimal"] | Seconds = key_of(
        'Work between checkpoints in seconds, or "optimal".', "optimal", unit="seconds"
    )
    straggler_fraction: Share = key_of("Chance that a device is slow in a step.", 0.0)
    straggler_factor: Factor = key_of("How many times longer its compute then takes.", 1.0)
    slow_link_fraction: Share = key_of("Chance that a device's link is slow in a step.", 0.0)
    slow_link_factor: Factor = key_of(
        "How many times longer communication that nothing hides then takes.", 1.0
    )
    preemptions_per_day: Often = key_of(
        "Times that the cluster is taken away after a warning long enough to save everything.", 0.0
    )
    preemption_s: Wait = key_of("From then until work goes on.", 0.0, unit="seconds")

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if self.mtbf_hours is None and self.rates is None:
            raise refusal("needs a failure rate: give mtbf_hours, or rates.")
        if self.mtbf_hours is not None and self.rates is not None:
            raise refusal("and mtbf_hours exclude each other: keep one of them.", "rates")
        if self.stall_s > self.checkpoint_s:
            raise refusal(
                f"= {self.stall_s:g} exceeds checkpoint_s = {self.checkpoint_s:g}: lower it.",
                "checkpoint_stall_s",
            )
        least = max(0.0, self.checkpoint_s - 2 * self.stall_s)
        if self.interval_s is not None and self.interval_s < least:
            raise refusal(
                f"= {self.interval_s:g} begins a checkpoint before the last one is written: "
                f"it must be at least {least:g}.",
                "checkpoint_interval_s",
            )
        return self

    @property
    def stall_s(self) -> float:
        """Seconds that a checkpoint halts the run."""
        stall = self.checkpoint_stall_s
        return self.checkpoint_s if stall is None else stall

    @property
    def interval_s(self) -> float | None:
        """Work between checkpoints, or None for the best."""
        every = self.checkpoint_interval_s
        return None if isinstance(every, str) else every

    def faults(self, devices: int, nodes: int) -> Faults:
        """Return what interrupts a job on ``devices`` in ``nodes``."""
        if self.rates is not None:
            rates = part_rates(self.rates)
        else:
            assert self.mtbf_hours is not None
            rates = {"device": 1 / (self.mtbf_hours * HOUR_S)}
        down = self.detect_s + self.restart_s
        causes = tuple(
            Cause(part, system_rate_per_s({part: rate}, devices, nodes), down)
            for part, rate in rates.items()
        )
        return Faults(
            causes,
            self.stall_s,
            self.checkpoint_s - self.stall_s,
            self.interval_s,
            self.preemptions_per_day / (24 * HOUR_S),
            self.preemption_s,
        )

    def slow(self) -> Slow:
        """Return how ranks and links are slow."""
        return Slow(
            self.straggler_fraction,
            self.straggler_factor,
            self.slow_link_fraction,
            self.slow_link_factor,
        )
