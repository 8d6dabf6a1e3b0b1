"""Every objective by name, those of installed plugins included."""

from __future__ import annotations

from reweigh.weighting.registry import Registry

from .objective import Objective

registry: Registry[Objective] = Registry("objective", "reweigh.objectives", Objective)
method = registry.method
available = registry.available
create = registry.create
