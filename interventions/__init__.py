"""Interventions: methods that change what heads do, one file each; see `headscope.interventions.base` for what they have in common.

`REGISTRY` maps the name that stands in JSON to the class. It is filled by explicit imports, and refuses a name twice.
"""

from headscope.interventions.base import REGISTRY, Intervention, from_json, heads_of
from headscope.interventions.head_mask import HeadMask

__all__ = ["REGISTRY", "HeadMask", "Intervention", "from_json", "heads_of"]
