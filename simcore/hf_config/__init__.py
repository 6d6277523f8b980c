"""Read a Hugging Face ``config.json`` into a `ModelSpec`, with nothing but the standard library.

`FAMILIES` maps a config's ``model_type`` to the function that reads it. Each returns the
`ModelSpec` fields of its architecture as `transformers` builds it; defaults are those of its
config class, for published configs leave keys out.
"""

from __future__ import annotations

from simcore.hf_config.reading import FAMILIES, from_hf_config, load_hf_config

__all__ = ["FAMILIES", "from_hf_config", "load_hf_config"]
