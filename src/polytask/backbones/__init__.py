"""Frozen pretrained models: loading, fingerprints, sites, heads, precision."""

from polytask.backbones.backbone import Backbone
from polytask.backbones.batch import Batch
from polytask.backbones.loading import load
from polytask.backbones.site import Part, Site

__all__ = ["Backbone", "Batch", "Part", "Site", "load"]
