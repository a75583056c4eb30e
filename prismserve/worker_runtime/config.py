"""Configuration of one worker process."""

from __future__ import annotations

from pydantic import Field

from prismserve.core.config import FrozenConfig, PositiveInt, PositiveSeconds
from prismserve.core.types import Role
from prismserve.engine.config import EngineConfig
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.tiers.config import TierConfig


class WorkerConfig(FrozenConfig):
    """Everything a worker process is told; composed by the cluster's settings."""

    role: Role
    model_directory: str
    dtype: str = Field(default="auto", description="auto, float32 or bfloat16")
    device: str = Field(default="cpu", description="torch device, for example cpu or cuda")
    threads: PositiveInt | None = Field(
        default=1,
        description="threads that PyTorch and the native kernels compute with; none: cores visible to the process "
        "divided by ``node_workers``",
    )
    node_workers: PositiveInt = Field(default=1, description="workers that may share this machine, this one included")
    host: str = Field(default="127.0.0.1", description="address the data-plane server binds to and is reached at")
    cluster_id: str
    cluster_secret: str = Field(repr=False)
    index_url: str = Field(repr=False)
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    tiers: TierConfig = TierConfig()
    index: IndexConfig = IndexConfig()
    stats_interval_s: PositiveSeconds = 0.5
    peer_timeout_s: PositiveSeconds = 10.0
    kv_wait_timeout_s: PositiveSeconds = Field(
        default=60.0, description="longest wait of a decode worker for the KV of one request"
    )
    drain_timeout_s: PositiveSeconds = 30.0
