"""`Measurement`: how long one op or run really took, plain data whatever measured it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """Samples of one op or one run.

    ``subject`` names what was measured, ``shape`` its size, ``fingerprint`` the machine and
    ``source`` who measured: a command of this project, or a published file.
    """

    subject: str
    shape: Mapping[str, Any]
    samples_s: tuple[float, ...]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def median_s(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples_s)

    @property
    def quietest_s(self) -> float:
        """Smallest sample: other work on the machine only ever adds time."""
        return min(self.samples_s)

    @property
    def spread(self) -> float:
        """Range of the middle half of the samples over their median; of all, if there are few."""
        if len(self.samples_s) < 4:
            return (max(self.samples_s) - min(self.samples_s)) / self.median_s
        low, _, high = statistics.quantiles(self.samples_s, n=4)
        return (high - low) / self.median_s

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as plain data."""
        return {
            "subject": self.subject,
            "shape": dict(self.shape),
            "samples_s": list(self.samples_s),
            "median_s": self.median_s,
            "spread": self.spread,
            "fingerprint": dict(self.fingerprint),
            "source": self.source,
        }
