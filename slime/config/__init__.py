"""Every knob of slime: one dataclass a group, one documented line a knob.

`SlimeConfig` is the whole recipe. A file of this package holds one group; the string below a field is its documentation
(`slime train --help` and the docs print it). `checks.py` holds what one field cannot say alone.
"""

from dataclasses import dataclass, field

from slime.config.algorithm import AlgorithmConfig
from slime.config.cluster import ClusterConfig, RoleConfig
from slime.config.critic import CriticConfig
from slime.config.data import DataConfig, DataFile, EvalSet
from slime.config.model import ModelConfig
from slime.config.observe import ObserveConfig
from slime.config.reward import RewardConfig
from slime.config.rollout import RolloutConfig
from slime.config.run import RunConfig
from slime.config.sync import SyncConfig
from slime.config.trainer import TrainerConfig

__all__ = [
    "AlgorithmConfig",
    "ClusterConfig",
    "CriticConfig",
    "DataConfig",
    "DataFile",
    "EvalSet",
    "ModelConfig",
    "ObserveConfig",
    "RewardConfig",
    "RoleConfig",
    "RolloutConfig",
    "RunConfig",
    "SlimeConfig",
    "SyncConfig",
    "TrainerConfig",
]


@dataclass
class SlimeConfig:
    """A recipe."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
