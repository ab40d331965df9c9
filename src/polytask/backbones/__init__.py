"""Frozen pretrained models: loading, fingerprints, sites, heads, precision."""

from polytask.backbones.backbone import Backbone, Batch, load
from polytask.backbones.site import Part, Site

__all__ = ["Backbone", "Batch", "Part", "Site", "load"]
