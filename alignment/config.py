"""The names of before for `alignment.settings`; they go with the next release."""

from alignment.settings.data import DataConfig, SourceConfig
from alignment.settings.load import check_config, load_config
from alignment.settings.model import LoraConfig, ModelConfig
from alignment.settings.plugins import AlgorithmConfig, ScorerConfig
from alignment.settings.run import RunConfig
from alignment.settings.section import Section

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "RunConfig",
    "ScorerConfig",
    "Section",
    "SourceConfig",
    "check_config",
    "load_config",
]
