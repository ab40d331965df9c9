"""What was learned: the Adapter value, its format on disk, and interchange with Hugging Face PEFT."""

from polytask.adapters.adapter import Adapter, BackboneCard, Card, HeadCard, Lineage, ScoreCard, TermCard, TextCard
from polytask.adapters.peft import export_peft, import_peft
from polytask.adapters.store import load, save

__all__ = [
    "Adapter",
    "BackboneCard",
    "Card",
    "HeadCard",
    "Lineage",
    "ScoreCard",
    "TermCard",
    "TextCard",
    "export_peft",
    "import_peft",
    "load",
    "save",
]
